"""Whether the records of a `.rec` lie one behind the other: what its index leaves out, and lengths that are wrong.

`offsets`, int64 [records], ascending, are those of an index; `extents`, int64 [records], what `RecordFile.extents` says
of them.
"""

from pathlib import Path
from shlex import quote

import numpy as np

from data.recordio import RECORD_HEAD, IndexedRecordReader, RecordError, RecordFile


def unlisted_bytes(file: RecordFile, offsets: np.ndarray, extents: np.ndarray) -> int:
    """Bytes of the file that lie in no record of the index.

    Records that cannot be read are taken to reach to the next one.
    """
    bounds = np.clip(np.concatenate(([0], offsets, [file.size])), 0, file.size)
    gaps = np.diff(bounds)
    gaps[1:] = np.where(extents > 0, gaps[1:] - extents, 0)
    return int(gaps[gaps >= RECORD_HEAD.size].sum())


def unlisted_remark(index: Path, file: RecordFile, unlisted: int) -> str:
    """What to say of an `.idx` that leaves out `unlisted` bytes of its `.rec`."""
    return (
        f"{index} has no line for {unlisted:,} of the {file.size:,} bytes of {file.path.name}, whose records are not "
        "seen: it was cut off, or lists a part on purpose; if not, move it away, and it is rebuilt from the .rec"
    )


def overlong(file: RecordFile, offsets: np.ndarray, extents: np.ndarray) -> np.ndarray:
    """Positions, int64, of the records in which another one of the index begins.

    No payload has the beginning of a record in it, as it would be cut there: the length of such a record is wrong. An
    offset at which no record begins is a mistake of the index, and says nothing of the record that it points into.
    """
    reaching = np.flatnonzero(extents[:-1] > np.diff(offsets))
    if not reaching.size:
        return reaching
    starts = offsets[file.heads(offsets).begins]
    following = np.append(starts, file.size)[np.searchsorted(starts, offsets[reaching], side="right")]
    return reaching[offsets[reaching] + extents[reaching] > following]


def overlong_remark(extent: int) -> str:
    """What to say of such a record, which has `extent` bytes."""
    return f"its length is wrong: the record has {extent:,} bytes, and another one begins within them"


def require_lengths(reader: IndexedRecordReader, extents: np.ndarray) -> None:
    """Raise RecordError for records that are `overlong`, with the first one."""
    found = overlong(reader.file, reader.offsets, extents)
    if not found.size:
        return
    path, first = reader.file.path, found[0]
    raise RecordError(
        f"{path}, record {reader.keys[first]} at byte {reader.offsets[first]}: {overlong_remark(extents[first])} "
        f"({found.size:,} such records): copy the .rec again, or save the rest by data/report.py {quote(str(path))} "
        "--repair OUT"
    )
