"""Training runs of networks that draw at random, and of networks from elsewhere."""

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from config import Config
from models import backbones, load_embedder
from models.backbones.vit import VisionTransformer
from tiny_runs import configure
from train import Trainer, train
from utils.checkpoints import BEST
from utils.settings import build, from_json
from utils.training.build_parts import build_network


@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_that_masks_and_drops_goes_on_as_if_uninterrupted(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: bool
) -> None:
    """Which patches are masked and which branches dropped is drawn by the step, so that a resumed run, even one that
    computes its blocks anew, draws the same: its weights are equal to the bit."""
    small = partial(VisionTransformer, 32, 2, mask_ratio=0.3, drop_path=0.3)
    monkeypatch.setitem(backbones.NETWORKS, "small", small)
    whole = train(configure(tiny_set, tmp_path, model__network="small", train__name="whole"))

    saved = Trainer.save

    def save_then_stop(trainer: Trainer, wait: bool) -> None:
        saved(trainer, wait)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "save", save_then_stop)
        with pytest.raises(KeyboardInterrupt):
            train(
                configure(
                    tiny_set,
                    tmp_path,
                    model__network="small",
                    train__name="cut",
                    train__checkpoint_every=8,
                    train__activation_checkpointing=recompute,
                )
            )
    settings = from_json((tmp_path / "cut" / "config.json").read_text())
    cut = train(build(Config, {**settings, "train.resume": str(tmp_path / "cut")}))
    expected, found = load_file(whole / BEST), load_file(cut / BEST)
    assert expected.keys() == found.keys()
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_network_of_timm_trains_and_is_found_again(tiny_set: Path, tmp_path: Path) -> None:
    """From the name in the settings to embeddings of the run's best network."""
    run = train(configure(tiny_set, tmp_path, model__network="timm:resnet10t", train__epochs=1))
    embedder = load_embedder(run, torch.device("cpu"))
    embeddings = embedder.embed(torch.zeros(2, 32, 32, 3, dtype=torch.uint8), mirror=False)
    assert embeddings.shape == (2, 16)
    torch.testing.assert_close(embeddings.norm(dim=1), torch.ones(2))


def test_downloaded_weights_are_for_the_beginning_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that goes on has weights of its own, and one with `train.init` gets others: neither downloads."""
    asked: list[object] = []

    def record(embedding_size: int, image_size: int, *, pretrained: bool = False) -> torch.nn.Module:
        asked.append(pretrained)
        return torch.nn.Linear(1, 1)

    monkeypatch.setitem(backbones.NETWORKS, "recording", record)
    config = build(Config, {"model.network": "recording", "model.pretrained": True})
    build_network(config, torch.device("cpu"))
    build_network(config, torch.device("cpu"), with_init=False)
    assert asked == [True, False]
