"""A cache of the features of whole sets: files with checksums, which several runs can share.

`FOLDER/KEY.features` has 4,096 bytes of header (a JSON line behind its CRC-32), the features, float32 [images, D], in
blocks of `BLOCK` images, and the CRC-32 of each block, uint32. KEY is a digest of all that decides the features: the
embedder, the images, mirrored or not. While it is made, the file lies in the hidden folder of utils/files.py, with a
line for each finished block: a process that was killed loses the block that it was at, and the next goes on. A
finished file whose blocks do not fit their sums is warned of, and those blocks are made anew.
"""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from utils.files import JOURNAL, clear_partial, naming, partial_folder, seen, sync_folder, unfinished
from utils.ranks import Ranks, share_of
from utils.text_files import is_whole_number

BLOCK = 256
HEADER = 4096
VERSION = 1

#: Bytes of features from which on the file is mapped into memory, not read.
MAPPED_FROM = 256 << 20

_WORKING = "features"
_LOG = "blocks"


class _Block(NamedTuple):
    """A finished block: its number, numbers per feature, and CRC-32."""

    number: int
    dimension: int
    crc: int


def features_key(embedder: str, images: str, count: int, mirror: bool) -> str:
    """The key of these features; `embedder`, `images`: their fingerprints."""
    facts = json.dumps([VERSION, BLOCK, embedder, images, count, mirror])
    return hashlib.sha256(facts.encode()).hexdigest()[:40]


def kept_bytes(folder: Path, key: str) -> int | None:
    """Bytes of the unfinished file of the features `key` in `folder`; None: it is finished."""
    path = folder / f"{key}.features"
    working = partial_folder(path) / _WORKING
    if path.exists():
        return None
    return 512 * working.stat().st_blocks if working.exists() else 0  # blocks at its end may come before earlier ones


def kept_features(
    folder: Path, key: str, count: int, embed: Callable[[np.ndarray], Iterable[np.ndarray]], ranks: Ranks
) -> np.ndarray:
    """The features `key`, float32 [count, D], from `folder`; those that are not there are computed and kept there.

    `embed` computes the features of the images at the given positions, int64, in order, in batches of any length.
    Several `ranks`, which share the folder, share the work. Large files are mapped copy-on-write: the array can be
    written to, the file stays as it is. Another process that makes the same file is waited for.
    """
    path = folder / f"{key}.features"
    with ExitStack() as held:
        found: list[_Block] | None = None
        if ranks.first:
            folder.mkdir(parents=True, exist_ok=True)
            found = _check(path, key, count)
            if _missing(found, count):
                held.enter_context(unfinished(path, wait=True, resume=True))
                found = _check(path, key, count)  # another process may have made it meanwhile
                if _missing(found, count):
                    found = _prepare(path, found, count)
                    if not _missing(found, count):  # whoever made the last block was killed before it had its name
                        _finish(path, key, count, found[0].dimension)
        missing: list[int] = json.loads(ranks.agree(json.dumps(_missing(found or [], count))))
        if missing:
            own = [missing[i] for i in share_of(len(missing), ranks.rank, ranks.size)]
            dimension = _make(path, own, count, embed, ranks)
            if ranks.first:
                _finish(path, key, count, dimension)
            ranks.agree("finished")
    return _open(path, key, count)


def _missing(found: list[_Block], count: int) -> list[int]:
    return sorted(set(range(-(-count // BLOCK))) - {block.number for block in found})


def _rows(number: int, count: int) -> range:
    return range(number * BLOCK, min(count, (number + 1) * BLOCK))


def _check(path: Path, key: str, count: int) -> list[_Block]:
    """The undamaged blocks of a finished file; none if there is no such file, or its header is damaged."""
    try:
        header = _read_header(path, key, count)
        if header is None:
            return []
        sums = np.fromfile(path, "<u4", offset=HEADER + 4 * count * header["dimension"])
        return _good(path, [_Block(i, header["dimension"], int(crc)) for i, crc in enumerate(sums)], count)
    except FileNotFoundError:
        return []


def _good(path: Path, blocks: Iterable[_Block], count: int) -> list[_Block]:
    """Those of `blocks` whose features in the file at `path` have the right checksum."""
    good = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for block in blocks:
            rows = _rows(block.number, count)
            if not rows or block.dimension < 1 or HEADER + 4 * block.dimension * rows.stop > size:
                continue
            file.seek(HEADER + 4 * block.dimension * rows.start)
            if zlib.crc32(file.read(4 * block.dimension * len(rows))) == block.crc:
                good.append(block)
    return good


def _prepare(path: Path, finished: list[_Block], count: int) -> list[_Block]:
    """Prepare the working file and its log; returns the blocks that are done.

    `finished`: the undamaged blocks of a file at `path`, which then becomes the working file.
    """
    partial = partial_folder(path)
    working = partial / _WORKING
    if path.exists():
        wrong = len(_missing(finished, count))
        warnings.warn(f"{path} is damaged: {wrong} of its {-(-count // BLOCK)} blocks are made anew", stacklevel=4)
    if finished:
        clear_partial(partial)
        path.replace(working)
        done = finished
    else:
        if not ((partial / JOURNAL).exists() and working.exists()):
            clear_partial(partial)
        logged = [block for log in partial.glob(f"{_LOG}.*") for block in _read_log(log)]
        done = _good(working, logged, count) if working.exists() else []
    done = [block for block in dict.fromkeys(done) if block.dimension == done[0].dimension]
    for log in partial.glob(f"{_LOG}.*"):
        log.unlink()
    with naming(partial):
        working.touch()
        (partial / f"{_LOG}.kept").write_text("".join(map(_line, done)))
        (partial / JOURNAL).write_text("{}")
    return done


def _line(block: _Block) -> str:
    return f"{block.number} {block.dimension} {block.crc}\n"


def _read_log(path: Path) -> Iterator[_Block]:
    for line in path.read_text(errors="replace").splitlines():
        fields = line.split()
        if len(fields) == 3 and all(map(is_whole_number, fields)):
            yield _Block(*map(int, fields))


def _make(
    path: Path, numbers: list[int], count: int, embed: Callable[[np.ndarray], Iterable[np.ndarray]], ranks: Ranks
) -> int:
    """Compute this rank's blocks, `numbers`; returns D when all ranks have computed theirs."""
    partial, dimension = partial_folder(path), 0
    if seen(lambda: partial.is_dir() or None, path.parent) is None:
        raise OSError(f"{path.parent} is not the same folder for all processes: a cache needs a disk that they share")
    if numbers:
        positions = np.concatenate([np.arange(rows.start, rows.stop) for rows in (_rows(n, count) for n in numbers)])
        working, log_path = partial / _WORKING, partial / f"{_LOG}.{ranks.rank}"
        with working.open("r+b") as file, log_path.open("a") as log:
            blocks = _cut(embed(positions), [len(_rows(number, count)) for number in numbers])
            for number, block in zip(numbers, blocks, strict=True):
                dimension, data = block.shape[1], block.tobytes()
                with naming(working):
                    file.seek(HEADER + 4 * dimension * number * BLOCK)
                    file.write(data)
                    file.flush()  # before the line that says that it is there
                with naming(log_path):
                    log.write(_line(_Block(number, dimension, zlib.crc32(data))))
                    log.flush()
            with naming(working):
                os.fsync(file.fileno())
    return ranks.most(dimension)


def _cut(batches: Iterable[np.ndarray], lengths: list[int]) -> Iterator[np.ndarray]:
    """The rows of `batches` in blocks of `lengths`, as little-endian float32."""
    waiting: list[np.ndarray] = []
    wanted = iter(lengths)
    length = next(wanted)
    for batch in batches:
        waiting.append(np.asarray(batch, "<f4"))
        while length and sum(map(len, waiting)) >= length:
            rows = waiting[0] if len(waiting) == 1 else np.concatenate(waiting)  # of a large batch no copy each time
            yield rows[:length]
            waiting, length = [rows[length:]], next(wanted, 0)


def _finish(path: Path, key: str, count: int, dimension: int) -> None:
    """Complete the working file with checksums and header, and give it its name."""
    partial = partial_folder(path)
    working = partial / _WORKING
    sums = {block.number: block.crc for log in partial.glob(f"{_LOG}.*") for block in _read_log(log)}
    table = np.array([sums[number] for number in range(-(-count // BLOCK))], "<u4").tobytes()
    facts = {"key": key, "images": count, "dimension": dimension, "sums": zlib.crc32(table)}
    with naming(working), working.open("r+b") as file:
        file.write(_header(facts))
        file.seek(HEADER + 4 * count * dimension)
        file.write(table)
        file.truncate()
        file.flush()
        os.fsync(file.fileno())
    working.replace(path)
    sync_folder(path.parent)
    (partial / JOURNAL).unlink()


def _header(facts: dict[str, Any]) -> bytes:
    text = json.dumps(facts).encode()
    return (f"{zlib.crc32(text):08x} ".encode() + text).ljust(HEADER - 1) + b"\n"


def _read_header(path: Path, key: str, count: int) -> dict[str, Any] | None:
    """The header of a finished file, if it is one of these features and as long as it says."""
    with path.open("rb") as file:
        line = file.read(HEADER)
        try:
            crc, text = line.rstrip().split(b" ", 1)
            facts = json.loads(text)
            if int(crc, 16) != zlib.crc32(text) or facts["key"] != key or facts["images"] != count:
                return None
            if type(facts["dimension"]) is not int or facts["dimension"] < 1:
                return None
            file.seek(HEADER + 4 * count * facts["dimension"])
            table = file.read()
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return None
    good = len(table) == 4 * -(-count // BLOCK) and zlib.crc32(table) == facts["sums"]
    return facts if good else None


def _open(path: Path, key: str, count: int) -> np.ndarray:
    header = seen(lambda: _read_header(path, key, count) if path.exists() else None, path.parent)
    if header is None:
        raise OSError(f"{path} is not the file that was just made: a cache needs a disk that all processes share")
    shape = (count, header["dimension"])
    if 4 * shape[0] * shape[1] >= MAPPED_FROM:
        return np.memmap(path, "<f4", "c", HEADER, shape)
    return np.fromfile(path, "<f4", shape[0] * shape[1], offset=HEADER).reshape(shape)
