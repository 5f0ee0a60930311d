"""Margin losses: statistics, random margins, faces that do not count, and how they are made by name."""

from collections.abc import Callable
from dataclasses import asdict
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from torch import Tensor

from config import LossConfig
from loss_formulas import PUBLISHED, STEP, dense_loss, every_case, every_loss, faces, gradients, make, reference
from models.losses import LOSSES, create_loss
from models.losses.batch_statistics import move_towards_


@every_case
def test_faces_that_do_not_count_influence_nothing(name: str, options: dict[str, Any]) -> None:
    """Whatever stands in their places: logits, penalty, statistics and gradients of the others stay the same."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.tensor([True, False, True, True, False, True, False, True])
    seen = []
    for junk in (0.0, -1.0, 1.0, 0.37):
        cosine = torch.rand(8, generator=generator.manual_seed(1), dtype=torch.float64) * 2 - 1
        norm = torch.rand(8, generator=generator, dtype=torch.float64) * 100 + 5
        cosine = cosine.where(counted, junk).requires_grad_()
        norm = norm.where(counted, abs(junk) * 1e6).requires_grad_()
        loss = make(name, **options).train()
        targets = loss.targets(cosine, norm, counted, STEP)
        total = torch.where(counted, targets.logits, 0).sum() + (0 if targets.penalty is None else targets.penalty)
        slopes = torch.autograd.grad(total, (cosine, norm), allow_unused=True)
        assert all(slope is None or (slope[~counted] == 0).all() for slope in slopes)
        assert torch.isfinite(targets.logits).all()
        seen.append([targets.logits[counted], total, *(s[counted] for s in slopes if s is not None), *loss.buffers()])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


Running = Callable[[dict[str, float], np.ndarray, np.ndarray], None]


def _curricular(state: dict[str, float], cosines: np.ndarray, norms: np.ndarray) -> None:
    del norms
    if len(cosines):
        state["t"] = 0.99 * state["t"] + 0.01 * float(np.mean(cosines))


def _ada(state: dict[str, float], cosines: np.ndarray, norms: np.ndarray) -> None:
    del cosines
    if len(norms):
        state["norm_mean"] = 0.99 * state["norm_mean"] + 0.01 * float(np.mean(norms))
    if len(norms) > 1:
        state["norm_std"] = 0.99 * state["norm_std"] + 0.01 * float(np.std(norms, ddof=1))


@pytest.mark.parametrize(
    ("name", "start", "running"),
    [
        ("curricularface", {"t": 0.0}, _curricular),
        ("adaface", {"norm_mean": 20.0, "norm_std": 100.0}, _ada),
    ],
)
def test_statistics(name: str, start: dict[str, float], running: Running) -> None:
    """They start as published, run over the faces that count of each training batch, this batch included, and nothing
    else moves them: no batch without faces, no evaluation."""
    rng = np.random.default_rng(0)
    loss, state = create_loss(name).double(), dict(start)
    assert {key: buffer.item() for key, buffer in loss.named_buffers()} == start
    for step in range(60):
        cosine, norm = rng.uniform(-1, 1, 8), rng.uniform(5, 60, 8)
        counted = rng.random(8) < (0.7, 0.0, 0.15)[step % 3]
        inputs = [torch.from_numpy(x) for x in (cosine, norm, counted)]
        loss.eval().targets(*inputs, step)
        loss.train().targets(*inputs, step)
        running(state, cosine[counted], norm[counted])
        assert {key: buffer.item() for key, buffer in loss.named_buffers()} == pytest.approx(state, rel=1e-12)
    assert all(abs(state[key] - start[key]) > 1e-3 for key in start)


def test_statistics_are_used_with_the_batch_in_them() -> None:
    """As in the authors' code: t and the lengths of a step are those after its update."""
    embeddings, centres, labels = faces()
    for name in ("curricularface", "adaface"):
        loss = make(name).train()
        value, _ = dense_loss(loss, embeddings, centres, labels)
        state = {key: buffer.item() for key, buffer in loss.named_buffers()}
        assert state != {key: buffer.item() for key, buffer in make(name).named_buffers()}
        expected = reference(name, {}, embeddings, centres, labels, state)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@every_loss
def test_state_is_saved_and_restored(name: str) -> None:
    """A resumed loss goes on with its statistics; the losses without any have no state at all."""
    embeddings, centres, labels = faces()
    loss = create_loss(name).double()
    for _ in range(3):
        dense_loss(loss, embeddings, centres, labels)
    saved = loss.state_dict()
    assert set(saved) == {"curricularface": {"t"}, "adaface": {"norm_mean", "norm_std"}}.get(name, set())
    restored = create_loss(name).double()
    restored.load_state_dict(saved)
    values = [dense_loss(one, embeddings, centres, labels)[0].item() for one in (loss, restored)]
    assert values[0] == values[1]
    fresh = dense_loss(create_loss(name).double(), embeddings, centres, labels)[0].item()
    assert (fresh != values[0]) == bool(saved)


@every_loss
def test_forward_twice_backward_twice(name: str) -> None:
    """Statistics that move on do not spoil the backward pass of the batch before (gradient accumulation)."""
    embeddings, centres, labels = (x.requires_grad_(x.is_floating_point()) for x in faces())
    loss = make(name).train()
    first, second = (dense_loss(loss, scale * embeddings, centres, labels)[0] for scale in (1.0, 0.5))
    alone = gradients(dense_loss(make(name).train(), embeddings, centres, labels)[0], embeddings)[0]
    torch.testing.assert_close(gradients(first, embeddings)[0], alone, rtol=0, atol=0)
    assert torch.isfinite(gradients(second, embeddings)[0]).all()


@every_case
def test_nothing_waits_for_the_device(name: str, options: dict[str, Any]) -> None:
    """On tensors without values, anything that needs one on the host is an error."""
    loss = create_loss(name, **options, filter_above=0.3).to("meta").train()
    cosine = torch.empty(8, device="meta", requires_grad=True)
    targets = loss.targets(cosine, cosine.abs(), cosine.bool(), STEP)
    value, _ = loss.others(torch.empty(8, 5, device="meta", requires_grad=True), targets.bar)
    (value.sum() + targets.logits.sum()).backward()
    assert cosine.grad is not None


def margins_of(name: str, step: int, count: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """The margins that the faces of a batch have, all at 90 degrees."""
    cosine = torch.zeros(count, dtype=dtype)
    values = create_loss(name, **options).targets(cosine, cosine, torch.ones(count, dtype=torch.bool), step)
    margins = -values.logits / 64
    return margins.asin() if name == "elastic_arc" else margins


@pytest.mark.parametrize(("name", "mean"), [("elastic_arc", 0.5), ("elastic_cos", 0.35)])
def test_elastic_margins(name: str, mean: float) -> None:
    """Normal with the published mean and deviation; the same for the same seed and step, others for others."""
    margins = margins_of(name, 5, 20_000)
    assert margins.mean().item() == pytest.approx(mean, abs=0.002)
    assert margins.std().item() == pytest.approx(0.05, rel=0.03)
    assert ((margins - mean).abs() < 0.05).double().mean().item() == pytest.approx(0.683, abs=0.015)
    torch.testing.assert_close(margins_of(name, 5, 20_000), margins, rtol=0, atol=0)
    torch.testing.assert_close(margins_of(name, 5, 100), margins[:100], rtol=0, atol=0)
    torch.testing.assert_close(margins_of(name, 5, 100, torch.float32), margins[:100].float(), rtol=0, atol=1e-6)
    for step, seed in ((6, 0), (5, 1), (0, 5)):
        assert (margins_of(name, step, 100, seed=seed) != margins[:100]).all()


@pytest.mark.parametrize("name", ["elastic_arc", "elastic_cos"])
def test_elastic_plus_gives_the_largest_margin_to_the_farthest_face(name: str) -> None:
    """The margins drawn for the faces that count, by rank of their angles; equal angles or none counted are no harm."""
    loss = create_loss(name, plus=True)
    plain = create_loss(name, std=loss.std)
    cosine = torch.tensor([0.3, 9.0, -0.2, 0.9, -9.0, 0.1, 0.1])
    counted = torch.tensor([True, False, True, True, False, True, True])
    drawn = plain.margins(cosine, counted, 3)[counted]
    given = loss.margins(cosine, counted, 3)[counted]
    assert not torch.equal(drawn, given)
    assert sorted(drawn.tolist()) == sorted(given.tolist())
    by_angle = given[cosine[counted].argsort(descending=True, stable=True)]
    assert by_angle.tolist() == sorted(given.tolist())
    assert torch.isfinite(loss.margins(cosine, counted & False, 3)).all()


def test_elastic_deviations() -> None:
    """As published with and without plus; a given one wins, 0 means as published."""
    found = [create_loss(name, plus=plus).std for name in ("elastic_arc", "elastic_cos") for plus in (False, True)]
    assert found == [0.05, 0.0175, 0.05, 0.025]
    assert create_loss("elastic_arc", std=0.1, plus=True).std == 0.1
    assert create_loss("elastic_cos", std=0.0).std == 0.05


@every_loss
def test_published_defaults(name: str) -> None:
    """Without options, and with None for any of them, a loss is the published one; the defaults of the settings are
    the same, 0 standing for None."""
    expected = PUBLISHED[name]
    settings = {
        key: value or None if key in ("margin", "scale") else value for key, value in asdict(LossConfig()).items()
    }
    del settings["name"]
    for loss in (create_loss(name), create_loss(name, **dict.fromkeys(expected)), create_loss(name, **settings)):
        assert type(loss) is LOSSES[name]
        assert {key: getattr(loss, key) for key in expected} == expected
        assert loss.filter_above == 0


@every_loss
def test_options_reach_the_loss(name: str) -> None:
    """Each option of a loss arrives in it; those of other losses are ignored."""
    options = {key: value / 2 + 0.25 for options in PUBLISHED.values() for key, value in options.items()}
    loss = create_loss(name, **options, filter_above=0.5)
    assert {key: getattr(loss, key) for key in PUBLISHED[name]} == {key: options[key] for key in PUBLISHED[name]}
    assert loss.filter_above == 0.5


def test_names() -> None:
    """The setting `loss.name` offers every loss there is; another name is an error that lists them."""
    assert set(get_args(get_type_hints(LossConfig)["name"])) == set(LOSSES) == set(PUBLISHED)
    with pytest.raises(ValueError, match=r"loss\.name: there is no loss 'arc'; there are softmax, normface"):
        create_loss("arc")


@pytest.mark.parametrize("name", ["adaface", "curricularface"])
def test_losses_with_statistics_know_of_parts(name: str) -> None:
    """The same faces, in one pass or again in each of three, move every statistic as far."""
    norm, cosine = torch.tensor([5.0, 9.0, 30.0]), torch.tensor([0.3, 0.1, 0.9])
    found = []
    for parts in (1, 3):
        loss = create_loss(name)
        loss.parts = parts
        for loss.part in range(parts):
            loss.targets(cosine, norm, torch.ones(3, dtype=torch.bool), 0)
        found.append(list(loss.buffers()))
    torch.testing.assert_close(*found)
    assert found[0][0] != next(create_loss(name).buffers())


def test_parts_of_a_batch_move_statistics_as_the_batch_does() -> None:
    """A batch that takes four passes: four equal values move a running mean as far as one does."""
    whole, by_parts = torch.tensor(1.0), torch.tensor(1.0)
    move_towards_(whole, torch.tensor(3.0), 0.01, 1, torch.tensor(True))
    for _ in range(4):
        move_towards_(by_parts, torch.tensor(3.0), 0.01, 4, torch.tensor(True))
    assert by_parts.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["elastic_arc", "elastic_cos"])
def test_each_part_of_a_batch_draws_margins_of_its_own(name: str) -> None:
    """Two passes of one step: other margins in each, the same again when the step is repeated."""
    loss = create_loss(name)
    cosine, counted = torch.zeros(8), torch.ones(8, dtype=torch.bool)
    draws = []
    for loss.part in (0, 1, 0):
        draws.append(loss.margins(cosine, counted, 5))
    assert torch.equal(draws[0], draws[2])
    assert not torch.isclose(draws[0], draws[1]).any()
