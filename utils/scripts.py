"""How every script ends: an error of the user is one line that says what is wrong, not a traceback."""

import errno
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
from pathlib import Path
from typing import NoReturn

from utils.interrupts import Stopped

# Control characters, which a terminal may take for commands, and how they are printed.
_CONTROLS = {code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
# Seconds that a process other than the first of its machine waits before it prints an error: as a rule the first prints
# the same, and torchrun ends the others then.
_FIRST_SPEAKS = 3.0
# Seconds after which a process that lost the others says so, unless torchrun ended it: another process has the cause.
_ENDED_BY_THEN = 10.0

# What is behind errors of the system that do not say so.
_HINTS = {errno.ENOTDIR: " (it, or a part of its path, is a file)"}


class LostRanksError(OSError):
    """Another rank ended in the middle of an exchange with this one."""


def printable(text: str) -> str:
    """`text` with control characters escaped, as `\\x1b`: in names of files and identities, which are other people's,
    they could hide what is printed.
    """
    return text.translate(_CONTROLS)


@contextmanager
def readable_errors(script: str, when_interrupted: str) -> Iterator[None]:
    """End the program with `script: message` for ValueError, OSError and Ctrl-C; warnings become such a line, too.

    `when_interrupted`: what an interrupted run leaves behind, printed if the interrupt has no message of its own.
    Errors of other kinds are faults of the program and keep their traceback. One of several ranks ends without waiting
    for the others, so that torchrun ends them, which may wait for it; the first on each machine prints the error.
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
        _exit(printable(f"{script}: {_said(error)}"))
    except Exception:
        if not _one_of_several():
            raise
        let_the_first_speak()
        _exit(traceback.format_exc().rstrip())
    finally:
        warnings.formatwarning = before


def _said(error: ValueError | OSError) -> str:
    """Of an error of the system, the file first, then what is wrong with it, without its number."""
    if not isinstance(error, OSError) or not error.strerror:
        return str(error)
    files = [os.fsdecode(file) for file in (error.filename, error.filename2) if isinstance(file, str | bytes)]
    if not files:
        return error.strerror
    hint = _HINTS.get(error.errno or 0, "")
    if error.errno == errno.EEXIST and not Path(files[0]).is_dir():
        hint = " (and is no folder)"
    return f"{' -> '.join(files)}: {error.strerror}{hint}"


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


def is_first() -> bool:
    """Whether this process is alone, or the first of several that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def is_restarted() -> bool:
    """Whether torchrun started this machine's processes before, and one of them failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def let_the_first_speak(lost: bool = False) -> None:
    """Called before one of several processes prints an error: wait long enough for torchrun to end it, unless it is the
    first of its machine and has not `lost` the others. So an error that all have is printed once a machine, and one
    that only follows from the end of another process is not printed at all.
    """
    if not _one_of_several() or (os.environ.get("LOCAL_RANK", "0") == "0" and not lost):
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # torchrun may end it by Ctrl-C
    time.sleep(_ENDED_BY_THEN if lost else _FIRST_SPEAKS)


def _one_of_several() -> bool:
    return os.environ.get("WORLD_SIZE", "1") != "1"


def end_rank(status: int = 0) -> None:
    """Call this last: it ends the process here, with `status`, if it is one of several that torchrun started.

    In a normal exit of the interpreter a thread of torch's may free its last tensor, which aborts the process, and
    torchrun takes the complete run for a failed one (PyTorch's issue 190489). A process that is alone exits normally,
    but without collecting torch's million objects as garbage, which takes half a second.
    """
    if _one_of_several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    gc.freeze()
