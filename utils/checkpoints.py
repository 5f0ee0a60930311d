"""The weights that a run leaves for others to use: safetensors, written whole or not at all, never a pickle.

Such a file holds a network's state dict under its own names, and JSON in its metadata: the run's settings, and where
the run stood. Checkpoints to resume from are in utils/training/checkpoint_store.py.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.files import atomic_path
from utils.settings import ConfigError, Settings, from_json

BEST = "best.safetensors"
#: The weights in a folder that `utils.export --format hub` makes.
HUB_WEIGHTS = "model.safetensors"
CONFIG = "config.json"
#: No size of a face or an embedding: a network of that size would take all memory.
TOO_LARGE = 1 << 14


class CheckpointError(ValueError):
    """A file is not the checkpoint, or the weights, that it should be; the message names it."""


@dataclass(frozen=True)
class Progress:
    """The optimizer steps that a run has made, and its best verification accuracy (0..1) so far."""

    step: int
    best_accuracy: float


def save_backbone(path: Path, network: nn.Module, settings: str, progress: Progress) -> None:
    """Write the state dict of `network`; `settings` is the run's configuration as JSON. Raises OSError."""
    with atomic_path(path) as temporary:
        write_safetensors(temporary, network.state_dict(), backbone_metadata(settings, progress))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write `tensors` by name, of any strides, and `metadata`. Raises OSError."""
    path.touch()
    mode = path.stat().st_mode  # save_file makes the file its owner's alone
    try:
        save_file({name: value.contiguous() for name, value in tensors.items()}, path, metadata)
    except SafetensorError as error:  # a full disk, say
        raise OSError(f"{path} cannot be written: {error}") from None
    path.chmod(mode)


def backbone_metadata(settings: str, progress: Progress) -> dict[str, str]:
    """The metadata of a backbone file; `settings` is the run's configuration as JSON."""
    text = {name: repr(value) for name, value in asdict(progress).items()}
    return {"settings": settings, "torch": torch.__version__, **text}


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, settings by `section` and field) of a backbone file. Raises CheckpointError for anything else."""
    tensors, metadata = read_safetensors(path)
    if "settings" not in metadata:
        raise CheckpointError(f"{path} was not written by train.py: it has no settings in it")
    return tensors, json.loads(metadata["settings"])


def read_safetensors(path: Path, metadata_only: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, metadata) of a `.safetensors`; no tensors with `metadata_only`. Raises CheckpointError."""
    try:
        with safe_open(path, "pt") as file:
            names = [] if metadata_only else file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None


def run_settings(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The settings, by section and field, in the metadata of a `.safetensors`; {} if they do not describe a network, as
    those of other projects' files do not.
    """
    try:
        settings = json.loads(metadata.get("settings", "null"))
        name = settings["model"]["network"]
        sizes = settings["model"]["embedding_size"], settings["data"]["image_size"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    good = (
        isinstance(name, str) and len(name) < 100 and all(type(size) is int and 0 < size < TOO_LARGE for size in sizes)
    )
    return settings if good else {}


def newest_run(runs: Path) -> Path:
    """The run folder with the newest best model. Raises CheckpointError when there is none."""
    found = sorted(runs.glob(f"*/{BEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no model is named, and {runs} has no trained one: train one, or give --model")
    return found[-1].parent


def run_of(model: Path) -> Path | None:
    """The folder of the run that `model`, its folder or a file in it, comes from; None for a model from elsewhere, and
    for an exported folder to upload.
    """
    folder = model if model.is_dir() else model.parent
    return folder if settings_beside(folder) and not (folder / HUB_WEIGHTS).exists() else None


def settings_beside(model: Path) -> Settings:
    """The settings of the run that `model`, its folder or a file in it, comes from; none for a model from elsewhere,
    beside which there may be another program's config.json. Raises ConfigError, naming the file, for a damaged one.
    """
    file = (model if model.is_dir() else model.parent) / CONFIG
    if not file.is_file():
        return {}
    try:
        text = file.read_text(encoding="utf-8")
        json.loads(text)
        return from_json(text) if run_settings({"settings": text}) else {}
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{file} is damaged ({error}); if it is a run's: python train.py --resume "
            f"{quote(str(file.parent))} writes it anew"
        ) from None


def shorten(message: str, lines: int = 6) -> str:
    """The first lines of torch's message about weights that do not fit, which may list thousands of names."""
    return "\n".join(line[:300] for line in message.splitlines()[:lines])
