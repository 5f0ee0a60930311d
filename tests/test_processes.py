"""Work spread over processes: every result, errors as they are, and no waiting for the dead."""

import errno
import multiprocessing.context
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import cast

import pytest

from utils.processes import WorkerError, map_ordered, map_unordered, starting_workers, worker_count

_base = 0


def set_base(base: int) -> None:
    global _base
    _base = base


def work(item: int) -> int:
    if item == -1:
        raise ZeroDivisionError("item -1")
    if item == -2:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == -3:
        os.kill(os.getpid(), signal.SIGBUS)
    return _base + item


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_every_result_arrives(workers: int) -> None:
    """All items, once each, in processes that were initialised; an error is raised as it is."""
    assert sorted(map_unordered(work, range(50), workers, set_base, 100)) == list(range(100, 150))
    assert list(map_ordered(work, range(50), workers, set_base, 100)) == list(range(100, 150))
    for mapped in (map_unordered, map_ordered):
        assert list(mapped(work, [], workers, set_base, 0)) == []
        with pytest.raises(ZeroDivisionError, match="item -1"):
            list(mapped(work, [1, -1, 2], workers, set_base, 0))


def test_a_killed_worker_is_an_error() -> None:
    """A worker that the kernel kills ends the work with a reason instead of hanging it; a read error of a mapped file
    is not taken for a lack of memory.
    """
    with pytest.raises(WorkerError, match=r"a worker process died \(out of memory\?\)"):
        list(map_unordered(work, [1, -2, 3], 2, set_base, 0))
    with pytest.raises(WorkerError, match="died of a bus error: a file could not be read"):
        list(map_unordered(work, [1, -3, 3], 2, set_base, 0))


@pytest.mark.parametrize(
    ("number", "reason"),
    [(errno.ENOSPC, "No space left on device on /dev/shm"), (errno.EAGAIN, os.strerror(errno.EAGAIN))],
)
def test_workers_that_cannot_be_started_are_an_error(number: int, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full /dev/shm is not taken for the disk that is written to. A file's own errors stay as they are."""

    def fail(*arguments: object, **options: object) -> None:
        raise OSError(number, os.strerror(number))

    message = re.escape(f"worker processes cannot be started ({reason}); try fewer with --workers")
    with monkeypatch.context() as full:
        full.setattr(multiprocessing.context.SpawnContext, "Lock", fail)
        with pytest.raises(WorkerError, match=message):
            list(map_ordered(work, [1], 1, set_base, 0))
    with monkeypatch.context() as full:
        full.setattr(multiprocessing.context.SpawnProcess, "start", fail)
        with pytest.raises(WorkerError, match=message):
            list(map_ordered(work, [1], 1, set_base, 0))
    with pytest.raises(OSError, match=r"No space left on device: 'face\.jpg'"), starting_workers():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "face.jpg")


def leave_a_mark(folder_and_number: tuple[Path, int]) -> None:
    folder, number = folder_and_number
    time.sleep(0.02)
    (folder / str(number)).touch()


def test_what_is_not_wanted_any_more_is_not_done(tmp_path: Path) -> None:
    """After an interrupt or an error the queue is dropped instead of worked off."""
    tasks = [(tmp_path, number) for number in range(500)]
    results = cast("Generator[None]", map_unordered(leave_a_mark, tasks, 2, set_base, 0))
    next(results)
    results.close()
    assert 1 <= len(list(tmp_path.iterdir())) < 100


class TwoPartsError(ValueError):
    """What pickle cannot make anew: it keeps the message alone."""

    def __init__(self, where: str, what: str) -> None:
        super().__init__(f"{where}: {what}")


def fail_in_two_parts(item: int) -> int:
    raise TwoPartsError(f"image {item}", "it is grey")


def test_an_error_that_cannot_be_sent_back_is_told() -> None:
    """Its message arrives, and is not taken for a worker that died for want of memory."""
    with pytest.raises(WorkerError, match=r"^TwoPartsError: image 3: it is grey$"):
        list(map_ordered(fail_in_two_parts, [3], 1, set_base, 0))


INTERRUPTED = """
import sys, time
from pathlib import Path
from utils.processes import map_ordered
from utils.scripts import readable_errors

if __name__ == "__main__":
    with readable_errors("a", "all is kept"):
        list(map_ordered(abs, range(1000), 2, print))
else:
    Path(sys.argv[1]).touch()
    time.sleep(0.5)
"""


def test_workers_that_still_start_are_not_disturbed_by_ctrl_c(tmp_path: Path) -> None:
    """It comes to all processes of a terminal: of those that are importing none shows a traceback."""
    script, starting = tmp_path / "interrupted.py", tmp_path / "starting"
    script.write_text(INTERRUPTED)
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen(
        [sys.executable, script, starting],
        env=os.environ | {"PYTHONPATH": str(root)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        while not starting.exists():
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        assert process.communicate(timeout=60)[1] == "\na: interrupted; all is kept\n"
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("cores", "ranks", "workers"), [(2, None, 2), (64, None, 8), (64, 4, 8), (16, 4, 4), (4, 8, 1)]
)
def test_worker_count(cores: int, ranks: int | None, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """-1 is one per usable core, 8 at most, and a machine's ranks share its cores; anything else is taken as it is."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert worker_count(-1) == workers
    assert [worker_count(0), worker_count(20)] == [0, 20]
