"""A folder that is made over several runs and appears when whole: files that only grow, and a journal.

The journal says what the folder is made from, how many bytes of each file are known to be on the disk, and what its
maker needs to go on from there. A run that goes on cuts off what is beyond, and removes files that it does not name.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from utils.files import JOURNAL, clear_partial, naming, publish, remove, require_free, sync_folder, unfinished


class JournalError(ValueError):
    """What an interrupted run left is not what this one would go on with; the message says how they differ."""


class GrowingFile:
    """A binary file to append to. A failed write names it, unlike one of Python's own files."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("ab")
        self._size = self._file.tell()

    def write(self, data: bytes, /) -> None:
        with naming(self._path):
            self._file.write(data)
        self._size += len(data)

    def tell(self) -> int:
        return self._size

    def sync(self) -> None:
        """Bring all that was written onto the disk."""
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())

    def abandon(self) -> None:
        """Close the file; what is not on the disk yet may be lost."""
        with suppress(OSError):  # of a full disk, which an error told of already
            self._file.close()


class ResumableFolder:
    """A folder in the making; made by `resumable_folder`.

    `path`: the working folder; what else is put there appears with it, but is made anew by each run.
    `state`: what the maker gave to the last `save`, empty when there is nothing to go on with.
    """

    def __init__(
        self, path: Path, journal: Path, made_from: Mapping[str, Any], or_from: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.state: dict[str, Any] = {}
        self._journal = journal
        self._made_from, self._or_from = (json.loads(json.dumps(one)) for one in (made_from, or_from))
        self._sizes: dict[str, int] = {}
        self._files: dict[str, GrowingFile] = {}
        if journal.exists():
            self._take_over()
        else:
            path.mkdir()

    def _take_over(self) -> None:
        try:
            kept = json.loads(self._journal.read_text())
            made_from, self._sizes, self.state = kept["made_from"], kept["bytes"], kept["state"]
            _require_journal(made_from, self._sizes, self.state)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise JournalError(f"{self._journal} is damaged ({error!r})") from None
        if made_from not in (self._made_from, self._or_from):
            names = [name for name in {**made_from, **self._made_from} if _differs(name, made_from, self._made_from)]
            raise JournalError(
                f"{self._journal.parent} was begun with another "
                + ", ".join(_difference(name, made_from, self._made_from) for name in names)
            )
        for name, size in self._sizes.items():
            path = self.path / name
            found = path.stat().st_size if path.exists() else 0
            if found < size:
                raise JournalError(f"{path} has {found} bytes, {size} were written")
            os.truncate(path, size)
        for entry in self.path.iterdir():
            if entry.name not in self._sizes:
                remove(entry)

    def open(self, name: str) -> GrowingFile:
        """The file `name` of the folder, to append to."""
        if name not in self._files:
            self._files[name] = GrowingFile(self.path / name)
        return self._files[name]

    def save(self, state: Mapping[str, Any]) -> None:
        """Bring what was written onto the disk, then note how far it goes, and `state`."""
        self.sync()
        self._sizes |= {name: file.tell() for name, file in self._files.items()}
        text = json.dumps({"made_from": self._made_from, "bytes": self._sizes, "state": dict(state)}) + "\n"
        new = self._journal.with_name(f"{self._journal.name}.new")
        with naming(new), new.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        new.replace(self._journal)
        sync_folder(new.parent)

    def sync(self) -> None:
        """Bring what was written onto the disk."""
        for file in self._files.values():
            file.sync()
        sync_folder(self.path)

    def close(self) -> None:
        """Give up the files."""
        for file in self._files.values():
            file.abandon()


def _require_journal(made_from: Any, sizes: Any, state: Any) -> None:
    """Raise TypeError unless they are what `save` writes: no file outside of the folder is ever cut off."""
    if not all(isinstance(part, dict) for part in (made_from, sizes, state)):
        raise TypeError("not three objects")
    for name, size in sizes.items():
        if Path(name).name != name or type(size) is not int or size < 0:
            raise TypeError(f"{size!r} bytes of {name!r}")


def _differs(name: str, one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return name not in one or name not in other or one[name] != other[name]


def _difference(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    return f"{name} ({old.get(name)!r}, now {new.get(name)!r})"


@contextmanager
def resumable_folder(
    folder: Path | str,
    made_from: Mapping[str, Any],
    restart: bool,
    or_from: Mapping[str, Any] | None = None,
    wait: bool = False,
) -> Iterator[ResumableFolder]:
    """Yield a ResumableFolder that becomes `folder` when the block ends without error.

    `made_from`, of what JSON holds, is all that the content depends on. What a run with the same one saved is gone on
    with, unless `restart` discards it; so is one with `or_from`, whose content up to an interruption is the same.
    Raises JournalError when one with another was interrupted, FileExistsError when `folder` exists and is not empty,
    BusyError when another process is writing it, which with `wait` is waited for.
    """
    folder = Path(folder).resolve()
    require_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with unfinished(folder, wait, resume=True) as partial:
        require_free(folder)  # another process may have finished it meanwhile
        journal = partial / JOURNAL
        if restart or not (journal.exists() and (partial / folder.name).exists()):
            clear_partial(partial)
        sync_folder(folder.parent)
        work = ResumableFolder(partial / folder.name, journal, made_from, or_from)
        try:
            yield work
            work.sync()
        finally:
            work.close()
        publish(work.path, folder)
        journal.unlink(missing_ok=True)
