"""The RecordIO container (`.rec` + `.idx`) and the image record header inside it, without mxnet.

A record is `u32 magic, u32 lrec = cflag << 29 | length`, `length` payload bytes and zero padding to a multiple of 4,
all little-endian. A payload that holds the magic at an aligned offset is cut there: the writer drops those 4 bytes and
numbers the parts with cflag 1 (first), 2 (middle) and 3 (last); the reader puts the magic back between them.
The format is dmlc-core's `recordio.h`; the header is `mxnet.recordio.IRHeader`.
"""

import mmap
import struct
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shlex import quote
from typing import NamedTuple, Protocol

import numpy as np

from utils.arrays import distinct
from utils.files import atomic_write
from utils.progress import progress_bar
from utils.text_files import read_whole_numbers

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
LENGTH_BITS = 29
LENGTH_MASK = (1 << LENGTH_BITS) - 1
WHOLE, FIRST, MIDDLE, LAST = range(4)  # cflag

RECORD_HEAD = struct.Struct("<II")
_IMAGE_HEADER = struct.Struct("<IfQQ")
IMAGE_HEADER_SIZE = _IMAGE_HEADER.size
_ID = struct.Struct("<Q")  # of the image header, at its byte 8
_HEADS_AT_ONCE = 1 << 16
_FIRST_RECORD_WITHIN = 1 << 20  # bytes
_SCAN_SHOWN = 1 << 30  # bytes of a file from which on walking it shows its progress


class RecordError(ValueError):
    """A `.rec` or `.idx` file is not what it should be; the message names file, record and offset."""


def encode_record(payload: bytes) -> bytes:
    """The bytes that mxnet's writer puts into a `.rec` file for `payload`.

    Raises RecordError when a part has 2**29 bytes or more, which the format cannot hold.
    """
    parts = _cut_at_magic(payload)
    encoded = bytearray()
    for number, part in enumerate(parts):
        if len(part) > LENGTH_MASK:
            raise RecordError(f"a record part of {len(part)} bytes does not fit the format's {LENGTH_BITS}-bit length")
        if len(parts) == 1:
            flag = WHOLE
        elif number == 0:
            flag = FIRST
        else:
            flag = LAST if number == len(parts) - 1 else MIDDLE
        encoded += RECORD_HEAD.pack(MAGIC, flag << LENGTH_BITS | len(part))
        encoded += part
        encoded += bytes(-len(part) % 4)
    return bytes(encoded)


def _cut_at_magic(payload: bytes) -> list[bytes]:
    parts = []
    start = 0
    found = payload.find(MAGIC_BYTES)
    while found >= 0:
        if found % 4 == 0:
            parts.append(payload[start:found])
            start = found + 4
            found = payload.find(MAGIC_BYTES, start)
        else:
            found = payload.find(MAGIC_BYTES, found + 1)
    parts.append(payload[start:])
    return parts


class ImageRecord(NamedTuple):
    """An image record taken apart: labels as float32 array, the two ids, the encoded image (may be empty)."""

    labels: np.ndarray
    id: int
    id2: int
    image: bytes


def pack_image(label: float | Sequence[float], id: int, image: bytes, id2: int = 0) -> bytes:
    """The payload of an image record: a scalar label sits in the header, several follow it as float32."""
    if isinstance(label, Sequence):
        header = _IMAGE_HEADER.pack(len(label), 0.0, id, id2)
        return header + np.asarray(label, "<f4").tobytes() + image
    return _IMAGE_HEADER.pack(0, label, id, id2) + image


def unpack_image(payload: bytes, where: str) -> ImageRecord:
    """Take the payload of an image record apart; `where` names it in the RecordError of a damaged one."""
    if len(payload) < IMAGE_HEADER_SIZE:
        raise RecordError(
            f"{where}: {len(payload)} bytes are too few for an image record's header of {IMAGE_HEADER_SIZE}"
        )
    flag, label, id, id2 = _IMAGE_HEADER.unpack_from(payload)
    image_start = IMAGE_HEADER_SIZE + 4 * flag
    if image_start > len(payload):
        raise RecordError(f"{where}: its header announces {flag} labels, more than its {len(payload)} bytes hold")
    if flag:
        labels = np.frombuffer(payload, "<f4", count=flag, offset=IMAGE_HEADER_SIZE)
    else:
        labels = np.array([label], np.float32)
    return ImageRecord(labels, id, id2, payload[image_start:])


class RecordHeads(NamedTuple):
    """What some records begin with, arrays of one length: whether a record `begins` there, and is `whole`, neither cut
    at an embedded magic nor at the end of the file; the `length` of its payload, and the `label_count` that follow its
    image header, both int64, 0 where the only label is in the header. Where no record begins, they are arbitrary.
    """

    begins: np.ndarray
    whole: np.ndarray
    length: np.ndarray
    label_count: np.ndarray

    @property
    def image_bytes(self) -> np.ndarray:
        """Bytes of the image, int64 [records]; negative where more labels are announced than the payload holds."""
        return self.length - IMAGE_HEADER_SIZE - 4 * self.label_count


class RecordFile:
    """Random access to the payloads of a `.rec` file by byte offset.

    The file is memory-mapped, so reading needs no lock and no shared file position: one object may be used in forked
    processes, and a pickled one maps the file anew. Raises RecordError for a file too small for a record.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._map()

    def _map(self) -> None:
        self.size = self.path.stat().st_size
        if self.size < RECORD_HEAD.size:
            found = f"has {self.size} bytes" if self.size else "is empty"
            raise RecordError(f"{self.path} holds no record: it {found}, copy it again")
        with self.path.open("rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._view = np.frombuffer(self._bytes, np.uint8)
        self._words = self._view[: self.size // 4 * 4].view("<u4")  # records begin at multiples of 4

    def __getstate__(self) -> dict[str, Path]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.path = state["path"]
        self._map()

    def expect_random_reads(self) -> None:
        """From now on, in this process and those forked from it, read what is looked at and nothing around it."""
        if hasattr(mmap, "MADV_RANDOM"):  # not on every system
            self._bytes.madvise(mmap.MADV_RANDOM)

    def read_soon(self, start: int, end: int) -> None:
        """Have bytes `start` to `end` read from disk, without waiting for it."""
        if hasattr(mmap, "MADV_WILLNEED") and 0 <= start < self.size:
            page = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._bytes.madvise(mmap.MADV_WILLNEED, page, end - page)

    def why_unreadable(self, start: int, end: int) -> str | None:
        """What the system says when it is asked for bytes `start` to `end`, not by the mapping, where an error ends the
        process; None when it has them.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                size = self.path.stat().st_size
                if size < end:
                    return f"the file has {size:,} bytes, {self.size:,} when it was opened: it was changed while in use"
                file.seek(start)
                file.read(end - start)
        except OSError as error:
            return str(error)
        return None

    def view(self) -> np.ndarray:
        """The whole file as a read-only uint8 array; only the pages that are looked at are read."""
        return self._view

    def words(self) -> np.ndarray:
        """The same as a uint32 array: records, their heads and payloads begin at multiples of 4 bytes."""
        return self._words

    def words_at(self, offsets: np.ndarray, *places: int) -> list[np.ndarray]:
        """Words of the records at `offsets`, int64: uint32 [records] for each of `places`, counted from the magic on.

        2: how many labels follow the image header, 3: the label in it, 4 and 5: the id, 8: the first that follows.
        What would lie outside of the file is arbitrary.
        """
        first = np.clip(offsets // 4, 0, len(self._words) - 1)
        return [self._words[np.minimum(first + place, len(self._words) - 1)] for place in places]

    def heads(self, offsets: np.ndarray) -> RecordHeads:
        """What the records at `offsets`, int64, begin with."""
        magic, lrec, label_count = self.words_at(offsets, 0, 1, 2)
        flag, length = lrec >> LENGTH_BITS, (lrec & LENGTH_MASK).astype(np.int64)
        begins = (magic == MAGIC) & ((flag == WHOLE) | (flag == FIRST))
        begins &= (offsets >= 0) & (offsets <= self.size - RECORD_HEAD.size) & (offsets % 4 == 0)
        whole = begins & (flag == WHOLE) & (offsets + RECORD_HEAD.size + length <= self.size)
        return RecordHeads(begins, whole, length, label_count.astype(np.int64))

    def labels(self, offsets: np.ndarray) -> np.ndarray:
        """The first label of the records at `offsets`, float32 [records]; arbitrary where no record is `whole`."""
        count, in_header, first_behind = self.words_at(offsets, 2, 3, 8)
        return np.where(count > 0, first_behind.view("<f4"), in_header.view("<f4"))

    def image_spans(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(first, end) bytes of the images in the records at `offsets`, all int64 [records].

        `end` is 0 for a record whose image is not one piece of the file: it is cut at an embedded magic, has no image,
        or is damaged. `read` and `unpack_image` tell which.
        """
        heads = self.heads(offsets)
        size, end = heads.image_bytes, offsets + RECORD_HEAD.size + heads.length
        return end - size, np.where(heads.whole & (size > 0), end, 0)

    def extents(self, offsets: np.ndarray) -> np.ndarray:
        """Bytes of each record at `offsets`, int64 [records], from its beginning to the next one's; 0 where no whole
        record can be read.
        """
        extents = np.zeros(len(offsets), np.int64)
        for start in range(0, len(offsets), _HEADS_AT_ONCE):
            part = offsets[start : start + _HEADS_AT_ONCE]
            heads = self.heads(part)
            ends = part + RECORD_HEAD.size + heads.length
            extents[start : start + len(part)] = np.where(
                heads.whole, np.minimum(ends + -ends % 4, self.size) - part, 0
            )
            for i in np.flatnonzero(heads.begins & ~heads.whole).tolist():  # cut at an embedded magic, or damaged
                with suppress(RecordError):
                    extents[start + i] = self._read_with_end(int(part[i]))[1] - part[i]
        return extents

    def read(self, offset: int) -> bytes:
        """The payload of the record that begins at byte `offset`, its parts joined; RecordError if none can be read."""
        # Nearly all records are whole, and this runs for every image of every epoch: with cflag 0, lrec is the length.
        if 0 <= offset <= self.size - RECORD_HEAD.size:
            magic, length = RECORD_HEAD.unpack_from(self._bytes, offset)
            start = offset + RECORD_HEAD.size
            if magic == MAGIC and length <= LENGTH_MASK and start + length <= self.size:
                return self._bytes[start : start + length]
        return self._read_with_end(offset)[0]

    def _read_with_end(self, offset: int) -> tuple[bytes, int]:
        parts: list[bytes] = []
        while True:
            flag, start, end = self._part(offset)
            if (flag in (WHOLE, FIRST)) != (not parts):
                expected = "a continuation" if parts else "the start of a record"
                raise RecordError(f"{self.path}: expected {expected} at byte {offset}, found a part with cflag {flag}")
            parts.append(self._bytes[start:end])
            offset = end + -(end - start) % 4
            if flag in (WHOLE, LAST):
                return MAGIC_BYTES.join(parts), offset

    def _part(self, offset: int) -> tuple[int, int, int]:
        """(cflag, start, end) of the record part at `offset`."""
        start = offset + RECORD_HEAD.size
        if not 0 <= offset <= self.size - RECORD_HEAD.size:
            raise RecordError(f"{self.path}: no record can begin at byte {offset}, the file has {self.size} bytes")
        magic, lrec = RECORD_HEAD.unpack_from(self._bytes, offset)
        if magic != MAGIC:
            raise RecordError(
                f"{self.path}: no record begins at byte {offset} (found {magic:#010x} in place of the magic): "
                + self._advice()
            )
        flag, length = lrec >> LENGTH_BITS, lrec & LENGTH_MASK
        if start + length > self.size:
            raise RecordError(
                f"{self.path}: the record at byte {offset} has {length} bytes, but the file ends at {self.size}: "
                "it was cut off, copy it again"
            )
        return flag, start, start + length

    def _advice(self) -> str:
        """What to do where no record begins."""
        if self._bytes.find(MAGIC_BYTES, 0, _FIRST_RECORD_WITHIN) < 0:
            return f"it is no .rec file, it begins with {self._bytes[:16]!r}: copy it again"
        mend = "the .rec is damaged (copy it again, or save the rest by data/report.py --repair)"
        if not self.path.with_suffix(".idx").exists():
            return mend
        return f"the .idx was cut off or is another file's (move it away, and it is rebuilt), or {mend}"

    def scan(self) -> tuple[np.ndarray, np.ndarray]:
        """Walk the whole file: (keys, offsets), int64, where the keys are as in `keys_from_ids`.

        Raises RecordError at the first damage.
        """
        ids, offsets = array("Q"), array("q")
        offset = 0
        shown = self.size >= _SCAN_SHOWN
        with progress_bar(self.size, "B", f"index of {self.path}", disable=not shown) as bar:
            while offset < self.size:
                flag, start, end = self._part(offset)
                if flag == WHOLE and end - start >= IMAGE_HEADER_SIZE:  # nearly all: its image need not be read
                    id, following = _ID.unpack_from(self._bytes, start + 8)[0], end + -(end - start) % 4
                else:
                    payload, following = self._read_with_end(offset)
                    id = unpack_image(payload, f"{self.path}, record at byte {offset}").id
                ids.append(id)
                offsets.append(offset)
                offset = following
                if not len(ids) % _HEADS_AT_ONCE:
                    bar.update(offset - bar.n)
            bar.update(offset - bar.n)
        return keys_from_ids(np.frombuffer(ids, np.uint64)), np.array(offsets, np.int64)


def keys_from_ids(ids: np.ndarray) -> np.ndarray:
    """Keys for the records of a file without index, int64 [records], from the ids in their headers, uint64 [records].

    They are the ids; where those are no keys, occurring more than once or being too large, the positions.
    """
    keys = ids.astype(np.int64)
    unique = len(distinct(keys)) == len(keys) and (keys >= 0).all()
    return keys if unique else np.arange(len(keys))


def read_index(path: Path | str) -> tuple[np.ndarray, np.ndarray]:
    """Read an `.idx` file: (keys, byte offsets), int64, in the order of its lines.

    Raises RecordError for an empty file, and for lines that are not two whole numbers.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise RecordError(f"{path} is empty: remove it and the index is rebuilt from the .rec")
    cure = "move it away, and it is rebuilt from the .rec"
    try:
        table = read_whole_numbers(path)
    except ValueError as error:
        raise RecordError(f"{path}: every line must be 'key<tab>byte offset': {error}; {cure}") from error
    if not table.size:
        raise RecordError(f"{path} has blank lines only: {cure}")
    if table.shape[1] != 2:
        raise RecordError(f"{path}: every line must be 'key<tab>byte offset', found {table.shape[1]} columns; {cure}")
    return table[:, 0].copy(), table[:, 1].copy()


class IndexedRecordReader:
    """Records of a `.rec` file by key.

    Attributes: `keys` and `offsets`, int64 arrays of equal length in the order of the file; `file`, the RecordFile.
    Without an `.idx` file the index is rebuilt by walking the `.rec` (see `keys_from_ids`). Raises RecordError for
    damage, and for an index in which a key or an offset occurs twice.
    """

    def __init__(self, rec_path: Path | str) -> None:
        self.file = RecordFile(rec_path)
        index = self.file.path.with_suffix(".idx")
        keys, offsets = read_index(index) if index.exists() else self.file.scan()
        in_file_order = np.argsort(offsets, kind="stable")
        self.keys, self.offsets = keys[in_file_order], offsets[in_file_order]
        same = np.flatnonzero(self.offsets[1:] == self.offsets[:-1])
        if same.size:
            first, second = self.keys[same[0]], self.keys[same[0] + 1]
            raise RecordError(
                f"{index}: records {first} and {second} have the same offset, {self.offsets[same[0]]} ({same.size} "
                "such pairs): the file is wrong; move it away, and it is rebuilt from the .rec"
            )
        self._by_key = np.argsort(self.keys, kind="stable")
        ordered = self.keys[self._by_key]
        repeated = ordered[1:][ordered[1:] == ordered[:-1]]
        if repeated.size:
            raise RecordError(
                f"{index}: key {repeated[0]} occurs more than once ({repeated.size} such keys): move it away, and it "
                "is rebuilt from the .rec; or have the set written with new keys by "
                f"data/report.py {quote(str(rec_path))} --repair OUT"
            )

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, key: int) -> bytes:
        """The payload of record `key`; KeyError when there is none."""
        position = np.searchsorted(self.keys, key, sorter=self._by_key)
        if position == len(self.keys) or self.keys[self._by_key[position]] != key:
            raise KeyError(f"{self.file.path} has no record {key}")
        return self.file.read(int(self.offsets[self._by_key[position]]))


class RecordSink(Protocol):
    """What records are appended to: a binary file."""

    def write(self, data: bytes, /) -> object: ...

    def tell(self) -> int: ...


class RecordAppender:
    """Appends records to an open `.rec`, and their lines to its open `.idx`; both go on where they are."""

    def __init__(self, rec: RecordSink, idx: RecordSink) -> None:
        self._rec, self._idx = rec, idx
        self._offset = rec.tell()

    def write(self, key: int, payload: bytes) -> None:
        """Append a record; keys are the caller's, in any order."""
        record = encode_record(payload)
        self._idx.write(b"%d\t%d\n" % (key, self._offset))
        self._rec.write(record)
        self._offset += len(record)


@contextmanager
def write_records(rec_path: Path | str) -> Iterator[RecordAppender]:
    """Write a `.rec` and its `.idx`; both appear, complete and synced, when the `with` block ends without error."""
    path = Path(rec_path)
    with atomic_write(path) as rec, atomic_write(path.with_suffix(".idx")) as idx:
        yield RecordAppender(rec, idx)
