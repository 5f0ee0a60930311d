"""What is asked of a run while it goes on, on all ranks alike: an end by a signal, a checkpoint by the clock."""

import time
from typing import NamedTuple

from utils.interrupts import Interrupt
from utils.ranks import Ranks

#: Steps between two at which several ranks agree, which waits for all of them.
AGREE_EVERY = 10


class SignalledError(Exception):
    """A signal came in the middle of something that can be done again."""

    def __init__(self, signal: int) -> None:
        super().__init__(f"signal {signal}")
        self.signal = signal


class Asked(NamedTuple):
    """`signal`: the one that asked for an end, or 0; `overdue`: whether the last save is too long ago; `failing`:
    whether some rank cannot go on."""

    signal: int
    overdue: bool
    failing: bool


class RunRequests:
    """`interrupt`: of this process; `minutes`: from a save to when the clock asks for the next, 0: never."""

    def __init__(self, interrupt: Interrupt, ranks: Ranks, minutes: float) -> None:
        self._interrupt, self._ranks, self._minutes = interrupt, ranks, minutes
        self.saved()

    def saved(self) -> None:
        """A save was begun: the clock starts anew."""
        self._saved_at = time.monotonic()

    def read(self, step: int, always: bool, failing: bool = False) -> Asked:
        """What is asked after `step`. Several ranks know it at some steps only, unless `always`, and wait there."""
        overdue = self._minutes > 0 and time.monotonic() - self._saved_at >= 60 * self._minutes
        asked = Asked(self._interrupt.number, overdue, failing)
        if self._ranks.size == 1:
            return asked
        if not (always or step % AGREE_EVERY == 0):
            return Asked(0, False, False)
        # The largest number of all: what matters most is its highest digit. Lower ones may get lost, and come again.
        digits = self._ranks.most(4 * asked.signal + 2 * failing + overdue)
        return Asked(digits // 4, bool(digits & 1), bool(digits & 2))

    def heed(self) -> None:
        """Raise SignalledError, on all ranks, if a signal came to one. Waits; called equally often on all."""
        if number := self._ranks.most(self._interrupt.number):
            raise SignalledError(number)
