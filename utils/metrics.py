"""The numbers of a run, `metrics.jsonl`: one JSON object a line."""

import json
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
#: What accuracies, of the network and of its moving average, and the time spent on them are called.
VERIFIED, VERIFIED_AVERAGE, SECONDS_VERIFYING = "verify/", "verify_average/", "verification/seconds"


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`; a line that a crash cut off is left out."""
    lines = []
    for line in (folder / METRICS).read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
