"""What every script does about errors: one line that says what is wrong, and no traceback for a user's mistake."""

import faulthandler
import gc
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from utils.interrupts import Stopped

# What a terminal takes for commands, or for the beginning of one.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}


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
    Errors of other kinds are faults of the program and keep their traceback. One of several ranks ends at once, so that
    torchrun ends the others, which may wait for it.
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
        if not isinstance(interrupt, Stopped) or int(os.environ.get("RANK", "0")) == 0:
            print(f"\n{script}: {str(interrupt) or 'interrupted; ' + when_interrupted}", file=sys.stderr)
        _exit(getattr(interrupt, "exit_code", 130))
    except (ValueError, OSError) as error:
        _exit(printable(f"{script}: {error}"))
    except Exception:
        if not _one_of_several():
            raise
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


def _one_of_several() -> bool:
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


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
