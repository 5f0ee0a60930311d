"""Requests to a run, agreed on by all ranks: to stop (a signal), to save a checkpoint (the clock)."""

import time
from typing import NamedTuple

from utils.interrupts import Interrupt
from utils.ranks import Ranks

#: Several ranks agree every so many seconds, for which each has to wait for the others: after one step at least, and
#: after so many at most. Whoever sends a signal kills after half a minute, as a rule.
AGREE_SECONDS, MOST_STEPS = 5.0, 10


class SignalledError(Exception):
    """A signal came in the middle of something that can be repeated."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class Asked(NamedTuple):
    """`signal`: that asks the run to stop, or 0; `overdue`: whether the last save is too long ago; `failing`: whether
    some rank cannot go on."""

    signal: int
    overdue: bool
    failing: bool


class RunRequests:
    """`interrupt`: of this process; `minutes`: from one save to the next, 0: no save is asked for."""

    def __init__(self, interrupt: Interrupt, ranks: Ranks, minutes: float) -> None:
        self._interrupt, self._ranks, self._minutes = interrupt, ranks, minutes
        self._steps, self._steps_left, self._agreed_at = 0, 1, time.monotonic()
        self.saved()

    def saved(self) -> None:
        """A save was begun: start the clock again."""
        self._saved_at = time.monotonic()

    def read(self, always: bool, failing: bool = False) -> Asked:
        """The requests after a step. Several ranks agree on them, and wait, after some steps only, unless `always`."""
        overdue = self._minutes > 0 and time.monotonic() - self._saved_at >= 60 * self._minutes
        asked = Asked(self._interrupt.number, overdue, failing)
        if self._ranks.size == 1:
            return asked
        self._steps, self._steps_left = self._steps + 1, self._steps_left - 1
        if not (always or self._steps_left <= 0):
            return Asked(0, False, False)
        self._steps_left = self._ranks.least(self._steps_until_next())
        # The largest of the ranks' numbers, in which the signal counts most. A lower bit may get lost, and comes again.
        bits = self._ranks.most(4 * asked.signal + 2 * failing + overdue)
        return Asked(bits // 4, bool(bits & 1), bool(bits & 2))

    def _steps_until_next(self) -> int:
        """How many steps this rank may make before the next agreement, going by how long the last ones took."""
        now = time.monotonic()
        seconds_each = (now - self._agreed_at) / self._steps
        self._steps, self._agreed_at = 0, now
        return max(1, min(MOST_STEPS, int(AGREE_SECONDS / max(seconds_each, 1e-3))))

    def heed(self) -> None:
        """Raise SignalledError, on all ranks, if a signal came to one. Waits; called equally often on all."""
        if number := self._ranks.most(self._interrupt.number):
            raise SignalledError(number)
