#!/usr/bin/env python3
"""Turn any set into folders of images, OUTPUT/<identity>/<image>, the bytes as they are.

    python data/prepare_data.py --rec_data_path datasets/ms1mv3 --output datasets/ms1mv3_images
    python data/prepare_data.py --rec_data_path datasets/ms1mv3 --min-images 50 --limit 100 --output datasets/some
    python data/prepare_data.py --rec_data_path faces.lst --image-root photos --output faces   # a list, or a CSV
    python data/prepare_data.py --rec_data_path crops --min-images 5 --output datasets/some    # crops/<identity>/*.jpg

Nothing is decoded or encoded again. Images of records are called by their keys, those of a list by its lines, those of
folders as they were: packed again (data/pack_set.py) they are in the same order. `prepared.csv` in OUTPUT says what
went where: it appears when all is written. An interrupted run goes on where it stopped: a journal in OUTPUT names the
blocks of images that are done, whose files are read and compared; all others are written (again).
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, READS, Config
from data.face_sets import (
    Divisible,
    EncodedImages,
    FaceSet,
    FaceSetError,
    FolderFaceSet,
    RecFaceSet,
    find_rec,
    only_set,
)
from data.identity_choice import Identity, choose_identities
from data.images import EXTENSIONS, image_extension
from data.set_sources import ListedFaceSet, open_source, stamp
from data.unpacked_names import UnpackedNames
from utils.files import lock_file, naming, write_csv_atomic
from utils.processes import map_unordered, worker_count
from utils.progress import progress_bar
from utils.resumable import JournalError
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings
from utils.text_files import is_whole_number

JOURNAL = ".prepare_journal.jsonl"
TABLE = "prepared.csv"
IMAGES_PER_BLOCK = 1000


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: images that were asked for, of them written now, bytes written now, identities."""

    images: int
    written: int
    bytes: int
    identities: int


def prepare(
    source: Path,
    output: Path,
    workers: int,
    names: Sequence[str] = (),
    min_images: int = 1,
    limit: int = 0,
    image_root: Path | None = None,
    unaligned: Literal["refuse", "copy"] = "refuse",
) -> Prepared:
    """Write images of `source` to `output`, called as in data/unpacked_names.py, and `prepared.csv`.

    `source`, `image_root`: as in data/set_sources.py. `names`, `min_images`, `limit` and `unaligned`: as in
    `config.PrepareConfig`. `workers` processes write; 0 means this one. Raises FaceSetError when no identity is left, a
    listed image is not aligned or an image is missing, RecordError for damaged records, JournalError when `output`
    holds something else, BusyError when another process writes there, OSError with the file when the disk is full:
    after any of them, the same call goes on.
    """
    faces = open_source(source, image_root, detected=True)  # what is not aligned gets a message of its own, see below
    identities = choose_identities(faces, names, min_images)[: limit or None]
    chosen = np.zeros(len(faces), bool)
    chosen[np.concatenate([identity.images for identity in identities])] = True
    order = np.flatnonzero(chosen)
    if unaligned == "refuse":
        _require_aligned(faces, order)
    if isinstance(faces, FolderFaceSet) and output.resolve().is_relative_to(faces.path.resolve()):
        raise FaceSetError(f"{output} is within the set: name another output")
    unpacked = UnpackedNames(faces, identities)
    fingerprint = _fingerprint(faces, order, unpacked)
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()) and not (output / JOURNAL).exists():
        raise JournalError(f"{output} is not empty and no earlier run's: name another output")
    kinds = np.zeros(len(faces), np.uint8)  # indices into EXTENSIONS
    with _Journal(output / JOURNAL, fingerprint) as journal:
        starts = range(0, len(order), IMAGES_PER_BLOCK)
        blocks = (_block(faces, unpacked, order, start, start in journal.done) for start in starts)
        written = size = 0
        with progress_bar(len(order), "image", "prepare") as bar:
            for block in map_unordered(_write_block, blocks, workers, _open, output):
                journal.add(block.start)
                images = order[block.start : block.start + IMAGES_PER_BLOCK]
                kinds[images] = block.kinds
                written, size = written + block.written, size + block.bytes
                bar.update(len(images))
    _write_table(output / TABLE, unpacked, identities, kinds)
    return Prepared(len(order), written, size, len(identities))


def _require_aligned(faces: FaceSet, order: np.ndarray) -> None:
    if not isinstance(faces, ListedFaceSet):
        return
    unaligned = [i for i in map(int, order) if faces.is_unaligned(i)]
    if unaligned:
        raise FaceSetError(
            f"{faces.describe(unaligned[0])} is not aligned, as its landmarks or the list say ({len(unaligned):,} such "
            "images): make a set of it by data/pack_set.py, which aligns them, and unpack that, or copy them as they "
            "are with --unaligned copy"
        )


class _Block(NamedTuple):
    """What a worker needs: its images, their names without what `adds_extension` adds, whether they are there."""

    start: int
    images: EncodedImages
    names: list[str]
    adds_extension: bool
    done: bool


def _block(faces: Divisible, unpacked: UnpackedNames, order: np.ndarray, start: int, done: bool) -> _Block:
    positions = order[start : start + IMAGES_PER_BLOCK]
    names = [unpacked.file(i, "") for i in positions.tolist()]
    return _Block(start, faces.part(positions), names, unpacked.adds_extension, done)


_worker: dict[str, Any] = {}


def _open(output: Path) -> None:
    _worker["output"] = output


class _Written(NamedTuple):
    start: int
    kinds: list[int]
    written: int
    bytes: int


def _write_block(block: _Block) -> _Written:
    kinds = []
    written = size = 0
    for i, name in enumerate(block.names):
        image = block.images.encoded(i)
        extension = image_extension(image)
        kinds.append(EXTENSIONS.index(extension))
        path: Path = _worker["output"] / (name + extension * block.adds_extension)
        if block.done and _holds(path, image):
            continue
        _write(path, image)
        written, size = written + 1, size + len(image)
    return _Written(block.start, kinds, written, size)


def _holds(path: Path, image: bytes) -> bool:
    """Whether the file has these very bytes: a set may have been damaged before, or a disk after they were written."""
    with naming(path):
        return path.exists() and path.stat().st_size == len(image) and path.read_bytes() == image


def _write(path: Path, image: bytes) -> None:
    with naming(path):
        try:
            path.write_bytes(image)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)


def _write_table(path: Path, unpacked: UnpackedNames, identities: Sequence[Identity], kinds: np.ndarray) -> None:
    """A line per image, with the label that packing or training on the folders gives, and the one of the source."""
    rows = (
        (unpacked.image(i), label, identity.name, unpacked.file(i, EXTENSIONS[kinds[i]]))
        for label, identity in enumerate(identities)
        for i in identity.images.tolist()
    )
    images = sum(len(identity.images) for identity in identities)
    with naming(path), progress_bar(images, "line", path.name, iterable=rows) as shown:
        write_csv_atomic(path, ("key", "label", "identity", "file"), shown)


def _fingerprint(faces: FaceSet, order: np.ndarray, unpacked: UnpackedNames) -> dict[str, Any]:
    """What the output depends on; the digest tells any two choices of images apart, however they were asked for.

    Sets in records are known by name and size, keys and labels; of image files size and time count, each one's.
    """
    digest = hashlib.sha256()
    if isinstance(faces, RecFaceSet):
        digest.update(faces.keys[order].data)
        digest.update(np.array(faces.identities, np.int64)[faces.labels[order]].data)
        source: dict[str, Any] = {"rec": faces.path.name, "bytes": faces.path.stat().st_size}
    else:
        assert isinstance(faces, FolderFaceSet | ListedFaceSet)
        for i in progress_bar(len(order), "file", "check", iterable=map(int, order)):
            try:
                line = f"{stamp(faces.file(i))} {faces.relative_file(i)}\n{unpacked.file(i, '')}\n"
            except OSError as error:
                raise FaceSetError(f"{faces.describe(i)}: {error.strerror}") from None
            digest.update(line.encode(errors="surrogateescape"))
        source = {"source": str(faces.path.resolve())}
    return {
        **source,
        "images": len(order),
        "keys and labels": digest.hexdigest(),
        "block": IMAGES_PER_BLOCK,
    }


class _Journal:
    """Names the blocks that are done: a line for the set, then a line a block. One process at a time has it.

    A lost line costs writing its block again, so lines are not synced one by one.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.done: set[int] = set()
        self._path = path
        self._file = path.open("a+", errors="replace")
        try:
            lock_file(self._file.fileno(), path, path.parent, wait=False)
            self._take_over(json.dumps(fingerprint) + "\n")
        except Exception:
            with suppress(OSError):  # of a full disk, which the first error told of
                self._file.close()
            raise

    def _take_over(self, header: str) -> None:
        self._file.seek(0)
        journal = self._file.read()
        if header.startswith(journal):  # none yet, or one that was cut off in its first line
            self._file.truncate(0)
            self._file.write(header)
        elif journal.startswith(header):
            # What follows the last line break is a line that was cut off: its block is not done.
            lines, _, torn = journal.removeprefix(header).rpartition("\n")
            self.done = {int(line) for line in lines.split("\n") if is_whole_number(line)}
            self._file.write("?\n" if torn else "")
        else:
            raise JournalError(
                f"{self._path} belongs to another set or choice of identities, or images of the set were changed "
                "since: name another output, or remove that folder"
            )
        with naming(self._path):
            self._file.flush()

    def __enter__(self) -> Self:
        return self

    def add(self, start: int) -> None:
        if start not in self.done:
            self.done.add(start)
            with naming(self._path):
                self._file.write(f"{start}\n")
                self._file.flush()

    def __exit__(self, *error: object) -> None:
        with naming(self._path):
            self._file.close()


def _default_output(source: Path) -> Path:
    if not source.exists():
        raise FaceSetError(f"{source} does not exist")
    if source.suffix != ".rec":
        raise FaceSetError(f"name a folder for the images of {source}: --output B")
    return source.parent / "images"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("prepare_data", "the same command goes on where it stopped"):
        config = parse_settings(Config, PRESETS, ("prepare", "common"), __doc__, argv, reads=READS["prepare"])
        print(describe(config, READS["prepare"]))
        pick = config.prepare
        source = Path(pick.rec_data_path or only_set(config.data.root, "--rec-data-path A"))
        source = (find_rec(source) if source.is_dir() else None) or source
        output = Path(pick.output) if pick.output else _default_output(source)
        workers = worker_count(config.common.workers)
        image_root = Path(pick.image_root) if pick.image_root else None
        result = prepare(
            source, output, workers, pick.identities, pick.min_images, pick.limit, image_root, pick.unaligned
        )
    print(
        f"{output}: {result.images:,} images of {result.identities:,} identities; "
        f"{result.written:,} written now ({result.bytes / 2**20:,.1f} MiB), bytes as in {source}"
    )


if __name__ == "__main__":
    main()
