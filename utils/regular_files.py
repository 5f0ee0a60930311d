"""Reading files that may turn out to be something else."""

import errno
import os
import stat
from functools import partial
from io import BufferedReader, BytesIO, FileIO
from pathlib import Path
from typing import BinaryIO

#: Errors of the system that say what a file is: a link that leads around in a circle, a pipe, a folder. One that is
#: missing, or may not be read, may be so with all others of its disk.
UNREADABLE = frozenset((errno.ELOOP, errno.EINVAL, errno.EISDIR))


def open_regular_file(path: Path) -> FileIO:
    """The file at `path`, unbuffered, to read.

    Raises OSError for what is no file, or no link to one: reading a pipe would wait for ever, a device never end.
    """
    return FileIO(os.fspath(path), opener=_open)


def read_regular_file(path: Path) -> bytes:
    """The bytes of the file at `path`. Raises OSError as `open_regular_file` does."""
    with open_regular_file(path) as file:
        return file.readall()


def open_file_or_pipe(path: Path) -> BinaryIO:
    """The file at `path`, to read from any place in it; of a pipe, such as a shell's `<(...)`, all that comes out.

    Raises OSError as `open_regular_file` does, and for a pipe that nothing comes out of, as no program writes to it.
    """
    file = FileIO(os.fspath(path), opener=partial(_open, pipes=True))
    if not stat.S_ISFIFO(os.fstat(file.fileno()).st_mode):
        return BufferedReader(file)
    with file:
        content = file.readall()
    if not content:
        raise OSError(errno.EINVAL, "a pipe with nothing in it, to which no program writes", str(path))
    return BytesIO(content)


def _open(path: str, flags: int, pipes: bool = False) -> int:
    # Opening a pipe would wait for its other end; whoever waits there to write is let in by this, too.
    descriptor = os.open(path, flags | os.O_NONBLOCK)
    mode = os.fstat(descriptor).st_mode
    if pipes and stat.S_ISFIFO(mode):
        os.set_blocking(descriptor, True)
    elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, Python itself says that it is one
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file, but a pipe or a device", path)
    return descriptor
