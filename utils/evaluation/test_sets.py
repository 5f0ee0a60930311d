"""What to test on, whatever it is stored as, opened as one kind of thing."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.align import TEMPLATE_SIZE
from data.face_sets import EncodedImages, FaceSet, FaceSetError, FolderFaceSet, open_face_set
from data.folds import FOLDS
from data.pair_lists import PairFiles
from utils.evaluation.all_pairs import count_pairs
from utils.evaluation.ijb import Ijb, open_ijb
from utils.evaluation.pair_sets import PairSet, open_pair_set

_LISTS = (".txt", ".csv")


@dataclass(frozen=True, eq=False)
class TestSet:
    """A set to test on: exactly one of `pairs`, `faces` and `ijb` is there, and decides the protocol.

    images: the distinct images. people: int64 [images], who is on each, or None where the set does not say.
    identities: the name of each person, or None.
    """

    __test__ = False  # pytest takes every class called Test... for tests

    name: str
    path: Path
    images: EncodedImages
    people: NDArray[np.int64] | None
    identities: list[str] | None
    pairs: PairSet | None = None
    faces: FaceSet | None = None
    ijb: Ijb | None = None

    @property
    def protocol(self) -> str:
        """What is done with the set, in words."""
        if self.pairs is not None:
            return "10 folds"
        return "all pairs" if self.faces is not None else "IJB 1:1 and 1:N"

    def describe(self, image: int) -> str:
        """A short name of an image, for captions; with the identity, where a record's number does not tell."""
        name = short_name(self.images.describe(image))
        if name.startswith("record ") and self.identities is not None and self.people is not None:
            return f"{self.identities[int(self.people[image])]}, {name}"
        return name


_RECORD = re.compile(r"record \d+(?= at byte \d+$)")


def short_name(place: str) -> str:
    """Of where an image lies, as sets describe it, what tells it from others: `record 12`, or file and folder."""
    if record := _RECORD.search(place):
        return record[0]
    return "/".join(place.rsplit("/", 2)[-2:])


def open_test_set(path: Path, name: str, images: Path | None = None, size: int = TEMPLATE_SIZE) -> TestSet:
    """Open a `.bin`, a list of pairs with its folder of `images`, a face set, or a folder of IJB-B or IJB-C.

    A list without a folder takes `images` beside it, else the folder where it lies. Faces of IJB are aligned to size x
    size pixels. Raises FaceSetError and the errors of the formats for anything else, and FaceSetError for a set that
    lacks pairs of one kind.
    """
    if not path.exists():
        raise FaceSetError(f"{path} does not exist")
    opened = _open(path, name, images, size)
    try:
        _require_pairs(opened)
    except ValueError as error:
        raise FaceSetError(f"{name}: {error}") from None
    return opened


def _open(path: Path, name: str, images: Path | None, size: int) -> TestSet:
    if path.suffix == ".bin" or (path.suffix in _LISTS and path.is_file()):
        pairs = open_pair_set(path, None if path.suffix == ".bin" else images or _images_beside(path))
        return TestSet(name, path, pairs.images, pairs.people, None, pairs=pairs)
    if is_ijb(path):
        ijb = open_ijb(path, size)
        return TestSet(name, path, ijb.images, None, None, ijb=ijb)
    faces = open_face_set(path)
    return TestSet(name, path, faces, faces.labels, list(faces.identities), faces=faces)


def _require_pairs(test_set: TestSet) -> None:
    """Raise ValueError for a set that has no protocol: now, not when all of it is embedded."""
    if test_set.faces is not None:
        count_pairs(torch.from_numpy(test_set.faces.labels))
        return
    listed = test_set.pairs or test_set.ijb
    assert listed is not None
    same = listed.same
    if test_set.pairs is not None and len(same) < FOLDS:
        raise ValueError(f"{len(same)} pairs cannot make {FOLDS} folds")
    if same.all() or not same.any():
        raise ValueError(f"all of its {len(same):,} pairs are of one kind: it needs pairs of one person and of two")


def is_ijb(path: Path) -> bool:
    """Whether the folder has the meta files of IJB-B or IJB-C."""
    return any((path / "meta").glob("ijb?_face_tid_mid.txt"))


def _images_beside(path: Path) -> Path:
    beside = path.parent / "images"
    return beside if beside.is_dir() else path.parent


def set_names(paths: Sequence[Path]) -> list[str]:
    """What sets are called in tables and file names: the file's stem or the folder's name, longer where two clash.

    Raises FaceSetError for a set that is named twice.
    """
    parts = [(path.parent if path.name == "train.rec" else path).resolve() for path in paths]
    endings = (".bin", ".rec", *_LISTS)
    names = [part.stem if part.suffix in endings and part.is_file() else part.name for part in parts]
    if len(set(parts)) < len(parts):
        raise FaceSetError(f"a set is named twice: {', '.join(map(str, paths))}")
    return distinct_names(parts, names)


def distinct_names(paths: Sequence[Path], names: Sequence[str]) -> list[str]:
    """`names` of different paths; names that clash become the last parts of their paths, as many as it takes."""
    found, longest = list(names), max(len(path.parts) for path in paths)
    for parts in range(2, longest + 1):
        found = [
            name if found.count(name) == 1 else "_".join(path.parts[-parts:]).lstrip("/")
            for name, path in zip(found, paths, strict=True)
        ]
    return found


def keys_of(test_set: TestSet, kind: str) -> list[str]:
    """What a table of `kind` `image` or `identity` calls each image, or the person on it.

    An image of a folder is called by its path in it, one of a list of pairs by the last two parts of its path, others
    by their number from 0: in a `.rec` the order of the file, in a `.bin` the place where the image comes first.
    Raises FaceSetError where the set does not say who is who.
    """
    if kind == "identity":
        if test_set.identities is not None and test_set.people is not None:
            return [test_set.identities[person] for person in test_set.people]
        if test_set.pairs is not None and test_set.people is not None:
            return [_place(test_set, i).parent.name for i in range(len(test_set.images))]
        raise FaceSetError(f"{test_set.path} does not say who is who: a table for it needs the column `image`")
    if isinstance(test_set.faces, FolderFaceSet):
        faces = test_set.faces
        return [faces.file(i).relative_to(faces.path).as_posix() for i in range(len(faces))]
    if test_set.pairs is not None and test_set.path.suffix == ".bin":
        return [str(first) for first in np.unique(test_set.pairs.index.reshape(-1), return_index=True)[1]]
    if test_set.faces is None:
        return ["/".join(_place(test_set, i).parts[-2:]) for i in range(len(test_set.images))]
    return [str(i) for i in range(len(test_set.images))]


def _place(test_set: TestSet, image: int) -> Path:
    """The file of an image of a list."""
    assert isinstance(test_set.images, PairFiles)
    return test_set.images.file(image)
