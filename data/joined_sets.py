"""Face sets made of others: several joined, or without the identities of few images."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data.face_sets import FaceSet, FaceSetError, ImageSubset, InRecords, RecordSpans, image_views, open_face_set
from data.images_fingerprint import images_fingerprint, joined_digest


class JoinedFaceSet:
    """Several sets as one, the identities of each apart from those of the others.

    Memory: that of the sets and 8 bytes an image.
    """

    def __init__(self, sets: Sequence[FaceSet]) -> None:
        self._sets = sets
        self.path = Path(",".join(str(faces.path) for faces in sets))
        self.identities = [f"{faces.path}: {name}" for faces in sets for name in faces.identities]
        first_labels = np.cumsum([0, *(len(faces.identities) for faces in sets)])
        self.labels = np.concatenate([faces.labels + first for faces, first in zip(sets, first_labels, strict=False)])
        self._starts = np.cumsum([0, *(len(faces) for faces in sets)])

    @property
    def identity_keys(self) -> list[str]:
        """See `identity_keys`."""
        return [f"{number}: {name}" for number, faces in enumerate(self._sets) for name in faces.identities]

    def __len__(self) -> int:
        return len(self.labels)

    def _locate(self, i: int) -> tuple[FaceSet, int]:
        number = int(np.searchsorted(self._starts, i, side="right")) - 1
        return self._sets[number], i - int(self._starts[number])

    def encoded(self, i: int) -> bytes:
        faces, position = self._locate(i)
        return faces.encoded(position)

    def describe(self, i: int) -> str:
        faces, position = self._locate(i)
        return faces.describe(position)

    def part(self, positions: np.ndarray) -> "JoinedFaceSet":
        """See Divisible. Raises ValueError unless `positions` go through the sets in their order."""
        numbers = np.searchsorted(self._starts, positions, side="right") - 1
        if (np.diff(numbers) < 0).any():
            raise ValueError("a part of joined sets has to have their images in the order of the sets")
        return JoinedFaceSet(
            [faces.part(positions[numbers == number] - self._starts[number]) for number, faces in enumerate(self._sets)]
        )

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        return joined_digest([images_fingerprint(faces) for faces in self._sets])

    def spans(self, positions: np.ndarray) -> Iterator[RecordSpans]:
        for faces, start, end in zip(self._sets, self._starts, self._starts[1:], strict=False):
            if isinstance(faces, InRecords):
                yield from faces.spans(positions[(positions >= start) & (positions < end)] - start)

    def views(self, positions: np.ndarray) -> list[np.ndarray | None]:
        views: list[np.ndarray | None] = [None] * len(positions)
        for faces, start, end in zip(self._sets, self._starts, self._starts[1:], strict=False):
            rows = np.flatnonzero((positions >= start) & (positions < end))
            for row, view in zip(rows.tolist(), image_views(faces, positions[rows] - start), strict=True):
                views[row] = view
        return views


class FrequentIdentities(ImageSubset):
    """The identities of a set that have `min_images` images or more, numbered anew without holes.

    Memory: that of the set and 16 bytes an image.
    """

    def __init__(self, faces: FaceSet, min_images: int) -> None:
        self._faces = faces
        self.path = faces.path
        kept = np.bincount(faces.labels, minlength=len(faces.identities)) >= min_images
        if not kept.any():
            raise FaceSetError(f"{faces.path}: no identity has {min_images} images (data.min_images)")
        self._kept = np.flatnonzero(kept)
        self.identities = [faces.identities[label] for label in self._kept.tolist()]
        super().__init__(faces, np.flatnonzero(kept[faces.labels]))
        self.labels = (np.cumsum(kept) - 1)[faces.labels[self.positions]]

    @property
    def identity_keys(self) -> list[str]:
        """See `identity_keys`."""
        keys = identity_keys(self._faces)
        return [keys[label] for label in self._kept.tolist()]

    def part(self, positions: np.ndarray) -> FaceSet:
        return self._faces.part(self.positions[positions])

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        return joined_digest(images_fingerprint(self._faces), self.positions)

    def spans(self, positions: np.ndarray) -> Iterator[RecordSpans]:
        if isinstance(self._faces, InRecords):
            yield from self._faces.spans(self.positions[positions])

    def views(self, positions: np.ndarray) -> list[np.ndarray | None]:
        return image_views(self._faces, self.positions[positions])


def identity_keys(faces: FaceSet) -> list[str]:
    """Names of the identities that do not depend on how the paths of sets are spelled: those of joined sets have the
    number of their set in place of its path.
    """
    return getattr(faces, "identity_keys", faces.identities)


def open_training_set(paths: Sequence[Path | str], min_images: int) -> FaceSet:
    """The sets at `paths` as one, without the identities that have fewer than `min_images` images.

    Raises FaceSetError for a set that comes twice, whose people would be two of each.
    """
    sets = [open_face_set(path) for path in paths]
    places = [faces.path.resolve() for faces in sets]
    twice = next((faces.path for faces, place in zip(sets, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise FaceSetError(f"{twice} is named twice")
    faces: FaceSet = sets[0] if len(sets) == 1 else JoinedFaceSet(sets)
    return faces if min_images <= 1 else FrequentIdentities(faces, min_images)
