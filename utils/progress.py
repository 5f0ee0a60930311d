"""Progress bars with rate and ETA: live on a terminal, a line now and then in a log file."""

import sys
from typing import Any, TextIO

from tqdm import tqdm


class _Lines:
    """A stream that shows each state of a bar on a line of its own, for log files."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if text.strip():
            self._stream.write(text.strip("\r\n ") + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(total: int, unit: str, title: str = "", **options: Any) -> tqdm:
    """A bar over `total` things called `unit`; `options` are tqdm's."""
    live = sys.stderr.isatty()
    if not live:
        options |= {"file": _Lines(sys.stderr), "mininterval": 20.0, "leave": True}
    return tqdm(total=total, unit=unit, unit_scale=total >= 10_000, desc=title, **options)
