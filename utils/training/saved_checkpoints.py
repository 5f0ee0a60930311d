"""Checkpoints on the disk: their layout, their checksums, and how any number of ranks read tensors from them.

step-000001234/manifest.json                    what is in it; size and CRC-32 of each file
               backbone.safetensors             the network alone, of use by itself
               whole.safetensors                the other tensors that all ranks have alike
               rows-00000-of-00003.safetensors  one rank's rows of each matrix that is spread over ranks
"""

import json
import math
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from utils.checkpoints import CheckpointError
from utils.training.host_copy import DTYPES, FileSum, file_sum

FORMAT = 1
MANIFEST = "manifest.json"
BACKBONE = "backbone.safetensors"
WHOLE = "whole.safetensors"

_DTYPES = {name: dtype for dtype, name in DTYPES.items()}

# Names of files of tensors; nothing that leads out of the folder.
_PLAIN = re.compile(r"[\w-]+\.safetensors", re.ASCII)

# The second number is there when a step is saved again.
_NAME = re.compile(r"step-\d{9,}(?:-\d+)?")

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


@dataclass(frozen=True)
class _Spread:
    """A matrix that is spread over ranks, and which of its rows, from the first to one past the last, each rank has."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    ranges: list[tuple[int, int]]


@dataclass(frozen=True)
class _Manifest:
    """What a manifest says."""

    step: int
    ranks: int
    files: dict[str, FileSum]
    rows: dict[str, _Spread]
    notes: dict[str, Any]


def _read_manifest(path: Path) -> _Manifest:
    try:
        found = json.loads(path.read_bytes())
        content = found["content"]
        _require(found["crc32"] == _checksum(content) and type(content["format"]) is int)
        if content["format"] == FORMAT:
            return _as_manifest(content)
    except FileNotFoundError:
        raise MissingError(path) from None
    except OSError as error:
        raise UnreadableError(path, error) from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DamagedError(f"{path} is not as it was written") from None
    raise CheckpointError(
        f"{path} has format {content['format']}, this version reads {FORMAT}: go on with the version that wrote it"
    )


def _as_manifest(content: dict[str, Any]) -> _Manifest:
    """What `content` says, which may be anything. Raises ValueError, TypeError, KeyError or AttributeError unless it is
    whole."""
    step, ranks = _count(content["step"]), _count(content["ranks"])
    sums = {name: FileSum(_count(found["bytes"]), _count(found["crc32"])) for name, found in content["files"].items()}
    _require(all(map(_PLAIN.fullmatch, sums)) and 1 <= ranks <= len(sums))
    _require({WHOLE, *(shard_name(rank, ranks) for rank in range(ranks))} <= sums.keys())
    rows = {name: _as_spread(found, ranks) for name, found in content["rows"].items()}
    largest = max((math.prod(entry.shape) * entry.dtype.itemsize for entry in rows.values()), default=0)
    _require(largest <= sum(one.bytes for one in sums.values()) and isinstance(content["notes"], dict))
    return _Manifest(step, ranks, sums, rows, content["notes"])


def _as_spread(found: dict[str, Any], ranks: int) -> _Spread:
    total, *_ = shape = tuple(map(_count, found["shape"]))
    ranges = [(_count(first), _count(stop)) for first, stop in found["ranges"]]
    _require(len(ranges) == ranks and all(first <= stop for first, stop in ranges) and add_up(ranges, total))
    return _Spread(_DTYPES[found["dtype"]], shape, ranges)


def add_up(ranges: list[tuple[int, int]], total: int) -> bool:
    """Whether ranges of rows, each the first and one past the last, in any order, have each row of `total` once."""
    ends = [0, *(end for one in sorted(ranges) for end in one), total]
    return ends[::2] == ends[1::2]


def _count(found: Any) -> int:
    _require(type(found) is int and found >= 0)
    return found


def _require(good: bool) -> None:
    if not good:
        raise ValueError


class Saved:
    """A checkpoint. `step`; `notes`: those given to `CheckpointStore.save`; `ranks`: how many wrote it."""

    def __init__(self, folder: Path) -> None:
        """Read the manifest only. Raises DamagedError, UnreadableError; CheckpointError for the format of another
        version."""
        content = _read_manifest(folder / MANIFEST)
        self.folder = folder
        self.step, self.ranks, self.notes = content.step, content.ranks, content.notes
        self._rows, self._files = content.rows, content.files

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
        with _read(self.folder / BACKBONE) as path:
            return load_file(path)

    def whole(self) -> dict[str, Tensor]:
        """The other tensors that all ranks have alike, on the CPU."""
        with _read(self.folder / WHOLE) as path:
            return load_file(path)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a matrix that is spread over ranks, of all its rows. Raises CheckpointError if it has none."""
        return self._entry(name).shape

    def rows(self, name: str, first: int, stop: int) -> Tensor:
        """Rows `first` to `stop` (exclusive) of a spread matrix, on the CPU, from the files and places that hold them.

        Raises CheckpointError when it has no such matrix or rows.
        """
        entry = self._entry(name)
        total, *rest = entry.shape
        if not 0 <= first <= stop <= total:
            raise CheckpointError(f"{self.folder}: {name} has {total:,} rows, so none from {first:,} to {stop:,}")
        result = torch.empty(stop - first, *rest, dtype=entry.dtype)
        at_once = max(1, _READ_BYTES // max(1, torch.Size(rest).numel() * entry.dtype.itemsize))
        for rank, (shard_first, shard_stop) in enumerate(entry.ranges):
            start, end = max(first, shard_first), min(stop, shard_stop)
            if start >= end:
                continue
            with _read(self.folder / shard_name(rank, self.ranks)) as path, safe_open(path, "pt") as file:
                part = file.get_slice(name)
                if part.get_shape() != [shard_stop - shard_first, *rest]:
                    raise DamagedError(f"{path} does not have the rows of {name} that {MANIFEST} says")
                for row in range(start, end, at_once):
                    last = min(end, row + at_once)
                    result[row - first : last - first] = part[row - shard_first : last - shard_first]
        return result

    def _entry(self, name: str) -> _Spread:
        if name not in self._rows:
            has = ", ".join(sorted(self._rows)) or "none"
            raise CheckpointError(f"{self.folder} has no rows of {name!r}; it has {has}")
        return self._rows[name]


@contextmanager
def _read(path: Path) -> Iterator[Path]:
    """Reading it raises DamagedError where it is no file of tensors."""
    try:
        yield path
    except SafetensorError as error:
        raise DamagedError(f"{path} cannot be read: {error}") from None
