"""Functions run on several processes that talk over gloo, as training on several cards does over nccl."""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_on_ranks(ranks: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments)` on each of `ranks` processes in one process group; what each of them returned.

    `function` has to be importable; what it returns goes through a file (tensors and plain values).
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (ranks, folder, function, arguments), nprocs=ranks)
        return [torch.load(Path(folder, str(rank)), weights_only=True) for rank in range(ranks)]


def _run(rank: int, ranks: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=ranks)
    try:
        torch.save(function(*arguments), Path(folder, str(rank)))
    finally:
        dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # see utils.scripts.end_rank: the interpreter's end would be an abort now and then
