#!/usr/bin/env python3
"""Turn a `.rec` set into folders of images: OUTPUT/<label>/<key>.jpg, the bytes as they are in the records.

    python data/prepare_data.py --rec_data_path datasets/ms1mv3 --output datasets/ms1mv3_images

Nothing is decoded or encoded again. An interrupted run goes on where it stopped: a journal in OUTPUT names the blocks
of records that are done, whose files are only checked by size; all others are written (again).
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, Config
from data.face_sets import FaceSetError, RecFaceSet, find_rec
from data.images import image_extension
from utils.processes import map_unordered, worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings

JOURNAL = ".prepare_journal.jsonl"
RECORDS_PER_BLOCK = 1000


class JournalError(ValueError):
    """The output folder holds something else."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: images in the set, of them written now, bytes written now, identities."""

    images: int
    written: int
    bytes: int
    identities: int


def prepare(rec_path: Path, output: Path, workers: int) -> Prepared:
    """Write every image of `rec_path` to `output`/<label:06d>/<key:09d>.jpg (.png when it is one).

    `workers` processes do it; 0 means this one. Raises RecordError for damaged records, JournalError when `output`
    holds something else, OSError when the disk is full: after any of them, the same call goes on.
    """
    faces = RecFaceSet(rec_path)
    output.mkdir(parents=True, exist_ok=True)
    if any(output.iterdir()) and not (output / JOURNAL).exists():
        raise JournalError(f"{output} is not empty and no earlier run's: name another output")
    with _Journal(output / JOURNAL, _fingerprint(faces)) as journal:
        starts = range(0, len(faces), RECORDS_PER_BLOCK)
        blocks = [(start, min(start + RECORDS_PER_BLOCK, len(faces)), start in journal.done) for start in starts]
        written = size = 0
        with progress_bar(len(faces), "image", "prepare") as bar:
            for block in map_unordered(_write_block, blocks, workers, _open, faces, output):
                journal.add(block.start)
                written, size = written + block.written, size + block.bytes
                bar.update(block.images)
    return Prepared(len(faces), written, size, len(faces.identities))


_worker: dict[str, Any] = {}


def _open(faces: RecFaceSet, output: Path) -> None:
    _worker.update(faces=faces, output=output)


class _Block(NamedTuple):
    start: int
    images: int
    written: int
    bytes: int


def _write_block(block: tuple[int, int, bool]) -> _Block:
    start, stop, done = block
    faces: RecFaceSet = _worker["faces"]
    written = size = 0
    for i in range(start, stop):
        image = faces.encoded(i)
        folder = _worker["output"] / f"{int(faces.identities[faces.labels[i]]):06d}"
        path = folder / f"{faces.keys[i]:09d}{image_extension(image)}"
        if done and path.exists() and path.stat().st_size == len(image):
            continue
        folder.mkdir(exist_ok=True)
        path.write_bytes(image)
        written, size = written + 1, size + len(image)
    return _Block(start, stop - start, written, size)


def _fingerprint(faces: RecFaceSet) -> dict[str, Any]:
    return {
        "rec": faces.path.name,
        "bytes": faces.path.stat().st_size,
        "images": len(faces),
        "block": RECORDS_PER_BLOCK,
    }


class _Journal:
    """Names the blocks that are done: a line for the set, then a line a block.

    A lost line costs writing its block again, so lines are not synced one by one.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.done: set[int] = set()
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
            raise JournalError(f"{path} belongs to another set: name another output, or remove that folder")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def add(self, start: int) -> None:
        if start not in self.done:
            self.done.add(start)
            self._file.write(f"{start}\n")
            self._file.flush()

    def __exit__(self, *error: object) -> None:
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
        result = prepare(rec_path, output, worker_count(config.common.workers))
    print(
        f"{output}: {result.images:,} images of {result.identities:,} identities; "
        f"{result.written:,} written now ({result.bytes / 2**20:,.1f} MiB), bytes as in {rec_path}"
    )


if __name__ == "__main__":
    main()
