#!/usr/bin/env python3
"""How close loading comes to its limit, the JPEG decoder, and how far it is ahead of what other trainers do.

    python benchmarks/loading.py --set ../shared/data/faces_glint24

Everything is measured in turns, several times in one run; a ratio is the median of those of the turns: machines are
noisy, ratios less so. `--set` may be any face set; the default is the one of `FACE_DATA`. The comparison with mxnet and
torchvision (benchmarks/mxnet_loading.py) is made when there is a `.rec`, the environment of `make conformance`, and
one Python version in both environments.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cv2
import numpy as np
import torch

from data.face_sets import FaceSet, RecFaceSet, open_face_set
from data.loading import Batch, DecodedFaces, EpochBatches, flips, to_network_input, training_loader

BATCH = 128
ROUNDS = 7
IMAGES = 1280  # of a turn in one process, and of one of theirs
LONG_EPOCH = 16_384  # images of a turn of a loader: long, as epochs are
PEER_PYTHON = ROOT / ".venv-mxnet" / "bin" / "python"


def timed(work: Callable[[], int]) -> float:
    """Images/s of `work`, which returns how many it did."""
    began = time.perf_counter()
    return work() / (time.perf_counter() - began)


def bare(encoded: list[np.ndarray]) -> int:
    """The decoder alone, the bytes already in memory."""
    for image in encoded:
        cv2.imdecode(image, cv2.IMREAD_COLOR_RGB)
    return len(encoded)


def batches(decoded: DecodedFaces, positions: list[int]) -> int:
    """Reading, decoding and batching in this process."""
    for start in range(0, len(positions), BATCH):
        decoded.__getitems__(positions[start : start + BATCH])
    return len(positions)


def inputs(decoded: DecodedFaces, positions: list[int]) -> int:
    """The same, and what training does next on the device: mirroring and conversion to float32."""
    for start in range(0, len(positions), BATCH):
        faces = decoded.__getitems__(positions[start : start + BATCH]).faces
        to_network_input(faces, flips(0, 0, start, len(faces)))
    return len(positions)


def arrivals(loader: Iterable[Batch]) -> int:
    """What comes from worker processes."""
    return sum(len(batch.labels) for batch in loader)


def our_loader(decoded: DecodedFaces, workers: int) -> Iterable[Batch]:
    """A loader whose workers have started; its epochs go through the set several times."""

    def order(epoch: int) -> np.ndarray:
        return np.random.default_rng(epoch).permutation(max(LONG_EPOCH, len(decoded))) % len(decoded)

    loader = training_loader(decoded, EpochBatches(order, LONG_EPOCH, BATCH), workers, torch.device("cpu"))
    arrivals(loader)
    return loader


class Peer:
    """The program of benchmarks/mxnet_loading.py; with `core`, all its threads on that one."""

    def __init__(self, rec_path: Path, keys: list[int], core: int | None = None) -> None:
        program = ROOT / "benchmarks" / "mxnet_loading.py"
        command: list[str | Path] = [PEER_PYTHON, program, rec_path, sysconfig.get_paths()["platlib"]]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        if core is not None:  # before it has started a thread
            os.sched_setaffinity(self._process.pid, {core})
        self._tell(json.dumps(keys))

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def rate(self, workers: int) -> float:
        """Images/s."""
        assert self._process.stdout is not None
        self._tell(str(workers))
        return float(self._process.stdout.readline())


def peer_exists(faces: FaceSet) -> bool:
    """Whether the comparison can be made."""
    if not (isinstance(faces, RecFaceSet) and PEER_PYTHON.exists() and hasattr(os, "sched_setaffinity")):
        return False
    version = subprocess.run([PEER_PYTHON, "--version"], check=True, text=True, stdout=subprocess.PIPE).stdout
    return version.split()[1].split(".")[:2] == platform.python_version().split(".")[:2]


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = Path(os.environ.get("FACE_DATA", ROOT.parent / "shared" / "data"))
    parser.add_argument("--set", type=Path, default=default / "faces_glint24", help="face set to read")
    arguments = parser.parse_args()
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    faces = open_face_set(arguments.set)
    decoded = DecodedFaces(faces, faces.labels, 112)
    positions = np.random.default_rng(0).permutation(len(faces))[:IMAGES].tolist()
    encoded = [np.frombuffer(faces.encoded(i), np.uint8) for i in positions]
    one, two = our_loader(decoded, 1), our_loader(decoded, 2)
    measures: dict[str, Callable[[], float]] = {
        "bare": lambda: timed(lambda: bare(encoded)),
        "batches": lambda: timed(lambda: batches(decoded, positions)),
        "inputs": lambda: timed(lambda: inputs(decoded, positions)),
        "one": lambda: timed(lambda: arrivals(one)),
        "two": lambda: timed(lambda: arrivals(two)),
    }
    with_peer = peer_exists(faces)
    if with_peer:
        assert isinstance(faces, RecFaceSet)
        keys = faces.keys[positions].tolist()
        on_one_core, free = Peer(faces.path, keys, core=0), Peer(faces.path, keys)
        measures |= {
            "peer": lambda: on_one_core.rate(0),
            "peer free": lambda: free.rate(0),
            "peer one": lambda: free.rate(1),
            "peer two": lambda: free.rate(2),
        }
    for measure in measures.values():  # warm-up
        measure()
    rounds = [{name: measure() for name, measure in measures.items()} for _ in range(ROUNDS)]
    rate = {name: statistics.median(turn[name] for turn in rounds) for name in measures}

    def ratio(name: str, other: str) -> float:
        return statistics.median(turn[name] / turn[other] for turn in rounds)

    def row(what: str, name: str, *others: tuple[str, str]) -> None:
        spread = [turn[name] for turn in rounds]
        ratios = ", ".join(f"{ratio(name, other):.2f} of {words}" for other, words in others)
        print(f"| {what} | {rate[name]:,.0f} | {min(spread):,.0f} to {max(spread):,.0f} | {ratios} |")

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()},")
    print(f"OpenCV {cv2.__version__}, torch {torch.__version__}; {len(faces):,} images of {arguments.set.name}\n")
    print("| what | images/s | least to most | ratio |\n|---|---|---|---|")
    row("bare cv2.imdecode, one core", "bare")
    row("read, decode and batch, one core", "batches", ("bare", "bare"))
    row("the same, mirrored and as float32", "inputs", ("bare", "bare"))
    row("loader, 1 worker", "one", ("bare", "bare"))
    row("loader, 2 workers", "two", ("one", "1 worker"))
    if with_peer:
        row("mxnet, Pillow, torchvision: `__getitem__`, one core", "peer")
        row("the same, threads on any core", "peer free")
        row("their loader, 1 worker", "peer one")
        row("their loader, 2 workers", "peer two", ("peer one", "1 worker"))
        print()
        for ours, theirs, what in (
            ("batches", "peer", "read, decode and batch over their `__getitem__`, one core"),
            ("inputs", "peer", "the same, mirrored and as float32"),
            ("batches", "peer free", "read, decode and batch over their `__getitem__`, threads on any core"),
            ("one", "peer one", "loader, 1 worker"),
            ("two", "peer two", "loader, 2 workers"),
        ):
            print(f"- {what}: {ratio(ours, theirs):.1f} times theirs")


if __name__ == "__main__":
    main()
