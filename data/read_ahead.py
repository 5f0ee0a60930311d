"""What will be read of a set's `.rec` files next, told to the system. Sets that are folders of files need none."""

from collections.abc import Sequence

import numpy as np

from data.face_sets import EncodedImages, InRecords

# Records nearer to each other than this are read in one piece.
GAP = 1 << 14


def expect_random_reads(images: EncodedImages) -> None:
    """From now on images are read one here, one there: what lies beside them is not worth reading."""
    if isinstance(images, InRecords):
        for records in images.spans(np.arange(0)):
            records.file.expect_random_reads()


def read_soon(images: EncodedImages, positions: np.ndarray) -> None:
    """Have the images at `positions` (int64, in any order) read from disk, many at a time, without waiting for it."""
    if not isinstance(images, InRecords):
        return
    for file, starts, ends in images.spans(positions):
        order = np.argsort(starts)
        starts, ends = starts[order], ends[order]
        last = np.flatnonzero(starts[1:] - ends[:-1] > GAP)  # of each run but the last one
        firsts, lasts = [0, *(last + 1).tolist()], [*last.tolist(), -1]
        if len(starts):
            for start, end in zip(starts[firsts].tolist(), ends[lasts].tolist(), strict=True):
                file.read_soon(start, end)


def why_unreadable(images: EncodedImages, positions: Sequence[int]) -> str | None:
    """Which of the images in records at `positions` the system cannot read, and why; None when it can read them all."""
    if not isinstance(images, InRecords):
        return None
    for i in positions:
        for file, starts, ends in images.spans(np.array([i])):
            for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
                reason = file.why_unreadable(start, end)
                if reason:
                    return f"{images.describe(i)}: {reason}"
    return None
