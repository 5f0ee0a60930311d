"""Reads tensors by name from files of weights, none of which gets to run code.

Checkpoints wrap the network's weights: in a dictionary beside the epoch and the optimizer, and under a prefix that
comes from DataParallel, a compiler, or a training module. What is left here is the network's own names.
"""

import pickle
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from utils.checkpoints import BEST, HUB_WEIGHTS, CheckpointError, read_safetensors, shorten

T = TypeVar("T")

ENDINGS = (".pth", ".pt", ".ckpt", ".bin", ".tar", ".pkl", ".safetensors")

# Where checkpoints keep the network, in the order of preference; then, whatever else is a dictionary of tensors. Before
# it goes its moving average, which is what they were tested with, unless that lacks some of the tensors.
_AVERAGES = ("state_dict_ema", "ema_state_dict", "model_ema", "ema_model", "ema")
_WRAPPERS = (
    "net_state_dict", "state_dict", "model_state_dict", "backbone_state_dict", "state_dict_backbone",
    "backbone", "model", "net", "network", "module", "weights",
)  # fmt: skip

# Prefixes that say who holds the network, not what the network is.
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.", "net.", "network.", "encoder.")

# What a training module has beside its network: its head, losses and statistics.
_OTHERS = ("head.", "loss.", "criterion.", "classifier.", "arcface.", "margin.", "teacher.")

#: How the counters of norms end, which old files lack, and which only training without momentum reads.
COUNTER = "num_batches_tracked"

# What else checkpoints have in their notes: Lightning's callback, options, paths (of Python 3.13 too, which calls them
# otherwise), accuracies as numbers and arrays of numpy.
# Nothing is imported: a class without content stands in.
_NOTES = (
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "argparse.Namespace", "pathlib.PosixPath",
    "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath", "numpy.dtype", "numpy.ndarray",
    "numpy._core.multiarray.scalar", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
)  # fmt: skip

_UNSUPPORTED = re.compile(r"Unsupported global: GLOBAL (\S+)")
_ARCHIVE, _PICKLE = b"PK", b"\x80"  # how files of torch.save begin, now and before 1.6
_OLD_FILE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # these with its magic number

# Bytes that one of an archive may become.
_MOST_UNPACKED = 4

# Values that a tensor may have although its file has fewer: 1 GiB in a network.
_MOST_REPEATED = 1 << 28


class _Note:
    """Takes the place of an object that has nothing to do with the weights."""

    def __init__(self, *parts: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


@dataclass(frozen=True)
class Checkpoint:
    """A file's `content`; its weights by their `names` in the file, and, in `state`, by the network's own names."""

    file: Path
    content: Any
    names: dict[str, Tensor]
    state: dict[str, Tensor]


def model_file(path: Path | str) -> Path:
    """The file that `path` means: itself, the best model of a run's folder, or the weights of a folder for upload.

    Raises CheckpointError for none.
    """
    file = Path(path)
    _require_no_checkpoint(file)
    if file.is_dir():
        file = file / HUB_WEIGHTS if (file / HUB_WEIGHTS).exists() else file / BEST
    if not file.exists() and Path(path).is_dir():
        raise CheckpointError(f"{path} has no {BEST} or {HUB_WEIGHTS}; if it is a face set, name it without --model")
    if not file.exists():
        raise CheckpointError(f"there is no model at {file}")
    if not file.is_file():
        raise CheckpointError(f"{file} is no file, but a folder, a pipe or a device")
    if file.suffix not in (*ENDINGS, ".onnx"):
        raise CheckpointError(f"{file}: expected a run folder, .safetensors, .pth, .pt, .ckpt or .onnx")
    return file


def _require_no_checkpoint(path: Path) -> None:
    """Raise CheckpointError for a checkpoint to resume from, or a file of one, save for its network."""
    folder, network = (path if path.is_dir() else path.parent), "backbone.safetensors"
    if path.name != network and (folder / "manifest.json").exists() and (folder / network).exists():
        run = folder.absolute().parent.parent
        what = "is" if path.is_dir() else "is part of"
        raise CheckpointError(
            f"{path} {what} a checkpoint to resume from: name its run, {run}, its {BEST}, or {folder / network}"
        )


def is_torchscript(path: Path) -> bool:
    """Whether the file holds a program: an archive of torch.jit.save has code and constants, a state dict has none.

    A damaged archive is taken for none: whoever reads it says so.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.split("/")[1:] == ["constants.pkl"] for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_checkpoint(file: Path) -> Checkpoint:
    """The weights in `file`. Raises CheckpointError unless it holds tensors by name, and nothing that needs code."""
    if file.suffix == ".onnx" or is_torchscript(file):
        kind = "an ONNX file" if file.suffix == ".onnx" else "a TorchScript file"
        raise CheckpointError(
            f"{file} is {kind}, a finished program: it can be tested and merged with, but its weights fill no network "
            "here; name the weights that it was made from"
        )
    content = read_safetensors(file)[0] if file.suffix == ".safetensors" else _read_pickle(file)
    try:
        names = unwrap(content, file)
    except RecursionError:
        raise CheckpointError(f"{file} is no state dict: its dictionaries hold each other without an end") from None
    _require_values(names, file)
    return Checkpoint(file, content, names, strip_prefixes(names))


def _require_values(state: Mapping[str, Tensor], file: Path) -> None:
    """Raise CheckpointError for huge tensors that repeat a few values: a network that large takes all memory."""
    size = file.stat().st_size
    for name, value in state.items():
        if value.numel() > max(size, _MOST_REPEATED):
            raise CheckpointError(f"{file}: {name} is {list(value.shape)}, of which the file of {size:,} bytes has few")


def _require_its_size(file: Path) -> None:
    """Raise CheckpointError for an archive that becomes several times its size: torch.save compresses nothing, and who
    packs weights again saves a tenth. A damaged archive passes: torch says what is wrong with it.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return
    size = file.stat().st_size
    if (unpacked := sum(member.file_size for member in members)) > _MOST_UNPACKED * size:
        raise CheckpointError(f"{file} has {size:,} bytes, which become {unpacked:,}: torch.save writes no such file")


def _read_pickle(file: Path) -> Any:
    with file.open("rb") as opened:
        first = opened.read(16)
    if file.suffix == ".bin" and first.startswith(_PICKLE) and not first.startswith(_OLD_FILE):
        raise CheckpointError(
            f"{file} was not written by torch.save; if it is a verification set, name it without --model"
        )
    _require_its_size(file)
    try:
        with torch.serialization.safe_globals([(_Note, name) for name in _NOTES]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # of a damaged file torch's reader raises what its bytes lead it to
        raise CheckpointError(_refusal(file, error)) from None


def _refusal(file: Path, error: Exception) -> str:
    with file.open("rb") as opened:
        first = opened.read(16)
    if not first.startswith((_ARCHIVE, _PICKLE)):
        return f"{file} is no file of torch.save: " + (f"it begins with {first!r}" if first else "it is empty")
    if not isinstance(error, pickle.UnpicklingError):
        said = f"{type(error).__name__} {shorten(str(error), 1)}".strip()
        return f"{file} is damaged: it was not loaded. torch said: {said}"
    named = _UNSUPPORTED.search(str(error))
    what = f" ({named[1]})" if named else ", or was not written by torch.save"
    return (
        f"{file} holds more than tensors{what}: it was not loaded. If you trust its author, save the weights alone, "
        "torch.save(torch.load(FILE, 'cpu', weights_only=False)['state_dict'], NEW), or of a whole network its "
        ".state_dict()"
    )


def unwrap(content: Any, file: Path, known: dict[int, dict[str, Tensor]] | None = None) -> dict[str, Tensor]:
    """The state dict inside what a checkpoint holds. Raises CheckpointError, saying what it holds, without any.

    `known`: what is in dictionaries that were looked through, by their ids: many may hold the same ones.
    """
    known = {} if known is None else known
    if isinstance(content, Mapping):
        tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
        inner = {str(name): value for name, value in content.items() if isinstance(value, Mapping)}
        found = {name: state for name, value in inner.items() if (state := _unwrapped(value, file, known))}
        average, plain = (
            next((found[name] for name in names if name in found), {}) for names in (_AVERAGES, _WRAPPERS)
        )
        if average or plain:
            return average if _essential(plain) <= _essential(average) else plain
        others = [state for name, state in found.items() if not _is_optimizer(name)]
        if others or tensors:
            return max([*others, tensors], key=len)  # beside the network, a head perhaps, or the mean of its inputs
        kind = f"a dictionary of {', '.join(map(repr, content))[:200]}"
    else:
        kind = f"one {type(content).__name__}"
    raise CheckpointError(f"{file} is no state dict (names to tensors), but {kind}: save network.state_dict() in it")


def _essential(state: Mapping[str, Tensor]) -> set[str]:
    """The names of a network's weights, without the counters of norms and what is beside it."""
    return {name for name in strip_prefixes(state) if not (name.endswith(COUNTER) or _is_beside(name))}


def _unwrapped(content: Mapping[Any, Any], file: Path, known: dict[int, dict[str, Tensor]]) -> dict[str, Tensor]:
    """As `unwrap`; nothing where there is no state dict."""
    if not any(isinstance(value, Tensor | Mapping) for value in content.values()):
        return {}
    if id(content) not in known:
        try:
            known[id(content)] = unwrap(content, file, known)
        except CheckpointError:
            known[id(content)] = {}
    return known[id(content)]


def _is_optimizer(name: str) -> bool:
    return any(word in name for word in ("optim", "sched", "scaler", "amp"))


def parts_under_prefixes(state: Mapping[str, T]) -> list[dict[str, T]]:
    """What of `state` is under each of the prefixes of wrappers, without it: the network, if the rest is beside it."""
    parts = (
        {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        for prefix in _PREFIXES
    )
    return [strip_prefixes(part) for part in parts if part]


def strip_prefixes(state: Mapping[str, T]) -> dict[str, T]:
    """`state` without the prefixes of wrappers, and without what a training module has beside its network.

    Networks of which all names begin with such a prefix are compared without it, too.
    """
    state = dict(state)
    while True:
        for prefix in _PREFIXES:
            inside = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
            if inside and all(_is_beside(name) for name in state if not name.startswith(prefix)):
                state = inside
                break
        else:
            return state


def _is_beside(name: str) -> bool:
    return "." not in name or name.startswith(_OTHERS)
