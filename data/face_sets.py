"""Face sets: encoded images with an identity each, whatever they are stored as.

A face set has `labels` (int64 [images], class indices 0..identities-1 without holes), `identities` (the name of each
class in its source: the label of a `.rec`, the folder of a tree) and `encoded(i)`, the bytes of image i as stored.
"""

import os
import warnings
from collections.abc import Iterator, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from shlex import quote
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from data.images_fingerprint import files_digest
from data.index_cache import CACHED_FROM, ImageIndex, load_index, save_index
from data.record_extents import require_lengths, unlisted_bytes, unlisted_remark
from data.recordio import IMAGE_HEADER_SIZE, IndexedRecordReader, RecordError, RecordFile, unpack_image
from utils.progress import progress_bar
from utils.regular_files import read_regular_file
from utils.texts import Texts

#: How many numbers an identity may have: they fit into 32 bits.
IDENTITY_NUMBERS = 2**31
IMAGE_ENDINGS = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp"}
_HEADERS_AT_ONCE = 1 << 16
_FOLDERS_SHOWN = 10_000  # from which on reading them shows its progress
# What Windows puts beside images, as other systems do under names that begin with a dot.
_HIDDEN = ("thumbs.db", "desktop.ini")
_LONGEST_PROPERTY = 100  # characters
_NAMED = 3  # of what is not taken for one reason, in a message
_DEEPER = "a folder within that of an identity"
_NO_IMAGE = f"not named {', '.join(sorted(IMAGE_ENDINGS))}"
_WITHOUT_IMAGES = "a folder without images"
_BESIDE = "in no folder"
_REASONS = (_DEEPER, _NO_IMAGE, _WITHOUT_IMAGES, _BESIDE)


class FaceSetError(ValueError):
    """A path holds no face set, or one that contradicts itself; the message says what was found."""


class EncodedImages(Protocol):
    """Images in encoded form, by position."""

    def __len__(self) -> int: ...

    def encoded(self, i: int) -> bytes:
        """The bytes of image `i` as they are stored (JPEG, PNG, ...)."""

    def describe(self, i: int) -> str:
        """Where image `i` lies, for messages."""


class Divisible(EncodedImages, Protocol):
    """Images of which some can be sent to another process, which large sets are too large for."""

    def part(self, positions: np.ndarray) -> EncodedImages:
        """The images at `positions`, int64, alone, to be read and described."""


class FaceSet(Divisible, Protocol):
    """Encoded images with an identity each."""

    path: Path
    labels: np.ndarray
    identities: list[str]

    def part(self, positions: np.ndarray) -> "FaceSet":
        """As of Divisible; its labels and identities say nothing."""


class RecordSpans(NamedTuple):
    """Records of a file: int64 arrays of the bytes where each begins and the next one begins."""

    file: RecordFile
    starts: np.ndarray
    ends: np.ndarray


@runtime_checkable
class InRecords(Protocol):
    """Images of which some or all lie in `.rec` files."""

    def spans(self, positions: np.ndarray) -> Iterator[RecordSpans]:
        """Every `.rec` file behind the images, with the records in it of those at `positions`, int64."""

    def views(self, positions: np.ndarray) -> list[np.ndarray | None]:
        """The encoded images at `positions`, int64, as uint8 arrays that are parts of the file, which is not copied.

        None for those that do not lie there in one piece, damaged ones among them: `encoded` reads them, or raises.
        """


class RecFaceSet:
    """The images of a `.rec` file, in the order of the file.

    `labels`: int64 [images], classes 0..C-1; `identities`: the label of each class in the file, as text;
    `keys`: int64 [images], the record key of each image.
    Memory: 24 bytes an image, and more for a moment while it is opened.
    The image records' own labels decide who is who. The ranges in the header and identity records are float32, which
    cannot hold keys above 2**24 exactly, so they are not used; those records are known by their empty image.
    Raises FaceSetError for a file without images, RecordError when it or its `.idx` is damaged.
    """

    def __init__(self, rec_path: Path | str) -> None:
        self.path = Path(rec_path)
        self._file = RecordFile(self.path)
        images = load_index(self._file) or self._read_index()
        self.keys, self._offsets, self.labels = images.keys, images.offsets, images.labels
        self.identities = [str(label) for label in images.identities]
        self._compare_with_property()

    def _read_index(self) -> ImageIndex:
        reader = IndexedRecordReader(self.path)
        labels, has_image = _read_labels(reader)
        extents = reader.file.extents(reader.offsets)
        require_lengths(reader, extents)
        unlisted = unlisted_bytes(reader.file, reader.offsets, extents)
        if unlisted:
            remark = unlisted_remark(self.path.with_suffix(".idx"), reader.file, unlisted)
            warnings.warn(remark, stacklevel=4)
        records = len(has_image)
        keys, offsets, labels = reader.keys[has_image], reader.offsets[has_image], labels[has_image]
        del reader, has_image, extents  # as long as the set, and so are the arrays that sorting takes
        if not labels.size:
            raise FaceSetError(f"{self.path} has {records} records and not one image")
        wrong = np.flatnonzero(~are_identity_numbers(labels))
        if wrong.size:
            first = wrong[0]
            raise RecordError(
                f"{self.path}, record {keys[first]} at byte {offsets[first]}: label {labels[first]} is no identity "
                f"number ({wrong.size} such records): labels must be whole numbers from 0; the set is written without "
                f"such records by data/report.py {quote(str(self.path))} --repair OUT"
            )
        identities, classes = np.unique(labels.astype(np.int64), return_inverse=True)
        images = ImageIndex(keys, offsets, classes, identities)
        if records >= CACHED_FROM and not unlisted:  # what is kept would be opened without the warning
            save_index(self._file, images)
        return images

    def _compare_with_property(self) -> None:
        line, found = property_line(self.path), len(self.identities)
        stated = None if line is None else line.split(",")[0].strip()
        if stated not in (None, str(found)):
            path = self.path.with_name("property")
            warnings.warn(
                f"{path} states {stated!r} identities, the images have {found}: the images are believed", stacklevel=3
            )

    def __len__(self) -> int:
        return len(self.labels)

    def encoded(self, i: int) -> bytes:
        payload = self._file.read(int(self._offsets[i]))
        # Text that names the record is made for damaged ones only: this runs for every image of every epoch.
        start = IMAGE_HEADER_SIZE + 4 * int.from_bytes(payload[:4], "little")
        return payload[start:] if start < len(payload) else unpack_image(payload, self.describe(i)).image

    def describe(self, i: int) -> str:
        return f"{self.path}, record {self.keys[i]} at byte {self._offsets[i]}"

    def part(self, positions: np.ndarray) -> "RecFaceSet":
        part = copy(self)
        part.keys, part._offsets, part.labels = self.keys[positions], self._offsets[positions], self.labels[positions]
        part.identities = []
        return part

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        return files_digest(self, [self.path], self._offsets)

    def spans(self, positions: np.ndarray) -> Iterator[RecordSpans]:
        offsets, last = self._offsets, len(self._offsets) - 1
        ends = np.where(positions < last, offsets[np.minimum(positions + 1, last)], self._file.size)
        yield RecordSpans(self._file, offsets[positions], ends)

    def views(self, positions: np.ndarray) -> list[np.ndarray | None]:
        file = self._file.view()
        first, end = self._file.image_spans(self._offsets[positions])
        return [file[i:j] if j else None for i, j in zip(first.tolist(), end.tolist(), strict=True)]


def property_line(rec_path: Path) -> str | None:
    """The first line of the file `property` beside a `.rec`, `identities,height,width`, of what may be endless, its
    beginning; None without that file.
    """
    path = rec_path.with_name("property")
    if not path.is_file():
        return None
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline(_LONGEST_PROPERTY).strip()


def are_identity_numbers(labels: np.ndarray) -> np.ndarray:
    """Which labels of records, float of any shape, can be numbers of identities: bool of that shape."""
    with np.errstate(invalid="ignore"):  # where no record begins, the bytes may be anything
        return (labels >= 0) & (labels < IDENTITY_NUMBERS) & (labels == np.floor(labels))


def _read_labels(reader: IndexedRecordReader) -> tuple[np.ndarray, np.ndarray]:
    """(label float64 [records], has an image bool [records]) of every record, from one pass over the headers."""
    file, labels, has_image = reader.file, np.zeros(len(reader)), np.zeros(len(reader), bool)
    large = len(reader) >= CACHED_FROM
    with progress_bar(len(reader), "record", f"labels of {file.path}", disable=not large) as bar:
        for start in range(0, len(reader), _HEADERS_AT_ONCE):
            offsets = reader.offsets[start : start + _HEADERS_AT_ONCE]
            heads = file.heads(offsets)
            part = slice(start, start + len(offsets))
            with np.errstate(invalid="ignore"):  # where no record begins, the bytes may be anything
                labels[part] = file.labels(offsets)
            has_image[part] = heads.image_bytes > 0
            for i in np.flatnonzero(~heads.whole | (heads.image_bytes < 0)):  # cut at an embedded magic, or damaged
                where = f"{file.path}, record {reader.keys[start + i]} at byte {offsets[i]}"
                record = unpack_image(file.read(int(offsets[i])), where)
                labels[start + i], has_image[start + i] = record.labels[0], bool(record.image)
            bar.update(len(offsets))
    return labels, has_image


class NotTaken(NamedTuple):
    """A file or folder in a tree of images that is not one of its images, and why."""

    identity: str
    path: Path
    reason: str


class NotTakenEntries:
    """The NotTaken ones of the tree `root`, in order. Memory: the bytes of their paths within it, and nine each."""

    def __init__(self, root: Path) -> None:
        self._root, self._paths, self._kinds = root, Texts(), bytearray()

    def add(self, path: str, reason: str) -> None:
        """One more, by its path within the tree."""
        self._paths.append(path)
        self._kinds.append(_REASONS.index(reason))

    def __iter__(self) -> Iterator[NotTaken]:
        for i, kind in enumerate(self._kinds):
            identity = "" if _REASONS[kind] == _BESIDE else self._paths[i].partition("/")[0]
            yield NotTaken(identity, self._root / self._paths[i], _REASONS[kind])

    def __bool__(self) -> bool:
        return bool(self._kinds)

    def describe(self) -> str:
        """The first ones of each kind, for messages."""
        kinds = []
        for kind in dict.fromkeys(self._kinds):
            count, place, named = self._kinds.count(kind), -1, []
            for _ in range(min(count, _NAMED)):
                place = self._kinds.index(kind, place + 1)
                named.append(self._paths[place])
            more = f" and {count - len(named):,} more" if count > len(named) else ""
            kinds.append(f"{', '.join(named)}{more} ({_REASONS[kind]})")
        return "; ".join(kinds)


class FolderFaceSet:
    """A tree `<root>/<identity>/<image>`; identities in `identity_order`, images in the order of their names.

    A warning names what else lies there, except hidden entries and files beside the folders that are not images;
    `not_taken` lists it. Raises FaceSetError for a tree without images, for one of sets that hold records, in which
    images are pictures of the set, and for a link to a folder that is not there.
    """

    def __init__(self, root: Path | str) -> None:
        self.path = Path(root)
        self.identities = []
        self.not_taken = NotTakenEntries(self.path)
        self._names = Texts()
        counts = []
        folders = self._folders()
        ordered = [folders[position] for position in identity_order([entry.name for entry in folders])]
        shown = len(ordered) >= _FOLDERS_SHOWN
        for folder in progress_bar(len(ordered), "folder", str(self.path), iterable=ordered, disable=not shown):
            images = 0
            for name, is_folder in _entries(folder):
                if not is_folder and _is_image(name):
                    self._names.append(name)
                    images += 1
                elif name.endswith(".rec") and not is_folder:
                    raise FaceSetError(
                        f"{folder} holds {name}, so it is a set of its own, and {self.path} no folder of identities: "
                        "name the set"
                    )
                else:
                    self.not_taken.add(f"{folder.name}/{name}", _DEEPER if is_folder else _NO_IMAGE)
            if images:
                self.identities.append(folder.name)
                counts.append(images)
            else:
                self.not_taken.add(folder.name, _WITHOUT_IMAGES)
        if not counts:
            deeper = next((path.parent for _, path, reason in self.not_taken if reason == _DEEPER), None)
            raise FaceSetError(
                f"{self.path} has no folders of images (one folder per identity)"
                + (f": {self.not_taken.describe()}" if self.not_taken else "")
                + (f": if the identities are the folders in {deeper}, name that" if deeper else "")
            )
        if self.not_taken:
            warnings.warn(f"{self.path}: not taken are {self.not_taken.describe()}", stacklevel=3)
        self.labels = np.repeat(np.arange(len(counts)), counts)

    def _folders(self) -> list[Path]:
        folders = []
        for entry in self.path.iterdir():
            if _is_hidden(entry.name):
                continue
            if entry.is_dir():
                folders.append(entry)
            elif not entry.exists():
                raise FaceSetError(f"{entry} is a link to {entry.readlink()}, which is not there: mend or remove it")
            elif _is_image(entry.name):
                self.not_taken.add(entry.name, _BESIDE)
        return folders

    def __len__(self) -> int:
        return len(self.labels)

    def file(self, i: int) -> Path:
        """The file of image `i`."""
        return self.path / self.relative_file(i)

    def relative_file(self, i: int) -> str:
        """`<identity>/<image>`, the same however the path of the set is spelled."""
        return f"{self.identities[self.labels[i]]}/{self._names[i]}"

    def encoded(self, i: int) -> bytes:
        return read_regular_file(self.file(i))

    def describe(self, i: int) -> str:
        return str(self.file(i))

    def part(self, positions: np.ndarray) -> "FolderFaceSet":
        part = copy(self)
        part._names, part.not_taken = self._names.part(positions), NotTakenEntries(self.path)
        part.identities = [self.identities[label] for label in self.labels[positions].tolist()]
        part.labels = np.arange(len(positions))
        return part

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        images = range(len(self))
        return files_digest(self, map(self.file, images), [self.relative_file(i) for i in images])


def _entries(folder: Path) -> list[tuple[str, bool]]:
    """What is in `folder` and not hidden, by name: the name, and whether it is a folder."""
    with os.scandir(folder) as entries:
        return sorted((entry.name, _is_folder(entry)) for entry in entries if not _is_hidden(entry.name))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads around in a circle, say: whoever reads it says so
        return False


def _is_hidden(name: str) -> bool:
    # macOS leaves a `._face.jpg` beside each face that it copies.
    return name[0] == "." or name.lower() in _HIDDEN


def _is_image(name: str) -> bool:
    return name[name.rfind(".") :].lower() in IMAGE_ENDINGS and not _is_hidden(name)


class ImageSubset:
    """The images of `images` at `positions`, int64, as EncodedImages."""

    def __init__(self, images: EncodedImages, positions: np.ndarray) -> None:
        self._images, self.positions = images, positions

    def __len__(self) -> int:
        return len(self.positions)

    def encoded(self, i: int) -> bytes:
        return self._images.encoded(int(self.positions[i]))

    def describe(self, i: int) -> str:
        return self._images.describe(int(self.positions[i]))


def image_views(images: EncodedImages, positions: np.ndarray) -> list[np.ndarray | None]:
    """The `views` of a set that has them; None for every image of another."""
    return images.views(positions) if isinstance(images, InRecords) else [None] * len(positions)


def only_set(roots: Sequence[str], flag: str) -> Path:
    """The set of `data.root`, for a script that takes one and was told none by `flag`.

    Raises FaceSetError, naming the flag, where there are several, or the one is not there.
    """
    if len(roots) > 1:
        raise FaceSetError(f"data.root names {len(roots)} sets ({', '.join(roots)}): one at a time, {flag}")
    if not Path(roots[0]).exists():
        raise FaceSetError(f"no set is named: {flag} (data.root is {roots[0]}, which does not exist)")
    return Path(roots[0])


def images_by_identity(faces: FaceSet, keys: np.ndarray | None = None) -> list[np.ndarray]:
    """The positions of each identity's images, int64, in order, or in that of `keys`, [images]."""
    order = np.argsort(faces.labels, kind="stable") if keys is None else np.lexsort((keys, faces.labels))
    ends = np.cumsum(np.bincount(faces.labels, minlength=len(faces.identities))).tolist()
    return [order[start:end] for start, end in pairwise([0, *ends])]


def identity_order(names: list[str]) -> list[int]:
    """Positions of `names` in the order that labels are given in: numbers by value, any other names by alphabet.

    So `999999` comes before `1000000`, which the alphabet has the other way round. Names of one value, `7` and `007`,
    are in the order of the alphabet, not in that of the disk.
    """
    if all(name.isascii() and name.isdigit() for name in names):
        # The order of their values, which Python does not make of thousands of digits.
        digits = [name.lstrip("0") for name in names]
        return sorted(range(len(names)), key=lambda i: (len(digits[i]), digits[i], names[i]))
    return sorted(range(len(names)), key=names.__getitem__)


def find_rec(folder: Path) -> Path | None:
    """The `.rec` of a set's folder: `train.rec`, or the only one there is; None without any.

    Raises FaceSetError for several others.
    """
    found = sorted(path for path in folder.glob("*.rec") if path.name[0] != "." and path.is_file())
    if folder / "train.rec" in found:
        return folder / "train.rec"
    if len(found) > 1:
        raise FaceSetError(
            f"{folder} has several .rec files ({', '.join(p.name for p in found)}): name the one you mean"
        )
    return found[0] if found else None


def rec_of(path: Path) -> Path | None:
    """The `.rec` of the face set at `path`; None where it is a folder of folders. Raises FaceSetError for neither."""
    if not path.exists():
        raise FaceSetError(f"{path} does not exist")
    if path.is_dir():
        return find_rec(path)
    if path.suffix != ".rec":
        raise FaceSetError(
            f"{path} is no face set: expected a .rec file or a folder, which data/pack_set.py makes of a list or CSV"
        )
    return path


def open_face_set(path: Path | str) -> FaceSet:
    """Open a `.rec` file, a folder that holds one, or a folder with one folder of images per identity.

    Raises FaceSetError when `path` is none of these, RecordError when the records are damaged.
    """
    path = Path(path)
    rec_path = rec_of(path)
    return RecFaceSet(rec_path) if rec_path else FolderFaceSet(path)
