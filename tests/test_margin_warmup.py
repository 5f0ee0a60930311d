"""A margin that grows over the first epochs: as the loss with that margin at each step, on every head and in a run."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from models.heads import BlockwiseHead, DenseHead, Head, RowSGD
from models.losses import LOSSES, MarginLoss, Targets, create_loss
from tiny_runs import configure, same, weights
from train import train
from utils.training import build_parts
from utils.training.metrics import read_metrics

STEPS = 8


def at(share: float) -> dict[str, dict[str, Any]]:
    """{loss: its margin, no longer than `share` of the published one}; factors on the angle as far from 1."""
    return {
        "cosface": {"margin": 0.35 * share},
        "arcface": {"margin": 0.5 * share},
        "combined": {"m1": 1 - 0.1 * share, "m2": 0.4 * share, "m3": 0.15 * share},
        "curricularface": {"margin": 0.5 * share},
        "magface": {"margin_low": 0.45 * share, "margin_high": 0.8 * share},
        "adaface": {"margin": 0.4 * share},
        "elastic_arc": {"margin": 0.5 * share, "std": 0.05 * share},
        "elastic_cos": {"margin": 0.35 * share, "std": 0.05 * share},
        "sphereface_r": {"margin": 1 + 0.5 * share},
    }


def of_faces(loss: MarginLoss, step: int) -> tuple[Targets, Tensor]:
    """Targets of a batch in float64, and the gradient of their logits."""
    loss = loss.double().eval()
    cosine = torch.linspace(-0.97, 0.97, 24, dtype=torch.float64).requires_grad_()
    norm = torch.linspace(5, 130, 24, dtype=torch.float64)[torch.randperm(24, generator=torch.manual_seed(2))]
    targets = loss.targets(cosine, norm, torch.ones(24, dtype=torch.bool), step)
    return targets, torch.autograd.grad(targets.logits.sum(), cosine)[0]


@pytest.mark.parametrize("name", at(1))
@pytest.mark.parametrize(("step", "share"), [(2, 0.25), (4, 0.5), (7, 0.875), (8, 1), (1000, 1)])
def test_has_the_margin_of_its_step(name: str, step: int, share: float) -> None:
    """Logits, their gradient, and what negatives are compared with are those of the loss with a part of the margin."""
    growing = create_loss(name, **at(1)[name], margin_warmup=STEPS)
    torch.testing.assert_close(
        of_faces(growing, step), of_faces(create_loss(name, **at(share)[name]), step), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("name", at(1))
def test_begins_without_a_margin(name: str) -> None:
    """At step 0 every loss is the softmax over cosines; MagFace keeps its penalty."""
    (targets, slope), (plain, plain_slope) = (
        of_faces(loss, 0) for loss in (create_loss(name, margin_warmup=STEPS), create_loss("normface"))
    )
    scale = targets.scale / plain.scale
    torch.testing.assert_close(targets.logits, scale * plain.logits, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, scale * plain_slope, rtol=1e-9, atol=1e-9)
    assert (targets.penalty is not None) == (name == "magface")


@pytest.mark.parametrize("name", sorted(LOSSES.keys() - at(1).keys()))
def test_others_stay_as_they_are(name: str) -> None:
    """Losses without a margin, and SphereFace, whose annealing is its own: as without a warm-up."""
    torch.testing.assert_close(
        of_faces(create_loss(name, margin_warmup=STEPS), 3), of_faces(create_loss(name), 3), rtol=0, atol=0
    )


@pytest.mark.parametrize("head_of", [DenseHead, BlockwiseHead])
def test_heads_say_which_step_it_is(head_of: type[Head]) -> None:
    """Whatever the engine, a step's loss is that of the margin at this step."""
    embeddings, labels = torch.randn(6, 8, generator=torch.manual_seed(0)), torch.tensor([0, 3, 5, -1, 4, 3])
    given = {"batch_size": 6, "block": 2} if head_of is BlockwiseHead else {}

    def loss(step: int, **options: Any) -> Tensor:
        head = head_of(create_loss("arcface", **options), 7, 8, optimizer=RowSGD(), **given)
        return head(embeddings, labels, step).loss

    for step, margin in ((1, 0.125), (2, 0.25), (4, 0.5), (5, 0.5)):
        torch.testing.assert_close(loss(step, margin_warmup=4), loss(step, margin=margin))


def test_a_run_begins_without_a_margin_and_ends_with_it(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over epochs, here of six steps: the first step is one without a margin, later ones have more and more of it. A
    run that was stopped in the middle of the growth goes on as if it had not been."""
    heads: list[Head] = []

    def build_head(*given: Any) -> Head:
        heads.append(build_parts.build_head(*given))
        return heads[-1]

    monkeypatch.setattr("train.build_head", build_head)

    def run(name: str, loss: str, epochs: int, **more: Any) -> Path:
        settings = {"loss__name": loss, "train__epochs": epochs, "train__schedule": "constant", "train__log_every": 1}
        return train(configure(tiny_set, tmp_path, train__name=name, **settings, **more))

    def losses(folder: Path) -> list[float]:
        return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]

    growing = run("growing", "arcface", 2, loss__margin_warmup_epochs=1.5)
    assert heads[0].loss.margin_warmup == 9
    plain, full = run("plain", "normface", 2), run("full", "arcface", 2)
    assert losses(growing)[0] == losses(plain)[0] != losses(full)[0]
    for less, more in ((plain, growing), (growing, full)):
        assert losses(less)[1] < losses(more)[1], "a margin makes the loss larger"
    stopped = run("stopped", "arcface", 1, loss__margin_warmup_epochs=1.5)
    resumed = run("", "arcface", 2, loss__margin_warmup_epochs=1.5, train__resume=str(stopped))
    assert same(weights(resumed), weights(growing))
