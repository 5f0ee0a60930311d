"""What every script does about errors: one line that says what is wrong, and no traceback for a user's mistake."""

import faulthandler
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from utils.interrupts import Stopped


@contextmanager
def readable_errors(script: str, when_interrupted: str) -> Iterator[None]:
    """End the program with `script: message` for errors of input, files and settings, and for Ctrl-C; warnings are a
    line each, too.

    `when_interrupted` says what an interrupted run left behind; an interrupt's own message comes before it.
    Errors of other kinds are faults of the program and keep their traceback.
    """
    # In a log file, too, a line should appear when it is printed; and a name that the screen has no letters for is no
    # reason to end.
    sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")  # type: ignore[union-attr]
    # A read error of a mapped file is a signal that no exception stands for: show at least where it came.
    if not faulthandler.is_enabled():
        faulthandler.enable()
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_: f"{script}: warning: {message}\n"
    try:
        yield
    except KeyboardInterrupt as interrupt:
        # All ranks of a run stop, and the first says so.
        if not isinstance(interrupt, Stopped) or int(os.environ.get("RANK", "0")) == 0:
            print(f"\n{script}: {str(interrupt) or 'interrupted; ' + when_interrupted}", file=sys.stderr)
        sys.exit(getattr(interrupt, "exit_code", 130))
    except (ValueError, OSError) as error:
        sys.exit(f"{script}: {error}")
    finally:
        warnings.formatwarning = before


def end_rank() -> None:
    """Nothing is left to be done: end this process here, with status 0, if it is one of several that torchrun started.

    Taking the interpreter down would be a risk: a thread of torch's that talks to other ranks may then let go of its
    last tensor, which aborts the process, and torchrun takes a run that is complete for a failed one (PyTorch's issue
    190489). One that is alone ends as any other, but does not search torch's million objects for garbage, which takes
    half a second.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    gc.freeze()
