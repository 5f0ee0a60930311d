"""How many faces fit is tried out, and the trial leaves no trace."""

import copy
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from live_memory import LiveMemory
from models.heads import Engine, RowSGD, create_head
from models.losses import ArcFace
from utils.training.micro_batch import LIMIT, bytes_beside, keep_limit, kept_limit, largest_that_fits, trial_pass


class Card:
    """Something on which at most `holds` faces fit; notes what was tried."""

    def __init__(self, holds: int) -> None:
        self.holds = holds
        self.tried: list[int] = []

    def attempt(self, faces: int) -> None:
        self.tried.append(faces)
        if faces > self.holds:
            raise torch.OutOfMemoryError("made up")


@pytest.mark.parametrize(
    ("holds", "most", "tried"),
    [(100, 64, [64]), (64, 64, [64]), (20, 64, [64, 32, 16]), (20, 75, [75, 38, 19]), (1, 1, [1]), (2, 7, [7, 4, 2])],
)
def test_halves_until_it_fits(holds: int, most: int, tried: list[int]) -> None:
    """The largest of the halves of `most`, rounded up, is found from above, and nothing smaller is tried."""
    card = Card(holds)
    assert largest_that_fits(card.attempt, most) == tried[-1]
    assert card.tried == tried


@pytest.mark.parametrize(("most", "tried"), [(8, [8, 4, 2]), (1, [1])])
def test_a_network_that_never_fits_raises(most: int, tried: list[int]) -> None:
    """Not even the least that can train: out of memory, for the caller to say what to do about it."""
    card = Card(0)
    with pytest.raises(torch.OutOfMemoryError):
        largest_that_fits(card.attempt, most)
    assert card.tried == tried


def test_other_errors_are_not_tried_again() -> None:
    """A network that fails for another reason fails once, with its own error."""
    tried = []

    def attempt(faces: int) -> None:
        tried.append(faces)
        raise RuntimeError("a shape that does not fit")

    with pytest.raises(RuntimeError, match="a shape"):
        largest_that_fits(attempt, 8)
    assert tried == [8]


class Failing(nn.Module):
    """Passes forward; runs out of memory on the way back when `fails`."""

    def __init__(self) -> None:
        super().__init__()
        self.fails = True
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(tuple(x.shape))
        x.register_hook(self._back)
        return x

    def _back(self, gradient: Tensor) -> None:
        if self.fails:
            raise torch.OutOfMemoryError("made up")


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_trial_leaves_nothing_behind(fails: bool, precision: torch.dtype) -> None:
    """After a pass, whole or broken off in the middle: the weights, the statistics of norms and their count are as they
    were, and no weight has a gradient. The pass trains on as many faces as asked, in the precision of the run."""
    torch.manual_seed(0)
    last = Failing()
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5), last)
    last.fails = fails
    dtypes: list[torch.dtype] = []
    network[0].register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(torch.OutOfMemoryError) if fails else nullcontext():
        trial_pass(network, 6, 4, precision, states=2)
    assert last.seen == [(6, 5)]
    assert dtypes == [precision]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(weight.grad is None for weight in network.parameters())


@pytest.mark.parametrize(
    ("faces", "ranks", "engine", "block", "floats"),
    [
        (8, 1, "dense", 20, 8 * 3 * 16 + 4 * 8 * 100 + 2 * 1000),
        (8, 1, "blockwise", 20, 8 * 3 * 16 + 4 * 8 * 40 + 5 * 400),
        (8, 1, "blockwise", 10_000, 8 * 3 * 16 + 4 * 8 * 100 + 5 * 1000),
        (4, 1, "dense", 20, 8 * 3 * 16 + 4 * 4 * 100 + 2 * 1000 + 1000),
        (8, 2, "dense", 20, 8 * 3 * 16 + 4 * 16 * 100 + 2 * 1000 + 84),
    ],
)
def test_what_a_step_keeps_beside_a_pass(faces: int, ranks: int, engine: Engine, block: int, floats: int) -> None:
    """A pass alone may fit where the step does not: the inputs, the head's work on all sub-centers of a block, which
    are no more than there are, what is as large as their centres, all centres' gradient when there are several passes,
    and what ranks exchange."""
    network = nn.Conv2d(3, 3, 3)
    head = create_head(
        ArcFace(0.5, 16.0), 50, 10, RowSGD(), 8, device=torch.device("cpu"), engine=engine, block=block, sub_centers=2
    )
    assert bytes_beside(faces, 8, 4, network, head, ranks) == 4 * floats


def test_a_trial_keeps_in_memory_what_the_step_keeps() -> None:
    """It does not fit where that does not."""
    with pytest.raises(RuntimeError, match="memory"):
        trial_pass(nn.Conv2d(3, 1, 3), 6, 4, torch.float32, beside=1 << 60)


def test_a_trial_has_what_an_optimizer_keeps() -> None:
    """Tensors as large as the weights, as many as `states`; gone after it, and after one that failed too, whose error
    whoever called may hold while it tries something else."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 1000), Failing())
    size = sum(weight.nbytes for weight in network.parameters())
    peaks = []
    for fails in (False, True):
        network[2].fails = fails
        for states in (0, 2):
            held: list[BaseException] = []
            with LiveMemory() as memory:
                try:
                    trial_pass(network, 6, 4, torch.float32, states)
                except torch.OutOfMemoryError as error:
                    held.append(error)
                left = memory.now
            assert len(held) == fails
            assert left < size
            peaks.append(memory.peak)
    assert [peaks[1] - peaks[0], peaks[3] - peaks[2]] == [2 * size] * 2


def test_a_limit_is_kept_for_the_run(tmp_path: Path) -> None:
    """None at first, then the one written last; a file that is something else is an error that names it."""
    assert kept_limit(tmp_path) is None
    for faces in (64, 32):
        keep_limit(tmp_path, faces)
        assert kept_limit(tmp_path) == faces
    for text in ("", "0", "many", "-3", "1.5"):
        (tmp_path / LIMIT).write_text(text)
        with pytest.raises(ValueError, match=rf"{LIMIT}: {text!r} is no number of images: remove the file"):
            kept_limit(tmp_path)
    for damaged in (b"\xff\xfe", b"9" * 5000):
        (tmp_path / LIMIT).write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"{LIMIT}: .* is no number of images: remove the file"):
            kept_limit(tmp_path)
