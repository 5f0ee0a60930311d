"""Settings of training runs that take a second."""

from pathlib import Path

from config import Config
from utils.settings import build


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
