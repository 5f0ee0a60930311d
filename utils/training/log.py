"""The log of a run: TensorBoard, `metrics.jsonl` (one JSON object a line), and curves as PNG."""

import importlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data.images import encode_png
from data.loading import Batch
from utils.appended_file import AppendedFile
from utils.board import Board
from utils.face_sheets import draw_contact_sheet, tile
from utils.files import write_text_atomic
from utils.plots import draw_curves
from utils.training.metrics import METRICS, VERIFIED, VERIFIED_AVERAGE, read_metrics
from utils.training.step import StepOutput

#: Curves are drawn no more often than this, and at the end.
SECONDS_BETWEEN_DRAWINGS = 60.0


def import_wandb() -> Any:
    """The package of Weights & Biases. Raises ValueError, which names the setting, when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise ValueError("train.wandb: it needs one more package: pip install wandb") from None


class Noted(NamedTuple):
    """The numbers of the steps since the last reading.

    `means`: loss, accuracy (0..1), gradient norm, images/s, seconds, the share of them spent waiting for data, and on
    CUDA the peak memory in GiB. For each of `steps`: `losses`, `gradient_norms`. `distributions`: values for each face
    of the last step.
    """

    means: dict[str, float]
    steps: list[int]
    losses: list[float]
    gradient_norms: list[float]
    distributions: dict[str, np.ndarray]


class Meter:
    """Collects the numbers of steps, which stay on the device: only `read` makes the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start()

    def _start(self) -> None:
        self._steps: list[int] = []
        self._scalars: list[Tensor] = []
        self._last: StepOutput | None = None
        self._images = 0
        self._waited = 0.0
        self._since = time.perf_counter()

    def add(self, step: int, output: StepOutput, images: int) -> None:
        """Add the output of `step`, on `images` faces of all ranks."""
        self._steps.append(step)
        self._scalars.append(torch.stack((output.loss, output.correct, output.gradient_norm)))
        self._last, self._images = output, self._images + images

    def read(self) -> Noted | None:
        """The steps since the last reading; None if there were none."""
        if self._last is None:
            return None
        scalars = torch.stack(self._scalars).cpu().double().numpy()  # waits for the device, so that the time is right
        seconds = time.perf_counter() - self._since
        # Means of finite values: a step that overflows in float16 is skipped, and JSON has no NaN.
        names = ("train/loss", "train/accuracy", "train/gradient_norm")
        finite = [column[np.isfinite(column)] for column in scalars.T]
        means = {
            **{name: float(column.mean()) for name, column in zip(names, finite, strict=True) if len(column)},
            "train/images_per_s": self._images / seconds,
            "train/seconds": seconds,
            "train/data_wait": self._waited / seconds,
        }
        if self._device.type == "cuda":
            means["train/memory_gib"] = torch.cuda.max_memory_allocated(self._device) / 2**30
        own = self._last.own.float().cpu().numpy()
        distributions = {
            "train/embedding_norms": self._last.norms.cpu().numpy(),
            "train/own_cosines": own[~np.isnan(own)],
        }
        noted = Noted(means, self._steps, scalars[:, 0].tolist(), scalars[:, 2].tolist(), distributions)
        self._start()
        return noted

    def waiting(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """`batches`; the time spent waiting for them is measured."""
        iterator = iter(batches)
        while True:
            began = time.perf_counter()
            batch = next(iterator, None)
            self._waited += time.perf_counter() - began
            if batch is None:
                return
            yield batch

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time within the block does not count."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


class TrainingLog:
    """Writes the log into `folder`. A run that goes on from `step` first drops what was logged after it.

    `wandb`: project at Weights & Biases to log to as well, `settings` included; empty: none. Without `write`, for all
    ranks but the first, it does nothing. When the disk is full, pictures are left out, the rest is kept in memory until
    it can be written, and `say` is given a line for people. `verify_again`: the verification of `step` itself is
    dropped, too. Raises ValueError if `wandb` is not installed.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        wandb: str = "",
        write: bool = True,
        say: Callable[[str], object] = print,
        verify_again: bool = False,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self._write, self._say = folder, write, say
        self._files, self._open = ExitStack(), ExitStack()
        self._wandb: Any = None
        self._drawn = time.monotonic()
        if not write:
            return
        if wandb:
            self._wandb = import_wandb().init(
                project=wandb,
                name=folder.name,
                id=folder.name,
                resume="allow",
                dir=str(folder),
                config=dict(settings or {}),
                allow_val_change=True,  # a run may go on with other settings
            )
            # Its own steps only grow: it would drop those that are made again after a step back.
            self._wandb.define_metric("*", step_metric="step")
            self._open.callback(self._wandb.finish)
        self.forget_after(step, verify_again)

    def forget_after(self, step: int, verify_again: bool = False) -> None:
        """Drop what was logged after `step`, and with `verify_again` its verification; and go on from there."""
        if not self._write:
            return
        self._files.close()
        if (self.folder / METRICS).exists():
            lines = [line for line in read_metrics(self.folder) if line["step"] <= step]
            kept = [line for line in lines if not (verify_again and line["step"] == step and _is_verification(line))]
            write_text_atomic(self.folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = self._files.enter_context(closing(AppendedFile(self.folder / METRICS, self._say)))
        self._board = self._files.enter_context(closing(Board(self.folder, step + 1 if step else 0, self._say)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.close()
        self.draw()
        self._open.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Log `values` of `step`, such as {"train/loss": 12.3}."""
        if not self._write:
            return
        self._metrics.write((json.dumps({"step": step, **values}) + "\n").encode())
        for name, value in values.items():
            self._board.scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, **values})

    def distributions(self, step: int, values: dict[str, np.ndarray]) -> None:
        """Log histograms of `values`, save for arrays that are empty or not finite."""
        for name, array in values.items():
            if self._write and array.size and np.isfinite(array).all():
                self._board.histogram(name, array, step)

    def inputs(self, faces: Tensor, step: int) -> None:
        """Show faces as the network sees them: float [N, 3, H, W], RGB in [-1, 1]."""
        if not self._write:
            return
        pixels = ((faces.cpu() + 1) * 127.5).round().byte()
        images = pixels.permute(0, 2, 3, 1).numpy()
        self._board.image("train/inputs", encode_png(tile(images, columns=8)), step)
        with self._drawing():
            draw_contact_sheet(self.folder / "inputs.png", images, columns=8)

    def draw_now_and_then(self) -> None:
        """`draw`, if the last time is long enough ago."""
        if time.monotonic() - self._drawn > SECONDS_BETWEEN_DRAWINGS:
            self.draw()
            self._drawn = time.monotonic()

    def draw(self) -> None:
        """Draw the curves so far: `loss.png`, and `accuracy.png` once there was a verification."""
        if not self._write:
            return
        lines = read_metrics(self.folder)
        for prefixes, file, label, scale, highest in (
            ({"train/loss": "loss"}, "loss.png", "loss", 1, np.inf),
            ({VERIFIED: "{}", VERIFIED_AVERAGE: "{} (average)"}, "accuracy.png", "accuracy, %", 100, 100.0),
        ):
            curves = {}
            for prefix, title in prefixes.items():
                for name in sorted({name for line in lines for name in line if name.startswith(prefix)}):
                    points = [(line["step"], line[name]) for line in lines if name in line]
                    steps, values = np.array(points, float).T
                    curves[title.format(name.removeprefix(prefix))] = (steps, scale * values)
            if curves:
                with self._drawing():
                    draw_curves(self.folder / file, curves, "step", label, self.folder.name, highest)

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """A picture that cannot be written is reported, and no error: its numbers are in the log."""
        try:
            yield
        except OSError as error:
            self._say(f"a picture of {self.folder} could not be drawn: {error}")


def _is_verification(line: dict[str, Any]) -> bool:
    """Whether a line of metrics is that of a verification, not of training steps."""
    return not any(name.startswith("train/") for name in line)


@contextmanager
def step_profiler(steps: int, folder: Path) -> Iterator[Any]:
    """Something whose `step()` is called after every step: after the first ten it records `steps` of them, and writes
    `trace.json` for chrome://tracing or Perfetto into `folder`. With 0 steps it does nothing."""
    if not steps:
        yield SimpleNamespace(step=lambda: None)
        return
    from torch.profiler import profile, schedule

    def write(recorded: Any) -> None:
        recorded.export_chrome_trace(str(folder / "trace.json"))

    with profile(schedule=schedule(wait=9, warmup=1, active=steps, repeat=1), on_trace_ready=write) as profiler:
        yield profiler
