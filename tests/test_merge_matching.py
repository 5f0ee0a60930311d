"""The most similar identities: against the whole matrix, in any blocks, on several ranks, in bounded memory."""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_merge import matching
from dataset_merge.matching import TopMatches, top_matches
from ranks import run_on_ranks
from saved_steps import files_up_to
from utils.ranks import Ranks


def unit(rows: int, size: int, seed: int) -> Tensor:
    """Random unit vectors."""
    return F.normalize(torch.randn(rows, size, generator=torch.Generator().manual_seed(seed)))


def brute_force(cosines: Tensor, k: int, floor: float) -> tuple[Tensor, Tensor]:
    """The k best of each row: the first whatever it is, the others above the floor."""
    best, index = cosines.topk(min(k, cosines.shape[1]), dim=1)
    low = best <= floor
    low[:, 0] = False
    low |= best == -torch.inf
    return best.masked_fill(low, -torch.inf), index.masked_fill(low, -1)


def check(found: TopMatches, cosines: Tensor, k: int, floor: float) -> None:
    best, index = brute_force(cosines, k, floor)
    torch.testing.assert_close(found.cosine[:, : best.shape[1]], best)
    assert torch.equal(found.index[:, : best.shape[1]], index)
    assert (found.index[:, best.shape[1] :] == -1).all()


@pytest.mark.parametrize("block", [1, 17, 64, 1000])
@pytest.mark.parametrize("floor", [-1.0, 0.3, 0.95])
@pytest.mark.parametrize("k", [1, 4])
def test_equal_to_brute_force(block: int, floor: float, k: int) -> None:
    """Both ways, for two sets and within one, with and without a floor that cuts something off."""
    first, second = unit(83, 16, 0), unit(61, 16, 1)
    rows, columns = top_matches(first, second, k, floor, block)
    cosines = first @ second.T
    check(rows, cosines, k, floor)
    check(columns, cosines.T, k, floor)
    rows, columns = top_matches(first, None, k, floor, block)
    check(rows, (first @ first.T).fill_diagonal_(-torch.inf), k, floor)
    assert columns is rows or torch.equal(columns.index, rows.index)


def test_fewer_than_k() -> None:
    """Sets smaller than k have all they can give, and -1 for the rest; one identity has nobody within its set."""
    rows, columns = top_matches(unit(2, 4, 0), unit(3, 4, 1), k=8, block=2)
    assert (rows.index >= 0).sum(1).tolist() == [3, 3]
    assert (columns.index >= 0).sum(1).tolist() == [2, 2, 2]
    alone, _ = top_matches(unit(1, 4, 0), None, k=2)
    assert alone.index.tolist() == [[-1, -1]]


def _on_a_rank() -> list[Tensor]:
    import torch.distributed as dist

    ranks = Ranks(dist.group.WORLD)
    rows, columns = top_matches(unit(83, 16, 0), unit(61, 16, 1), 4, 0.5, 16, ranks)
    within, _ = top_matches(unit(83, 16, 0), None, 4, 0.5, 16, ranks)
    return [rows.cosine, rows.index, columns.cosine, columns.index, within.cosine, within.index]


def test_ranks_share_the_work_and_agree() -> None:
    """Three processes, each with every third row block, give each of them what one alone gives; what is below the floor
    on one of them is not among the best of all.
    """
    first, second = unit(83, 16, 0), unit(61, 16, 1)
    rows, columns = top_matches(first, second, 4, 0.5, 16)
    within, _ = top_matches(first, None, 4, 0.5, 16)
    alone = [rows.cosine, rows.index, columns.cosine, columns.index, within.cosine, within.index]
    for result in run_on_ranks(3, _on_a_rank):
        for mine, expected in zip(result, alone, strict=True):
            torch.testing.assert_close(mine, expected)


def test_a_bar_shows_how_far_millions_are_compared(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """It ends at all of them, where a call goes on from what was kept, too; few are compared without a word."""
    first, second = unit(83, 16, 0), unit(61, 16, 1)
    top_matches(first, second, 4, 0.5, 16)
    assert not capsys.readouterr().err
    monkeypatch.setattr(matching, "_PAIRS_SHOWN", 1)
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    for _ in range(2):
        top_matches(first, second, 4, 0.5, 16, folder=tmp_path)
        assert "compare: 100%" in capsys.readouterr().err


class OneOfSeveral(Ranks):
    """A rank that keeps what it has found to itself."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size

    def gather(self, part: Tensor) -> Tensor:
        return part


@pytest.mark.parametrize("swap", [False, True])
def test_every_rank_has_work(swap: bool) -> None:
    """A set smaller than one block against a larger one, in either order: each of eight ranks compares an eighth."""
    first, second = unit(50, 8, 0), unit(900, 8, 1)
    shares = []
    for number in range(8):
        order = (second, first) if swap else (first, second)
        rows, columns = top_matches(*order, k=1, ranks=OneOfSeveral(number, 8))
        assert ((rows if swap else columns).index >= 0).sum() in range(80, 150)
        shares.append(rows if swap else columns)
    assert sum(int((share.index >= 0).sum()) for share in shares) == 900
    best, index = (second @ first.T).max(1)
    cosine, rank = torch.stack([share.cosine[:, 0] for share in shares]).max(0)
    torch.testing.assert_close(cosine, best)
    assert torch.equal(torch.stack([share.index[:, 0] for share in shares])[rank, torch.arange(900)], index)


@pytest.mark.parametrize("within", [False, True])
def test_an_interrupted_comparison_goes_on(within: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any product, the next call begins with the row block that was not done, and gives the very same; once
    all is done nothing is multiplied any more, and other vectors or limits begin anew.
    """
    first, second = unit(83, 16, 0), None if within else unit(61, 16, 1)
    arguments = {"k": 3, "floor": 0.1, "block": 16}
    wanted = top_matches(first, second, **arguments)
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    products, multiply = 0, torch.mm

    def count(*operands: Tensor, out: Tensor) -> Tensor:
        nonlocal products
        products += 1
        if products == stop:
            raise KeyboardInterrupt
        return multiply(*operands, out=out)

    monkeypatch.setattr(torch, "mm", count)
    stop = 14
    with pytest.raises(KeyboardInterrupt):
        top_matches(first, second, folder=tmp_path, **arguments)
    whole = 21 if within else 24
    done = 11 if within else 12
    stop = 0
    for further in (whole - done, 0):
        products = 0
        found = top_matches(first, second, folder=tmp_path, **arguments)
        assert products == further
        for kept, expected in zip(found, wanted, strict=True):
            assert torch.equal(kept.cosine, expected.cosine)
            assert torch.equal(kept.index, expected.index)
    for other, limits in ((first.roll(1, 0), arguments), (first, {**arguments, "floor": 0.2})):
        products = 0
        top_matches(other, second, folder=tmp_path, **limits)
        assert products == whole


@pytest.mark.parametrize(
    "damage",
    [
        lambda state: b"",
        lambda state: b"PK\x03\x04",
        lambda state: [1],
        lambda state: {"start": 0},
        lambda state: {**state, "start": "x"},
        lambda state: {**state, "start": -16},
        lambda state: {**state, "start": 7},
        lambda state: {**state, "start": 16_000},
        lambda state: {**state, "kept": []},
        lambda state: {**state, "kept": [5, 6]},
        lambda state: {**state, "kept": [(cosine[1:], index[1:]) for cosine, index in state["kept"]]},
        lambda state: {**state, "kept": [(cosine.double(), index) for cosine, index in state["kept"]]},
        lambda state: {**state, "kept": [(cosine, index.clamp(min=61)) for cosine, index in state["kept"]]},
    ],
)
def test_damaged_matches_are_made_anew(
    damage: Callable[[dict[str, Any]], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the file holds, of which a line tells: a merge need not wait until somebody removes it."""
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    first, second = unit(83, 16, 0), unit(61, 16, 1)
    wanted = top_matches(first, second, 3, 0.1, 16, folder=tmp_path)
    (path,) = tmp_path.iterdir()
    content = damage(torch.load(path))
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.warns(UserWarning, match=r"matches-\w+\.pt is damaged: its matches are made anew"):
        found = top_matches(first, second, 3, 0.1, 16, folder=tmp_path)
    for kept, expected in zip(found, wanted, strict=True):
        assert torch.equal(kept.cosine, expected.cosine)
        assert torch.equal(kept.index, expected.index)


def test_matches_that_do_not_fit_on_the_disk_are_an_error_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which a program tells in a line; torch's own, of a position in its archive, would be a traceback."""
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    with files_up_to(1000), pytest.raises(OSError, match=r"File too large: '.*/matches-\w+\.pt'"):
        top_matches(unit(20_000, 16, 0), unit(61, 16, 1), 3, 0.1, 5000, folder=tmp_path)
    assert not [*tmp_path.iterdir()]


def test_interrupted_ranks_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own rows, from a file of its own in the folder that they share."""
    first, second = unit(83, 16, 0), unit(61, 16, 1)
    ranks = [OneOfSeveral(number, 3) for number in range(3)]
    wanted = [top_matches(first, second, 3, 0.1, 4, rank) for rank in ranks]
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    products, multiply = 0, torch.mm

    def count(*operands: Tensor, out: Tensor) -> Tensor:
        nonlocal products
        products += 1
        if products == stop:
            raise KeyboardInterrupt
        return multiply(*operands, out=out)

    monkeypatch.setattr(torch, "mm", count)
    stop = 40  # in the third of seven row blocks with sixteen products each
    for rank in ranks:
        products = 0
        with pytest.raises(KeyboardInterrupt):
            top_matches(first, second, 3, 0.1, 4, rank, tmp_path)
    stop = 0
    for rank, alone in zip(ranks, wanted, strict=True):
        products = 0
        found = top_matches(first, second, 3, 0.1, 4, rank, tmp_path)
        assert products == 5 * 16
        assert all(torch.equal(kept.index, expected.index) for kept, expected in zip(found, alone, strict=True))


def test_matches_are_saved_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After each minute of work: of 21 row blocks that take 25 s each every third one is saved."""
    seconds = itertools.count(step=25.0)
    monkeypatch.setattr(matching.time, "monotonic", seconds.__next__)
    saves, save = [], torch.save

    def count(state: dict, file: BinaryIO) -> None:
        saves.append(state["start"])
        save(state, file)

    monkeypatch.setattr(torch, "save", count)
    top_matches(unit(84, 16, 0), unit(61, 16, 1), block=4, folder=tmp_path)
    assert 4 <= len(saves) <= 7


def test_short_comparisons_leave_no_file(tmp_path: Path) -> None:
    """What takes less than a minute is done again."""
    top_matches(unit(83, 16, 0), None, folder=tmp_path)
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_product() -> None:
    """No tensor is larger than a block of cosines, the vectors, or what is kept of them."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, Tensor):
                largest = max(largest, result.numel())
            return result

    first, second = unit(3000, 4, 0), unit(2000, 4, 1)
    with Watch():
        top_matches(first, second, k=2, floor=0.99, block=64)
    assert largest == 3000 * 2
