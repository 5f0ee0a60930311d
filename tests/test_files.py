"""Whole or not there: what a killed process leaves, who removes it, and two processes with one target."""

import csv
import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT
from saved_steps import files_up_to
from utils import files
from utils.files import (
    BusyError,
    atomic_folder,
    atomic_path,
    atomic_write,
    csv_line,
    partial_folder,
    require_free,
    seen,
    write_csv_atomic,
    write_text_atomic,
)
from utils.resumable import resumable_folder

HOLD = """
import sys
from pathlib import Path
from utils import files
with getattr(files, sys.argv[1])(Path(sys.argv[2])) as path:
    if sys.argv[1] == "atomic_folder":
        path = path / "file"
    path.write_text("half")
    path.with_name("somebody's own temporary file").write_text("half")
    print("holds", flush=True)
    sys.stdin.read()
"""


def hold(how: str, target: Path) -> subprocess.Popen[str]:
    """A process that is in the middle of writing `target`, until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, how, str(target)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "holds\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("how", ["atomic_path", "atomic_folder"])
def test_the_next_one_clears_what_a_killed_one_left(tmp_path: Path, how: str) -> None:
    """`kill -9` leaves one folder of a known name; the next process with that target is not stopped, and removes it."""
    for _ in range(2):
        kill(hold(how, tmp_path / "x"))
        assert names(tmp_path) == [".x.partial"]
    if how == "atomic_path":
        with atomic_write(tmp_path / "x") as file:
            file.write(b"whole")
        assert (tmp_path / "x").read_bytes() == b"whole"
    else:
        with atomic_folder(tmp_path / "x") as folder:
            assert names(folder) == []
            (folder / "file").write_bytes(b"whole")
        assert names(tmp_path / "x") == ["file"]
    assert names(tmp_path) == ["x"]


def test_one_process_at_a_time_makes_a_folder(tmp_path: Path) -> None:
    """A second one is told so at once and harms nothing; when the first is killed, the lock is gone."""
    first = hold("atomic_folder", tmp_path / "x")
    with pytest.raises(BusyError, match="x is being written by another process"), atomic_folder(tmp_path / "x"):
        pytest.fail("two at once")
    assert (partial_folder(tmp_path / "x") / "x" / "file").read_text() == "half"
    kill(first)
    with atomic_folder(tmp_path / "x"):
        pass
    assert names(tmp_path) == ["x"]


def test_a_file_is_waited_for(tmp_path: Path) -> None:
    """Of two that write one file the second waits, and its content is what stays."""
    first = hold("atomic_path", tmp_path / "x")
    second = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from utils.files import write_text_atomic as w; w('X', 'second')".replace("X", f"{tmp_path}/x"),
        ],
        cwd=ROOT,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(timeout=0.5)
    first.communicate()
    assert second.wait(timeout=20) == 0
    assert (tmp_path / "x").read_text() == "second"
    assert names(tmp_path) == ["x"]


def test_many_write_one_file(tmp_path: Path) -> None:
    """However the locking, renaming and tidying of several processes interleave, nothing fails and nothing stays."""
    code = (
        "from utils.files import write_text_atomic\n"
        f"for turn in range(100): write_text_atomic({str(tmp_path / 'x')!r}, 'NUMBER' * 5000)"
    )
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", code.replace("NUMBER", str(number))], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for number in range(3)
    ]
    while any(writer.poll() is None for writer in writers):
        if (tmp_path / "x").exists():
            text = (tmp_path / "x").read_text()
            assert text == text[0] * 5000
    assert [writer.communicate()[1] for writer in writers] == ["", "", ""]
    assert names(tmp_path) == ["x"]


def test_killed_between_the_last_rename_and_the_tidying(tmp_path: Path) -> None:
    """The finished folder is refused as any other; the rest of its making goes, unfinished work does not."""
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    partial = partial_folder(tmp_path / "x")
    partial.mkdir()
    (partial / ".lock").touch()
    (partial / ".journal.json").write_text("{}")
    (partial / "x").mkdir()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        require_free(tmp_path / "x")
    assert names(tmp_path) == [".x.partial", "x"]
    (partial / "x").rmdir()
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        require_free(tmp_path / "x")
    assert names(tmp_path) == ["x"]


def test_another_one_finishes_while_the_lock_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that appears after the first look is seen before any work is done, not at its end."""
    lock = files._lock

    def lock_late(partial: Path, path: Path, wait: bool) -> int:
        path.mkdir(exist_ok=True)
        (path / "file").touch()
        return lock(partial, path, wait)

    monkeypatch.setattr(files, "_lock", lock_late)
    with pytest.raises(FileExistsError, match="x exists and is not empty"), atomic_folder(tmp_path / "x"):
        pytest.fail("the block must not be entered")
    with pytest.raises(FileExistsError, match="y exists"), resumable_folder(tmp_path / "y", {}, restart=False):
        pytest.fail("the block must not be entered")
    assert names(tmp_path) == ["x", "y"]


def test_work_that_can_go_on_is_not_discarded_by_others(tmp_path: Path) -> None:
    """A program that would begin anew in the place of an interrupted one that can be resumed says so instead."""
    partial = partial_folder(tmp_path / "x")
    (partial / "x").mkdir(parents=True)
    (partial / ".journal.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"x\.partial holds unfinished work on "), atomic_folder(tmp_path / "x"):
        pytest.fail("the block must not be entered")
    assert (partial / "x").exists()


def test_file_systems_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel has no locks a warning says so, and the file is written; other errors name the lock."""

    def refuse(number: int) -> None:
        def flock(descriptor: int, operation: int) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(fcntl, "flock", flock)

    refuse(errno.ENOLCK)
    with pytest.warns(UserWarning, match="no locks here"), atomic_write(tmp_path / "x") as file:
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"
    refuse(errno.EIO)
    with pytest.raises(OSError, match=r"Input/output error: .*\.y\.partial/\.lock"), atomic_path(tmp_path / "y"):
        pytest.fail("the block must not be entered")


def test_what_another_machine_wrote_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network file system goes on for a while to say that there is nothing, NFS until the folder is opened."""
    folder, fresh = tmp_path / "a" / "b", []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda place: (fresh.append(place), scandir(place))[1])
    assert seen(lambda: "found" if folder in fresh else None, folder) == "found"
    assert fresh == [tmp_path, tmp_path / "a", folder], "a folder that was not there is looked for in the one above"
    assert seen(lambda: None, folder, seconds=0.01) is None


@pytest.mark.parametrize("leads_to", ["somebodys", "nowhere"])
def test_a_link_in_place_of_the_working_folder(tmp_path: Path, leads_to: str) -> None:
    """What lies where a link leads is never removed, and one that leads nowhere is no reason to wait for ever."""
    (tmp_path / "somebodys").mkdir()
    (tmp_path / "somebodys" / "file").write_text("kept")
    partial_folder(tmp_path / "out").symlink_to(tmp_path / leads_to)
    for begin in (atomic_folder, atomic_path):
        with pytest.raises(FileExistsError, match=r"is a link.*remove the link"), begin(tmp_path / "out"):
            pass
    assert (tmp_path / "somebodys" / "file").read_text() == "kept"


def test_tables_give_back_what_was_written(tmp_path: Path) -> None:
    """Names of other people's files have everything in them: carriage returns, line ends, quotes, blanks, commas."""
    rows = [["a\rb", "c\r"], ["d\n", "\r\n"], ['e"', " f, "], ["\udcff", ""], ["plain", "1"]]
    write_csv_atomic(tmp_path / "a.csv", ["one", "two"], rows)
    content = (tmp_path / "a.csv").read_bytes()
    assert content == b"".join(map(csv_line, [["one", "two"], *rows]))
    assert content.startswith(b"one,two\n")
    assert content.endswith(b"\nplain,1\n")
    with (tmp_path / "a.csv").open(newline="", errors="surrogateescape") as file:
        assert list(csv.reader(file, strict=True)) == [["one", "two"], *rows]


@pytest.mark.parametrize("length", [2_000, 2_000_000])
def test_a_full_disk_is_told_with_the_file(tmp_path: Path, length: int) -> None:
    """Whether it is full when a part is written or when the rest is; a program that says "no space" alone lets one
    guess which of its disks."""
    with files_up_to(1000):
        for name, write in (
            ("a.txt", lambda path: write_text_atomic(path, "x" * length)),
            ("a.csv", lambda path: write_csv_atomic(path, ["one"], [["x" * length]])),
        ):
            with pytest.raises(OSError, match="File too large") as full:
                write(tmp_path / name)
            assert full.value.filename == str(tmp_path / name)
    assert not [*tmp_path.iterdir()]
