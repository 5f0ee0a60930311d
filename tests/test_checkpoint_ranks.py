"""Checkpoints of several ranks: written together or not at all, and read by any number of others."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from ranks import run_on_ranks
from saved_steps import TOTAL, attempt, files_up_to, is_step, matrix, names, own_range, save_step, write_three
from utils.ranks import Ranks
from utils.training import checkpoint_store
from utils.training.checkpoint_store import CheckpointStore, Rows
from utils.training.saved_checkpoints import shard_name


def read_part(folder: Path, ranks: Ranks) -> tuple[int, Tensor, Tensor]:
    """(step, this rank's rows, what is whole) of the newest checkpoint."""
    with CheckpointStore(folder, ranks) as store:
        saved = store.newest()
        assert saved is not None
        held = own_range(ranks)
        return saved.step, saved.rows("centres", held.start, held.stop), saved.whole()["weight"]


def fall_back(folder: Path, ranks: Ranks) -> tuple[bool, int]:
    """Whether the ranks pass over a damaged step 3 together, and how many lines this one says."""
    write_three(folder, ranks)
    if ranks.first:
        shard = folder / "step-000000003" / shard_name(0, ranks.size)
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    said: list[str] = []
    with CheckpointStore(folder, ranks, say=said.append) as store:
        return is_step(store, 2), len(said)


def set_aside(folder: str) -> tuple[int, list[str]]:
    """The step to which two ranks go back when the third is set aside, and what this one says."""
    ranks, said = Ranks(dist.group.WORLD), list[str]()
    with CheckpointStore(Path(folder), ranks, keep=3, say=said.append) as store:
        for step in (1, 2, 3):
            save_step(store, step, ranks)
        store.set_aside_from(3)
        saved = store.newest()
        assert saved is not None
        return saved.step, said


def full_disk(folder: Path, ranks: Ranks) -> tuple[str, bool, bool]:
    """(what a save raises when one rank's disk is full, whether the one before stays, whether the next succeeds)."""
    with CheckpointStore(folder, ranks, say=lambda line: None) as store:
        save_step(store, 1, ranks, wait=True)
        limit = 20 if ranks.rank == 2 else 10**6
        with files_up_to(limit), records_of_any_size():
            failure = attempt(lambda: save_step(store, 2, ranks, wait=True))
        old_stays = is_step(store, 1)
        save_step(store, 3, ranks, wait=True)
        return failure, old_stays, is_step(store, 3)


@contextmanager
def records_of_any_size() -> Iterator[None]:
    """A disk that is full for tensors has room, once they are removed, for the line that says so."""
    put = checkpoint_store._put

    def put_unlimited(path: Path, content: dict[str, Any]) -> None:
        with files_up_to(10**6):
            put(path, content)

    checkpoint_store._put = put_unlimited
    try:
        yield
    finally:
        checkpoint_store._put = put


def dead_rank(folder: Path, ranks: Ranks, dead: int) -> tuple[str, bool]:
    """(what a save raises in which the rank `dead` takes no part, whether the one before stays)."""
    store = CheckpointStore(folder, ranks, patience=0.3, say=lambda line: None)
    save_step(store, 1, ranks, wait=True)
    start = time.monotonic()
    failure = "" if ranks.rank == dead else attempt(lambda: save_step(store, 2, ranks, wait=True))
    assert time.monotonic() < start + 10
    old_stays = is_step(store, 1)
    assert attempt(store.finish) == failure
    return failure, old_stays


def lost_rank(folder: Path, ranks: Ranks) -> bool:
    """Whether a save that another rank will never finish is given up soon, once the training noticed the loss."""
    checkpoint_store._LOST_SECONDS = 0.3
    start = time.monotonic()
    with suppress(RuntimeError), CheckpointStore(folder, ranks, say=lambda line: None) as store:
        if ranks.first:
            save_step(store, 1, ranks, wait=False)
        raise RuntimeError("... Connection closed by peer ...")
    return time.monotonic() < start + 30


def overlap(folder: Path, ranks: Ranks) -> str:
    """What two ranks' saving the same rows comes to."""
    store = CheckpointStore(folder, ranks, say=lambda line: None)
    rows = {"centres": Rows(torch.zeros(3, 2), 2 * ranks.rank, 5)}
    failure = attempt(lambda: store.save(1, {}, rows, {}, wait=True))
    assert store.newest() is None
    attempt(store.finish)
    return failure


def all_on_ranks(folder: str) -> dict[str, Any]:
    """Every case in one set of processes, for they take long to start: each on the first few of four ranks."""
    groups = [dist.new_group(list(range(size))) for size in (1, 2, 3, 4)]
    member = {size: Ranks(group) for size, group in enumerate(groups, 1) if dist.get_rank() < size}
    found: dict[str, Any] = {}
    for writers, readers in CROSSINGS:
        place = Path(folder, f"{writers}to{readers}")
        if writers in member:
            write_three(place, member[writers])
        dist.barrier()
        if readers in member:
            found[f"{writers}to{readers}"] = read_part(place, member[readers])
    if 2 in member:
        found["fall back"] = fall_back(Path(folder, "damaged"), member[2])
        found["overlap"] = overlap(Path(folder, "overlap"), member[2])
        for dead in (0, 1):
            found[f"dead {dead}"] = dead_rank(Path(folder, f"dead{dead}"), member[2], dead)
        found["lost"] = lost_rank(Path(folder, "lost"), member[2])
    if 3 in member:
        found["full disk"] = full_disk(Path(folder, "full"), member[3])
    return found


CROSSINGS = [(3, 2), (1, 4), (2, 1)]


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `all_on_ranks` saved."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def on_ranks(ranks_folder: Path) -> list[dict[str, Any]]:
    """What each of four ranks found."""
    return run_on_ranks(4, all_on_ranks, str(ranks_folder))


@pytest.mark.parametrize(("writers", "readers"), CROSSINGS)
def test_any_number_of_ranks_goes_on(
    on_ranks: list[dict[str, Any]], ranks_folder: Path, writers: int, readers: int
) -> None:
    """Every rank gets its rows, whoever had them, and all get what is whole."""
    folder = ranks_folder / f"{writers}to{readers}"
    assert names(folder / "step-000000003") == [
        "manifest.json",
        *(f"rows-{rank:05}-of-{writers:05}.safetensors" for rank in range(writers)),
        "whole.safetensors",
    ]
    assert [name for name in names(folder) if name.startswith("step")] == ["step-000000002", "step-000000003"]
    found = [rank[f"{writers}to{readers}"] for rank in on_ranks[:readers]]
    assert {step for step, _, _ in found} == {3}
    assert torch.equal(torch.cat([rows for _, rows, _ in found]), matrix() + 3)
    assert all(torch.equal(whole, torch.full((4,), 3)) for _, _, whole in found)


def test_only_what_holds_the_rows_is_read(
    on_ranks: list[dict[str, Any]], ranks_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows come in pieces, from the files that hold them: the others need not even be there."""
    monkeypatch.setattr("utils.training.saved_checkpoints._READ_BYTES", 48)
    with CheckpointStore(ranks_folder / "3to2", Ranks()) as store:
        saved = store.newest()
    assert saved is not None
    assert torch.equal(saved.rows("centres", 1, 10), matrix()[1:10] + 3)
    (saved.folder / shard_name(1, 3)).rename(ranks_folder / "moved")
    assert torch.equal(saved.rows("centres", 0, 3), matrix()[:3] + 3)
    assert torch.equal(saved.rows("centres", 7, TOTAL), matrix()[7:] + 3)
    (ranks_folder / "moved").rename(saved.folder / shard_name(1, 3))


def test_ranks_fall_back_together(on_ranks: list[dict[str, Any]]) -> None:
    """Each checks some of the files; damage that one of them sees counts for all."""
    assert [rank["fall back"] for rank in on_ranks[:2]] == [(True, 2), (True, 0)], "the first says it all"


def test_a_full_disk_of_one_rank(on_ranks: list[dict[str, Any]]) -> None:
    """No rank takes the checkpoint for written, all are told by whom it was not, and the next save is whole."""
    for rank in on_ranks[:3]:
        failure, old_stays, recovers = rank["full disk"]
        assert "rank 2: " in failure
        assert "File too large" in failure
        assert old_stays
        assert recovers


def test_what_does_not_fit_makes_room_for_its_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a full disk the rows that were cut off go before the line is written that tells the first rank of it."""
    there, put = list[bool](), checkpoint_store._put

    def cut_off(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left")

    def noted(path: Path, content: dict[str, Any]) -> None:
        there.append((path.parent / shard_name(0, 1)).exists())
        put(path, content)

    monkeypatch.setattr(checkpoint_store, "_put", noted)
    store = CheckpointStore(tmp_path / "checkpoints", Ranks(), say=lambda line: None)
    monkeypatch.setattr(store._rows, "write", cut_off)
    assert "rank 0: no space left" in attempt(lambda: save_step(store, 1, Ranks(), wait=True))
    assert there == [False]
    attempt(store.finish)


def test_only_what_is_said_of_the_save_counts(tmp_path: Path) -> None:
    """What the first rank said in a run before, of whatever number, is no answer; one save later it has seen more."""
    with CheckpointStore(tmp_path, Ranks(), patience=0.05) as store:
        save = checkpoint_store._Save(2, 7, tmp_path, {}, {}, False)

        def heed(token: str, number: int, error: str | None) -> None:
            said = {"token": token, "number": number, "error": error}
            checkpoint_store._put(tmp_path / checkpoint_store._OUTCOME, said)
            store._heed_outcome(save)

        heed(store._token, 2, None)
        heed(store._token, 3, "a full disk, at a later one")
        for token, number in (("another", 2), (store._token, 1)):
            with pytest.raises(TimeoutError):
                heed(token, number, None)
        with pytest.raises(OSError, match="the checkpoint of step 7 could not be written: a full disk"):
            heed(store._token, 2, "a full disk")


@pytest.mark.parametrize(("dead", "missed"), [(0, "the first rank"), (1, "the rows of all ranks")])
def test_a_dead_rank_does_not_hang_the_others(on_ranks: list[dict[str, Any]], dead: int, missed: str) -> None:
    """The others give up after a while, whether it is the one that they wait for or the one that waits for them."""
    assert on_ranks[1 - dead][f"dead {dead}"] == (f"TimeoutError waited 0.3 s in vain for {missed}", True)
    assert on_ranks[dead][f"dead {dead}"] == ("", True)


def test_a_slow_rank_is_not_taken_for_dead(tmp_path: Path) -> None:
    """However long it takes, the others wait for it as long as its file grows."""

    def write_slowly() -> None:
        with (tmp_path / "rows").open("wb", buffering=0) as file:
            for _ in range(20):
                file.write(b"x")
                time.sleep(0.05)
        (tmp_path / "record").touch()

    writer = threading.Thread(target=write_slowly)
    writer.start()
    with CheckpointStore(tmp_path / "checkpoints", Ranks(), patience=0.5) as store:
        store._await("the record", lambda: (tmp_path / "record").exists() or None, tmp_path)
    writer.join()


def test_rows_have_to_make_up_the_matrix(on_ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """A matrix with rows twice, or with holes, never becomes a checkpoint; it is a fault, not a full disk."""
    assert on_ranks[0]["overlap"].startswith("ValueError the ranks' rows do not make up one centres")
    assert "do not make up one centres" in on_ranks[1]["overlap"]
    store = CheckpointStore(tmp_path / "alone", Ranks())
    store.save(1, {}, {"centres": Rows(torch.zeros(3, 2), 1, 4)}, {})
    with pytest.raises(ValueError, match="do not make up one centres"):
        store.save(2, {}, {}, {})
    with pytest.raises(ValueError, match="do not make up one centres"):
        store.finish()


def test_parts_of_a_matrix() -> None:
    """From ranks in any order; of one dtype and shape, and from every rank."""

    def part(first: int, stop: int, dtype: str = "F32", width: int = 2) -> dict[str, Any]:
        return {"a": {"dtype": dtype, "shape": [5, width], "range": [first, stop]}}

    joined = checkpoint_store._joined([part(3, 5), part(0, 3)])
    assert joined == {"a": {"dtype": "F32", "shape": [5, 2], "ranges": [[3, 5], [0, 3]]}}
    for other in (part(3, 5, dtype="F16"), part(3, 5, width=3), part(2, 5), part(3, 4)):
        with pytest.raises(ValueError, match="do not make up one a"):
            checkpoint_store._joined([part(0, 3), other])
    with pytest.raises(ValueError, match="do not make up one a"):
        checkpoint_store._joined([part(0, 5), {}])


def test_a_lost_rank_is_not_waited_for_long(on_ranks: list[dict[str, Any]]) -> None:
    """kill -9 of a process on another machine, in the middle of a save: nobody tells torchrun here, which would end the
    others, so that they have to end themselves; ten minutes would be lost in them."""
    assert [on_ranks[rank]["lost"] for rank in (0, 1)] == [True, True]


def test_ranks_set_a_checkpoint_aside_together(tmp_path: Path) -> None:
    """Also one that is being written: all go back to the one before, the first says so, and nothing of it is lost."""
    (first, said), (second, nothing) = run_on_ranks(2, set_aside, str(tmp_path / "saved"))
    assert (first, second, nothing) == (2, 2, [])
    assert [line.partition(" may hold")[0] for line in said] == [str(tmp_path / "saved" / "step-000000003")]
    assert len(list((tmp_path / "saved").glob("exploded-step-000000003-*"))) == 1
