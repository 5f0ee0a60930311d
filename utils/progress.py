"""Progress bars with rate and ETA: live on a terminal, a line now and then in a log file."""

import sys
from typing import Any

from tqdm import tqdm


def progress_bar(total: int, unit: str, title: str = "", **options: Any) -> tqdm:
    """A bar over `total` things called `unit`; `options` are tqdm's."""
    live = sys.stderr.isatty()
    return tqdm(
        total=total, unit=unit, unit_scale=total >= 10_000, desc=title, mininterval=0.1 if live else 20.0, **options
    )
