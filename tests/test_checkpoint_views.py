"""Checkpoints in a folder that ranks see differently, late, or cannot write to, as on several machines."""

import errno
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ranks import run_on_ranks
from saved_steps import attempt, names, save_step, write_three
from utils.ranks import Ranks
from utils.training import checkpoint_checks, checkpoint_store
from utils.training.checkpoint_store import CheckpointStore
from utils.training.host_copy import HostCopy
from utils.training.saved_checkpoints import MissingError, Saved


def no_common_folder(folder: Path, ranks: Ranks) -> str:
    """What each rank hears when each has a folder of its own; all let go of what they took."""
    own = folder / str(ranks.rank)
    (own / ".checkpoints.partial").mkdir(parents=True)  # what a killed run of the same name left
    patience, checkpoint_store.SEEN_WITHIN = checkpoint_store.SEEN_WITHIN, 0.2
    try:
        failure = attempt(lambda: CheckpointStore(own / "checkpoints", ranks))
    finally:
        checkpoint_store.SEEN_WITHIN = patience
    assert (own / ".checkpoints.partial").exists() != ranks.first
    return failure


def unseen(folder: Path, ranks: Ranks) -> tuple[str, list[str]]:
    """What each rank hears when the second does not see what the first does; the checkpoints afterwards."""
    write_three(folder, ranks)

    def see_nothing(path: Path) -> Saved:
        raise MissingError(path / "manifest.json")

    with CheckpointStore(folder, ranks) as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_checks, "SEEN_WITHIN", 0.1)
        if not ranks.first:
            patch.setattr(checkpoint_checks, "Saved", see_nothing)
        failure = attempt(store.newest)
    return failure, [name for name in names(folder) if "step" in name]


def seen_late(folder: Path, ranks: Ranks) -> int:
    """The step that is gone on from when the first rank sees a file after a while, and the second at once."""
    write_three(folder, ranks)
    begun = time.monotonic()

    def see_late(path: Path) -> Saved:
        if time.monotonic() < begun + 0.5:
            raise MissingError(path / "manifest.json")
        return Saved(path)

    with CheckpointStore(folder, ranks) as store, pytest.MonkeyPatch.context() as patch:
        if ranks.first:
            there = checkpoint_checks._there
            patch.setattr(checkpoint_checks, "Saved", see_late)
            patch.setattr(
                checkpoint_checks, "_there", lambda file: there(file) if time.monotonic() > begun + 0.5 else None
            )
        saved = store.newest()
    assert saved is not None
    return saved.step


def read_only(folder: Path, ranks: Ranks) -> str:
    """What each rank hears, before the first step, when the second cannot write into the folder."""

    def touch(path: Path) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with pytest.MonkeyPatch.context() as patch:
        if not ranks.first:
            patch.setattr(Path, "touch", touch)
        return attempt(lambda: CheckpointStore(folder, ranks).finish())


def gone_read_only(folder: Path, ranks: Ranks) -> tuple[str, list[str]]:
    """What a save comes to that the second rank can write nothing of, not even that, and what that one says."""

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    said: list[str] = []
    store = CheckpointStore(folder, ranks, patience=1.0, say=lambda line: None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_store, "say", said.append)
        if not ranks.first:
            patch.setattr(checkpoint_store, "_put", fail)
            patch.setattr(HostCopy, "write", fail)
            patch.setattr(Path, "unlink", fail)
        failure = attempt(lambda: save_step(store, 1, ranks, wait=True))
    attempt(store.finish)
    return failure, said


def elsewhere(folder: Path, ranks: Ranks) -> tuple[str, int]:
    """What each rank hears of a file that one does not see, and the other, to whom the folder is another, does; the
    number of checkpoints left."""
    write_three(folder / "run" / "checkpoints", ranks)
    if ranks.first:
        (folder / "link").symlink_to("run")
    ranks.agree("")
    own = folder / ("run" if ranks.first else "link") / "checkpoints"

    def see_nothing(path: Path) -> Saved:
        raise MissingError(path / "manifest.json")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_checks, "SEEN_WITHIN", 0.1)
        patch.setattr(Path, "resolve", lambda path: path)  # as on machines that have the disk in other places
        if ranks.first:
            there = checkpoint_checks._there
            patch.setattr(checkpoint_checks, "_there", lambda file: None if "link" in file.parts else there(file))
        else:
            patch.setattr(checkpoint_checks, "Saved", see_nothing)
            patch.setattr(checkpoint_checks, "_there", lambda file: None)
        with CheckpointStore(own, ranks) as store:
            failure = attempt(store.newest)
    return failure, len([name for name in names(own) if name.startswith("step")])


def all_on_ranks(folder: str) -> dict[str, Any]:
    """Every case in one set of processes, for they take long to start."""
    ranks = Ranks(dist.group.WORLD)
    found: dict[str, Any] = {}
    found["unseen"] = unseen(Path(folder, "unseen"), ranks)
    found["seen late"] = seen_late(Path(folder, "late"), ranks)
    found["gone read-only"] = gone_read_only(Path(folder, "gone read-only"), ranks)
    found["elsewhere"] = elsewhere(Path(folder, "elsewhere"), ranks)
    found["read-only"] = read_only(Path(folder, "read-only"), ranks)
    found["no common folder"] = no_common_folder(Path(folder, "own"), ranks)
    return found


@pytest.fixture(scope="module")
def on_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two ranks found."""
    return run_on_ranks(2, all_on_ranks, str(tmp_path_factory.mktemp("ranks")))


def test_what_one_rank_does_not_see_is_no_damage(on_ranks: list[dict[str, Any]]) -> None:
    """A machine with an old view of the folder, or without it, would set good checkpoints aside, one after another. It
    waits for what the first sees, and then all end, told by whom and why."""
    for failure, left in (rank["unseen"] for rank in on_ranks):
        assert "CheckpointError" in failure
        assert f"step-000000003 could not be checked by process 1 ({socket.gethostname()})" in failure
        assert "manifest.json is not there, though process 0 sees it" in failure
        assert left == ["step-000000002", "step-000000003"]
    assert [rank["seen late"] for rank in on_ranks] == [3, 3]
    for failure, left in (rank["elsewhere"] for rank in on_ranks):
        assert "could not be checked by process 1" in failure
        assert left == 2


def test_a_folder_that_one_rank_cannot_write_to_is_told_at_once(on_ranks: list[dict[str, Any]]) -> None:
    """Else each save would wait for that rank for ten minutes, and there would be no checkpoint in the end."""
    for failure in (rank["read-only"] for rank in on_ranks):
        assert "Read-only file system" in failure
    (failure, _), (_, said) = (rank["gone read-only"] for rank in on_ranks)
    assert "waited 1 s in vain for the rows of all ranks" in failure
    assert [line.split(": ", 1)[0] for line in said] == [
        f"the checkpoint of step 1 cannot be written on {socket.gethostname()}"
    ]
    assert "Read-only file system" in said[0]


def test_folders_that_are_not_shared_are_told_on_all_machines(on_ranks: list[dict[str, Any]]) -> None:
    """Also on that of the first rank, which would go on and lose the others."""
    cause = "waited 0.2 s in vain for "
    assert on_ranks[0]["no common folder"].startswith("OtherRankError process 1 (")
    assert cause in on_ranks[0]["no common folder"]
    assert on_ranks[1]["no common folder"].startswith(f"TimeoutError {cause}")
