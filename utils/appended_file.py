"""A file to append to that survives a full disk."""

from collections.abc import Callable
from pathlib import Path


class AppendedFile:
    """Appends bytes to a file, unbuffered. What cannot be written is kept in memory and tried again at the next write.

    `say` is given a line for people when that begins, when all is written, and when something is lost in the end.
    """

    def __init__(self, path: Path, say: Callable[[str], object]) -> None:
        """Raises OSError when the file cannot be opened."""
        self._path, self._say = path, say
        # Not buffered: what was written and what was not is known to the byte.
        self._file = path.open("ab", buffering=0)
        self._waiting = bytearray()
        self._failing = False

    def write(self, data: bytes) -> None:
        """Append `data`, and before it what waits."""
        self._waiting += data
        try:
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if not self._failing:
                self._say(f"{self._path} cannot be written ({error.strerror}): it is kept in memory and tried again")
            self._failing = True
            return
        if self._failing:
            self._say(f"{self._path} is written again, and has all that was kept")
        self._failing = False

    def flush(self) -> None:
        """Try again to write what waits."""
        self.write(b"")

    def close(self) -> None:
        """Write what waits, or say that it is lost; and close the file."""
        self.flush()
        if self._waiting:
            self._say(f"{self._path}: the last {len(self._waiting):,} bytes could not be written")
        self._file.close()
