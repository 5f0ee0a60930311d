"""Ctrl-C as a request to stop at the next safe point."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Interrupt:
    """Whether somebody asked to stop."""

    requested: bool = False


@contextmanager
def catch_interrupt() -> Iterator[Interrupt]:
    """Within the block the first Ctrl-C only sets `requested`; a second one interrupts as usual."""
    interrupt = Interrupt()

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.requested = True
        signal.signal(signal.SIGINT, previous)

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, previous)
