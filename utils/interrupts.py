"""Ctrl-C and the signals of schedulers, taken as a request to stop at the next safe point."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

#: Ctrl-C; the warning before SIGKILL of torchrun, SLURM, Kubernetes; SLURM's early one (`--signal=USR1@120`).
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Stopped(KeyboardInterrupt):
    """The run stopped because of a signal. `exit_code`: 128 + the signal's number, as shells and schedulers expect."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class Interrupt:
    """Whether somebody asked to stop. `number`: the first signal that did; 0: none has."""

    number: int = 0


@contextmanager
def catch_interrupt(shared: bool = False) -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C only sets `number`; a second one interrupts as usual.

    SIGTERM and SIGUSR1 set it, too, however often they come: whoever sends them kills in the end. In processes forked
    from this one SIGTERM ends as usual and SIGUSR1 does nothing. Only the main thread can enter.

    `shared`: other processes stop with this one, and wait for it. Once it is Stopped, SIGTERM and SIGUSR1 do nothing
    any more: they come to the processes of several machines at several times, and also to those that stop already.
    """
    interrupt, deaf = Interrupt(), False
    process = os.getpid()

    def note(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGTERM and os.getpid() != process:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        interrupt.number = interrupt.number or number
        if number == signal.SIGINT:
            signal.signal(number, previous[number])

    previous: dict[int, Any] = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    try:
        for number in SIGNALS:
            signal.signal(number, note)
        yield interrupt
    except Stopped:
        deaf = shared
        raise
    finally:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN if deaf and number != signal.SIGINT else previous[number])
