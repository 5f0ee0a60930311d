#!/usr/bin/env python3
"""Time and memory of evaluation: metrics of a list of pairs, and the all-pairs test against the bare matrix product.

    python benchmarks/evaluation.py                                     # 13,233 images, as LFW has
    python benchmarks/evaluation.py --images 3000 --dimensions 128 --repeats 1

The faces are drawn: random unit vectors around a centre for each of 5,749 people, in LFW's numbers of images. Times are
the best of several runs in one process, those to be compared taking turns. "CPU" is the time of all threads together.

The bare product is the same blocks of the same size on the same threads, and nothing is done with the scores. The
loops over thresholds are the LFW protocol as other tools write it, an array pass for each fold and threshold: once for
the accuracy alone, and once with the ROC and the TAR at FAR that they take from finer thresholds. Memory is the growth
of a process that does nothing else, beyond the embeddings it is given.
"""

import argparse
import multiprocessing
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from benchmarks.peak_memory import begin_peak, peak
from utils.devices import full_precision
from utils.evaluation.all_pairs import all_pairs
from utils.evaluation.bootstrap import bootstrap_identities, bootstrap_pairs
from utils.evaluation.curves import Roc, TarAtFar, roc, tar_at_far
from utils.evaluation.folds import THRESHOLDS, tar_of_folds, ten_fold_of_distances
from utils.evaluation.identification import identify_people
from utils.evaluation.identity_counts import identity_counts
from utils.evaluation.pair_blocks import PairBlocks


def main() -> None:
    """Measure and print tables in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=13_233)
    parser.add_argument("--dimensions", default="128,512", help="comma separated")
    parser.add_argument("--pairs", type=int, default=6000)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.machine()
    print(f"{name}, {torch.get_num_threads()} CPU threads, torch {torch.__version__}\n")
    sizes = [int(size) for size in arguments.dimensions.split(",")]
    _memory_table(arguments.images, sizes, device)
    _pairs_table(arguments.pairs, arguments.repeats)
    _all_pairs_table(arguments.images, sizes, arguments.repeats, device)


def drawn_faces(images: int, size: int) -> tuple[Tensor, Tensor]:
    """Embeddings float32 [images, size] and labels: most people have one image, few have many, as in LFW."""
    generator = torch.Generator().manual_seed(0)
    people = max(2, int(0.4345 * images))
    popularity = (torch.arange(people) + 1.0) ** -1.0
    more = torch.multinomial(popularity, images - people, replacement=True, generator=generator)
    labels = torch.cat([torch.arange(people), more])
    embeddings = torch.randn(people, size, generator=generator)[labels]
    embeddings += 0.9 * torch.randn(images, size, generator=generator)
    return torch.nn.functional.normalize(embeddings), labels


def best(works: Sequence[Callable[[], object]], repeats: int) -> list[tuple[float, float]]:
    """Wall-clock and CPU seconds of each, the best of `repeats` after a warm-up; they take turns."""
    times = [[(np.inf, np.inf)] for _ in works]
    for repeat in range(repeats + 1):
        for work, taken in zip(works, times, strict=True):
            wall, cpu = time.perf_counter(), time.process_time()
            work()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                taken.append((time.perf_counter() - wall, time.process_time() - cpu))
    return [(min(wall for wall, _ in taken), min(cpu for _, cpu in taken)) for taken in times]


def loop_over_thresholds(distances: np.ndarray, same: np.ndarray, folds: int = 10) -> float:
    """The mean accuracy of the folds, each threshold tried on each of them in turn."""
    fold = np.arange(len(same)) * folds // len(same)
    accuracies = []
    for test in range(folds):
        train = fold != test
        scores = [np.mean((distances[train] < threshold) == same[train]) for threshold in THRESHOLDS]
        chosen = THRESHOLDS[int(np.argmax(scores))]
        accuracies.append(np.mean((distances[~train] < chosen) == same[~train]))
    return float(np.mean(accuracies))


def loop_over_all(distances: np.ndarray, same: np.ndarray, folds: int = 10) -> tuple[float, float]:
    """Accuracy and TAR at FAR 1e-3, with the ROC of each fold."""
    fold = np.arange(len(same)) * folds // len(same)
    fine = np.arange(0, 4, 0.001)
    tars = []
    for test in range(folds):
        train = fold != test
        for threshold in THRESHOLDS:
            accepted = distances[~train] < threshold
            np.mean(accepted[same[~train]]), np.mean(accepted[~same[~train]])
        far = [np.mean(distances[train][~same[train]] < threshold) for threshold in fine]
        chosen = np.interp(1e-3, far, fine)
        tars.append(np.mean(distances[~train][same[~train]] < chosen))
    return loop_over_thresholds(distances, same, folds), float(np.mean(tars))


def all_metrics(distances: np.ndarray, same: np.ndarray) -> tuple[float, float, Roc, tuple[TarAtFar, ...]]:
    """The same, with the exact ROC, and TAR by rank beside that of the folds."""
    result = ten_fold_of_distances(distances, same)
    scores = 1 - distances / 2
    genuine, impostor = scores[same], scores[~same]
    return result.accuracy, tar_of_folds(result).tar, roc(genuine, impostor), tar_at_far(genuine, impostor)


def _pairs_table(pairs: int, repeats: int) -> None:
    random = np.random.default_rng(0)
    same = np.arange(pairs) // max(1, pairs // 20) % 2 == 0
    distances = np.clip(random.normal(np.where(same, 0.9, 1.9), 0.25), 0, 4)
    result = ten_fold_of_distances(distances, same)
    assert np.allclose(all_metrics(distances, same)[:2], loop_over_all(distances, same), atol=1e-12)
    rows: list[tuple[str, Callable[[], object], int]] = [  # with the row that it is compared with
        ("accuracy, loop over thresholds", lambda: loop_over_thresholds(distances, same), 0),
        ("accuracy", lambda: ten_fold_of_distances(distances, same), 0),
        ("all metrics, loops over thresholds", lambda: loop_over_all(distances, same), 2),
        ("all metrics", lambda: all_metrics(distances, same), 2),
        ("intervals, 1,000 draws", lambda: bootstrap_pairs(result), 2),
    ]
    times = best([work for _, work, _ in rows], repeats)
    print(f"\nMetrics of {pairs:,} pairs\n\n| what | ms | CPU ms | the loop takes |\n|---|---|---|---|")
    for (what, _, loop), (wall, cpu) in zip(rows, times, strict=True):
        print(f"| {what} | {1000 * wall:,.2f} | {1000 * cpu:,.2f} | {times[loop][1] / cpu:,.1f} x |")


def bare_product(embeddings: Tensor, labels: Tensor) -> None:
    """All scores in the blocks and on the threads of `all_pairs`, each thrown away."""
    with torch.no_grad(), full_precision(embeddings.device):
        PairBlocks(embeddings, labels).each(lambda block, thread: None, "")


def _all_pairs_table(images: int, sizes: Sequence[int], repeats: int, device: torch.device) -> None:
    print(f"\nAll {images * (images - 1) // 2:,} pairs of {images:,} images\n")
    print("| D | what | s | CPU s | of the product | CPU |\n|---|---|---|---|---|---|")
    for size in sizes:
        embeddings, labels = (part.to(device) for part in drawn_faces(images, size))
        result = all_pairs(embeddings, labels)
        counts = identity_counts(embeddings, labels, result)
        host, people = embeddings.cpu().numpy(), labels.cpu().numpy()
        works: dict[str, Callable[[], object]] = {
            "bare product": lambda e=embeddings, y=labels: bare_product(e, y),
            "all-pairs test": lambda e=embeddings, y=labels: all_pairs(e, y),
            "counts by identity": lambda e=embeddings, y=labels, r=result: identity_counts(e, y, r),
            "intervals, 1,000 draws": lambda c=counts, r=result: bootstrap_identities(c, r),
            "identification": lambda e=host, y=people: identify_people(e, y),
        }
        times = best(list(works.values()), repeats)
        for what, (wall, cpu) in zip(works, times, strict=True):
            ratios = f"{wall / times[0][0]:.2f} | {cpu / times[0][1]:.2f}"
            print(f"| {size} | {what} | {wall:.2f} | {cpu:.2f} | {ratios} |", flush=True)


def _memory_table(images: int, sizes: Sequence[int], device: torch.device) -> None:
    print(
        "\nPeak memory of the all-pairs test beyond its embeddings\n\n| images | D | pairs | MiB |\n|---|---|---|---|"
    )
    for size in sizes:
        for count in (images // 2, images):
            with multiprocessing.get_context("spawn").Pool(1) as alone:
                extra = alone.apply(_peak, (count, size, str(device)))
            print(f"| {count:,} | {size} | {count * (count - 1) // 2:,} | {extra / 2**20:,.0f} |", flush=True)


def _peak(images: int, size: int, device: str) -> int:
    """Bytes that the test takes at its peak beyond its embeddings, in this process."""
    all_pairs(*drawn_faces(64, size))  # what libraries load at first use
    embeddings, labels = (part.to(device) for part in drawn_faces(images, size))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        all_pairs(embeddings, labels)
        return torch.cuda.max_memory_allocated() - before
    before = begin_peak()
    all_pairs(embeddings, labels)
    return peak() - before


if __name__ == "__main__":
    main()
