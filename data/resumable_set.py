"""A training set that is packed over several runs: what is kept of it, and how it is known to be the same one.

All its files only grow while images come in: `train.rec` and `train.idx`, `packed.csv` with a line for each finished
identity, `left_out.csv` with one for each image that is left out. The journal of utils/resumable.py holds where the
packing stands, so that the rest is added as if there had been no break.
"""

import csv
import hashlib
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.face_set_writer import FaceSetWriter
from data.face_sets import FaceSet, FaceSetError, FolderFaceSet
from data.fitting import Fit, Fitted, LeftOut
from data.identity_choice import Identity
from data.recordio import RecordAppender
from data.set_sources import ListedFaceSet, stamp
from utils.files import csv_line
from utils.progress import progress_bar
from utils.regular_files import UNREADABLE
from utils.resumable import JournalError, ResumableFolder

PACKED, PACKED_COLUMNS = "packed.csv", ("label", "identity", "images")
LEFT_OUT, LEFT_OUT_COLUMNS = "left_out.csv", ("identity", "image", "reason")
# What a break costs at most; each time waits for the disk.
SECONDS_BETWEEN_SAVES = 10.0


@dataclass
class Standing:
    """Where a packing stands: images taken from the source, what became of them, identities without one left.

    `first_left_out`: which image was the first one, and why. `digest`: of the paths, sizes and times of the image files
    that were taken.
    """

    taken: int = 0
    images: int = 0
    changed: int = 0
    left_out: int = 0
    lost_identities: int = 0
    first_left_out: str = ""
    digest: str = ""

    def __post_init__(self) -> None:
        for field in fields(self):
            if type(getattr(self, field.name)) is not type(field.default):
                raise TypeError(f"{field.name} is {getattr(self, field.name)!r}")


def made_from(faces: FaceSet, identities: Sequence[Identity], fit: Fit) -> dict[str, Any]:
    """All that the bytes of the set depend on, but the image files, by the names that users know."""
    choice = hashlib.sha256()
    for identity in identities:
        choice.update(f"{identity.name}\0{len(identity.images)}\0".encode(errors="surrogateescape"))
        choice.update(identity.images.astype("<i8").tobytes())
    images = sum(len(identity.images) for identity in identities)
    settings = asdict(fit)
    image_size, detection = settings.pop("size"), settings.pop("detection")
    if fit.detection is not None:
        import onnxruntime

        path = fit.detection.path
        detection |= {"path": str(path.resolve()), "onnxruntime": onnxruntime.__version__, "stamps": _stamps(path)}
    return {
        "source": str(faces.path.resolve()),
        "image_root": str(faces.image_root.resolve()) if isinstance(faces, ListedFaceSet) else None,
        "size and time of the source": _stamps(
            faces.path, *([faces.path.with_suffix(".idx")] if faces.path.is_file() else [])
        ),
        "choice of images": f"{images:,} of {len(identities):,} identities, {choice.hexdigest()[:8]}",
        "image_size": image_size,
        **settings,
        "detector": detection,
        "version of OpenCV": cv2.__version__,
    }


def _stamps(*paths: Path) -> list[str]:
    """Sizes and times of those paths that are files."""
    return [stamp(path) for path in paths if path.is_file()]


class ResumableSet:
    """The set of `identities` of `faces`, behind what `folder` has of it already.

    Raises JournalError when an image file that was packed already is not the same any more.
    """

    def __init__(self, folder: ResumableFolder, faces: FaceSet, identities: Sequence[Identity]) -> None:
        try:
            self.standing = Standing(**folder.state)
        except TypeError as error:
            begun = folder.path.parent
            raise JournalError(f"{begun} was begun by another version of this program ({error})") from None
        self._folder, self._faces, self._identities = folder, faces, identities
        self._order = np.concatenate([identity.images for identity in identities])
        self._ends = np.cumsum([len(identity.images) for identity in identities])
        self._current = int(np.searchsorted(self._ends, self.standing.taken, side="right"))
        self._check_files()
        records = RecordAppender(folder.open("train.rec"), folder.open("train.idx"))
        self._writer = FaceSetWriter(folder.path, records, self._ranges(), self.standing.images)
        self._next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def _check_files(self) -> None:
        digest, taken, begun = "", self.standing.taken, self._folder.path.parent
        with progress_bar(taken, "image", "check", disable=not taken) as bar:
            for i in map(int, self._order[:taken]):
                try:
                    digest = self._with_file(digest, i)
                except FileNotFoundError as error:
                    raise JournalError(f"{begun} was begun with an image that is gone, {error.filename}") from None
                bar.update()
        if digest != self.standing.digest:
            raise JournalError(
                f"{begun} was begun with other files: one of the first {taken:,} images was changed since"
            )

    def _with_file(self, digest: str, i: int) -> str:
        """`digest` with the file of image `i` added; those of records are known by their `.rec`."""
        if not isinstance(self._faces, FolderFaceSet | ListedFaceSet):
            return digest
        try:
            known = stamp(self._faces.file(i))
        except OSError as error:
            if error.errno not in UNREADABLE:
                raise
            known = "unreadable"
        line = f"{digest} {known} {self._faces.relative_file(i)}"
        return hashlib.sha256(line.encode(errors="surrogateescape")).hexdigest()

    def _ranges(self) -> list[tuple[int, int]]:
        """The range of keys of every identity that is finished."""
        table = self._folder.open(PACKED)
        if not table.tell():
            table.write(csv_line(PACKED_COLUMNS))
            return []
        ranges, first = [], 1
        with (self._folder.path / PACKED).open(encoding="utf-8", errors="surrogateescape", newline="") as file:
            try:
                for _, _, images in islice(csv.reader(file), 1, None):
                    ranges.append((first, first + int(images)))
                    first += int(images)
            except (ValueError, csv.Error) as error:
                raise JournalError(f"{file.name} is damaged ({error})") from None
        return ranges

    @property
    def rest(self) -> np.ndarray:
        """The positions in the source of the images that are still to be added, int64, in order."""
        return self._order[self.standing.taken :]

    def add(self, image: Fitted | LeftOut) -> None:
        """Take the next image of `rest`."""
        standing, identity = self.standing, self._identities[self._current]
        standing.digest = self._with_file(standing.digest, int(self._order[standing.taken]))
        standing.taken += 1
        if isinstance(image, LeftOut):
            standing.left_out += 1
            standing.first_left_out = standing.first_left_out or f"{image.where}: {image.reason}"
            self._leave_out(identity.name, image.where, image.reason)
        else:
            self._writer.add_image(image.encoded)
            standing.images += 1
            standing.changed += image.changed
        if standing.taken == self._ends[self._current]:
            self._end_identity(identity)
        if time.monotonic() >= self._next_save:
            self._save()

    def _leave_out(self, identity: str, where: str, reason: str) -> None:
        table = self._folder.open(LEFT_OUT)
        if not table.tell():
            table.write(csv_line(LEFT_OUT_COLUMNS))
        table.write(csv_line((identity, where, reason)))

    def _end_identity(self, identity: Identity) -> None:
        images = self._writer.images_of_identity
        if images:
            row = (self._writer.end_identity(), identity.name, images)
            self._folder.open(PACKED).write(csv_line(row))
        else:
            self.standing.lost_identities += 1
            self._leave_out(identity.name, "", f"not one of its {len(identity.images):,} images is left")
        self._current += 1

    def _save(self) -> None:
        self._folder.save(asdict(self.standing))
        self._next_save = time.monotonic() + SECONDS_BETWEEN_SAVES

    def finish(self, image_size: int) -> int:
        """Write what describes the images; returns the number of identities. All images must have been added.

        Raises FaceSetError when each of them was left out.
        """
        if not self._writer.ranges:
            raise FaceSetError(
                f"{self._faces.path}: not one of {self.standing.taken:,} images can be packed; the first: "
                + self.standing.first_left_out
            )
        self._save()
        # Behind the last save: a run that is interrupted here does this once more.
        if isinstance(self._faces, FolderFaceSet):
            for identity, path, reason in self._faces.not_taken:
                self._leave_out(identity, str(path), reason)
        self._writer.finish(image_size)
        return len(self._writer.ranges)
