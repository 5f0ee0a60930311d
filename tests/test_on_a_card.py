"""The runner of what wants a card: results are kept, whatever happens to the jobs."""

import signal
import time
from pathlib import Path

from benchmarks.on_a_card import ROOT, Job, jobs, run_all


def job(file: str, seconds: float, code: str) -> Job:
    return Job(file, seconds, ["-c", code])


def test_each_job_ends_in_its_time(tmp_path: Path) -> None:
    """One that hangs, with a process of its own, is stopped and what it wrote is kept; one that fails is told; others
    are done, until the time for all is up."""
    hang = "import subprocess, sys; print('a table', flush=True); subprocess.run([sys.executable, '-c', 'while 1: 1'])"
    todo = [
        job("hangs.md", 1.0, hang),
        job("fails.md", 5.0, "import sys; print('half', flush=True); sys.exit('what went wrong')"),
        job("works.md", 5.0, "print('the rest')"),
        job("late.md", 5.0, "print('never')"),
    ]
    began = time.monotonic()
    assert not run_all(todo[:3], tmp_path, 60)
    assert time.monotonic() - began < 30
    assert [(tmp_path / job.file).read_text() for job in todo[:3]] == ["a table\n", "half\n", "the rest\n"]
    summary = (tmp_path / "summary.md").read_text()
    assert "| hangs.md | stopped after 1 s |" in summary
    assert "| fails.md | failed with status 1 after" in summary
    assert "| works.md | done in" in summary
    assert "what went wrong" in (tmp_path / "log.txt").read_text()
    assert run_all(todo[3:], tmp_path, 1)
    assert "late.md | left out" in (tmp_path / "summary.md").read_text()


def test_the_jobs_are_there_and_fit(tmp_path: Path) -> None:
    """Every script and test file exists, and the limits of all but the last, which gets what is left, come to twelve
    minutes. A network that was not compiled before has the time that this takes."""
    todo = jobs(tmp_path, None)
    assert sum(job.seconds for job in todo[:-1]) <= 12 * 60
    assert all(job.seconds >= 140 for job in todo if job.file.startswith("train_step_r50"))
    for path in (part for job in todo for part in job.command if part.endswith(".py")):
        assert (ROOT / path).is_file(), path
    assert len({job.file for job in todo}) == len(todo)


def test_a_job_out_of_time_says_what_it_has(tmp_path: Path) -> None:
    """It is interrupted first: of tests that hang, those that failed before are told. That is no success.
    A shell that runs all this in the background has it ignore Ctrl-C: its jobs do not."""
    say = "import time\ntry:\n time.sleep(60)\nexcept KeyboardInterrupt:\n print('what failed', flush=True)\n"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not run_all([job("tests.txt", 4.0, say + "while 1: pass")], tmp_path, 60)
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "tests.txt").read_text() == "what failed\n"
    assert "| tests.txt | stopped after 4 s |" in (tmp_path / "summary.md").read_text()
