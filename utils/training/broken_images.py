"""Training images that cannot be decoded: each is reported once, and too many end the run."""

import json
from collections.abc import Sequence
from typing import NoReturn

from utils.progress import say
from utils.ranks import Ranks
from utils.training.run_folders import TrainingError

#: So many broken images in a row are no accident: the set is gone.
_IN_A_ROW = 32


class BrokenImages:
    """Counts the broken images of this rank. More than `limit` are too many, and so are whole batches of them in a row:
    as many as `_IN_A_ROW`, or all of an epoch (`images_per_epoch`: of this rank), as in a small set that is gone."""

    def __init__(self, limit: int, images_per_epoch: int, ranks: Ranks) -> None:
        self._limit, self._ranks = limit, ranks
        self._longest = min(_IN_A_ROW, images_per_epoch)
        self._found: set[str] = set()
        self._row = 0

    def note(self, found: Sequence[str], faces: int) -> None:
        """Report the broken images of a batch of `faces`; `found`: a message for each of them."""
        for message in sorted(set(found) - self._found):
            say(f"left out: {message}")
        self._found.update(found)
        self._row = self._row + faces if len(found) == faces else 0

    @property
    def too_many(self) -> bool:
        """Whether this rank cannot go on."""
        return len(self._found) > self._limit or self._row >= self._longest

    def refuse(self) -> NoReturn:
        """Raise TrainingError, with the broken images of all ranks. Waits for all ranks."""
        parts = [json.loads(text) for text in self._ranks.texts(json.dumps([self._row, list(self._found)]))]
        row = max(row for row, _ in parts)
        broken = {message for _, found in parts for message in found}
        listed = "\n  ".join(sorted(broken))
        if row >= self._longest:
            said = f"none of the last {row} images was good: is the set still there?"
        else:
            said = f"{len(broken)} images are broken, data.broken_limit allows {self._limit}:"
        advice = "A .rec set without its broken records: python data/report.py SET --repair OUTPUT"
        raise TrainingError(f"{said}\n  {listed}\n{advice}")
