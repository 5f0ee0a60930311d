"""The record of a run: TensorBoard, `metrics.jsonl` (one JSON object a line), and curves as PNG."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from utils.files import write_text_atomic
from utils.plots import draw_contact_sheet, draw_curves

METRICS = "metrics.jsonl"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a line that a crash cut off is left out."""
    lines = []
    for line in (folder / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


class Meter:
    """Means since the last reading. Sums stay on the device: only `read` makes the host wait for it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start()

    def _start(self) -> None:
        self._sums = torch.zeros(2, device=self._device)
        self._steps = self._images = 0
        self._since = time.perf_counter()

    def add(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """Note a step's loss and share of correct classifications, both scalars on the device."""
        self._sums += torch.stack((loss, correct))
        self._steps, self._images = self._steps + 1, self._images + images

    def read(self) -> dict[str, float]:
        """Mean loss and accuracy (0..1) of the steps since the last reading, and images/s; starts anew."""
        loss, accuracy = (self._sums / max(1, self._steps)).tolist()
        rate = self._images / (time.perf_counter() - self._since)
        self._start()
        return {"train/loss": loss, "train/accuracy": accuracy, "train/images_per_s": rate}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no time passes."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began


class TrainingLog:
    """Writes the record into `folder`; one that goes on from `step` first drops what was noted after it."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        if (folder / METRICS).exists():
            kept = [line for line in read_metrics(folder) if line["step"] <= step]
            write_text_atomic(folder / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = (folder / METRICS).open("a")
        self._board = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._metrics.close()
        self._board.close()

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Note `values`, e.g. {"train/loss": 12.3}, as of `step`."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def inputs(self, faces: Tensor, step: int) -> None:
        """Show faces as the network sees them: float [N, 3, H, W], RGB in [-1, 1]."""
        from torchvision.utils import make_grid

        pixels = ((faces.cpu() + 1) * 127.5).round().byte()
        self._board.add_image("train/inputs", make_grid(pixels, nrow=8), step)
        draw_contact_sheet(self.folder / "inputs.png", pixels.permute(0, 2, 3, 1).numpy(), columns=8)

    def draw(self) -> None:
        """Draw the curves so far: `loss.png`, and `accuracy.png` once there was a verification."""
        lines = read_metrics(self.folder)
        for prefix, file, label in (("train/loss", "loss.png", "loss"), ("verify/", "accuracy.png", "accuracy, %")):
            names = sorted({name for line in lines for name in line if name.startswith(prefix)})
            curves = {}
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                steps, values = np.array(points, float).T
                curves[name.split("/", 1)[1]] = (steps, 100 * values if prefix == "verify/" else values)
            if curves:
                draw_curves(self.folder / file, curves, "step", label, self.folder.name)
