#!/usr/bin/env python3
"""How long training stands still for a checkpoint: saved in the background, waited for, and as plain files.

    python benchmarks/checkpoints.py --classes 100000
    python benchmarks/checkpoints.py --classes 1000000 --device cuda     # 4 GB: class centres and their momentum

The peers write one file and sync it, too: safetensors' `save_file` and `torch.save`. Every round does each once, and
between saves the process computes matrix products, as training would; ratios are of medians in the same run. The first
background save, which takes the host memory for the copy, is shown by itself. Reading is measured from the system's
cache, where the files are after writing, with and without comparing checksums: the most that checking can cost.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from safetensors.torch import save_file
from torch import Tensor

from utils.ranks import Ranks
from utils.training.checkpoint_store import CheckpointStore, Rows

STEPS = 20


class Training:
    """Steps of some matrix products, timed."""

    def __init__(self, device: str) -> None:
        self._on_gpu = device == "cuda"
        self._factor = torch.randn(1024, 1024, device=device)

    def step(self) -> float:
        """Seconds of a step."""
        start = time.perf_counter()
        self._factor @ self._factor
        if self._on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def sync(path: Path) -> None:
    """Have a file on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read(path: Path) -> None:
    """Read a file, and do nothing with it."""
    buffer = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=100_000)
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--folder", help="where to write; the disk of this folder is measured")
    options = parser.parse_args()

    state = {
        name: torch.randn(options.classes, options.embedding_size, device=options.device)
        for name in ("weight", "momentum")
    }
    rows = {name: Rows(tensor, 0, len(tensor)) for name, tensor in state.items()}
    size = sum(tensor.nbytes for tensor in state.values())
    training = Training(options.device)
    alone = statistics.median(training.step() for _ in range(STEPS))
    stood: dict[str, list[float]] = {}
    beside: list[float] = []

    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        one_file = Path(folder, "one.safetensors")

        def plain(write: Callable[[dict[str, Tensor], Path], object]) -> None:
            one_file.unlink(missing_ok=True)
            write({name: tensor.cpu() for name, tensor in state.items()}, one_file)
            sync(one_file)

        with ThreadPoolExecutor(1) as pool, CheckpointStore(Path(folder, "checkpoints"), Ranks(), keep=1) as store:
            for step in range(0, 2 * options.rounds + 1, 2):
                took = seconds(lambda step=step: store.save(step, {}, rows, {}))
                stood.setdefault("in the background" if step else "in the background, the first", []).append(took)
                waiting = pool.submit(store.wait)
                while not waiting.done():
                    beside.append(training.step())
                waiting.result()  # which says why, if nothing was written
                if step == 2 * options.rounds:
                    break
                stood.setdefault("save_file", []).append(seconds(lambda: plain(save_file)))
                stood.setdefault("torch.save", []).append(seconds(lambda: plain(torch.save)))
                took = seconds(lambda step=step: store.save(step + 1, {}, rows, {}, wait=True))
                stood.setdefault("waited for", []).append(took)
            saved = store.newest()
            assert saved is not None
            shard = saved.folder / saved.files[-1]
            reading = [
                (seconds(lambda: read(shard)), seconds(lambda: saved.check(saved.files))) for _ in range(options.rounds)
            ]

    print(f"{options.device}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"{options.classes:,} classes x {options.embedding_size}, weight and momentum: {size / 1e9:.2f} GB")
    waited = statistics.median(stood["waited for"])
    print(f"{'training stands still':32}{'seconds':>9}{'of waited for':>15}")
    for name, times in stood.items():
        print(f"  {name:30}{statistics.median(times):9.3f}{statistics.median(times) / waited:15.3f}")
    print(f"a step while it is written takes {statistics.median(beside) / alone:.2f} times one alone")
    plainly, checked = (statistics.median(times) for times in zip(*reading, strict=True))
    print(f"reading with checksums takes {checked / plainly:.2f} times reading: {size / checked / 1e9:.2f} GB/s")


if __name__ == "__main__":
    main()
