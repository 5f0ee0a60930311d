"""Face sets written in insightface's layout: `train.rec`, `train.idx`, `property`."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shlex import quote

from config import DataConfig
from data.recordio import RecordAppender, pack_image, write_records
from utils.files import atomic_folder, write_text_atomic

LARGEST_LABEL = 2**24  # float32, which labels are stored as, has no whole numbers between 2^24 and 2^24 + 2


class FaceSetWriter:
    """Adds identities to a set that is being written; made by `write_face_set`.

    A set that was begun earlier goes on behind `images` images in all, those of the finished identities in `ranges`
    and, behind them, those of one that is not finished.
    """

    def __init__(
        self, folder: Path, records: RecordAppender, ranges: Sequence[tuple[int, int]] = (), images: int = 0
    ) -> None:
        #: The working folder: files put here appear together with the set.
        self.folder = folder
        #: The range of image keys (first, last + 1) of each identity so far.
        self.ranges = list(ranges)
        self._records = records
        self._next_key = 1 + images

    @property
    def images(self) -> int:
        """Images so far."""
        return self._next_key - 1

    @property
    def images_of_identity(self) -> int:
        """Images so far of the identity that is not finished."""
        return self._next_key - self._first_key

    @property
    def _first_key(self) -> int:
        return self.ranges[-1][1] if self.ranges else 1

    def add_image(self, image: bytes) -> None:
        """Append an encoded image, bytes as they are, to the identity that is not finished.

        Raises ValueError for an empty one, and for an identity whose label would be above LARGEST_LABEL.
        """
        if not image:
            raise ValueError(f"image {self.images_of_identity} of identity {len(self.ranges)} is empty")
        if len(self.ranges) > LARGEST_LABEL:
            raise ValueError(f"a record holds labels up to {LARGEST_LABEL:,}: write more identities to a second set")
        self._records.write(self._next_key, pack_image(float(len(self.ranges)), self._next_key, image))
        self._next_key += 1

    def end_identity(self) -> int:
        """Finish the identity; the next image is another's. Returns its label; ValueError if it has no images."""
        if not self.images_of_identity:
            raise ValueError(f"identity {len(self.ranges)} has no images")
        self.ranges.append((self._first_key, self._next_key))
        return len(self.ranges) - 1

    def add_identity(self, images: Iterable[bytes]) -> int:
        """Append an identity with its encoded images, bytes as they are; returns its label, or raises as those two."""
        for image in images:
            self.add_image(image)
        return self.end_identity()

    def finish(self, image_size: int) -> None:
        """Write what describes the images: identity records, record 0 and `property`. Raises ValueError without any."""
        if not self.ranges:
            raise ValueError("a face set needs at least one identity")
        identities = (self._next_key, self._next_key + len(self.ranges))
        for key, images in enumerate(self.ranges, self._next_key):
            self._records.write(key, pack_image(images, key, b""))
        self._records.write(0, pack_image(identities, 0, b""))
        write_text_atomic(self.folder / "property", f"{len(self.ranges)},{image_size},{image_size}")


@contextmanager
def write_face_set(folder: Path | str, image_size: int) -> Iterator[FaceSetWriter]:
    """Write insightface's layout (`train.rec`, `train.idx`, `property`) into a folder that appears only when whole.

    Records: 1..n the images, identity after identity; n+1.. one per identity with its range of image keys; 0, written
    last, with the range of the identity records. Raises FileExistsError when `folder` is there and not empty.

        with write_face_set("merged", image_size=112) as out:
            out.add_identity([jpeg_bytes, ...])      # label 0
    """
    with atomic_folder(folder) as working, write_records(working / "train.rec") as records:
        writer = FaceSetWriter(working, records)
        yield writer
        writer.finish(image_size)


def training_advice(folder: Path | str, image_size: int) -> str:
    """The command that trains on the set in `folder`, of images of image_size x image_size pixels."""
    size = "" if image_size == DataConfig.image_size else f" --data.image-size {image_size}"
    return f"train on it with: python train.py --data.root {quote(str(folder))}{size}"
