"""What a run leaves on disk: weights and state as safetensors, written whole or not at all, and never a pickle.

A backbone file holds a network's state dict under its own names. A checkpoint holds everything that a step changes.
Both carry JSON in their safetensors metadata: the run's settings, and where the run stood.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from utils.files import atomic_path
from utils.settings import Settings, from_json

BEST = "best.safetensors"
CHECKPOINT = "checkpoint.safetensors"
CONFIG = "config.json"


class CheckpointError(ValueError):
    """A file is not the checkpoint that it should be; the message names it."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: optimizer steps done, and its best verification accuracy (0..1) so far."""

    step: int
    best_accuracy: float


def save_backbone(path: Path, network: nn.Module, settings: str, progress: Progress) -> None:
    """Write the state dict of `network`; `settings` is the run's configuration as JSON."""
    _save(path, network.state_dict(), {"settings": settings, **_as_text(progress)})


def load_backbone(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, settings by `section` and field) of a backbone file. Raises CheckpointError for anything else."""
    tensors, metadata = _load(path)
    if "scaler" in metadata:
        raise CheckpointError(f"{path} is a checkpoint to resume from: name its run, {path.parent}, or its {BEST}")
    return tensors, json.loads(metadata["settings"])


def save_checkpoint(
    path: Path,
    modules: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    settings: str,
) -> None:
    """Write all that the next step depends on: `modules` by name, optimizer and loss scaler state, progress."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": value for key, value in state.items() if value is not None}
    _save(path, tensors, {"settings": settings, "scaler": json.dumps(scaler.state_dict()), **_as_text(progress)})


def load_checkpoint(
    path: Path, modules: Mapping[str, nn.Module], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Put what `save_checkpoint` wrote back in place; returns where the run stood.

    Raises CheckpointError when the file's tensors are not those of `modules`.
    """
    tensors, metadata = _load(path)
    for name, module in modules.items():
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise CheckpointError(f"{path} does not fit the {name} of the settings: {shorten(str(error))}") from None
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, index, field = key.split(".", 2)
            optimizer_state.setdefault(int(index), {})[field] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": optimizer_state, "param_groups": groups})
    _match_strides(optimizer)
    scaler_state = json.loads(metadata["scaler"])
    if scaler_state and scaler.is_enabled():  # a run may go on in another precision
        scaler.load_state_dict(scaler_state)
    return Progress(int(metadata["step"]), float(metadata["best_accuracy"]))


def _match_strides(optimizer: torch.optim.Optimizer) -> None:
    """Lay each buffer out like its parameter (channels last, say): the optimizer's fast path wants them alike."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter).copy_(value)


def newest_run(runs: Path) -> Path:
    """The run folder with the newest best model. Raises CheckpointError when there is none."""
    found = sorted(runs.glob(f"*/{BEST}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no model is named, and {runs} has no trained one: train one, or give --model")
    return found[-1].parent


def settings_beside(model: Path) -> Settings:
    """The settings of the run that `model`, its folder or a file in it, comes from; none for a model from elsewhere."""
    file = (model if model.is_dir() else model.parent) / CONFIG
    return from_json(file.read_text()) if file.exists() else {}


def shorten(message: str, lines: int = 6) -> str:
    """The first lines of what torch says of weights that do not fit; whole, it can be thousands of names."""
    return "\n".join(line[:300] for line in message.splitlines()[:lines])


def _as_text(progress: Progress) -> dict[str, str]:
    return {name: repr(value) for name, value in asdict(progress).items()}


def _save(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    metadata = {**metadata, "torch": torch.__version__}
    with atomic_path(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # save_file makes the file its owner's alone
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)
        temporary.chmod(mode)


def _load(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from None
    if "settings" not in metadata:
        raise CheckpointError(f"{path} was not written by train.py: it has no settings in it")
    return tensors, metadata
