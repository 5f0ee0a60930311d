"""Reading files that may turn out to be something else."""

import errno
import os
import stat
from io import FileIO
from pathlib import Path


def open_regular_file(path: Path) -> FileIO:
    """The file at `path`, unbuffered, to read.

    Raises OSError for what is no file, or no link to one: reading a pipe would wait for ever, a device never end.
    """
    return FileIO(os.fspath(path), opener=_open)


def read_regular_file(path: Path) -> bytes:
    """The bytes of the file at `path`. Raises OSError as `open_regular_file` does."""
    with open_regular_file(path) as file:
        return file.readall()


def _open(path: str, flags: int) -> int:
    descriptor = os.open(path, flags | os.O_NONBLOCK)  # else opening a pipe waits for its other end
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # of a folder, Python itself says that it is one
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a file, but a pipe or a device", path)
    return descriptor
