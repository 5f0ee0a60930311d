"""The numbers of a run, `metrics.jsonl`: one JSON object a line."""

import json
import sys
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
#: What accuracies, of the network and of its moving average, and the time spent on them are called.
VERIFIED, VERIFIED_AVERAGE, SECONDS_VERIFYING = "verify/", "verify_average/", "verification/seconds"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; what a crash cut off, or made of a line, is left out."""
    lines = []
    for line in (folder / METRICS).read_text(errors="replace").splitlines():
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_line(found):
            lines.append(found)
    return lines


def _is_line(found: Any) -> bool:
    """Whether it is finite numbers by name, of a step."""
    if not isinstance(found, dict) or type(found.get("step")) is not int:
        return False
    return all(isinstance(value, int | float) and abs(value) <= sys.float_info.max for value in found.values())
