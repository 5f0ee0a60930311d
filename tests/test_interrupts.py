"""Signals ask a run to stop where nothing is lost, and its exit status says which did."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from utils.interrupts import SIGNALS, Stopped, catch_interrupt

# Steps until it is asked to stop; a line for each thing that it notices.
RUN = """
import os, signal, sys, time
from utils.interrupts import Stopped, catch_interrupt

def say(line):
    print(line, flush=True)

signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background begins without
try:
    with catch_interrupt("shared" in sys.argv) as interrupt:
        if "child" in sys.argv:
            parent = os.getpid()
            child = os.fork()
            if not child:
                say("ready")
                while os.getppid() == parent:
                    time.sleep(0.01)
                os._exit(0)
        else:
            say("ready")
        while not interrupt.number:
            time.sleep(0.01)
            if "child" in sys.argv:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    say(f"child {os.waitstatus_to_exitcode(status)}")
                    sys.exit(128 + interrupt.number)
        say(f"asked {128 + interrupt.number}")
        if "slow" in sys.argv:
            sys.stdin.readline()
            say("saved")
        raise Stopped("stopped", 128 + interrupt.number)
except Stopped as stopped:
    say(str(stopped))
    if "after" in sys.argv:
        sys.stdin.readline()
    sys.exit(stopped.exit_code)
except KeyboardInterrupt:
    say("interrupted")
    sys.exit(1)
"""


class Run:
    """A process that steps until it is asked to stop."""

    def __init__(self, *how: str) -> None:
        root = Path(__file__).resolve().parents[1]
        command = [sys.executable, "-c", RUN, *how]
        self.process = subprocess.Popen(
            command, cwd=root, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert self.line() == "ready"

    def line(self) -> str:
        """The next line that it prints."""
        assert self.process.stdout
        return self.process.stdout.readline().rstrip()

    def end(self, text: str = "") -> tuple[list[str], int]:
        """(the rest of what it prints, its exit status) once it read `text`."""
        return self.process.communicate(text, timeout=30)[0].splitlines(), self.process.returncode


Start = Callable[..., Run]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts such processes, and kills what is left of them."""
    runs: list[Run] = []

    def start_one(*how: str) -> Run:
        runs.append(Run(*how))
        return runs[-1]

    yield start_one
    for run in runs:
        run.process.kill()
        run.process.communicate()


@pytest.fixture(autouse=True)
def usual_ctrl_c() -> Iterator[None]:
    """Ctrl-C interrupts, also when the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 138)])
def test_the_exit_status_names_the_signal(start: Start, number: signal.Signals, status: int) -> None:
    """Shells and schedulers take 128 + number for an end by that signal."""
    run = start()
    run.process.send_signal(number)
    assert run.end() == ([f"asked {status}", "stopped"], status)


def test_schedulers_may_ask_again(start: Start) -> None:
    """A second SIGTERM or SIGUSR1 does not stop the saving, and the first one stays the reason."""
    run = start("slow")
    run.process.send_signal(signal.SIGUSR1)
    assert run.line() == "asked 138"
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
        run.process.send_signal(number)
    assert run.end("go on\n") == (["saved", "stopped"], 138)


def test_who_presses_ctrl_c_again_is_heeded_at_once(start: Start) -> None:
    """The second Ctrl-C interrupts the saving, also when a scheduler had asked before the first."""
    run = start("slow")
    run.process.send_signal(signal.SIGINT)
    assert run.line() == "asked 130"
    run.process.send_signal(signal.SIGINT)
    assert run.end() == (["interrupted"], 1)
    with catch_interrupt() as interrupt:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert 128 + interrupt.number == 143


def test_workers_end_when_they_are_told(start: Start) -> None:
    """A forked worker ends by the SIGTERM of whoever stops workers; SIGUSR1, sent to a whole job, it ignores."""
    run = start("child")
    children = Path(f"/proc/{run.process.pid}/task/{run.process.pid}/children")
    child = int(children.read_text())
    os.kill(child, signal.SIGUSR1)
    os.kill(child, signal.SIGTERM)
    assert run.end()[0] == [f"child {-signal.SIGTERM}"]


def test_afterwards_signals_do_what_they_did(start: Start) -> None:
    """Handlers are put back as they were, whichever came."""
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(Stopped), catch_interrupt() as interrupt:
        assert interrupt.number == 0
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interrupt.number
        assert 128 + interrupt.number == 143
        raise Stopped("stopped", 128 + interrupt.number)
    assert [signal.getsignal(number) for number in SIGNALS] == before
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    run = start("after")
    run.process.send_signal(signal.SIGUSR1)
    assert [run.line(), run.line()] == ["asked 138", "stopped"]
    run.process.send_signal(signal.SIGTERM)
    assert run.end()[1] == -signal.SIGTERM


def test_a_signal_that_comes_late_does_not_disturb_an_end_with_others(start: Start) -> None:
    """Two machines get SIGTERM a moment apart: the second one's process, which has stopped and saved with the first's
    and waits for it to draw its pictures, must not die of it, as the first would say that it lost the other."""
    run = start("after", "shared")
    run.process.send_signal(signal.SIGTERM)
    assert [run.line(), run.line()] == ["asked 143", "stopped"]
    run.process.send_signal(signal.SIGTERM)
    run.process.send_signal(signal.SIGUSR1)
    assert run.end("go on\n") == ([], 143)
