#!/usr/bin/env python3
"""Training steps a second, next to a plain loop, to what the device could do, and with JPEGs to load.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --networks mbf,r18,r50,r100 --batch-size 128 --steps 50         # on a GPU

Ours is the trainer's step, made as train.py makes it, from decoded faces (uint8) on the host to updated weights. The
peer is the loop that other trainers have, written plainly (see PlainLoop); the faces it gets are normalised float32
already, which its workers would have done, and are copied ahead as ours are. The two run in turns, each in a process of
its own, so that noise hits both and one's memory is not another's. Numbers are medians over the rounds, ratios those of
medians. A quarter more steps go ahead of a turn's, untimed: workers start in them, and use up what they decode ahead,
two batches each, if there are as many. What takes how long, and the table's line by the rounds so far, go to the
standard error as they come. What our step says, that it is not compiled, say, stands under the table.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.peak_memory import begin_peak, peak
from config import Config, ModelConfig, TrainConfig
from data.face_sets import open_face_set
from data.loading import Batch, DecodedFaces, EpochBatches, flips, training_loader
from data.prefetch import on_device
from models import create_network
from utils.devices import pick_device, pick_precision, set_float32_products
from utils.processes import worker_count
from utils.ranks import Ranks
from utils.training.build_parts import build_head, build_network
from utils.training.build_step import build_input, build_step
from utils.training.flops import copy_bytes_per_s, forward_flops, matmul_flops_per_s
from utils.training.optimizers import create_optimizer, parameter_groups

SIZE = 112  # pixels
IN_MEMORY = 4  # batches of random faces, used in turn
LR = 0.01
#: Values moved for every value of the input, forward and backward together.
MOVED = {_BatchNorm: 3 + 5, nn.PReLU: 2 + 3}


@dataclass(frozen=True)
class Case:
    """What a process measures: `side` is ours or peer."""

    side: str
    network: str
    batch_size: int
    classes: int
    steps: int
    faces: Path
    cuda_graph: bool = False

    @property
    def untimed(self) -> int:
        """Steps ahead of those that are timed."""
        return -(-self.steps // 4)

    @property
    def batches(self) -> int:
        """Batches of a turn."""
        return self.untimed + self.steps


class Turn(NamedTuple):
    """`rate`: images/s; `wait`: seconds that a step waited for its batch; `memory`: bytes at the peak so far."""

    rate: float
    wait: float
    memory: int


class OurLoop:
    """The trainer's step, made as train.py makes it; see Trainer.prepare_inputs there for its inputs."""

    def __init__(self, case: Case, device: torch.device) -> None:
        settings = TrainConfig(batch_size=case.batch_size, cuda_graph=case.cuda_graph)
        config = Config(model=ModelConfig(network=case.network), train=settings)
        self.notes: list[str] = []  # what the step says: that it is not compiled, or takes several passes
        precision, ranks = pick_precision("auto", device), Ranks()
        set_float32_products(settings.precision, device)
        self.network = build_network(config, device)
        head = build_head(config, case.classes, steps_per_epoch=1, device=device, precision=precision, ranks=ranks)
        groups = parameter_groups(self.network, settings.weight_decay)
        optimizer = create_optimizer(settings.optimizer, groups, settings.momentum)
        scaler = torch.amp.GradScaler(device.type, enabled=precision == torch.float16)
        began = time.perf_counter()
        self._step = build_step(config, self.network, head, optimizer, scaler, precision, device, ranks, self._note)
        self._to_input = build_input(settings, device)
        _say(f"{case.network}, ours: step built in {time.perf_counter() - began:.1f} s")
        self._device, self._steps = device, 0

    def _note(self, line: str) -> None:
        self.notes.append(line)
        _say(line)

    def __call__(self, batch: Batch) -> None:
        step, faces = self._steps, batch.faces
        mirror = flips(0, 0, step, len(faces))
        inputs = self._to_input(faces, mirror.to(self._device, non_blocking=True))
        torch.manual_seed(step)
        self._step(inputs, batch.labels, step, LR)
        self._steps += 1

    def in_memory(self, case: Case) -> Iterator[Batch]:
        """Batches of random faces, as they come from `on_device`."""
        shape = (case.batch_size, SIZE, SIZE, 3)
        return in_turn(lambda: torch.randint(0, 256, shape, dtype=torch.uint8), case, self._device)

    def from_jpegs(self, case: Case) -> Callable[[], Iterator[Batch]]:
        """Starts the next pass over the face set, a turn's batches of it, loaded as training does."""
        images = open_face_set(case.faces)
        if len(images.identities) > case.classes:
            raise ValueError(f"{case.faces} has {len(images.identities)} identities: raise --classes to that at least")
        number = case.batch_size * case.batches

        def order(epoch: int) -> np.ndarray:
            return np.random.default_rng(epoch).permutation(max(number, len(images))) % len(images)

        batches = EpochBatches(order, number, case.batch_size)
        decoded = DecodedFaces(images, images.labels, SIZE)
        loader = training_loader(decoded, batches, worker_count(-1), self._device)
        return lambda: on_device(loader, self._device)


class PlainLoop:
    """The step as other trainers write it.

    NCHW, eager; float16 autocast with a gradient scaler on CUDA, where cuDNN looks for its fastest convolutions,
    float32 on the CPU; a float32 head over all classes with its margin outside of autograd; torch.optim.SGD as it
    comes; the loss read in every step.
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        torch.manual_seed(0)
        self.network = create_network(case.network, 512, SIZE).to(device).train()
        self.centres = nn.Parameter(torch.normal(0, 0.01, (case.classes, 512), device=device))
        parameters = [*self.network.parameters(), self.centres]
        self.optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=5e-4)
        self.device, self.half = device, device.type == "cuda"
        self.notes: list[str] = []
        torch.backends.cudnn.benchmark = True
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.half)
        self.loss = 0.0

    def __call__(self, batch: Batch) -> None:
        inputs, labels = batch.faces, batch.labels
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            embeddings = self.network(inputs)
        cosine = F.linear(F.normalize(embeddings.float()), F.normalize(self.centres)).clamp(-1, 1)
        rows = torch.arange(len(labels), device=self.device)
        with torch.no_grad():
            cosine[rows, labels] = torch.cos(cosine[rows, labels].acos() + 0.5)
        loss = F.cross_entropy(64 * cosine, labels)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.network.parameters(), 5)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss = loss.item()

    def in_memory(self, case: Case) -> Iterator[Batch]:
        """Batches of random faces, float32 [B, 3, 112, 112] in [-1, 1], as they come from `on_device`."""
        shape = (case.batch_size, 3, SIZE, SIZE)
        return in_turn(lambda: torch.rand(shape).mul_(2).sub_(1), case, self.device)


def in_turn(draw: Callable[[], Tensor], case: Case, device: torch.device) -> Iterator[Batch]:
    """A turn's batches on `device`, a few of faces that `draw` gives used over and over."""
    batches = []
    for _ in range(IN_MEMORY):
        faces, labels = draw(), torch.randint(0, case.classes, (case.batch_size,))
        pinned = (faces.pin_memory(), labels.pin_memory()) if device.type == "cuda" else (faces, labels)
        batches.append(Batch(*pinned, []))
    return on_device(itertools.islice(itertools.cycle(batches), case.batches), device)


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
    _synchronise(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # what looked for the fastest convolutions took more
    else:
        begin_peak()
    now = time.perf_counter()
    _say(f"{case.network}, {case.side}: made in {made - began:.1f} s, two steps and the face set in {now - made:.1f} s")
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


def turn(
    step: Callable[[Batch], None], batches: Iterable[Batch], case: Case, device: torch.device
) -> tuple[float, float]:
    """Images/s, and seconds that a step waits for its batch, of the steps that are timed."""
    source = iter(batches)
    batch: Batch | None = next(source)
    for _ in range(case.untimed):
        assert batch is not None
        step(batch)
        batch = next(source)
    steps, waited = 0, 0.0
    _synchronise(device)
    began = time.perf_counter()
    while batch is not None:
        step(batch)
        steps += 1
        asked = time.perf_counter()
        batch = next(source, None)
        waited += time.perf_counter() - asked
    _synchronise(device)
    return steps * case.batch_size / (time.perf_counter() - began), waited / steps


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        _say(f"{name}, round {number} of {rounds} in {time.perf_counter() - began:.1f} s, so far:\n{line}")
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
