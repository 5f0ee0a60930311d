"""What is asked of a run while it goes on: to end, also in the middle of a verification, and to save by the clock."""

import itertools
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from models.embedders import NetworkEmbedder
from ranks import run_on_ranks
from tiny_runs import configure
from train import Trainer, train
from utils.checkpoints import BEST
from utils.interrupts import Interrupt
from utils.ranks import OtherRankError, Ranks
from utils.training import run_requests
from utils.training.metrics import read_metrics
from utils.training.run_folders import CHECKPOINTS
from utils.training.run_requests import RunRequests, SignalledError
from utils.training.saved_checkpoints import BACKBONE, checkpoint_folders, step_of


def saved_steps(run: Path) -> list[int]:
    return [step_of(folder) for folder in checkpoint_folders(run / CHECKPOINTS)]


def verified(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["verify/tiny"]) for line in read_metrics(run) if "verify/tiny" in line]


def assert_same_end(run: Path, other: Path) -> None:
    """The last weights, the best ones, and what was verified."""
    files = [[checkpoint_folders(each / CHECKPOINTS)[-1] / BACKBONE, each / BEST] for each in (run, other)]
    for one, two in zip(*files, strict=True):
        expected, found = load_file(one), load_file(two)
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert verified(run) == verified(other)


@pytest.fixture(scope="module")
def whole(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbs."""
    return train(configure(tiny_set, tmp_path_factory.mktemp("whole")))


def signal_at(monkeypatch: pytest.MonkeyPatch, batch: int) -> list[int]:
    """Send SIGTERM in a batch of the verification, counted from 1; returns the sizes of all that are embedded."""
    real, sizes = NetworkEmbedder.features, list[int]()

    def features(self: NetworkEmbedder, faces: Tensor, mirror: bool) -> Tensor:
        sizes.append(len(faces))
        if len(sizes) == batch:
            signal.raise_signal(signal.SIGTERM)
        return real(self, faces, mirror)

    monkeypatch.setattr(NetworkEmbedder, "features", features)
    return sizes


@pytest.mark.parametrize(
    ("settings", "step"),
    [({}, 6), ({"train__checkpoint_every": 4}, 6), ({"train__verify_at_start": True}, 0)],
    ids=["saved", "not saved", "untrained"],
)
def test_a_signal_ends_a_verification_at_its_next_batch(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, settings: dict[str, object], step: int
) -> None:
    """Whoever sends SIGTERM kills soon, and a verification may take longer: it is given up, with no step lost, and made
    again, once, by the run that goes on, to the same end."""
    run = tmp_path / "a"
    for resume in ("", str(run)) if step else ("",):
        with monkeypatch.context() as patch:
            sizes = signal_at(patch, 2)
            with pytest.raises(KeyboardInterrupt, match=f"stopped and saved at step {step} of 12"):
                train(configure(tiny_set, tmp_path, test__batch_size=7, train__resume=resume, **settings))
            assert sizes == [7, 7], "of 40 images"
    assert checkpoint_folders(run / CHECKPOINTS)[-1].name == f"step-{step:09}", "saved, and once"
    train(configure(tiny_set, tmp_path, train__resume=str(run), **settings))
    if step:
        assert_same_end(whole, run)
    assert [at for at, _ in verified(run)] == ([6, 12] if step else [0, 6, 12])


def test_untrained_weights_are_verified_once(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before its first checkpoint, a run begins anew, and its record too; resumed from one, it has nothing
    untrained to verify."""
    settings = {"train__verify_at_start": True, "train__resume": "auto", "train__checkpoint_every": 4}
    config = configure(tiny_set, tmp_path, **settings)
    for method, whole in (("train_on", Trainer.train_on), ("save", Trainer.save)):

        def and_die(*arguments: Any, real: Any = whole, **named: Any) -> None:
            real(*arguments, **named)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, method, and_die)
            with pytest.raises(KeyboardInterrupt):
                train(config)
        assert [at for at, _ in verified(tmp_path / "a")] == [0]
    train(config)
    assert [at for at, _ in verified(tmp_path / "a")] == [0, 6, 12]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_run_that_dies_at_a_verification_makes_it_again(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: Path, when: str
) -> None:
    """The epoch's checkpoint is there before its verification begins. Whether that came to its end or not: accuracies
    and best network end as without the accident."""
    verify = Trainer.verify

    def die(self: Trainer) -> None:
        if when == "after":
            verify(self)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "verify", die)
        with pytest.raises(KeyboardInterrupt):
            train(configure(tiny_set, tmp_path))
    run = tmp_path / "a"
    assert saved_steps(run) == [6]
    train(configure(tiny_set, tmp_path, train__resume=str(run)))
    assert_same_end(whole, run)


@pytest.mark.parametrize(("minutes", "steps"), [(0.0, [6, 12]), (10.0, [6, 12]), (1e-9, [2, 4, 6, 8, 10, 12])])
def test_the_clock_asks_for_checkpoints(tiny_set: Path, tmp_path: Path, minutes: float, steps: list[int]) -> None:
    """An epoch may take hours: between its ends the run saves at lines of the log, when the last time is long ago."""
    config = configure(tiny_set, tmp_path, train__checkpoint_minutes=minutes, train__checkpoints_kept=9)
    assert saved_steps(train(config)) == steps


def test_every_save_sets_the_clock_back(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Be it by the clock or at the end of an epoch: the next one by the clock is the set time after it. A step takes
    25 s here, a save too."""
    seconds = itertools.count(0, 25)
    monkeypatch.setattr(run_requests, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    config = configure(tiny_set, tmp_path, train__checkpoint_minutes=1.0, train__checkpoints_kept=9)
    assert saved_steps(train(config)) == [4, 6, 10, 12]


def test_a_process_alone_hears_after_every_step() -> None:
    """It need not wait for a step at which several would agree."""
    assert RunRequests(Interrupt(15), Ranks(), 0.0).read(always=False) == (15, False, False)


def ask(ranks: Ranks) -> list[list[int]]:
    """What this rank hears of signals, clocks and failures of the second one."""
    heard = []
    for number, minutes, failing in ((0, 0.0, False), (15, 0.0, False), (0, 1e-9, False), (0, 0.0, True)):
        requests = RunRequests(Interrupt(0 if ranks.first else number), ranks, 0.0 if ranks.first else minutes)
        time.sleep(0.001)
        own = failing and not ranks.first
        heard.append([*requests.read(False, own), *requests.read(False, own), *requests.read(True, own)])
        try:
            requests.heed()
        except SignalledError as error:
            heard[-1].append(error.signal)
    return [[int(value) for value in one] for one in heard]


def fail(ranks: Ranks) -> list[str]:
    """What is raised here when the first rank fails, the second, none; and what all then say."""

    def fail_on(rank: int) -> int:
        if ranks.rank == rank:
            raise KeyError(f"of rank {rank}")
        return ranks.rank

    heard = []
    for rank in (0, 1, 2):
        try:
            heard.append(str(ranks.together(lambda rank=rank: fail_on(rank))))  # type: ignore[misc]
        except (KeyError, OtherRankError) as error:
            heard.append(f"{type(error).__name__} {error}".replace(socket.gethostname(), "HOST"))
    return [*heard, *ranks.texts(f"text {ranks.rank}")]


def ask_and_fail() -> tuple[list[list[int]], list[str]]:
    ranks = Ranks(dist.group.WORLD)
    return ask(ranks), fail(ranks)


def test_ranks_hear_the_same_and_fail_together() -> None:
    """A signal, a clock or a failure of one rank is known to all, at the same steps; an error of one ends the others
    too, in its words and with its name, instead of leaving them waiting."""
    nothing = [0, 0, 0]
    said = ([0, 0, 0], [15, 0, 0], [0, 1, 0], [0, 0, 1])
    asked = [[*one, *nothing, *one] for one in said]
    asked[1].append(15)
    failures = (
        ["KeyError 'of rank 0'", "OtherRankError process 1 (HOST): 'of rank 1'", "0", "text 0", "text 1"],
        ["OtherRankError process 0 (HOST): 'of rank 0'", "KeyError 'of rank 1'", "1", "text 0", "text 1"],
    )
    assert run_on_ranks(2, ask_and_fail) == [(asked, failures[0]), (asked, failures[1])]


def agreements(seconds: list[float]) -> list[list[int]]:
    """After which of 25 steps the ranks agree, for steps that take each rank so many `seconds`."""
    ranks, clock = Ranks(dist.group.WORLD), SimpleNamespace(now=0.0)
    agreed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_requests, "time", SimpleNamespace(monotonic=lambda: clock.now))
        for each in ([seconds[0]] * 2, [seconds[1]] * 2, seconds):
            requests, heard = RunRequests(Interrupt(0), ranks, 0.0), []
            for step in range(25):
                clock.now += each[ranks.rank]
                if requests.read(False, failing=True).failing:
                    heard.append(step)
            agreed.append(heard)
    return agreed


def test_ranks_agree_every_few_seconds() -> None:
    """torchrun kills half a minute after a signal: however slow its steps are, a run hears in time, and the slowest
    rank sets the pace; quick steps are not held up each time."""
    every_step, quick = list(range(25)), [0, 10, 20]
    for found in run_on_ranks(2, agreements, [0.1, 30.0]):
        assert found == [quick, every_step, every_step]
    for found in run_on_ranks(2, agreements, [1.0, 2.0]):
        assert found == [[0, 5, 10, 15, 20], [0, *range(2, 25, 2)], [0, *range(2, 25, 2)]]
