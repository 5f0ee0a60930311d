"""Progress in a log file: lines, not carriage returns."""

import subprocess
import sys

import pytest

from conftest import ROOT
from utils.progress import progress_bar


def test_a_log_file_gets_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Where stderr is no terminal, each state shown is a line of its own, and the last one is complete."""
    assert not sys.stderr.isatty()
    with progress_bar(3, "image", "embed") as bar:
        for _ in range(3):
            bar.update()
    shown = capsys.readouterr().err
    assert "\r" not in shown
    assert shown.splitlines()[-1].startswith("embed: 100%")
    assert "3/3" in shown


def test_a_log_file_gets_no_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bar below another moves the cursor, and names of files may do worse; nor has every terminal such commands."""
    with progress_bar(2, "image", "a set called \x1b[31m") as bar:
        for _ in range(2):
            with progress_bar(1, "image", "inner") as inner:
                inner.update()
            bar.update()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    with progress_bar(1, "image", "dumb") as bar:
        bar.update()
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "\r" not in shown
    assert all(line.strip() for line in shown.splitlines())
    assert r"a set called \x1b[31m: 100%" in shown


def test_a_bar_starts_no_process() -> None:
    """Where processes are not forked (from Python 3.14 on), a lock of theirs takes one, which warns at a rank's end."""
    program = (
        "import multiprocessing\n"
        "from multiprocessing.resource_tracker import _resource_tracker\n"
        "from utils.progress import progress_bar, say\n"
        "multiprocessing.set_start_method('forkserver')\n"
        "with progress_bar(1, 'image') as bar:\n"
        "    say('\\x1b a line'); bar.update()\n"
        "assert _resource_tracker._fd is None, 'a process was started'\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "\\x1b a line\n"
