#!/usr/bin/env python3
"""How close loading comes to its limit, the JPEG decoder: images/s over bare `cv2.imdecode` of the same bytes.

    python benchmarks/loading.py --set ../shared/data/faces_glint24

Both are measured on one core in turns, several times in one run, and the ratio is taken of the medians: machines are
noisy, ratios less so. `--set` may be any face set; the default is the one of `FACE_DATA`.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import cv2
import numpy as np
import torch

from data.face_sets import FaceSet, open_face_set
from data.loading import DecodedFaces, EpochBatches, training_loader
from data.orders import create_order

BATCH = 128
ROUNDS = 7


def bare(faces: FaceSet, positions: list[int]) -> float:
    """Images/s of the decoder alone, the bytes already in memory."""
    encoded = [np.frombuffer(faces.encoded(i), np.uint8) for i in positions]
    began = time.perf_counter()
    for image in encoded:
        cv2.imdecode(image, cv2.IMREAD_COLOR_RGB)
    return len(positions) / (time.perf_counter() - began)


def batches(decoded: DecodedFaces, positions: list[int]) -> float:
    """Images/s of reading, decoding and batching in this process."""
    began = time.perf_counter()
    for start in range(0, len(positions), BATCH):
        decoded.__getitems__(positions[start : start + BATCH])
    return len(positions) / (time.perf_counter() - began)


def loader(decoded: DecodedFaces, workers: int, rounds: int) -> float:
    """Images/s that arrive from `workers` processes, their start left out."""
    order = create_order("exact", decoded.labels.numpy(), 0)
    epoch = EpochBatches(order, len(decoded), BATCH)
    loading = training_loader(decoded, epoch, workers, torch.device("cpu"))
    images = 0
    for number in range(rounds + 1):
        epoch.start_at(number, 0)
        for batch in loading:
            images += len(batch.labels) if number else 0
        if number == 0:
            began = time.perf_counter()
    return images / (time.perf_counter() - began)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FACE_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    parser.add_argument("--set", type=Path, default=default / "faces_glint24", help="face set to read")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    faces = open_face_set(arguments.set)
    decoded = DecodedFaces(faces, faces.labels, 112)
    positions = np.random.default_rng(0).permutation(len(faces))[:3000].tolist()
    bare(faces, positions), batches(decoded, positions)  # warm-up
    rates = [(bare(faces, positions), batches(decoded, positions)) for _ in range(ROUNDS)]
    limit, ours = (statistics.median(column) for column in zip(*rates, strict=True))
    one, two = loader(decoded, 1, 3), loader(decoded, 2, 3)
    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"OpenCV {cv2.__version__}, torch {torch.__version__}; {len(faces):,} images of {arguments.set.name}\n")
    print("| what | images/s | ratio |\n|---|---|---|")
    print(f"| bare cv2.imdecode, one core | {limit:,.0f} | |")
    print(f"| read, decode and batch, one core | {ours:,.0f} | {ours / limit:.2f} of bare |")
    print(f"| loader, 1 worker | {one:,.0f} | {one / limit:.2f} of bare |")
    print(f"| loader, 2 workers | {two:,.0f} | {two / one:.2f} of 1 worker |")


if __name__ == "__main__":
    main()
