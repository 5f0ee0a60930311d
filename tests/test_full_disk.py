"""A disk that is full for a while: the run goes on, and its record has nothing missing in the end."""

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from tiny_runs import configure
from train import train
from utils.appended_file import AppendedFile
from utils.checkpoints import BEST
from utils.evaluation import verification
from utils.training import log as training_log
from utils.training.host_copy import HostCopy
from utils.training.metrics import read_metrics
from utils.training.run_folders import CHECKPOINTS
from utils.training.saved_checkpoints import checkpoint_folders, step_of
from utils.training.step import StepOutput, TrainingStep

BEFORE = resource.getrlimit(resource.RLIMIT_FSIZE)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """Writing beyond `size` bytes of a file fails for this process, as it does on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, BEFORE[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, BEFORE)


def test_what_does_not_fit_is_written_later(tmp_path: Path) -> None:
    """Cut off in the middle of a line: the rest follows where it belongs, and begin and end are said once."""
    said: list[str] = []
    path = tmp_path / "lines"
    path.write_bytes(b"before\n")
    file = AppendedFile(path, said.append)
    with files_up_to(12):
        for line in (b"first line\n", b"second line\n"):
            file.write(line)
        assert path.read_bytes() == b"before\nfirst"
    file.write(b"third line\n")
    assert path.read_bytes() == b"before\nfirst line\nsecond line\nthird line\n"
    assert said == [
        f"{path} cannot be written (File too large): it is kept in memory and tried again",
        f"{path} is written again, and has all that was kept",
    ]
    with files_up_to(40):
        file.write(b"fourth line\n")
        file.close()
    assert said[2:] == [said[0], f"{path}: the last 12 bytes could not be written"]


def fill(monkeypatch: pytest.MonkeyPatch, first: int, last: int) -> None:
    """Make the disk full from before the step `first`, counted from 0, until after the step `last`."""
    step_itself = TrainingStep.__call__

    def step_on_a_full_disk(self: TrainingStep, inputs: Tensor, labels: Tensor, step: int, lr: float) -> StepOutput:
        full = first <= step <= last
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, BEFORE[1]) if full else BEFORE)
        return step_itself(self, inputs, labels, step, lr)

    monkeypatch.setattr(TrainingStep, "__call__", step_on_a_full_disk)


@pytest.fixture(autouse=True)
def said_in_memory(capsys: pytest.CaptureFixture[str]) -> None:
    """Not in pytest's own file of what is said, which would be full, too."""


@contextmanager
def room_afterwards() -> Iterator[None]:
    """Whatever the block left."""
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, BEFORE)


def test_a_full_disk_does_not_end_the_training(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Full from the third step on, over two verifications and checkpoints: said, and the run ends as if nothing had
    been, with every line of metrics and every point in TensorBoard."""
    settings: dict[str, object] = {"train__checkpoint_every": 3, "train__verify_every": 3}
    whole = train(configure(tiny_set, tmp_path, **settings))
    fill(monkeypatch, 2, 7)
    monkeypatch.setattr(training_log, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    with room_afterwards():
        run = train(configure(tiny_set, tmp_path, train__name="full", **settings))
    said = capsys.readouterr().out
    for part in (
        "the best network so far could not",
        "metrics.jsonl cannot be",
        "a picture of",
        "checkpoint of step 3",
    ):
        assert part in said, part
    lines = [[(line["step"], line["train/loss"]) for line in read_metrics(folder) if "train/loss" in line]
             for folder in (whole, run)]  # fmt: skip
    assert lines[0] == lines[1]
    board = EventAccumulator(str(run), size_guidance={"scalars": 0, "histograms": 0})
    board.Reload()
    assert [point.step for point in board.Scalars("train/loss")] == [step for step, _ in lines[0]]
    assert [step_of(folder) for folder in checkpoint_folders(run / CHECKPOINTS)] == [9, 12]
    assert (run / BEST).exists()
    assert (run / "loss.png").exists()


def test_a_disk_that_stays_full_is_an_error_in_the_end(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The best network or the last checkpoint of the run could not be written: it must not end well, and what the
    record lacks is said."""
    fill(monkeypatch, 7, 99)
    with pytest.raises(OSError, match=r"File too large"), room_afterwards():
        train(configure(tiny_set, tmp_path))
    assert [step_of(folder) for folder in checkpoint_folders(tmp_path / "a" / CHECKPOINTS)] == [6]
    assert load_file(tmp_path / "a" / BEST)
    assert "metrics.jsonl: the last" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["best", "checkpoint"])
def test_what_the_run_is_for_has_to_be_written(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    """The last try to write the best network, or the checkpoint of the last step: each by itself is an error."""

    def full(*_: object) -> None:
        raise OSError("no room")

    if part == "best":
        monkeypatch.setattr("utils.training.best_network.save_backbone", full)
    else:
        monkeypatch.setattr(HostCopy, "write", full)
    with pytest.raises(OSError, match="no room"):
        train(configure(tiny_set, tmp_path))


def test_a_run_that_could_not_be_saved_does_not_say_that_it_was(
    tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM in the verification, while the epoch's checkpoint is still being written to a full disk: an error, and
    not "stopped and saved"."""

    def interrupted(embedder: object, sets: object, *options: object) -> None:
        signal.raise_signal(signal.SIGTERM)
        options[-1]()  # type: ignore[operator]

    monkeypatch.setattr(verification, "verify", interrupted)
    fill(monkeypatch, 5, 99)
    # KeyboardInterrupt, the wrong end, is caught here too: loose, it would end the whole test run.
    with pytest.raises((OSError, KeyboardInterrupt), match="File too large"), room_afterwards():
        train(configure(tiny_set, tmp_path))
