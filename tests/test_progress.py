"""Progress in a log file: lines, not carriage returns."""

import sys

import pytest

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
