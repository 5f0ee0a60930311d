#!/usr/bin/env python3
"""Time and memory of a head's step (forward, backward, update) by the number of classes and the engine.

    python benchmarks/heads.py --classes 10000,100000,1000000
    python benchmarks/heads.py --classes 1000000,10000000 --batch-size 512 --matmul bf16 --blocks 8192,32768   # a GPU

The peer is PartialFC as other trainers have it, written plainly: normalise all sampled centres, all logits in memory,
gradients by autograd, torch.optim.SGD. On the CPU each engine runs in a process of its own, so that one's memory is not
another's; ratios are of the best of several steps. Ours are made as training makes them: compiled on a GPU (the column
"by" tells what that came to: kernels of ours, torch.compile's, or plain torch where these failed). The peer and an
unsampled `dense` have float32 products, whatever --matmul says. Memory is what a step needs at its peak beyond the
centres and their momentum: allocated bytes on a GPU, growth of the process on the CPU.

Of the limits: four products (three for the peer and an unsampled `dense`) at the speed of a product of large matrices
of their precision, then five passes over float32 rows (centres read twice and written, momentum read and written) at
that of a large copy, all measured in the same run: the time of these, one after the other, as a share of the step's.
Who computes and copies at once could have more than 1.
"""

import argparse
import itertools
import multiprocessing
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peak_memory import begin_peak, peak
from models.heads import BlockwiseHead, Head, RowSGD, automatic_block, create_head
from models.heads.fused_steps import FusedMaths
from models.losses import create_loss
from utils.compiling import Compiled, shortly
from utils.training.flops import copy_bytes_per_s, matmul_flops_per_s


@dataclass(frozen=True)
class Case:
    """One measurement."""

    engine: str
    classes: int
    batch_size: int
    embedding_size: int
    block: int
    matmul: str
    device: str
    steps: int

    @property
    def rate(self) -> float:
        """Share of the classes that take part."""
        return 0.1 if "0.1" in self.engine else 1.0

    def limits(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Seconds of a step's products, and then of its passes over the centres."""
        numbers = self.rate * self.classes * self.embedding_size
        products = 3 if self.engine in ("peer", "peer 0.1", "dense") else 4  # a sampled `dense` is a single block
        return products * 2 * self.batch_size * numbers / flops_per_s + 5 * 4 * numbers / bytes_per_s


class PlainPartialFC:
    """Margin softmax over a sample of the classes, as other trainers write it."""

    def __init__(self, classes: int, size: int, sample_rate: float, device: str) -> None:
        self.weight = torch.empty(classes, size, device=device).normal_(0, 0.01)
        self.momentum = torch.zeros_like(self.weight).zero_()  # twice: zeros come to be in memory when written to
        self.sampled = int(sample_rate * classes)

    def step(self, embeddings: Tensor, labels: Tensor, lr: float) -> None:
        index = None
        if self.sampled < len(self.weight):
            score = torch.rand(len(self.weight), device=labels.device)
            score[labels.unique()] = 2.0
            index = score.topk(self.sampled).indices.sort().values
            labels = torch.searchsorted(index, labels)
        rows = (self.weight if index is None else self.weight[index]).requires_grad_()
        cosine = (F.normalize(embeddings) @ F.normalize(rows).T).clamp(-1, 1)
        picked = torch.arange(len(labels), device=labels.device)
        with torch.no_grad():
            cosine[picked, labels] = torch.cos(torch.acos(cosine[picked, labels]) + 0.5)
        F.cross_entropy(64 * cosine, labels).backward()
        optimizer = torch.optim.SGD([rows], lr, 0.9, weight_decay=5e-4)
        optimizer.state[rows]["momentum_buffer"] = self.momentum if index is None else self.momentum[index]
        optimizer.step()
        self.weight = self.weight.detach()
        if index is not None:
            self.weight[index], self.momentum[index] = rows.detach(), optimizer.state[rows]["momentum_buffer"]


class Measured(NamedTuple):
    """`seconds` of the best step; `extra`: bytes that a step needs beyond centres and momentum; `by`: what computed the
    blocks; `products`: their precision."""

    seconds: float
    extra: float
    by: str
    products: str


def measure(case: Case) -> Measured:
    """Take the steps of `case`, in this process."""
    on_gpu = case.device == "cuda"
    if on_gpu:  # of the engine before
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    faces = torch.randn(case.batch_size, case.embedding_size, device=case.device)
    labels = torch.randint(0, case.classes, (case.batch_size,), device=case.device)
    if case.engine.startswith("peer"):
        peer = PlainPartialFC(case.classes, case.embedding_size, case.rate, case.device)
    else:
        head = create_head(
            create_loss("arcface"),
            case.classes,
            case.embedding_size,
            RowSGD(),
            case.batch_size,
            device=torch.device(case.device),
            engine="blockwise" if "blockwise" in case.engine else "dense",
            block=case.block,
            sample_rate=case.rate,
            matmul=torch.bfloat16 if case.matmul == "bf16" else None,
            compiled=on_gpu,
            # Drawing millions of them as training does takes a minute.
            centres=torch.empty(case.classes, case.embedding_size, device=case.device).normal_(0, 0.01),
        )
        head.fused = True
        head.lr = 0.1
        for state in head.optimizer_states():
            state.zero_()
    before = torch.cuda.memory_allocated() if on_gpu else begin_peak()
    times = []
    for step in range(case.steps):
        embeddings = faces.clone().requires_grad_()
        began = _now(on_gpu)
        if case.engine.startswith("peer"):
            peer.step(embeddings, labels, 0.1)
        else:
            head(embeddings, labels, step).loss.backward()
            head.update(step)
        times.append(_now(on_gpu) - began)
        if on_gpu and step == 0:
            torch.cuda.reset_peak_memory_stats()  # a compiler tries its kernels on copies
    most = torch.cuda.max_memory_allocated() if on_gpu else peak()
    by = "" if case.engine.startswith("peer") else computed_by(head)
    return Measured(min(times), most - before, by, case.matmul if by else "fp32")


def computed_by(head: Head) -> str:
    """What computes the blocks of a head: our kernels, torch.compile's, or plain torch. Empty for a dense one."""
    if not isinstance(head, BlockwiseHead):
        return ""
    if isinstance(head.maths, FusedMaths):
        return "kernels"
    compiled = isinstance(head.block_backward, Compiled) and not head.block_backward.gave_up
    return "compiled" if compiled else "plain"


def _now(on_gpu: bool) -> float:
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter()


def _process(device: str) -> ProcessPoolExecutor:
    """What measures in another process: a new one for each engine, but on a GPU, which tells what is allocated, the
    same for all, until one fails: to start takes seconds."""
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, spawn, max_tasks_per_child=None if device == "cuda" else 1)


def main() -> None:
    """Measure and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", default="10000,100000,1000000", help="comma separated")
    parser.add_argument(
        "--engines",
        default="peer,dense,blockwise,peer 0.1,dense 0.1,blockwise 0.1",
        help="comma separated; 0.1 samples a tenth of the classes",
    )
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--embedding-size", type=int, default=512)
    parser.add_argument("--blocks", default="0", help="classes computed at a time by blockwise; 0: automatic")
    parser.add_argument("--matmul", choices=("fp32", "bf16"), default="fp32", help="of all but the peer and `dense`")
    parser.add_argument("--steps", type=int, default=4)
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    print(f"{name}, torch {torch.__version__}; batch {arguments.batch_size}, {arguments.embedding_size} dimensions,")
    flops_per_s = {"fp32": matmul_flops_per_s(torch.device(device), torch.float32)}
    if arguments.matmul == "bf16":
        flops_per_s["bf16"] = matmul_flops_per_s(torch.device(device), torch.bfloat16)
    bytes_per_s = copy_bytes_per_s(torch.device(device))
    automatic = automatic_block(arguments.batch_size, torch.device(device))
    rates = ", ".join(f"products in {name} at {rate / 1e12:,.1f} TFLOP/s" for name, rate in flops_per_s.items())
    print(f"automatic blocks of {automatic:,} classes; {rates},")
    print(f"copies at {bytes_per_s / 1e9:,.0f} GB/s\n")
    print(
        "| classes | engine | block | by | products | ms a step | of dense | images/s "
        "| MiB beyond centres and momentum | of the limits |"
    )
    print("|" + "---|" * 10, flush=True)
    alone = _process(device)
    for classes in map(int, arguments.classes.split(",")):
        reference = None
        for engine, block in itertools.product(arguments.engines.split(","), map(int, arguments.blocks.split(","))):
            if block != int(arguments.blocks.split(",")[0]) and not engine.startswith("blockwise"):
                continue
            case = Case(
                engine, classes, arguments.batch_size, arguments.embedding_size, block, arguments.matmul, device,
                arguments.steps,
            )  # fmt: skip
            named = f"{block or automatic:,}" if engine.startswith("blockwise") else ""
            try:
                found = alone.submit(measure, case).result()
            except torch.OutOfMemoryError:
                print(f"| {classes:,} | {engine} | {named} | | | does not fit | | | | |", flush=True)
                continue
            except Exception as error:  # the others are still worth measuring
                reason = shortly(error).replace("|", "/")
                print(f"| {classes:,} | {engine} | {named} | | | failed: {reason} | | | | |", flush=True)
                alone.shutdown()
                alone = _process(device)
                continue
            reference = found.seconds if engine == "dense" else reference
            ratio = f"{found.seconds / reference:.2f}" if reference else ""
            limits = case.limits(flops_per_s[found.products], bytes_per_s)
            print(
                f"| {classes:,} | {engine} | {named} | {found.by} | {found.products} | {1000 * found.seconds:,.1f} "
                f"| {ratio} | {arguments.batch_size / found.seconds:,.0f} | {found.extra / 2**20:,.0f} "
                f"| {limits / found.seconds:.2f} |",
                flush=True,
            )
    alone.shutdown()


if __name__ == "__main__":
    main()
