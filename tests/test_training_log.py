"""The record of a run: one line a note, nothing that was given up, and nothing from ranks but the first."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tiny_runs
from data.loading import Batch
from train import train
from utils.settings import flatten
from utils.training import log as training_log
from utils.training.log import Meter, TrainingLog, step_profiler
from utils.training.metrics import METRICS, SECONDS_VERIFYING, read_metrics
from utils.training.step import StepOutput

ROOT = Path(__file__).resolve().parents[1]


def output(loss: float, faces: int = 4) -> StepOutput:
    own = torch.full((faces,), 0.25)
    own[0] = torch.nan
    return StepOutput(torch.tensor(loss), torch.tensor(0.5), torch.tensor(2 * loss), torch.arange(faces) + 1.0, own)


def board(folder: Path) -> EventAccumulator:
    """What TensorBoard would show."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0})
    found.Reload()
    return found


def test_numbers_are_kept_as_they_are(tmp_path: Path) -> None:
    """Every note is a line of JSON and a point in TensorBoard, at its step."""
    with TrainingLog(tmp_path, 0) as log:
        log.scalars(2, {"train/loss": 0.1, "train/lr": 1e-3})
        log.scalars(4, {"train/loss": 0.05})
        assert read_metrics(tmp_path)[-1] == {"step": 4, "train/loss": 0.05}, "at once, not at the end"
    assert read_metrics(tmp_path) == [
        {"step": 2, "train/loss": 0.1, "train/lr": 1e-3},
        {"step": 4, "train/loss": 0.05},
    ]
    points = [(point.step, point.value) for point in board(tmp_path).Scalars("train/loss")]
    assert points == [(2, pytest.approx(0.1)), (4, pytest.approx(0.05))]


@pytest.mark.parametrize("again", ["rolled back", "resumed"])
def test_what_was_given_up_is_forgotten(tmp_path: Path, again: str) -> None:
    """Back at a step, in the same run or in a new process: lines after it are gone, those up to it stay, and it goes on
    from there; TensorBoard drops them too."""
    log = TrainingLog(tmp_path, 0)
    for step in (2, 4, 6):
        log.scalars(step, {"train/loss": float(step)})
    if again == "rolled back":
        log.forget_after(4)
    else:
        log.__exit__(None, None, None)
        log = TrainingLog(tmp_path, 4)
    log.scalars(6, {"train/loss": 60.0})
    log.__exit__(None, None, None)
    expected = [(2, 2.0), (4, 4.0), (6, 60.0)]
    assert [(line["step"], line["train/loss"]) for line in read_metrics(tmp_path)] == expected
    assert [(point.step, point.value) for point in board(tmp_path).Scalars("train/loss")] == expected


def test_a_clock_that_went_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or that of another machine: TensorBoard still takes what comes last for the last. It showed none of it."""
    with TrainingLog(tmp_path, 0) as log:
        log.scalars(2, {"train/loss": 2.0})
    clock = time.time
    monkeypatch.setattr(time, "time", lambda: clock() - 3600)
    for step in (2, 4):
        with TrainingLog(tmp_path, step) as log:
            log.scalars(step + 2, {"train/loss": step + 2.0})
    assert [point.step for point in board(tmp_path).Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.parametrize("again", [False, True])
def test_a_verification_that_is_due_again_is_forgotten(tmp_path: Path, again: bool) -> None:
    """That of the very step, and of no step before, and not what is noted of training."""
    with TrainingLog(tmp_path, 0) as log:
        for step in (2, 4):
            log.scalars(step, {"train/loss": 1.0})
            log.scalars(step, {"verify/a": 0.5})
        log.scalars(4, {SECONDS_VERIFYING: 1.0})
        log.forget_after(4, again)
    names = [(line["step"], *(name for name in line if name != "step")) for line in read_metrics(tmp_path)]
    expected = [(2, "train/loss"), (2, "verify/a"), (4, "train/loss"), (4, "verify/a")]
    assert names == (expected[:3] if again else [*expected, (4, SECONDS_VERIFYING)])


def test_a_line_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    """The next line starts on a line of its own."""
    (tmp_path / METRICS).write_text('{"step": 2, "train/loss": 1.0}\n{"step": 4, "train/lo')
    with TrainingLog(tmp_path, 9) as log:
        log.scalars(10, {"train/loss": 0.5})
    assert (tmp_path / METRICS).read_text().splitlines() == [
        '{"step": 2, "train/loss": 1.0}',
        '{"step": 10, "train/loss": 0.5}',
    ]


@pytest.mark.parametrize("value", ["1" + "0" * 400, "NaN", "-Infinity", '"x"', "[" * 100_000])
def test_lines_that_are_no_numbers_are_left_out(tmp_path: Path, value: str) -> None:
    """Whatever stands in them, a run goes on."""
    good = {"step": 2, "train/loss": 1.0, "train/images_per_s": 10**300}
    (tmp_path / METRICS).write_text(json.dumps(good) + f'\n{{"step": 4, "train/loss": {value}}}\n')
    assert read_metrics(tmp_path) == [good]


def test_distributions(tmp_path: Path) -> None:
    """Histograms of what is there; what is empty or not finite is left out instead of ending the run."""
    with TrainingLog(tmp_path, 0) as log:
        values = {
            "good": np.arange(10.0),
            "empty": np.zeros(0),
            "broken": np.array([1.0, np.nan]),
            "far": np.array([np.inf]),
        }
        log.distributions(3, values)
    found = board(tmp_path)
    assert found.Tags()["histograms"] == ["good"]
    histogram = found.Histograms("good")[0]
    assert histogram.step == 3
    value = histogram.histogram_value
    assert (value.num, value.min, value.max, value.sum, value.sum_squares) == (10, 0, 9, 45, 285)
    assert len(value.bucket_limit) == len(value.bucket)
    filled = {(value.bucket_limit[i - 1], value.bucket_limit[i]) for i in np.flatnonzero(value.bucket)}
    assert all(any(low <= number <= high for low, high in filled) for number in range(10)), "bars and edges do not fit"


@pytest.mark.parametrize("value", [0.0, 0.25, -(2.0**70), 2.0**100])
def test_a_distribution_of_one_value(tmp_path: Path, value: float) -> None:
    """Equal values make a histogram however large they are, as embeddings of a network that diverges: the run goes on
    to say that it did."""
    with TrainingLog(tmp_path, 0) as log:
        log.distributions(3, {"equal": np.full(4, value, np.float32)})
    shown = board(tmp_path).Histograms("equal")[0].histogram_value
    (bar,) = np.flatnonzero(shown.bucket)
    assert shown.bucket[bar] == 4
    assert shown.bucket_limit[bar - 1] <= value <= shown.bucket_limit[bar]


def test_curves_are_drawn_now_and_then_and_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks at a run that goes on sees curves, and after one that failed; drawing takes little time."""
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    picture = tmp_path / "loss.png"
    log = TrainingLog(tmp_path, 0)
    log.scalars(1, {"train/loss": 1.0})
    for seconds, drawn in ((59, False), (61, True), (120, False), (122, True)):
        now[0] = seconds
        log.draw_now_and_then()
        assert picture.exists() == drawn, seconds
        picture.unlink(missing_ok=True)
    with pytest.raises(RuntimeError, match="made up"), log:
        raise RuntimeError("made up")
    assert picture.exists()


def test_accuracies_are_drawn_in_percent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As their axis says, those of the moving average too, which may be the best; losses as they are."""
    drawn: dict[str, Any] = {}
    highest: dict[str, float] = {}
    monkeypatch.setattr(
        training_log,
        "draw_curves",
        lambda path, curves, *more: (drawn.update({path.name: curves}), highest.update({path.name: more[-1]})),
    )
    with TrainingLog(tmp_path, 0) as log:
        log.scalars(2, {"train/loss": 0.5, "verify/a": 0.75, "verify_average/a": 0.8})
    assert highest == {"loss.png": np.inf, "accuracy.png": 100}
    found = {file: {name: values.tolist() for name, (_, values) in curves.items()} for file, curves in drawn.items()}
    assert found == {"loss.png": {"loss": [0.5]}, "accuracy.png": {"a": [75.0], "a (average)": [80.0]}}


def test_writing_imports_no_library_of_pictures_or_networks(tmp_path: Path) -> None:
    """A run does not wait seconds for torchvision, or for a TensorFlow that torch's writer would look for."""
    program = (
        "import sys, torch; from utils.training.log import TrainingLog\n"
        "with TrainingLog(__import__('pathlib').Path(sys.argv[1]), 0) as log:\n"
        "    log.scalars(1, {'train/loss': 1.0}); log.distributions(1, {'a': torch.ones(3).numpy()})\n"
        "    log.inputs(torch.zeros(2, 3, 8, 8), 1)\n"
        "unwanted = {'torchvision', 'torch.utils.tensorboard', 'matplotlib.pyplot', 'sklearn', 'scipy'}\n"
        "sys.exit(', '.join(unwanted & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_only_the_first_rank_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the others note leaves no file, and wandb is not even looked for."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with TrainingLog(tmp_path, 0, "project", write=False) as log:
        log.scalars(1, {"train/loss": 1.0})
        log.distributions(1, {"a": np.arange(3.0)})
        log.inputs(torch.zeros(2, 3, 8, 8), 1)
        log.forget_after(0)
        log.draw()
    assert list(tmp_path.iterdir()) == []


def test_inputs_are_shown_as_they_are(tmp_path: Path) -> None:
    """Pixels from [-1, 1] back to 0..255, in RGB."""
    faces = torch.full((2, 3, 16, 16), -1.0)
    faces[0, 0] = 1.0
    with TrainingLog(tmp_path, 0) as log:
        log.inputs(faces, 0)
    event = board(tmp_path).Images("train/inputs")[0]
    assert (event.width, event.height) == (2 * 20 + 4, 24)
    shown = event.encoded_image_string
    for image in (np.frombuffer(shown, np.uint8), np.fromfile(tmp_path / "inputs.png", np.uint8)):
        pixels = cv2.imdecode(image, cv2.IMREAD_COLOR_RGB)
        assert {tuple(pixel.tolist()) for pixel in pixels.reshape(-1, 3)} >= {(255, 0, 0), (0, 0, 0)}


def test_wandb_that_is_not_there_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The setting and what to install."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train\.wandb: it needs one more package: pip install wandb"):
        TrainingLog(tmp_path, 0, "faces")


def test_wandb_gets_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run under its folder's name, taken up again when resumed, with its settings; ended in the end.

    Every number is drawn over the run's own step: the package drops what is logged for steps that are not new to it,
    as those are that are made again after the run went back to a checkpoint.
    """
    calls: list[Any] = []

    class Run:
        def define_metric(self, name: str, step_metric: str) -> None:
            calls.append((name, step_metric))

        def log(self, values: dict[str, float]) -> None:
            calls.append(values)

        def finish(self) -> None:
            calls.append("finish")

    def init(**options: object) -> Run:
        calls.append(options)
        return Run()

    fake = ModuleType("wandb")
    fake.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "my-run"
    folder.mkdir()
    with TrainingLog(folder, 0, "faces", settings={"train.lr": 0.1}) as log:
        log.scalars(2, {"train/loss": 0.5})
        log.forget_after(1)
        log.scalars(2, {"train/loss": 0.25})
    named = {"project": "faces", "name": "my-run", "id": "my-run", "resume": "allow", "dir": str(folder)}
    assert calls == [
        {**named, "config": {"train.lr": 0.1}, "allow_val_change": True},
        ("*", "step"),
        {"step": 2, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25},
        "finish",
    ]


def test_wandb_gets_the_settings_of_a_run(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By which runs are compared there; all of them, as they are named on the command line."""
    wandb = MagicMock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = tiny_runs.configure(tiny_set, tmp_path, train__wandb="faces", train__epochs=1)
    train(config)
    assert wandb.init.call_args.kwargs["config"] == flatten(config)
    assert any("train/loss" in call.args[0] for call in wandb.init.return_value.log.call_args_list)


def test_the_meter_takes_means_and_keeps_each_step() -> None:
    """Means over the steps since the last reading, each step's loss and norm, the last step's distributions."""
    meter = Meter(torch.device("cpu"))
    assert meter.read() is None
    meter.add(5, output(1.0), 4)
    meter.add(6, output(3.0), 4)
    noted = meter.read()
    assert noted is not None
    assert (noted.steps, noted.losses, noted.gradient_norms) == ([5, 6], [1.0, 3.0], [2.0, 6.0])
    assert (noted.means["train/loss"], noted.means["train/accuracy"], noted.means["train/gradient_norm"]) == (2, 0.5, 4)
    assert noted.distributions["train/embedding_norms"].tolist() == [1, 2, 3, 4]
    assert noted.distributions["train/own_cosines"].tolist() == [0.25] * 3, "the face that does not count is left out"
    assert meter.read() is None
    meter.add(7, output(math.nan), 4)
    again = meter.read()
    assert again is not None
    assert math.isnan(again.losses[0])
    assert not {"train/loss", "train/gradient_norm"} & again.means.keys(), "there is no mean of no number"
    for loss in (math.inf, 5.0):
        meter.add(8, output(loss), 4)
    overflowed = meter.read()
    assert overflowed is not None
    assert overflowed.means["train/loss"] == 5, "what overflowed in float16, and was skipped, is not in it"


def test_the_meter_tells_waiting_from_working(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images a second over all time but pauses; the share of it that was spent waiting for batches."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    meter = Meter(torch.device("cpu"))
    batch = Batch(torch.zeros(4, 8, 8, 3, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64), [])

    def slow() -> Any:
        for _ in range(2):
            now[0] += 3
            yield batch

    for step, _ in enumerate(meter.waiting(slow())):
        now[0] += 1
        meter.add(step, output(1.0), 4)
        with meter.paused():
            now[0] += 50
    noted = meter.read()
    assert noted is not None
    assert noted.means["train/images_per_s"] == pytest.approx(8 / 8)
    assert noted.means["train/data_wait"] == pytest.approx(6 / 8)


def test_the_profile_is_a_trace(tmp_path: Path) -> None:
    """The steps asked for, after the first ten, in a file that trace viewers read; nothing without the setting."""
    with step_profiler(0, tmp_path) as profiler:
        for _ in range(20):
            profiler.step()
    assert list(tmp_path.iterdir()) == []
    with step_profiler(2, tmp_path) as profiler:
        for step in range(30):
            with torch.profiler.record_function(f"step {step}"):
                torch.ones(3).add(1)
            profiler.step()
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {name for name in names if name and name.startswith("step ")} == {"step 10", "step 11"}
    assert "aten::add" in names
