"""The table that a run ends with: first, last and best values, and what the time was spent on."""

import math
from operator import itemgetter
from pathlib import Path
from typing import Any

from utils.checkpoints import BEST, CheckpointError, read_safetensors
from utils.texts import columns_of
from utils.training.metrics import SECONDS_VERIFYING, VERIFIED, VERIFIED_AVERAGE, read_metrics
from utils.training.run_folders import CHECKPOINTS


def summarise(folder: Path) -> str:
    """A summary of `metrics.jsonl` in `folder`, as a table for the screen.

    Rates and shares of the time are those of all sessions of a run that was resumed; verifications count once each.
    """
    lines = read_metrics(folder)
    rows = [("", f"{'first':>12} {'last':>12} {'best':>12}")]
    rows += _row(lines, "train/loss", "loss", "{:.4f}", min)
    rows += _row(lines, "train/accuracy", "accuracy, margin aside", "{:.2%}", max)
    for prefix, kind in ((VERIFIED, ""), (VERIFIED_AVERAGE, " (average)")):
        for name in sorted({name for line in lines for name in line if name.startswith(prefix)}):
            rows += _row(lines, name, name.removeprefix(prefix) + kind, "{:.3%}", max)
    width = max(28, *(columns_of(title) for title, _ in rows))
    table = [f"{title}{' ' * (width - columns_of(title))} {values}" for title, values in rows]
    steps = [line for line in lines if line.keys() >= {"train/seconds", "train/images_per_s", "train/data_wait"}]
    if steps:
        seconds = [line["train/seconds"] for line in steps]
        total = math.fsum(seconds)
        images = math.fsum(line["train/images_per_s"] * line["train/seconds"] for line in steps)
        waited = math.fsum(line["train/data_wait"] * line["train/seconds"] for line in steps)
        verifying = math.fsum(line.get(SECONDS_VERIFYING, 0.0) for line in lines)
        table.append(
            f"{images / total:,.0f} images/s; of {_duration(total + verifying)}, "
            f"{verifying / (total + verifying):.1%} verifying, {waited / (total + verifying):.1%} waiting for data"
        )
    if _verified_later(lines) and _step_of_best(folder) == "0":
        table.append(
            f"no step verified better than step 0: {BEST} holds the weights that the run began with, {CHECKPOINTS} the "
            "last ones"
        )
    return "\n".join(table)


def _verified_later(lines: list[dict[str, Any]]) -> bool:
    """Whether weights were verified that the run did not begin with."""
    return any(line["step"] > 0 and name.startswith((VERIFIED, VERIFIED_AVERAGE)) for line in lines for name in line)


def _step_of_best(folder: Path) -> str | None:
    """The step whose weights are kept as the best, "0" for those that the run began with."""
    try:
        return read_safetensors(folder / BEST, metadata_only=True)[1].get("step")
    except CheckpointError:  # another program's by now, or gone
        return None


def _row(lines: list[dict[str, Any]], name: str, title: str, form: str, best: Any) -> list[tuple[str, str]]:
    """`title`, and `name`'s first, last and best value with the best's step; nothing when it was never noted."""
    points = [(line["step"], line[name]) for line in lines if name in line]
    if not points:
        return []
    step, value = best(points, key=itemgetter(1))  # of equally good ones the first
    first, last, top = (form.format(number) for number in (points[0][1], points[-1][1], value))
    return [(title, f"{first:>12} {last:>12} {top:>12} at step {step:,}")]


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {seconds:02} s"
