"""Requests to a run, agreed on by all ranks: to stop (a signal), to save a checkpoint (the clock)."""

import time
from typing import NamedTuple

from utils.interrupts import Interrupt
from utils.ranks import Ranks

#: Several ranks agree every so many steps, for which each has to wait for the others.
AGREE_EVERY = 10


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
        self.saved()

    def saved(self) -> None:
        """A save was begun: start the clock again."""
        self._saved_at = time.monotonic()

    def read(self, step: int, always: bool, failing: bool = False) -> Asked:
        """The requests after `step`. Several ranks agree on them, and wait, in some steps only, unless `always`."""
        overdue = self._minutes > 0 and time.monotonic() - self._saved_at >= 60 * self._minutes
        asked = Asked(self._interrupt.number, overdue, failing)
        if self._ranks.size == 1:
            return asked
        if not (always or step % AGREE_EVERY == 0):
            return Asked(0, False, False)
        # The largest of the ranks' numbers, in which the signal counts most. A lower bit may get lost, and comes again.
        bits = self._ranks.most(4 * asked.signal + 2 * failing + overdue)
        return Asked(bits // 4, bool(bits & 1), bool(bits & 2))

    def heed(self) -> None:
        """Raise SignalledError, on all ranks, if a signal came to one. Waits; called equally often on all."""
        if number := self._ranks.most(self._interrupt.number):
            raise SignalledError(number)
