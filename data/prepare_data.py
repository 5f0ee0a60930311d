#!/usr/bin/env python3
"""Turn a `.rec` set into folders of images: OUTPUT/<label>/<key>.jpg, the bytes as they are in the records.

    python data/prepare_data.py --rec_data_path datasets/ms1mv3 --output datasets/ms1mv3_images
    python data/prepare_data.py --rec_data_path datasets/ms1mv3 --min-images 50 --limit 100 --output datasets/some

Nothing is decoded or encoded again. `prepared.csv` in OUTPUT says what went where: it appears when all is written. An
interrupted run goes on where it stopped: a journal in OUTPUT names the blocks of records that are done, whose files are
only checked by size; all others are written (again).
"""

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, Config
from data.face_sets import FaceSetError, RecFaceSet, find_rec
from data.identity_choice import Identity, choose_identities
from data.images import image_extension
from utils.files import naming, write_csv_atomic
from utils.processes import map_unordered, worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings

JOURNAL = ".prepare_journal.jsonl"
TABLE = "prepared.csv"
RECORDS_PER_BLOCK = 1000


class JournalError(ValueError):
    """The output folder holds something else."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: images that were asked for, of them written now, bytes written now, identities."""

    images: int
    written: int
    bytes: int
    identities: int


def prepare(
    rec_path: Path,
    output: Path,
    workers: int,
    names: Sequence[str] = (),
    min_images: int = 1,
    limit: int = 0,
) -> Prepared:
    """Write images of `rec_path` to `output`/<label:06d>/<key:09d>.jpg (.png when it is one), and `prepared.csv`.

    `names`, `min_images` and `limit` choose identities as in `config.PrepareConfig`. `workers` processes write; 0 means
    this one. Raises FaceSetError when no identity is left, RecordError for damaged records, JournalError when `output`
    holds something else, OSError with the file when the disk is full: after any of them, the same call goes on.
    """
    faces = RecFaceSet(rec_path)
    identities = choose_identities(faces, names, min_images)[: limit or None]
    order = np.sort(np.concatenate([identity.images for identity in identities]))
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()) and not (output / JOURNAL).exists():
        raise JournalError(f"{output} is not empty and no earlier run's: name another output")
    is_png = np.zeros(len(faces), bool)
    with _Journal(output / JOURNAL, _fingerprint(faces, order)) as journal:
        starts = range(0, len(order), RECORDS_PER_BLOCK)
        blocks = [(start, order[start : start + RECORDS_PER_BLOCK], start in journal.done) for start in starts]
        written = size = 0
        with progress_bar(len(order), "image", "prepare") as bar:
            for block in map_unordered(_write_block, blocks, workers, _open, faces, output):
                journal.add(block.start)
                images = order[block.start : block.start + RECORDS_PER_BLOCK]
                is_png[images] = block.is_png
                written, size = written + block.written, size + block.bytes
                bar.update(len(images))
    _write_table(output / TABLE, faces, identities, is_png)
    return Prepared(len(order), written, size, len(identities))


_worker: dict[str, Any] = {}


def _open(faces: RecFaceSet, output: Path) -> None:
    _worker.update(faces=faces, output=output)


class _Block(NamedTuple):
    start: int
    is_png: list[bool]
    written: int
    bytes: int


def _write_block(block: tuple[int, np.ndarray, bool]) -> _Block:
    start, images, done = block
    faces: RecFaceSet = _worker["faces"]
    is_png = []
    written = size = 0
    for i in images.tolist():
        image = faces.encoded(i)
        extension = image_extension(image)
        is_png.append(extension == ".png")
        path: Path = _worker["output"] / _file(faces, i, extension)
        if done and path.exists() and path.stat().st_size == len(image):
            continue
        _write(path, image)
        written, size = written + 1, size + len(image)
    return _Block(start, is_png, written, size)


def _file(faces: RecFaceSet, i: int, extension: str) -> str:
    return f"{int(faces.identities[faces.labels[i]]):06d}/{faces.keys[i]:09d}{extension}"


def _write(path: Path, image: bytes) -> None:
    with naming(path):
        try:
            path.write_bytes(image)
        except FileNotFoundError:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(image)


def _write_table(path: Path, faces: RecFaceSet, identities: Sequence[Identity], is_png: np.ndarray) -> None:
    """A line per image, with the label that packing or training on the folders gives, and the one of the records."""
    rows = (
        (faces.keys[i], label, identity.name, _file(faces, i, ".png" if is_png[i] else ".jpg"))
        for label, identity in enumerate(identities)
        for i in identity.images
    )
    with naming(path):
        write_csv_atomic(path, ("key", "label", "identity", "file"), rows)


def _fingerprint(faces: RecFaceSet, order: np.ndarray) -> dict[str, Any]:
    """What the output depends on; the digest tells any two choices of images apart, however they were asked for."""
    digest = hashlib.sha256(faces.keys[order].tobytes())
    digest.update(np.array(faces.identities, np.int64)[faces.labels[order]].tobytes())
    return {
        "rec": faces.path.name,
        "bytes": faces.path.stat().st_size,
        "images": len(order),
        "keys and labels": digest.hexdigest(),
        "block": RECORDS_PER_BLOCK,
    }


class _Journal:
    """Names the blocks that are done: a line for the set, then a line a block.

    A lost line costs writing its block again, so lines are not synced one by one.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.done: set[int] = set()
        self._path = path
        header = json.dumps(fingerprint) + "\n"
        journal = path.read_text(errors="replace") if path.exists() else ""
        if header.startswith(journal):  # none yet, or one that was cut off in its first line
            self._file = path.open("w")
            self._file.write(header)
        elif journal.startswith(header):
            # What follows the last line break is a line that was cut off: its block is not done.
            lines, _, torn = journal.removeprefix(header).rpartition("\n")
            self.done = {int(line) for line in lines.split("\n") if line.isdigit()}
            self._file = path.open("a")
            self._file.write("?\n" if torn else "")
        else:
            raise JournalError(
                f"{path} belongs to another set or choice of identities: name another output, or remove that folder"
            )
        with naming(path):
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("prepare_data", "the same command goes on where it stopped"):
        config = parse_settings(Config, PRESETS, ("prepare", "common"), __doc__, argv)
        print(describe(config, ("prepare", "common")))
        source = Path(config.prepare.rec_data_path or config.data.root[0])
        rec_path = find_rec(source) if source.is_dir() else source
        if rec_path is None or rec_path.suffix != ".rec" or not rec_path.exists():
            raise FaceSetError(f"{source} is no .rec file and no folder with one")
        output = Path(config.prepare.output) if config.prepare.output else rec_path.parent / "images"
        pick = config.prepare
        workers = worker_count(config.common.workers)
        result = prepare(rec_path, output, workers, pick.identities, pick.min_images, pick.limit)
    print(
        f"{output}: {result.images:,} images of {result.identities:,} identities; "
        f"{result.written:,} written now ({result.bytes / 2**20:,.1f} MiB), bytes as in {rec_path}"
    )


if __name__ == "__main__":
    main()
