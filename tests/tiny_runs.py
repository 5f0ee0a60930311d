"""Settings of training runs that take a second, and what is in their folders."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from config import Config
from utils.settings import build
from utils.training.run_folders import CHECKPOINTS
from utils.training.saved_checkpoints import BACKBONE, checkpoint_folders


def configure(tiny_set: Path, runs: Path, **settings: object) -> Config:
    """Training of the demo net on 32x32 faces: 6 steps an epoch, 2 epochs. `settings`: others, as `section__field`."""
    base = {
        "common.device": "cpu",
        "common.workers": 0,
        "common.runs": str(runs),
        "data.root": (str(tiny_set),),
        "data.image_size": 32,
        "model.network": "demo",
        "model.embedding_size": 16,
        "loss.scale": 16.0,
        "train.name": "a",
        "train.batch_size": 8,
        "train.epochs": 2,
        "train.lr": 0.05,
        "train.log_every": 2,
    }
    return build(Config, {**base, **{name.replace("__", "."): value for name, value in settings.items()}})


def checkpoints(run: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return checkpoint_folders(run / CHECKPOINTS)


def weights(run: Path, file: str | None = None) -> dict[str, torch.Tensor]:
    """The tensors in a file of the run, or all of its newest checkpoint, the network's as `network.*`."""
    if file is not None:
        return load_file(run / file)
    newest = checkpoints(run)[-1]
    network = {f"network.{name}": value for name, value in load_file(newest / BACKBONE).items()}
    parts = [load_file(part) for part in newest.glob("*.safetensors") if part.name != BACKBONE]
    return network | {name: value for part in parts for name, value in part.items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
