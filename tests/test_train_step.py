"""What the benchmark of a training step counts and times."""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import train_step
from benchmarks.train_step import Turn, measure_network, moved_bytes
from benchmarks.training_loops import Case, turn
from data.loading import Batch

CASE = Case("ours", "r18", 4, 10, 8, Path("none"))


def test_the_first_steps_are_not_timed() -> None:
    """What starts in them, workers and kernels, takes seconds, which are not the rate of the steps after them."""
    taken: list[int] = []

    def batches() -> Iterator[Batch]:
        for i in range(CASE.batches):
            yield Batch(torch.full((4, 1, 1, 3), i), torch.zeros(4), [])

    def step(batch: Batch) -> None:
        taken.append(int(batch.faces[0, 0, 0, 0]))
        if len(taken) <= CASE.untimed:
            time.sleep(0.5)

    rate, _ = turn(step, batches(), CASE, torch.device("cpu"))
    assert CASE.untimed == 2
    assert replace(CASE, steps=2).untimed == 1, "however few"
    assert taken == list(range(10))
    assert rate > 4 * 8 / 0.5


def test_moved_bytes_are_those_of_the_values() -> None:
    """The values that r18's norms and PReLUs get for a face, counted by hand."""
    # Stem: a norm and a PReLU of 64 x 112 x 112. A block: a norm of its input, a norm and a PReLU of what its first
    # convolution gives, of the same height, and a norm behind the second, of half the height at a stage's beginning,
    # where the shortcut has one, too. At the end a norm of 512 x 7 x 7, and one of the embedding in float32.
    norms = prelus = 64 * 112 * 112
    channels_in = 64
    for channels, size in ((64, 56), (128, 28), (256, 14), (512, 7)):
        norms += channels_in * (2 * size) ** 2 + channels * (2 * size) ** 2 + 2 * channels * size**2
        prelus += channels * (2 * size) ** 2
        norms += 3 * channels * size**2
        prelus += channels * size**2
        channels_in = channels
    norms += 512 * 7 * 7
    assert moved_bytes("r18", torch.bfloat16) == 2 * (8 * norms + 5 * prelus) + 4 * 8 * 512


def test_a_benchmark_that_is_stopped_has_told_its_rounds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The line of the table is told after each round, by all so far; and what our step said, that it runs uncompiled,
    say, comes with the last one: a rate means nothing without it."""
    rates = {"ours": iter([10.0, 8.0, 30.0, 24.0]), "peer": iter([5.0, 5.0])}

    class Measurer:
        failed = False

        def __init__(self, case: Case) -> None:
            self.side = case.side

        def prepare(self) -> None: ...
        def close(self) -> None: ...

        def __call__(self, what: str) -> Turn:
            return Turn(next(rates[self.side]), 0.0, 2**20)

        def notes(self) -> list[str]:
            return ["runs uncompiled"]

    monkeypatch.setattr(train_step, "Measurer", Measurer)
    monkeypatch.setattr(train_step, "matmul_flops_per_s", lambda *_: 1e12)
    monkeypatch.setattr(train_step, "copy_bytes_per_s", lambda *_: 1e12)
    line, notes = measure_network((CASE, replace(CASE, side="peer")), 2, torch.device("cpu"))
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("|")]
    assert told[-1] == line
    assert notes == ["runs uncompiled"]
    assert [one.split(" | ")[1:4:2] for one in told] == [["10 (10 to 10)", "2.00"], ["20 (10 to 30)", "4.00"]]
    assert [one.rsplit(" | ", 1)[1] for one in told] == ["0.80 |", "0.80 |"]


def test_what_fails_leaves_the_rest(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A peer that does not fit, or a set that is not there, costs its own numbers alone: ours are in the table, and
    below it is said what is missing."""
    monkeypatch.setattr(train_step, "matmul_flops_per_s", lambda *_: 1e12)
    monkeypatch.setattr(train_step, "copy_bytes_per_s", lambda *_: 1e12)
    case = replace(CASE, network="demo", steps=1)
    line, notes = measure_network((case, replace(case, side="none", network="none")), 1, torch.device("cpu"))
    name, ours, peer, ratio, *numbers, jpeg, jpeg_wait, jpeg_share = (part.strip() for part in line.split("|")[1:-1])
    assert (name, peer, ratio, jpeg, jpeg_wait, jpeg_share) == ("demo", "", "", "", "", "")
    assert float(ours.split(" ")[0]) > 0
    assert [part for part in numbers if part == ""] == [""], "the peer's memory"
    assert len(notes) == 2
    assert notes[0].startswith("no JPEGs: ")
    assert notes[1] == "the peer failed"
    assert "Process SpawnProcess" in capfd.readouterr().err, "what failed in it"
