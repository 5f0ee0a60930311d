#!/usr/bin/env python3
"""Training steps a second, next to a plain loop, to what the device could do, and with JPEGs to load.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --networks mbf,r18,r50,r100 --batch-size 128 --steps 50         # on a GPU

Ours is the trainer's step, made as train.py makes it, from decoded faces (uint8) on the host to updated weights. The
peer is the loop that other trainers have, written plainly (see PlainLoop in benchmarks/training_loops.py); the faces it
gets are normalised float32 already, which its workers would have done, and are copied ahead as ours are. The two run in
turns, each in a process of its own, so that noise hits both and one's memory is not another's. Numbers are medians over
the rounds, ratios those of medians. A quarter more steps go ahead of a turn's, untimed: workers start in them, and use
up what they decode ahead, two batches each, if there are as many. What takes how long, and the table's line by the
rounds so far, go to the standard error as they come. What our step says, that it is not compiled, say, stands under the
table.

Wait: time that the loop, on the host, waits for a batch in memory. MiB: memory at its peak beyond what the process had
before the network was made, from the third step on; allocated bytes on a GPU, growth of the process on the CPU. With
--cuda-graph the network's activations are not in it: they lie in memory of the graph's own. MFU: share of the rate that
the network's convolutions and products, forward and backward (three times forward; the head's are not counted), would
have at the speed of a product of large matrices in the same precision, the best of the rounds. Roofline: the same when
norms and PReLUs get their time too: what they must move through memory at the speed of a large copy. For every value, a
batch norm moves three forward (read for the statistics, read, written) and five backward (value and gradient read for
the sums, read again, gradient written), a PReLU two (read, written) and three (value and gradient read, gradient
written): each as a kernel of its own. A compiler that joins them moves less. JPEG: ours with the images of a face set
read, decoded by workers and copied, and its share of the rate with faces in memory. A side that fails, or the JPEGs,
have no numbers, and what failed stands under the table.
"""

import argparse
import itertools
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.peak_memory import begin_peak, peak
from benchmarks.training_loops import SIZE, Case, OurLoop, PlainLoop, say_aside, synchronise, turn
from models import create_network
from utils.devices import pick_device, pick_precision
from utils.processes import worker_count
from utils.training.flops import copy_bytes_per_s, forward_flops, matmul_flops_per_s

#: Values moved for every value of the input, forward and backward together.
MOVED = {_BatchNorm: 3 + 5, nn.PReLU: 2 + 3}


class Turn(NamedTuple):
    """`rate`: images/s; `wait`: seconds that a step waited for its batch; `memory`: bytes at the peak so far."""

    rate: float
    wait: float
    memory: int


def measure(case: Case, pipe: Connection) -> None:
    """Once told to, make the loop and say so; then answer `memory` and `jpeg` with a Turn, `notes` with what the loop
    said, until the pipe is closed."""
    with suppress(EOFError):
        _measure(case, pipe)


def _measure(case: Case, pipe: Connection) -> None:
    pipe.recv()
    began = time.perf_counter()
    device = pick_device("auto")
    before = begin_peak() if device.type == "cpu" else torch.cuda.memory_allocated(device)
    loop = OurLoop(case, device) if case.side == "ours" else PlainLoop(case, device)
    made = time.perf_counter()
    for batch in itertools.islice(loop.in_memory(case), 2):  # memory is all there from the second step on
        loop(batch)
    jpegs = None
    if isinstance(loop, OurLoop):
        try:
            jpegs = loop.from_jpegs(case)
        except (ValueError, OSError) as error:  # the rest is worth measuring all the same
            loop.notes.append(f"no JPEGs: {error}")
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what looked for the fastest convolutions took more
    else:
        begin_peak()
    now = time.perf_counter()
    say_aside(
        f"{case.network}, {case.side}: made in {made - began:.1f} s, two steps and the face set in {now - made:.1f} s"
    )
    pipe.send("ready")
    while True:
        what = pipe.recv()
        if what == "notes":
            pipe.send(loop.notes)
            continue
        if what == "jpeg" and jpegs is None:
            pipe.send(None)
            continue
        rate, wait = turn(loop, jpegs() if what == "jpeg" and jpegs else loop.in_memory(case), case, device)
        most = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak()
        pipe.send(Turn(rate, wait, most - before))


class Measurer:
    """A process that measures a case when it is told to, and rests otherwise, as soon as it has started.

    What is asked of one whose process failed is None; `failed` says so.
    """

    def __init__(self, case: Case) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=measure, args=(case, theirs))
        self._process.start()
        theirs.close()  # so that recv raises EOFError when the process ends
        self.failed = False

    def prepare(self) -> None:
        """Make the network and whatever a step needs; returns when that is done."""
        self._ask("prepare")

    def __call__(self, what: str) -> Turn | None:
        """A turn with faces in `memory`, or of `jpeg`s; None also where there are none."""
        return self._ask(what)

    def notes(self) -> list[str]:
        """What the loop said: that it is not compiled, say."""
        return self._ask("notes") or []

    def _ask(self, what: str) -> Any:
        try:
            self._pipe.send(what)
            return self._pipe.recv()
        except (EOFError, OSError):  # its error is in the standard error
            self.failed = True
            return None

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


def moved_bytes(name: str, precision: torch.dtype) -> int:
    """What the batch norms and PReLUs of a network must move through memory for a face, forward and backward."""
    network = _weightless(name)
    total = 0

    def count(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal total
        width = 4 if inputs[0].dim() == 2 else precision.itemsize  # the last norm is outside of autocast
        total += sum(times for kind, times in MOVED.items() if isinstance(module, kind)) * inputs[0].numel() * width

    for module in network.modules():
        if isinstance(module, tuple(MOVED)):
            module.register_forward_hook(count)
    with torch.no_grad():
        network(torch.zeros(2, 3, SIZE, SIZE, device="meta"))  # batch norm wants two
    return total // 2


def _weightless(name: str) -> nn.Module:
    """A network of which operations can be counted, in no time."""
    with torch.device("meta"):
        return create_network(name, 512, SIZE)


def measure_in_turns(name: str, ours: Measurer, peer: Measurer, rounds: int, device: torch.device) -> Iterator[str]:
    """After each round the network's line of the table, by all rounds so far."""
    precision = pick_precision("auto", device)
    big = device.type == "cuda"
    turns: list[tuple[Turn | None, ...]] = []
    flops_per_s = bandwidth = 0.0
    for number in range(1, rounds + 1):
        began = time.perf_counter()
        now = matmul_flops_per_s(device, precision, 4096 if big else 2048, 20 if big else 4)
        flops_per_s = max(flops_per_s, now)
        bandwidth = max(bandwidth, copy_bytes_per_s(device))
        turns.append((ours("memory"), peer("memory"), ours("jpeg")))
        line = table_line(name, turns, flops_per_s, bandwidth, precision)
        say_aside(f"{name}, round {number} of {rounds} in {time.perf_counter() - began:.1f} s, so far:\n{line}")
        yield line


def measure_network(cases: tuple[Case, Case], rounds: int, device: torch.device) -> tuple[str, list[str]]:
    """(its line of the table, what our loop said)."""
    with closing(Measurer(cases[0])) as ours, closing(Measurer(cases[1])) as peer:  # both start
        for measurer in (ours, peer):  # and have the device for themselves, one after the other
            measurer.prepare()
        *_, line = measure_in_turns(cases[0].network, ours, peer, rounds, device)
        failed = [f"{side} failed" for side, measurer in (("ours", ours), ("the peer", peer)) if measurer.failed]
        return line, [*ours.notes(), *failed]


class Side(NamedTuple):
    """Of the turns of ours or the peer: images/s (median), that and its range as text, ms a step waited for its batch
    (median), MiB (most). NaN, and no text, if there were none."""

    rate: float
    rates: str
    wait: float
    mebibytes: float


def side(turns: Iterable[Turn | None]) -> Side:
    """What comes of turns, of which some may have failed."""
    done = [turn for turn in turns if turn is not None]
    if not done:
        return Side(math.nan, "", math.nan, math.nan)
    rates = [turn.rate for turn in done]
    rate = statistics.median(rates)
    wait, memory = 1000 * statistics.median(turn.wait for turn in done), max(turn.memory for turn in done)
    return Side(rate, f"{rate:,.4g} ({min(rates):,.3g} to {max(rates):,.3g})", wait, memory / 2**20)


def table_line(
    name: str, turns: Sequence[tuple[Turn | None, ...]], flops_per_s: float, bandwidth: float, precision: torch.dtype
) -> str:
    """The line of a network, by turns of ours, the peer and ours with JPEGs. `flops_per_s`: the device's in products;
    `bandwidth`: bytes/s in copies; `precision`: of the network."""
    ours, peer, jpeg = map(side, zip(*turns, strict=True))
    flops = 3 * forward_flops(_weightless(name), SIZE, training=True)
    products = flops / flops_per_s  # seconds a face
    moves = moved_bytes(name, precision) / bandwidth
    cells: list[tuple[float, str]] = [
        (ours.rate / peer.rate, ".2f"),
        (ours.wait, ".1f"),
        (ours.mebibytes, ",.0f"),
        (peer.mebibytes, ",.0f"),
        (1 / products, ",.4g"),
        (ours.rate * products, ".2f"),
        (1 / (products + moves), ",.4g"),
        (ours.rate * (products + moves), ".2f"),
        (jpeg.rate, ",.4g"),
        (jpeg.wait, ".1f"),
        (jpeg.rate / ours.rate, ".2f"),
    ]
    numbers = ["" if math.isnan(value) else format(value, form) for value, form in cells]
    return f"| {' | '.join([name, ours.rates, peer.rates, *numbers])} |"


def main() -> None:
    """Measure and print a table in Markdown."""
    device = pick_device("auto")
    big = device.type == "cuda"
    default = Path(os.environ.get("FACE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--networks",
        default="mbf,r18,r50,r100" if big else "mbf,r18",
        help="comma separated; r50 and r100 take up to a minute a step on a CPU",
    )
    parser.add_argument("--batch-size", type=int, default=128 if big else 32)
    parser.add_argument("--classes", type=int, default=93431 if big else 10572)
    parser.add_argument("--steps", type=int, default=50 if big else 2, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5 if big else 3)
    parser.add_argument("--set", type=Path, default=default / "faces_glint24", help="face set to load JPEGs from")
    parser.add_argument("--cuda-graph", action="store_true", help="ours as with train.cuda_graph")
    arguments = parser.parse_args()
    name = torch.cuda.get_device_name(device) if big else f"{platform.machine()}, {torch.get_num_threads()} threads"
    print(f"{name}, {os.cpu_count()} cores, Python {platform.python_version()}, torch {torch.__version__};")
    print(
        f"batch {arguments.batch_size}, {arguments.classes:,} classes, {arguments.rounds} rounds of {arguments.steps}"
    )
    print(f"steps; JPEGs of {arguments.set.name}, {worker_count(-1)} workers\n")
    print(
        "| network | ours, images/s | peer, images/s | ours / peer | wait, ms a step | MiB | peer, MiB "
        "| products alone, images/s | MFU | roofline, images/s | reached | JPEG, images/s | wait, ms a step "
        "| of faces in memory |\n|" + "---|" * 14,
        flush=True,
    )
    notes: list[str] = []
    for network in arguments.networks.split(","):
        ours, peer = (
            Case(
                side,
                network,
                arguments.batch_size,
                arguments.classes,
                arguments.steps,
                arguments.set,
                arguments.cuda_graph,
            )
            for side in ("ours", "peer")
        )
        line, said = measure_network((ours, peer), arguments.rounds, device)
        print(line, flush=True)
        notes += [f"- {network}: {note}" for note in said]
    if notes:
        print("\nWhat our step said:\n\n" + "\n".join(notes))


if __name__ == "__main__":
    main()
