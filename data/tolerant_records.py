"""The records of a set that may be damaged, read on behind every damage.

RecFaceSet refuses a set with a broken record; a report on such a set, and its repair, need the rest of it.
"""

from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from data.face_sets import FolderFaceSet, are_identity_numbers, rec_of
from data.images import ImageError
from data.record_extents import overlong, overlong_remark, unlisted_bytes, unlisted_remark
from data.recordio import MAGIC, RecordError, RecordFile, keys_from_ids, read_index, unpack_image
from utils.arrays import distinct
from utils.progress import progress_bar
from utils.regular_files import open_regular_file

KINDS = ("JPEG", "PNG", "other")
SCAN_BYTES = 1 << 24
NO_LABEL = -1
# The share of an index's offsets at which records must lie for the others to count as broken records.
LEAST_FOUND = 0.75


class Place(NamedTuple):
    """Where a record lies; key and offset are empty for a file in a folder."""

    file: str
    key: int | str
    offset: int | str

    def __str__(self) -> str:
        return self.file if self.key == "" else f"{self.file}, record {self.key} at byte {self.offset}"


class Heads(NamedTuple):
    """What the heads of some records say; arrays of equal length."""

    #: int32, the label of an image; NO_LABEL where there is no image or it is broken.
    labels: np.ndarray
    #: int64, bytes of the image.
    image_bytes: np.ndarray
    #: uint8, index into KINDS.
    kinds: np.ndarray
    #: bool, known to be broken without decoding anything.
    broken: np.ndarray


class Records(Protocol):
    """The records of a set, or the files of a tree, in their order, damaged ones included."""

    def __len__(self) -> int: ...

    def part(self, start: int, stop: int) -> "Records":
        """Records `start` to `stop`, to send to another process."""

    def heads(self, start: int, stop: int) -> Heads:
        """What the heads of records `start` to `stop` say."""

    def encoded(self, i: int) -> bytes:
        """The bytes of image `i`; ValueError or OSError when it is broken."""

    def place(self, i: int) -> Place:
        """Where record `i` lies."""

    def identity(self, label: int) -> str:
        """The name of an identity in the set."""


class RecRecords:
    """The records of a `.rec` file in the order of their offsets; `overlong`, bool [records]: those that
    have another one in them, by their lengths.
    """

    def __init__(
        self, file: RecordFile, keys: np.ndarray, offsets: np.ndarray, overlong: np.ndarray, id_start: float
    ) -> None:
        self._file, self._keys, self._offsets, self._overlong = file, keys, offsets, overlong
        self._id_start = id_start

    def __len__(self) -> int:
        return len(self._keys)

    def part(self, start: int, stop: int) -> "RecRecords":
        part = slice(start, stop)
        return RecRecords(self._file, self._keys[part], self._offsets[part], self._overlong[part], self._id_start)

    def encoded(self, i: int) -> bytes:
        where = str(self.place(i))
        if i and self._offsets[i - 1] == self._offsets[i]:
            raise RecordError(f"{where}: record {self._keys[i - 1]} has the same offset: the .idx file is wrong")
        if self._overlong[i]:
            raise RecordError(f"{where}: {overlong_remark(self._file.extents(self._offsets[i : i + 1])[0])}")
        record = unpack_image(self._file.read(int(self._offsets[i])), where)
        if not record.image:
            raise RecordError(f"{where}: its image is empty")
        if not are_identity_numbers(record.labels[0]):
            raise RecordError(f"{where}: label {record.labels[0]} is no identity number: it must be whole, from 0")
        return record.image

    def place(self, i: int) -> Place:
        return Place(str(self._file.path), int(self._keys[i]), int(self._offsets[i]))

    def identity(self, label: int) -> str:
        return str(label)

    def heads(self, start: int, stop: int) -> Heads:
        keys, offsets = self._keys[start:stop], self._offsets[start:stop]
        records = self._file.heads(offsets)
        labels, sizes = self._file.labels(offsets), records.image_bytes
        label_counts = np.maximum(records.label_count, 1)
        first, _ = self._file.image_spans(offsets)
        (starts,) = self._file.words_at(first, 0)

        before = np.arange(start, stop) - 1
        broken = self._overlong[start:stop] | (before >= 0) & (offsets == self._offsets[before])
        for i in np.flatnonzero(~records.whole | (sizes < 0)).tolist():  # cut at an embedded magic, or damaged
            try:
                record = unpack_image(self._file.read(int(offsets[i])), str(self.place(start + i)))
            except RecordError:
                broken[i] = True
                continue
            labels[i], label_counts[i], sizes[i] = record.labels[0], record.labels.size, len(record.image)
            starts[i] = int.from_bytes(record.image[:4], "little")

        # Header and identity records are empty too: a scalar label, or a key before theirs, tells a lost image.
        broken |= (sizes == 0) & (keys != 0) & ((keys < self._id_start) | (label_counts == 1))
        broken |= (sizes > 0) & ~are_identity_numbers(labels)
        good = ~broken & (sizes > 0)
        return Heads(np.where(good, labels, NO_LABEL).astype(np.int32), sizes, _kinds(starts), broken)


def _kinds(starts: np.ndarray) -> np.ndarray:
    """Indices into KINDS by the first four bytes of images, uint32 [images]."""
    is_jpeg, is_png = starts & 0xFFFFFF == 0xFFD8FF, starts == 0x474E5089
    return np.select([is_jpeg, is_png], [0, 1], 2).astype(np.uint8)


class FolderRecords:
    """The image files of a folder of identity folders."""

    def __init__(self, faces: FolderFaceSet) -> None:
        self._faces = faces

    def __len__(self) -> int:
        return len(self._faces)

    def part(self, start: int, stop: int) -> "FolderRecords":
        return FolderRecords(self._faces.part(np.arange(start, min(stop, len(self)))))

    def encoded(self, i: int) -> bytes:
        image = self._faces.encoded(i)
        if not image:
            raise ImageError(f"{self._faces.describe(i)}: the file is empty")
        return image

    def place(self, i: int) -> Place:
        return Place(self._faces.describe(i), "", "")

    def identity(self, label: int) -> str:
        return self._faces.identities[label]

    def heads(self, start: int, stop: int) -> Heads:
        sizes, starts = np.zeros(stop - start, np.int64), np.zeros(stop - start, np.uint32)
        for i in range(stop - start):
            try:
                with open_regular_file(self._faces.file(start + i)) as opened:
                    starts[i] = int.from_bytes(opened.read(4), "little")
                    sizes[i] = opened.seek(0, 2)
            except OSError:
                pass  # a size of 0 says that it is broken; reading it again will say why
        labels = np.where(sizes > 0, self._faces.labels[start:stop], NO_LABEL)
        return Heads(labels.astype(np.int32), sizes, _kinds(starts), sizes == 0)


def open_records(path: Path) -> tuple[Records, list[str]]:
    """The records of a face set as `data.face_sets.open_face_set` takes it, and what is odd about their index.

    Raises FaceSetError when `path` is no face set, RecordError when its `.rec` holds no record at all.
    """
    rec_path = rec_of(path)
    if rec_path is not None:
        return _open_rec(rec_path)
    return FolderRecords(FolderFaceSet(path)), []


def _open_rec(path: Path) -> tuple[RecRecords, list[str]]:
    file, index, remarks = RecordFile(path), path.with_suffix(".idx"), []
    try:
        keys, offsets = read_index(index)
        _require_index_of(file, index, offsets)
        indexed = True
    except (RecordError, FileNotFoundError) as error:
        reason = f"there is no {index.name}" if isinstance(error, FileNotFoundError) else error
        remarks.append(f"the index is not used, records were searched in {path.name}: {reason}")
        keys, offsets = find_records(file)
        indexed = False
    repeated = keys.size - distinct(keys).size
    if repeated:
        remarks.append("some keys occur more than once, so that training refuses the set; --repair numbers anew")
    zero = offsets[keys == 0]
    order = np.lexsort((keys, offsets))
    keys, offsets = keys[order], offsets[order]
    extents = file.extents(offsets)
    too_long = np.zeros(len(offsets), bool)
    too_long[overlong(file, offsets, extents)] = True
    unlisted = unlisted_bytes(file, offsets, extents) if indexed else 0
    if unlisted:
        remarks.append(unlisted_remark(index, file, unlisted))
    return RecRecords(file, keys, offsets, too_long, _id_start(file, zero)), remarks


def _require_index_of(file: RecordFile, index: Path, offsets: np.ndarray) -> None:
    """Raise RecordError if the index is another file's. Offsets behind the end tell nothing: the `.rec` may be cut."""
    inside = offsets[(offsets >= 0) & (offsets < file.size)]
    found = np.count_nonzero(file.extents(inside))
    if found < LEAST_FOUND * inside.size or not inside.size:
        raise RecordError(
            f"{index} seems to be another file's: where {inside.size:,} of its lines point to, there are {found:,} "
            "records; move it away, and training rebuilds it from the .rec"
        )


def _id_start(file: RecordFile, zero: np.ndarray) -> float:
    """The first key of the identity records, less what float32 may have rounded it up, as record 0 states it.

    `zero`: its offset, int64 [1], or [0] when it is missing. 0 then, and when the record is damaged or an image.
    """
    if not zero.size:
        return 0.0
    try:
        record = unpack_image(file.read(int(zero[0])), "record 0")
    except RecordError:
        return 0.0
    if record.image or record.labels.size < 2:
        return 0.0
    id_start = record.labels[0]
    return float(id_start - np.spacing(id_start)) if id_start > 2**24 else float(id_start)


def find_records(file: RecordFile) -> tuple[np.ndarray, np.ndarray]:
    """(keys, offsets) of all records of a file that may be damaged, keys as in `keys_from_ids`.

    Every magic at a multiple of 4 begins a part of a record, because the writer cuts payloads there. Raises RecordError
    when there is none.
    """
    words = file.words()
    found = [np.zeros(0, np.int64)]
    with progress_bar(file.size, "B", "search") as bar:
        for start in range(0, len(words), SCAN_BYTES // 4):
            part = words[start : start + SCAN_BYTES // 4]
            offsets = 4 * (start + np.flatnonzero(part == MAGIC))
            found.append(offsets[file.heads(offsets).begins])
            bar.update(part.nbytes)
    offsets = np.concatenate(found)
    if not offsets.size:
        raise RecordError(f"{file.path} holds no record: it is no .rec file, copy it again")
    low, high = (word.astype(np.uint64) for word in file.words_at(offsets, 4, 5))
    return keys_from_ids(low | high << np.uint64(32)), offsets
