#!/usr/bin/env python3
"""How close unpacking a set comes to copying its images: bytes/s of `prepare` over `cp -r` of the tree it made.

    python benchmarks/prepare_data.py --set ../shared/data/faces_celeba5k

Both write to the same disk in turns, several times in one run, each into a new folder with nothing left to be written
of the one before, and the ratio is taken of the medians: machines are noisy, ratios less so. `--workers` defaults to
what the program itself takes.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.face_sets import find_rec
from data.prepare_data import Prepared, prepare
from utils.processes import worker_count

ROUNDS = 7


def seconds(write: Callable[[], object], output: Path) -> float:
    """How long `write` takes to make `output`, which is removed, and the disk left at rest, before the next one."""
    os.sync()
    began = time.perf_counter()
    write()
    taken = time.perf_counter() - began
    shutil.rmtree(output)
    return taken


def measure(rec_path: Path, folder: Path, workers: int) -> tuple[Prepared, float, float]:
    """(what was written, median seconds of `prepare`, median seconds of `cp -r`)."""
    original, copy = folder / "original", folder / "copy"
    prepared = prepare(rec_path, original, workers)  # warm-up
    ours, theirs = [], []
    for _ in range(ROUNDS):
        ours.append(seconds(lambda: prepare(rec_path, copy, workers), copy))
        theirs.append(seconds(lambda: subprocess.run(["cp", "-r", original, copy], check=True), copy))
    return prepared, statistics.median(ours), statistics.median(theirs)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FACE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--set", type=Path, default=default / "faces_celeba5k", help="folder of a .rec set")
    parser.add_argument("--folder", type=Path, help="where to write: the disk to measure; default: for temporary files")
    parser.add_argument("--workers", type=int, default=-1, help="processes that write; -1: as the program decides")
    arguments = parser.parse_args()
    rec_path = find_rec(arguments.set)
    if rec_path is None:
        parser.error(f"{arguments.set} has no .rec file")
    workers = worker_count(arguments.workers)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        prepared, ours, copying = measure(rec_path, Path(folder), workers)
    mebibytes = prepared.bytes / 2**20
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()};")
    print(f"{prepared.images:,} images of {prepared.identities:,} identities of {arguments.set.name}\n")
    print("| what | MiB/s | images/s | ratio |\n|---|---|---|---|")
    print(f"| cp -r | {mebibytes / copying:,.1f} | {prepared.images / copying:,.0f} | |")
    print(
        f"| prepare_data, {workers} workers | {mebibytes / ours:,.1f} | {prepared.images / ours:,.0f} "
        f"| {copying / ours:.2f} of cp -r |"
    )


if __name__ == "__main__":
    main()
