"""Progress bars with rate and ETA: live on a terminal, a line now and then in a log file."""

import os
import re
import sys
from threading import RLock
from typing import Any, TextIO

from tqdm import tqdm

from utils.scripts import printable


class Bar(tqdm):
    """A bar of one process. tqdm's own lock is for several, which from Python 3.14 on takes a process of its own."""

    _lock = RLock()


# What moves the cursor, for bars above one another.
_MOVES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class _Lines:
    """A stream that shows each state of a bar on a line of its own, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        shown = _MOVES.sub("", text).strip("\r\n ")
        if shown:
            self._stream.write(shown + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, unit: str, title: str = "", **options: Any) -> Bar:
    """A bar over `total` things called `unit`; `options` are tqdm's."""
    live = sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    if not live:
        options |= {"file": _Lines(sys.stderr), "mininterval": 20.0, "leave": True}
    return Bar(total=total, unit=unit, unit_scale=total >= 10_000, desc=printable(title), **options)


def say(line: str) -> None:
    """A line on the screen, above the bar if there is one."""
    Bar.write(printable(line))
