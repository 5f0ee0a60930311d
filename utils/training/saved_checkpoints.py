"""Checkpoints on the disk: their layout, their checksums, and how any number of ranks read tensors from them.

step-000001234/manifest.json                    what is in it; size and CRC-32 of each file
               backbone.safetensors             the network alone, of use by itself
               whole.safetensors                the other tensors that all ranks have alike
               rows-00000-of-00003.safetensors  one rank's rows of each matrix that is spread over ranks
"""

import json
import re
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from utils.checkpoints import CheckpointError
from utils.training.host_copy import DTYPES, FileSum, file_sum

FORMAT = 1
MANIFEST = "manifest.json"
BACKBONE = "backbone.safetensors"
WHOLE = "whole.safetensors"

# What a manifest has beside its format.
_PARTS = {"step": int, "ranks": int, "files": dict, "rows": dict, "notes": dict}

# The second number is there when a step is saved again.
_NAME = re.compile(r"step-(\d{9,})(?:-(\d+))?")

# Memory beyond the result that reading rows takes.
_READ_BYTES = 1 << 26


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written; the message names the file."""


class MissingError(DamagedError):
    """A file of a checkpoint, `path`, is not there, or not seen here."""

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} is not there")
        self.path = path


class UnreadableError(CheckpointError):
    """A file of a checkpoint may be whole, but cannot be read here; the message names it and says why."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path} cannot be read: {error.strerror}")


def shard_name(rank: int, ranks: int) -> str:
    """The file of one rank's rows."""
    return f"rows-{rank:05}-of-{ranks:05}.safetensors"


def checkpoint_folders(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, damaged ones too, oldest first; none if it does not exist."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step_and_time)


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    return _step_and_time(checkpoint)[0]


def free_name(folder: Path, step: int) -> Path:
    """A free name for a checkpoint of `step`, the last of this step in order."""
    same_step = [path for path in checkpoint_folders(folder) if step_of(path) == step]
    if not same_step:
        return folder / f"step-{step:09}"
    return folder / f"step-{step:09}-{_step_and_time(same_step[-1])[1] + 1}"


def _step_and_time(checkpoint: Path) -> tuple[int, int]:
    """(step, number of the save among those of that step, from 1)."""
    _, step, *time = checkpoint.name.split("-")
    return int(step), int(time[0]) if time else 1


def manifest_text(content: dict[str, Any]) -> str:
    """A manifest's text, with the checksum of `content`."""
    return json.dumps({"crc32": _checksum(content), "content": content}, indent=1)


def _checksum(content: object) -> str:
    return f"{zlib.crc32(json.dumps(content, sort_keys=True).encode()):08x}"


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        content = found["content"]
        undamaged = found["crc32"] == _checksum(content) and type(content["format"]) is int
    except FileNotFoundError:
        raise MissingError(path) from None
    except OSError as error:
        raise UnreadableError(path, error) from None
    except (ValueError, TypeError, KeyError, RecursionError):
        undamaged = False
    if not undamaged:
        raise DamagedError(f"{path} is not as it was written")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"{path} has format {content['format']}, this version reads {FORMAT}: go on with the version that wrote it"
        )
    if not all(isinstance(content.get(name), kind) for name, kind in _PARTS.items()):
        raise DamagedError(f"{path} is not as it was written")
    return content


class Saved:
    """A checkpoint. `step`; `notes`: those given to `CheckpointStore.save`; `ranks`: how many wrote it."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest only. Raises DamagedError, UnreadableError; CheckpointError for the format of another
        version."""
        content = _read_manifest(folder / MANIFEST)
        self.folder = folder
        self.step: int = content["step"]
        self.notes: dict[str, Any] = content["notes"]
        self.ranks: int = content["ranks"]
        self._rows: dict[str, dict[str, Any]] = content["rows"]
        self._files = {name: FileSum(**found) for name, found in content["files"].items()}

    @property
    def files(self) -> list[str]:
        """The names of the files that hold tensors."""
        return list(self._files)

    def check(self, names: list[str]) -> None:
        """Read those files and compare size and checksum. Raises DamagedError, UnreadableError."""
        for name in names:
            path, expected = self.folder / name, self._files[name]
            try:
                size = path.stat().st_size
                if size != expected.bytes:
                    raise DamagedError(f"{path} has {size:,} bytes instead of {expected.bytes:,}")
                found = file_sum(path)
            except FileNotFoundError:
                raise MissingError(path) from None
            except OSError as error:
                raise UnreadableError(path, error) from None
            if found != expected:
                raise DamagedError(f"{path} has CRC-32 {found.crc32:08x} instead of {expected.crc32:08x}")

    def backbone(self) -> dict[str, Tensor]:
        """The network's tensors, on the CPU."""
        return load_file(self.folder / BACKBONE)

    def whole(self) -> dict[str, Tensor]:
        """The other tensors that all ranks have alike, on the CPU."""
        return load_file(self.folder / WHOLE)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix that is spread over ranks, of all its rows. Raises CheckpointError if it has none."""
        return tuple(self._entry(name)["shape"])

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows `first` to `stop` (exclusive) of a spread matrix, on the CPU, from the files and places that hold them.

        Raises CheckpointError when it has no such matrix or rows.
        """
        entry = self._entry(name)
        total, *rest = entry["shape"]
        if not 0 <= first <= stop <= total:
            raise CheckpointError(f"{self.folder}: {name} has {total:,} rows, so none from {first:,} to {stop:,}")
        dtype = next(dtype for dtype, its_name in DTYPES.items() if its_name == entry["dtype"])
        result = torch.empty(stop - first, *rest, dtype=dtype)
        at_once = max(1, _READ_BYTES // max(1, torch.Size(rest).numel() * dtype.itemsize))
        for rank, (shard_first, shard_stop) in enumerate(entry["ranges"]):
            start, end = max(first, shard_first), min(stop, shard_stop)
            if start >= end:
                continue
            with safe_open(self.folder / shard_name(rank, self.ranks), "pt") as file:
                part = file.get_slice(name)
                for row in range(start, end, at_once):
                    last = min(end, row + at_once)
                    result[row - first : last - first] = part[row - shard_first : last - shard_first]
        return result

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self._rows:
            has = ", ".join(sorted(self._rows)) or "none"
            raise CheckpointError(f"{self.folder} has no rows of {name!r}; it has {has}")
        return self._rows[name]
