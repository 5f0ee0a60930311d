"""What will be read of a set's `.rec` files next, told to the system. Sets that are folders of files need none."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.face_sets import EncodedImages, FrequentIdentities, JoinedFaceSet, RecFaceSet
from data.recordio import RecordFile

# Records nearer to each other than this are read in one piece.
GAP = 1 << 14


class _Records(NamedTuple):
    """Records of a file: int64 arrays of the bytes where each begins and the next one begins."""

    file: RecordFile
    starts: np.ndarray
    ends: np.ndarray


def expect_random_reads(images: EncodedImages) -> None:
    """From now on images are read one here, one there: what lies beside them is not worth reading."""
    for records in _records(images, np.arange(0)):
        records.file.expect_random_reads()


def read_soon(images: EncodedImages, positions: np.ndarray) -> None:
    """Have the images at `positions` (int64, in any order) read from disk, many at a time, without waiting for it."""
    for file, starts, ends in _records(images, positions):
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        last = np.flatnonzero(starts[1:] - ends[:-1] > GAP)  # of each run but the last one
        firsts, lasts = [0, *(last + 1).tolist()], [*last.tolist(), -1]
        if len(starts):
            for start, end in zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True):
                file.read_soon(start, end)


def _records(images: EncodedImages, positions: np.ndarray) -> Iterator[_Records]:
    """Every `.rec` file behind the images, with the records in it of those at `positions`."""
    if isinstance(images, RecFaceSet):
        file, offsets = images._file, images._offsets  # in the order of the file
        following = np.minimum(positions + 1, len(offsets) - 1)
        ends = np.where(positions + 1 < len(offsets), offsets[following], file.size)
        yield _Records(file, offsets[positions], ends)
    elif isinstance(images, FrequentIdentities):
        yield from _records(images._faces, images._positions[positions])
    elif isinstance(images, JoinedFaceSet):
        for faces, start, end in zip(images._sets, images._starts, images._starts[1:], strict=False):
            inside = positions[(positions >= start) & (positions < end)]
            yield from _records(faces, inside - start)
