#!/usr/bin/env python3
"""How long a set of many records takes to open: the first time, from the kept index, and with the usual naive parse.

    python benchmarks/opening.py --records 10000000

Writes a set of tiny records (44 bytes each, and the index text) to a temporary folder. The peer is what mxnet's reader
does in Python: split every line of the index, put two ints into a dict; it does not even look at labels.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.peak_memory import begin_peak, peak
from data.face_sets import RecFaceSet
from data.recordio import MAGIC

IMAGES_PER_IDENTITY = 40
RECORD = np.dtype(
    [("magic", "<u4"), ("lrec", "<u4"), ("flag", "<u4"), ("label", "<f4"), ("id", "<u8"), ("id2", "<u8"),
     ("image", "S4"), ("padding", "S8")]
)  # fmt: skip
LENGTH = 24 + 12


def write_set(folder: Path, records: int) -> Path:
    """A `.rec` of equal records, 40 to an identity, and its index."""
    path = folder / "train.rec"
    with path.open("wb") as rec, path.with_suffix(".idx").open("wb") as idx:
        for start in range(0, records, 1_000_000):
            keys = np.arange(start + 1, min(start + 1_000_000, records) + 1)
            block = np.zeros(len(keys), RECORD)
            block["magic"], block["lrec"], block["id"] = MAGIC, LENGTH, keys
            block["label"], block["image"] = (keys - 1) // IMAGES_PER_IDENTITY, b"jpeg"
            rec.write(block.tobytes())
            offsets = (keys - 1) * RECORD.itemsize
            idx.write("".join(f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True)).encode())
    return path


def naive(path: Path) -> int:
    """The records that a line-by-line parse of the index finds."""
    index = {}
    with path.with_suffix(".idx").open() as lines:
        for line in lines:
            key, offset = line.strip().split("\t")
            index[int(key)] = int(offset)
    return len(index)


def measure(path: Path, how: str) -> None:
    """In a fresh process: seconds, and how much its memory grew at most, in MiB."""
    before = begin_peak()
    began = time.perf_counter()
    count = naive(path) if how == "naive" else len(RecFaceSet(path))
    seconds = time.perf_counter() - began
    grown = (peak() - before) / 2**20
    print(f"{count} {seconds} {grown}")


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000_000, help="records in the set")
    parser.add_argument("--measure", nargs=2, metavar=("REC", "HOW"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        measure(Path(arguments.measure[0]), arguments.measure[1])
        return
    with tempfile.TemporaryDirectory() as folder:
        path = write_set(Path(folder), arguments.records)
        rows = {}
        for how in ("naive", "first", "kept"):
            command = [sys.executable, __file__, "--measure", str(path), how]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            rows[how] = [float(value) for value in output.split()[1:]]
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, numpy {np.__version__};")
    print(f"{arguments.records:,} records, files in the page cache\n")
    print("| opening | seconds | of naive | MiB at most |\n|---|---|---|---|")
    names = {"naive": "naive parse of the index, no labels", "first": "first time, labels read", "kept": "kept index"}
    for how, (seconds, grown) in rows.items():
        print(f"| {names[how]} | {seconds:.2f} | {seconds / rows['naive'][0]:.3f} | {grown:,.0f} |")


if __name__ == "__main__":
    main()
