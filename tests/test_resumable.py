"""A folder made over several runs: only what its journal vouches for is taken over, and that is on the disk."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from utils.files import JOURNAL, partial_folder
from utils.resumable import JournalError, ResumableFolder, resumable_folder

SETTINGS = {"size": 112, "sources": ("a", "b")}


def begin(folder: Path, made_from: dict[str, Any] = SETTINGS) -> None:
    """Save after `one`, write on without saving, and be interrupted."""
    with pytest.raises(KeyboardInterrupt), resumable_folder(folder, made_from, restart=False) as work:
        assert work.state == {}
        work.open("log").write(b"one ")
        work.save({"words": 1})
        work.open("log").write(b"two " * 9999)
        work.open("other").write(b"two")
        raise KeyboardInterrupt


def test_what_is_not_in_the_journal_is_not_there(tmp_path: Path) -> None:
    """The next run begins where the journal says, whatever lies behind, and in files that it does not name."""
    begin(tmp_path / "set")
    assert not (tmp_path / "set").exists()
    with resumable_folder(tmp_path / "set", SETTINGS, restart=False) as work:
        assert work.state == {"words": 1}
        assert sorted(path.name for path in work.path.iterdir()) == ["log"]
        assert (work.path / "log").read_bytes() == b"one "
        assert work.open("log").tell() == 4
        work.open("log").write(b"2")
        assert work.open("other").tell() == 0
        work.open("other").write(b"x")
    assert {path.name: path.read_bytes() for path in (tmp_path / "set").iterdir()} == {"log": b"one 2", "other": b"x"}
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_without_a_save_nothing_is_left(tmp_path: Path) -> None:
    """An error before there is anything to go on with leaves no trace."""
    with pytest.raises(KeyboardInterrupt), resumable_folder(tmp_path / "set", SETTINGS, restart=False) as work:
        work.open("log").write(b"one")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_other_settings(tmp_path: Path) -> None:
    """The error names each that differs, added and removed ones too, and what was begun stays as it was."""
    begin(tmp_path / "set")
    other = {"size": 96, "sources": ["a", "b"], "new": "x"}
    message = r"\.set\.partial was begun with another size \(112, now 96\), new \(None, now 'x'\)$"
    with pytest.raises(JournalError, match=message), resumable_folder(tmp_path / "set", other, restart=False):
        pytest.fail("the block must not be entered")
    with resumable_folder(tmp_path / "set", SETTINGS, restart=False) as work:
        assert work.state == {"words": 1}
    begin(tmp_path / "again")
    with resumable_folder(tmp_path / "again", other, restart=True) as work:
        assert work.state == {}
        assert list(work.path.iterdir()) == []


@pytest.mark.parametrize(
    "change",
    [
        {"made_from": 3},
        {"state": []},
        {"bytes": [1]},
        {"bytes": {"log": -1}},
        {"bytes": {"log": "x"}},
        {"bytes": {"../../precious": 0}},
    ],
)
def test_a_journal_of_somebody_else(tmp_path: Path, change: dict[str, object]) -> None:
    """One that says anything else than this program writes is refused, and cuts off no file outside of its folder."""
    (tmp_path / "precious").write_text("mine")
    begin(tmp_path / "set")
    journal = partial_folder(tmp_path / "set") / JOURNAL
    journal.write_text(json.dumps({**json.loads(journal.read_text()), **change}))
    with (
        pytest.raises(JournalError, match=r"journal\.json is damaged"),
        resumable_folder(tmp_path / "set", SETTINGS, restart=False),
    ):
        pytest.fail("it was believed")
    assert (tmp_path / "precious").read_text() == "mine"


def test_the_journal_never_runs_ahead_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At each save the bytes that it vouches for were synced before it, it itself before its name, then its folder."""
    synced: dict[int, int] = {}  # size of each file and folder, by inode, when it was last synced
    real_sync, real_replace = os.fsync, Path.replace

    def fsync(descriptor: int) -> None:
        status = os.fstat(descriptor)
        synced[status.st_ino] = status.st_size
        real_sync(descriptor)

    def vouched_for(work: ResumableFolder, journal: Path) -> bool:
        sizes = json.loads(journal.read_text())["bytes"]
        return bool(sizes) and all(
            synced.get((work.path / name).stat().st_ino, -1) >= size for name, size in sizes.items()
        )

    def replace(source: Path, target: Path) -> Path:
        if target.name == JOURNAL:
            assert source != target, "the old journal stays until the new one is whole"
            assert synced[source.stat().st_ino] == source.stat().st_size
            assert vouched_for(work, source)
            assert work.path.stat().st_ino in synced
            synced.pop(target.parent.stat().st_ino, None)
            renamed.append(target)
        else:
            for file in source.iterdir():
                assert synced[file.stat().st_ino] == file.stat().st_size
            assert source.stat().st_ino in synced
            synced.pop(target.parent.stat().st_ino, None)
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    renamed: list[Path] = []
    with resumable_folder(tmp_path / "set", SETTINGS, restart=False) as work:
        partial = partial_folder(tmp_path / "set")
        assert tmp_path.stat().st_ino in synced, "the partial folder's own name"
        for number in range(3):
            work.open("log").write(b"word ")
            work.open(f"file {number}").write(b"word ")
            work.save({})
            assert partial.stat().st_ino in synced
        work.open("log").write(b"the end")
    assert len(renamed) == 3
    assert tmp_path.stat().st_ino in synced
