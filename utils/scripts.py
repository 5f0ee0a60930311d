"""What every script does about errors: one line that says what is wrong, and no traceback for a user's mistake."""

import faulthandler
import gc
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.interrupts import Stopped

# What a terminal takes for commands, or for the beginning of one.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
# Seconds that a process which is not the first of its machine waits before it says an error: as a rule the first says
# the same, and torchrun ends the others then.
_FIRST_SPEAKS = 3.0
# Seconds until a process that lost the others says so, unless torchrun has ended it: the cause is another one's to say.
_ENDED_BY_THEN = 10.0


class LostRanksError(OSError):
    """Another rank ended in the middle of an exchange with this one, without a word to it."""


def printable(text: str) -> str:
    """`text` for the screen, control characters written out, an escape as `\\x1b`: names of files and identities are
    other people's, and would be obeyed by the terminal, which could then hide what is said.
    """
    return text.translate(_CONTROLS)


@contextmanager
def readable_errors(script: str, when_interrupted: str) -> Iterator[None]:
    """End the program with `script: message` for errors of input, files and settings, and for Ctrl-C; warnings are a
    line each, too.

    `when_interrupted` says what an interrupted run left behind; an interrupt's own message comes before it.
    Errors of other kinds are faults of the program and keep their traceback. One of several ranks ends without waiting
    for the others, so that torchrun ends them, which may wait for it; what all of them have to say the first on each
    machine says.
    """
    _open_closed_streams()
    # In a log file, too, a line should appear when it is printed; and a name that the screen has no letters for is no
    # reason to end.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    # A read error of a mapped file is a signal that no exception stands for: show at least where it came.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{script}: warning: {printable(str(message))}\n"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        # All ranks of a run stop, and the first says so.
        number = "RANK" if isinstance(interrupt, Stopped) else "LOCAL_RANK"
        if os.environ.get(number, "0") == "0":
            said = str(interrupt) or f"interrupted; {when_interrupted}"
            print(printable(f"\n{script}: {said}"), file=sys.stderr)
        _exit(getattr(interrupt, "exit_code", 130))
    except (ValueError, OSError) as error:
        let_the_first_speak(lost=isinstance(error, LostRanksError))
        _exit(printable(f"{script}: {error}"))
    except Exception:
        if not _one_of_several():
            raise
        let_the_first_speak()
        _exit(traceback.format_exc().rstrip())
    finally:
        warnings.formatwarning = before


def _open_closed_streams() -> None:
    """Give a program that was started without standard streams (`>&-`) empty ones: it may say things, and no file of
    its own gets a number to which libraries write their messages."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest that is free
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def _exit(status: int | str) -> NoReturn:
    """As `sys.exit`."""
    if _one_of_several() and isinstance(status, str):
        print(status, file=sys.stderr)
        end_rank(1)
    elif isinstance(status, int):
        end_rank(status)
    sys.exit(status)


def let_the_first_speak(lost: bool = False) -> None:
    """Before an error is said by one of several processes: wait until torchrun had the time to end it, unless it is the
    first of its machine and has not `lost` the others. So what all have to say is said once a machine, and what only
    follows from another one's end is not said at all.
    """
    if not _one_of_several() or (os.environ.get("LOCAL_RANK", "0") == "0" and not lost):
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun may end it by Ctrl-C
    time.sleep(_ENDED_BY_THEN if lost else _FIRST_SPEAKS)


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def end_rank(status: int = 0) -> None:
    """Nothing is left to be done: end this process here, with `status`, if it is one of several that torchrun started.

    Taking the interpreter down would be a risk: a thread of torch's that talks to other ranks may then let go of its
    last tensor, which aborts the process, and torchrun takes a run that is complete for a failed one (PyTorch's issue
    190489). One that is alone ends as any other, but does not search torch's million objects for garbage, which takes
    half a second.
    """
    if _one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()
