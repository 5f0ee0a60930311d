"""Files and folders that are either whole or not there: made beside their place, synced, then renamed.

Unfinished work on `NAME` lies in the folder `.NAME.partial` beside it, whatever NAME is and whoever makes it, and is
locked by the process that does. The kernel releases the lock when that process dies, also by `kill -9`. What a killed
process left is removed by the next one with the same target, unless it has a journal (utils/resumable.py) to go on by.
"""

import csv
import errno
import fcntl
import io
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TextIO, TypeVar

LOCK = ".lock"
JOURNAL = ".journal.json"

#: Seconds for which a network file system may show what was before another machine wrote (NFS: 60, as a rule).
SEEN_WITHIN = 90.0

_Found = TypeVar("_Found")

# What flock answers on a file system that has no locks.
_NO_LOCKS = {errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP}


class BusyError(OSError):
    """Another process is writing the same file or folder."""


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def partial_folder(path: Path) -> Path:
    """Where unfinished work on `path` lies: hidden, in the same folder, so that the rename stays in one file system."""
    return path.with_name(f".{path.name}.partial")


def look_again(folder: Path) -> None:
    """Let the next look into `folder` be a fresh one, on NFS too, which remembers for a while what was not there."""
    for place in (*reversed(folder.parents[:2]), folder):
        with suppress(OSError), os.scandir(place):  # NFS asks the server when a folder is opened
            pass


def seen(probe: Callable[[], _Found | None], folder: Path, seconds: float = SEEN_WITHIN) -> _Found | None:
    """What `probe` finds of what another process, perhaps on another machine, has put into `folder`; None: it was not
    seen here in so many `seconds`."""
    deadline, pause = time.monotonic() + seconds, 0.002
    while (found := probe()) is None and time.monotonic() < deadline:
        time.sleep(pause)
        pause = min(2 * pause, 0.25)
        look_again(folder)
    return found


@contextmanager
def unfinished(path: Path, wait: bool, resume: bool = False) -> Iterator[Path]:
    """Yield `partial_folder(path)`, locked and empty; afterwards it is removed, or, where it cannot be, warned of.

    When another process has it, `wait` for that to end, or raise BusyError. With `resume` it may have something in it,
    and is kept as long as it has a journal; without, a journal there raises FileExistsError.
    """
    partial = partial_folder(path)
    lock = _lock(partial, path, wait)
    try:
        if (partial / JOURNAL).exists() and not resume:
            raise FileExistsError(
                f"{partial} holds unfinished work on {path}: go on with it by the command that began it, "
                "name another output, or remove it first"
            )
        if not resume:
            clear_partial(partial)
        yield partial
    finally:
        kept = (partial / JOURNAL).exists()
        try:
            if not kept:
                clear_partial(partial)
                (partial / LOCK).unlink()
        except OSError as error:  # which is no reason for what is done to count as failed
            warnings.warn(f"{error.filename or partial} could not be removed ({error.strerror})", stacklevel=4)
        finally:
            os.close(lock)
        if not kept:
            with suppress(OSError):  # the next process may have come in already: then the folder is its own
                partial.rmdir()


def _lock(partial: Path, path: Path, wait: bool) -> int:
    """A descriptor that holds the lock file of `partial`."""
    while True:
        with suppress(FileExistsError):
            partial.mkdir()
        if partial.is_symlink():  # it may have come with other people's files; what it leads to would be removed
            raise FileExistsError(f"{partial} is a link, where unfinished work on {path} would lie: remove the link")
        try:
            lock = os.open(partial / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:
            continue  # whoever had the folder has just removed it
        try:
            lock_file(lock, partial / LOCK, path, wait)
        except OSError:
            os.close(lock)
            raise
        if _is_at(partial / LOCK, lock):
            return lock
        os.close(lock)


def lock_file(descriptor: int, file: Path, target: Path, wait: bool) -> None:
    """Lock the open `file` for who writes `target`, until it is closed; on a file system without locks, warn.

    When another process has it, `wait` for that to end, or raise BusyError.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        raise BusyError(f"{target} is being written by another process: wait for it, or name another output") from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise OSError(error.errno, error.strerror, str(file)) from error
        warnings.warn(f"{file.parent}: no locks here ({error.strerror}): let one process at a time write", stacklevel=6)


def _is_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one at `path`, not one that was removed meanwhile."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def clear_partial(partial: Path) -> None:
    """Remove all but the lock from a folder that `unfinished` yielded."""
    # The journal goes first: without it nothing takes what else is left for work to go on with.
    (partial / JOURNAL).unlink(missing_ok=True)
    for entry in partial.iterdir():
        if entry.name != LOCK:
            remove(entry)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary path to write to; it becomes `path`, synced, when the block ends without error.

    Another process that writes the same file is waited for.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(path, wait=True) as partial:
        temporary = partial / path.name
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


class _NamedFile(io.FileIO):
    """A file to write, which becomes `path`: a failed write names that, unlike one to Python's own files."""

    def __init__(self, temporary: Path, path: Path) -> None:
        super().__init__(temporary, "w")
        self._path = path

    def write(self, data: Any, /) -> int:
        with naming(self._path):
            return super().write(data)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[BinaryIO]:
    """Open `path` for writing bytes; it appears, complete and synced, only when the block ends without error."""
    with atomic_path(path) as temporary, io.BufferedWriter(_NamedFile(temporary, Path(path))) as file:
        yield file


def write_text_atomic(path: Path | str, text: str) -> None:
    """Write `text` as UTF-8 to `path`, all or nothing; names that are no UTF-8 keep their bytes."""
    with atomic_write(path) as file:
        file.write(text.encode(errors="surrogateescape"))


class _EndedByLineFeeds:
    """What a csv.writer writes a row at a time to: told to end them so itself, it would not quote carriage returns."""

    def __init__(self, text: TextIO) -> None:
        self._text = text

    def write(self, row: str) -> int:
        return self._text.write(row.removesuffix("\r\n") + "\n")


def write_csv_atomic(path: Path | str, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV with a header line to `path`, all or nothing; names that are no UTF-8 keep their bytes."""
    with (
        atomic_write(path) as file,
        io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="") as text,
    ):
        writer = csv.writer(_EndedByLineFeeds(text))
        writer.writerow(header)
        writer.writerows(rows)


def csv_line(row: Sequence[object]) -> bytes:
    """A line of a CSV as `write_csv_atomic` writes it."""
    text = io.StringIO(newline="")
    csv.writer(_EndedByLineFeeds(text)).writerow(row)
    return text.getvalue().encode(errors="surrogateescape")


def require_free(folder: Path | str) -> None:
    """Raise FileExistsError when `folder` is there and not empty: nothing that is there is ever replaced."""
    shown, folder = folder, Path(folder).resolve()
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    partial = partial_folder(folder)
    if partial.is_dir() and not (partial / folder.name).exists():
        # A process was killed after the folder had got its name. What it left is no work; a failure leaves it there.
        with suppress(OSError), unfinished(folder, wait=False, resume=True):
            if not (partial / folder.name).exists():
                clear_partial(partial)
    raise FileExistsError(f"{shown} exists and is not empty: name another output, or remove it first")


def nearest_existing(folder: Path) -> Path:
    """The folder, or the one nearest above it that is there."""
    folder = folder.resolve()
    return folder if folder.exists() else nearest_existing(folder.parent)


def require_writable(output: Path) -> None:
    """Raise OSError where nothing can be put beside `output`: its first byte may come after hours of work."""
    place = nearest_existing(output.parent)
    if not place.is_dir():
        raise NotADirectoryError(f"{output} cannot be written, as {place} is a file: name another output")
    if not os.access(place, os.W_OK | os.X_OK):
        raise PermissionError(f"{output} cannot be written, as {place} may not be written to: name another output")


@contextmanager
def atomic_folder(folder: Path | str) -> Iterator[Path]:
    """Yield an empty working folder that becomes `folder` when the block ends without error.

    Raises FileExistsError when `folder` exists and is not empty, or when work on it was interrupted that can go on;
    BusyError when another process is writing it.
    """
    folder = Path(folder).resolve()
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, wait=False) as partial:
        require_free(folder)  # another process may have finished it meanwhile
        working = partial / folder.name
        working.mkdir()
        yield working
        publish(working, folder)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name the file in an OSError: those of writing, unlike those of opening, do not say where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # not the system's: it says all that there is to say
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def publish(working: Path, folder: Path) -> None:
    """Give a finished working folder its name, on the disk as well. Raises OSError when `folder` is not empty."""
    sync_folder(working)
    working.replace(folder)
    sync_folder(folder.parent)
