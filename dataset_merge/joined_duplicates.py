"""The duplicates among all identities that a merge joins; an interrupted search goes on where it was."""

import csv
import hashlib
import itertools
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.face_sets import EncodedImages, FaceSet, images_by_identity
from data.joined_sets import JoinedFaceSet
from dataset_merge.decisions import Decision, members
from dataset_merge.duplicates import CANDIDATE_COSINE, SAME_CORRELATION, Duplicate, find_duplicates
from dataset_merge.unit_rows import UnitRows
from dataset_merge.writing import describe_choice, made_from
from utils.files import csv_line
from utils.processes import map_ordered
from utils.progress import progress_bar
from utils.resumable import GrowingFile, JournalError, ResumableFolder, resumable_folder

COLUMNS = ("image", "original", "kind", "correlation")
_TABLE = "duplicates.csv"
_IDENTITIES_BETWEEN_SAVES = 1000
_IDENTITIES_AT_ONCE = 16
# With fewer images processes would take longer to start than to look.
_IMAGES_FOR_WORKERS = 5000


#: The images under each new label: those of each identity there, in the order they are taken, positions in all sets.
Parts = list[list[np.ndarray]]


class JoinedRows:
    """The embeddings of several sets as those of one, taken a few at a time."""

    def __init__(self, parts: Sequence[UnitRows]) -> None:
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts)])

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        rows = np.empty((len(positions), self._parts[0].shape[1]), np.float32)
        for part, start, end in zip(self._parts, self._starts, self._starts[1:], strict=False):
            own = (positions >= start) & (positions < end)
            rows[own] = part[positions[own] - start].numpy()
        return rows


def parts_of(sets: Sequence[FaceSet], decisions: Sequence[Decision]) -> Parts:
    """Which images go under which label, as decided."""
    starts = np.cumsum([0, *(len(faces) for faces in sets)])
    own = zip(sets, starts, strict=False)
    images = [positions + start for faces, start in own for positions in images_by_identity(faces)]
    return [[images[identity] for identity in identities] for identities in members(decisions)]


def without(duplicates: Sequence[Duplicate], parts: Parts) -> list[np.ndarray]:
    """The positions under each label, int64, less the duplicates."""
    whole = [np.concatenate(images) if len(images) > 1 else images[0] for images in parts]
    if not duplicates:
        return whole
    dropped = np.zeros(1 + max((int(images.max(initial=0)) for images in whole), default=0), bool)
    dropped[[duplicate.image for duplicate in duplicates]] = True
    return [images[~dropped[images]] for images in whole]


def search(
    cache: Path,
    sets: Sequence[FaceSet],
    everything: JoinedFaceSet,
    parts: Parts,
    embeddings: JoinedRows | None,
    made_by: str,
    workers: int,
) -> list[Duplicate]:
    """All duplicates under the labels of several identities, looked for by `workers` processes where there are many.
    `embeddings`: None to go by bytes only; `made_by`: model and way that made them. What is found is kept in the folder
    `cache`; another merge that is at the same search is waited for.
    """
    joined = [images for images in parts if len(images) > 1]
    choice = [np.concatenate(images) for images in joined]
    made = {
        **made_from(sets, choice),
        "identities": describe_choice([image for images in joined for image in images]),
        "model": made_by,
        "limits": [CANDIDATE_COSINE, SAME_CORRELATION] if embeddings is not None else None,
    }
    folder = cache / f"duplicates-{hashlib.sha256(json.dumps(made).encode()).hexdigest()[:16]}"
    if not (folder / _TABLE).exists():
        try:
            with resumable_folder(folder, made, restart=False, wait=True) as work:
                _search(work, everything, joined, embeddings, workers)
        except FileExistsError:
            if not (folder / _TABLE).exists():  # or the merge that was waited for has made it
                raise
    try:
        with (folder / _TABLE).open(newline="") as table:
            rows = csv.reader(table)
            next(rows, None)
            return [Duplicate(int(row[0]), int(row[1]), row[2], float(row[3])) for row in rows]
    except (ValueError, IndexError, csv.Error) as error:
        raise JournalError(
            f"{folder / _TABLE} is damaged ({error}): remove {folder}, and duplicates are looked for again"
        ) from None


def _search(
    work: ResumableFolder,
    everything: JoinedFaceSet,
    joined: Sequence[Sequence[np.ndarray]],
    embeddings: JoinedRows | None,
    workers: int,
) -> None:
    table: GrowingFile = work.open(_TABLE)
    if not table.tell():
        table.write(csv_line(COLUMNS))
    done = saved = int(work.state.get("identities", 0))
    few = sum(map(len, itertools.chain.from_iterable(joined[done:]))) < _IMAGES_FOR_WORKERS
    blocks = _blocks(everything, joined[done:], embeddings)
    with progress_bar(len(joined), "identity", "duplicates", initial=done) as bar:
        for count, found in map_ordered(_search_block, blocks, 0 if few else workers, _start):
            for duplicate in found:
                table.write(csv_line(duplicate))
            done += count
            bar.update(count)
            if done - saved >= _IDENTITIES_BETWEEN_SAVES:
                work.save({"identities": done})
                saved = done


class _Task(NamedTuple):
    """An identity: the positions of the images of each of its parts, the images alone, and their embeddings."""

    parts: Sequence[np.ndarray]
    images: EncodedImages
    unit: np.ndarray | None


def _blocks(
    everything: JoinedFaceSet, joined: Sequence[Sequence[np.ndarray]], embeddings: JoinedRows | None
) -> Iterator[list[_Task]]:
    """What a process gets at a time. The embeddings are read when it does, as those of all may lie in files."""
    for start in range(0, len(joined), _IDENTITIES_AT_ONCE):
        block = joined[start : start + _IDENTITIES_AT_ONCE]
        whole = [np.concatenate(parts) for parts in block]
        yield [
            _Task(parts, everything.part(positions), None if embeddings is None else embeddings[positions])
            for parts, positions in zip(block, whole, strict=True)
        ]


def _start() -> None:
    """This process is one of several, so OpenCV works in it alone."""
    if multiprocessing.parent_process() is not None:
        cv2.setNumThreads(1)


def _search_block(block: Sequence[_Task]) -> tuple[int, list[Duplicate]]:
    """How many identities there were, and their duplicates."""
    found: list[Duplicate] = []
    for parts, images, unit in block:
        positions = np.concatenate(parts).tolist()
        own = np.split(np.arange(len(positions)), np.cumsum([len(part) for part in parts])[:-1])
        found.extend(
            one._replace(image=positions[one.image], original=positions[one.original])
            for one in find_duplicates(images, own, unit)
        )
    return len(block), found
