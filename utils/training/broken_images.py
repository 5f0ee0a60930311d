"""Training images that cannot be decoded: each is told once, and too many end the run."""

import json
from collections.abc import Sequence
from typing import NoReturn

from utils.progress import say
from utils.ranks import Ranks
from utils.training.run_folders import TrainingError


class BrokenImages:
    """Those that this rank came upon; `limit`: how many may be."""

    def __init__(self, limit: int, ranks: Ranks) -> None:
        self._limit, self._ranks = limit, ranks
        self._found: set[str] = set()

    def note(self, found: Sequence[str]) -> None:
        """Say which images are broken, what is said of each being in `found`."""
        for message in set(found) - self._found:
            say(f"left out: {message}")
        self._found.update(found)

    @property
    def too_many(self) -> bool:
        """Whether this rank cannot go on."""
        return len(self._found) > self._limit

    def refuse(self) -> NoReturn:
        """Raise TrainingError with those that any rank came upon. Waits for all ranks."""
        texts = self._ranks.texts(json.dumps(list(self._found)))
        broken = {message for part in texts for message in json.loads(part)}
        listed = "\n  ".join(sorted(broken))
        said = f"{len(broken)} images are broken, data.broken_limit allows {self._limit}:\n  {listed}\n"
        raise TrainingError(f"{said}A .rec set without its broken records: python data/report.py SET --repair OUTPUT")
