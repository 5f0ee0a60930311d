#!/usr/bin/env python3
"""What verification during training costs: how many images could be trained on in the time that one is verified in.

    python benchmarks/verifying.py
    python benchmarks/verifying.py --networks r50 --batch-size 512 --steps 20          # on a GPU

Training is the trainer's step on decoded faces in memory (as in benchmarks/train_step.py), verification what train.py
calls: workers start, images are decoded, embedded as they are and mirrored in the training's precision, and pairs of
them go through the 10-fold protocol. The two run in turns on one network; rates are medians over the rounds. The share
of a run: that of one verification of LFW, CFP-FP and AgeDB-30 after each epoch of MS1MV3, from the two rates.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch

from benchmarks.training_loops import SIZE, Case, OurLoop, turn
from config import Config
from data.face_sets import open_face_set
from data.verification_bin import VerificationPairs
from utils.devices import pick_device, pick_precision
from utils.evaluation.verification import Verifier
from utils.processes import worker_count
from utils.ranks import Ranks

#: Images of LFW (6,000 pairs), CFP-FP (7,000) and AgeDB-30 (6,000), each counted as often as it is in a pair.
VERIFIED = 2 * (6000 + 7000 + 6000)
#: Images of MS1MV3, by the `num_image` of insightface's settings for it.
EPOCH = 5_179_510


def pairs_of(path: Path, images: int) -> VerificationPairs:
    """So many images of a face set, those that it begins with if it has fewer, as pairs at random."""
    faces = open_face_set(path)
    encoded = [faces.encoded(i % len(faces)) for i in range(images)]
    index = np.random.default_rng(0).integers(0, images, (images // 2, 2))
    return VerificationPairs(path.name, encoded, index, np.arange(images // 2) % 2 == 0)


def rates(case: Case, images: int, rounds: int, device: torch.device) -> tuple[list[float], list[float]]:
    """Images/s trained on and verified, of each round."""
    loop = OurLoop(case, device)
    test, pairs, workers = Config().test, pairs_of(case.faces, images), worker_count(-1)
    precision = pick_precision("auto", device)
    verifier = Verifier([pairs], SIZE, device, precision, test.batch_size, workers, test.mirror, Ranks())
    trained, verified = [], []
    verifier(loop.network)  # a card looks for its fastest convolutions, for batches of its size
    for _ in range(rounds):
        loop.network.train()
        trained.append(turn(loop, loop.in_memory(case), case, device)[0])
        began = time.perf_counter()
        verifier(loop.network)
        verified.append(images / (time.perf_counter() - began))
        print(f"{case.network}: {trained[-1]:,.4g} trained, {verified[-1]:,.4g} verified", file=sys.stderr, flush=True)
    return trained, verified


def main() -> None:
    """Measure and print a table in Markdown."""
    device = pick_device("auto")
    big = device.type == "cuda"
    default = Path(os.environ.get("FACE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="r50" if big else "mbf", help="comma separated")
    parser.add_argument("--batch-size", type=int, default=128 if big else 32)
    parser.add_argument("--classes", type=int, default=93431 if big else 10572)
    parser.add_argument("--steps", type=int, default=50 if big else 4, help="of a turn")
    parser.add_argument("--images", type=int, default=VERIFIED if big else 400, help="of a verification")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", type=Path, default=default / "faces_glint24", help="face set to verify images of")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name(device) if big else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__};")
    print(f"batch {arguments.batch_size}, {arguments.rounds} rounds of {arguments.steps} steps and of a verification")
    print(f"of {arguments.images:,} images of {arguments.set.name}, {worker_count(-1)} workers\n")
    print("| network | trained, images/s | verified, images/s | one verified costs as much as trained | of a run |")
    print("|---|---|---|---|---|", flush=True)
    for network in arguments.networks.split(","):
        case = Case("ours", network, arguments.batch_size, arguments.classes, arguments.steps, arguments.set)
        both = rates(case, arguments.images, arguments.rounds, device)
        trained, verified = map(statistics.median, both)
        seconds = VERIFIED / verified
        share = seconds / (seconds + EPOCH / trained)
        print(f"| {network} | {trained:,.4g} | {verified:,.4g} | {trained / verified:.2f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
