"""The training step that settings and device ask for: in passes that fit into memory, its network compiled, spread over
ranks, replayed as CUDA graphs."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from config import Config, TrainConfig
from data.loading import to_network_input
from models.heads import Head
from models.recompute import recomputes
from utils.compiling import Compiled, CompiledNetwork
from utils.ranks import Ranks
from utils.training.build_parts import compiles
from utils.training.cuda_graph import with_graph
from utils.training.micro_batch import LIMIT, bytes_beside, can_train, largest_that_fits, part_sizes, trial_pass
from utils.training.optimizers import train_mode
from utils.training.quick_prelu import quicken_prelus
from utils.training.run_folders import TrainingError
from utils.training.step import TrainingStep


def build_input(settings: TrainConfig, device: torch.device) -> Callable[..., Tensor]:
    """`to_network_input`, in one kernel instead of five where it is compiled."""
    return Compiled(to_network_input) if compiles(settings, device) else to_network_input


def build_step(
    config: Config,
    network: nn.Module,
    head: Head,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    precision: torch.dtype,
    device: torch.device,
    ranks: Ranks,
    say: Callable[[str], object],
    limit: int | None = None,
) -> TrainingStep:
    """The step of `network` and `head`, which are on `device`. `say`, called on every rank, gets lines for people.

    `limit`: most faces of a pass, where more ran out of memory before; for train.micro_batch=auto. Raises TrainingError
    for settings that do not work, torch.OutOfMemoryError when not even two faces fit.
    """
    settings, size = config.train, config.data.image_size
    faces, on_card = settings.batch_size // ranks.size, device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # shapes stay the same: it finds the fastest convolution for each once
    states = 0 if optimizer.state else 2  # what the first step of AdamW and its like makes

    def trial(number: int, tried: nn.Module = network) -> None:
        beside = bytes_beside(number, faces, size, network, head, ranks.size)
        trial_pass(tried, number, size, precision, states, beside)

    micro_batch = _choose_micro_batch(settings, faces, on_card, ranks, trial, limit, say)
    if settings.sync_bn and ranks.size > 1:
        if not on_card:
            raise TrainingError("train.sync_bn: torch has it for CUDA only")
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # after the trial, in which ranks are on their own
    train_mode(network, settings.frozen)  # compiled and captured is what trains
    if compiles(settings, device):

        def attempt(compiled: nn.Module) -> None:
            for number in part_sizes(faces, micro_batch):
                trial(number, compiled)

        trained = compile_network(network, ranks, device, attempt, say)
    else:
        if not on_card:
            quicken_prelus(network)
        trained = spread(network, ranks, device)
    if settings.cuda_graph and on_card:
        reason = why_no_graph(network, faces, micro_batch, ranks)
        if reason:
            say(f"no CUDA graph of the network: {reason}")
        else:
            sample = torch.zeros(faces, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
            trained = with_graph(trained, sample, precision, say)
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)  # the log's is that of the steps, not that of what was tried
    shrinking = say if settings.micro_batch == "auto" else None
    clip = settings.gradient_clip
    return TrainingStep(trained, head, optimizer, scaler, precision, clip, micro_batch, ranks, shrinking)


def _choose_micro_batch(
    settings: TrainConfig,
    faces: int,
    on_card: bool,
    ranks: Ranks,
    attempt: Callable[[int], None],
    limit: int | None,
    say: Callable[[str], object],
) -> int:
    """Most faces of a pass, the same on all ranks, each of which has `faces` of the batch: as set, or as many as
    `attempt`, a trial of a pass, has memory for, and `limit` at most."""
    if settings.micro_batch != "auto":
        micro_batch = min(faces, int(settings.micro_batch))
    else:
        micro_batch = faces
        if on_card:
            micro_batch = ranks.least(ranks.together(lambda: largest_that_fits(attempt, faces)))
        if limit is not None and limit < micro_batch:
            say(f"{limit} faces in a pass at most: more ran out of memory before ({LIMIT} in the run's folder)")
            micro_batch = limit
    if not can_train(faces, micro_batch):
        raise TrainingError(
            f"train.micro_batch: with {micro_batch} of the {faces} images of a process some pass has a single one, on "
            "which batch norm cannot train; take more, or another train.batch_size"
        )
    return micro_batch


def why_no_graph(network: nn.Module, faces: int, micro_batch: int, ranks: Ranks) -> str | None:
    """Why steps of `faces`, in passes of `micro_batch` at most, cannot have CUDA graphs; None: they can."""
    reasons = {
        "several processes exchange gradients": ranks.size > 1,
        "a batch takes several passes": micro_batch < faces,
        "activations are computed anew": recomputes(network),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def compile_network(
    network: nn.Module,
    ranks: Ranks,
    device: torch.device,
    attempt: Callable[[nn.Module], None],
    say: Callable[[str], object],
    backend: str | Callable[..., Any] = "inductor",
) -> nn.Module:
    """`network`, in its training mode, compiled and spread over `ranks`. If compiling fails on some rank, it is
    left uncompiled on all, which is said.

    `attempt` makes forward and backward passes of all shapes that training has; gradients are not exchanged then.
    The network is compiled inside of DistributedDataParallel: torch then splits the graph, so that gradients are
    exchanged while others are still computed. With activation checkpointing it cannot split it, and compiles the whole.
    """
    compiled = CompiledNetwork(network, say, backend)
    wrapped = spread(compiled, ranks, device)
    if recomputes(network):
        torch._dynamo.config.optimize_ddp = False
    sync_bn = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) and ranks.size > 1
    failure: Exception | None = None
    try:
        with wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext():
            attempt(wrapped)
    except Exception as error:  # compilers fail in many ways
        if sync_bn and isinstance(error, torch.OutOfMemoryError):
            raise  # the others wait for this rank's statistics, not for its word
        failure = error
    no_memory = isinstance(failure, torch.OutOfMemoryError)
    worst = ranks.most(2 if no_memory else int(failure is not None or compiled.gave_up))  # no rank goes on alone
    if worst == 2:
        raise failure if failure is not None and no_memory else torch.OutOfMemoryError("out of memory on another rank")
    if worst:
        compiled.give_up(failure)
    return wrapped


def spread(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """`network` in DistributedDataParallel, which averages gradients over `ranks`; itself on a single one.

    All ranks get the first one's weights. Each keeps its own statistics of norms between verifications.
    """
    if ranks.size == 1:
        return network
    ids = [device.index if device.index is not None else torch.cuda.current_device()] if device.type == "cuda" else None
    # The option's newer name, where there is one.
    known = inspect.signature(DistributedDataParallel).parameters
    own_statistics: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(network, ids, process_group=ranks.group, **own_statistics)
