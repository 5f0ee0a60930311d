"""The training step as settings and device ask for it: in passes that fit, its network compiled, spread over ranks,
replayed as CUDA graphs."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
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
from utils.training.cuda_graph import with_graph
from utils.training.micro_batch import LIMIT, bytes_beside, largest_that_fits, trial_pass
from utils.training.optimizers import train_mode
from utils.training.parts import compiles
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

    A pass has as many faces as set, or as the device holds, the same on all ranks; `limit` at most, which is what
    fitted after more had run out of memory. Raises TrainingError for settings that cannot be, and what the trial of
    the passes does: torch.OutOfMemoryError when not even two faces fit.
    """
    settings, size = config.train, config.data.image_size
    whole = settings.batch_size // ranks.size
    most = whole if settings.micro_batch == "auto" else min(whole, int(settings.micro_batch))
    on_card = device.type == "cuda"
    torch.backends.cudnn.benchmark = True  # shapes stay the same: it finds the fastest convolution for each once
    states = 0 if optimizer.state else 2  # what the first step of AdamW and its like makes
    beside = partial(bytes_beside, whole=whole, image_size=size, network=network, head=head, ranks=ranks.size)
    trial = partial(trial_pass, image_size=size, precision=precision, states=states, beside=beside)
    if settings.micro_batch == "auto" and on_card:
        most = ranks.least(ranks.together(lambda: largest_that_fits(trial(network), whole)))
    if settings.micro_batch == "auto" and limit is not None and limit < most:
        say(f"{limit} faces in a pass at most: more ran out of memory before ({LIMIT} in the run's folder)")
        most = limit
    if whole // -(-whole // most) < 2:
        raise TrainingError(
            f"train.micro_batch: with {most} of the {whole} images of a process some pass has a single one, on "
            "which batch norm cannot train; take more, or another train.batch_size"
        )
    if settings.sync_bn and ranks.size > 1:
        if not on_card:
            raise TrainingError("train.sync_bn: torch has it for CUDA only")
        nn.SyncBatchNorm.convert_sync_batchnorm(network)  # after the trial, in which ranks are on their own
    train_mode(network, settings.frozen)  # compiled and captured is what trains
    if compiles(settings, device):

        def attempt(compiled: nn.Module) -> None:
            for faces in part_sizes(whole, most):
                trial(compiled)(faces)

        passes = compile_network(network, ranks, device, attempt, say)
    else:
        passes = spread(network, ranks, device)
    if settings.cuda_graph and on_card:
        reason = why_no_graph(network, whole, most, ranks)
        if reason:
            say(f"no CUDA graph of the network: {reason}")
        else:
            sample = torch.zeros(whole, 3, size, size, device=device).contiguous(memory_format=torch.channels_last)
            passes = with_graph(passes, sample, precision, say)
    if on_card:
        torch.cuda.reset_peak_memory_stats(device)  # the log's is that of the steps, not that of what was tried
    shrinking = say if settings.micro_batch == "auto" else None
    return TrainingStep(passes, head, optimizer, scaler, precision, settings.gradient_clip, most, ranks, shrinking)


def why_no_graph(network: nn.Module, whole: int, most: int, ranks: Ranks) -> str | None:
    """What is against CUDA graphs in steps of `whole` faces, of which `most` fit into a pass; None: nothing."""
    reasons = {
        "several processes exchange gradients": ranks.size > 1,
        "a batch takes several passes": most < whole,
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
    """`network`, in the mode that it trains in, compiled and spread over `ranks`; or, where `attempt` shows that the
    compiler cannot, said and uncompiled, on all ranks. It makes passes both ways, without an exchange of gradients.

    It is compiled when it is called by what spreads it: torch then cuts it where the exchange of gradients can begin
    while others are still computed. What it cannot cut (blocks that are computed anew) is compiled whole.
    """
    compiled = CompiledNetwork(network, say, backend)
    whole = spread(compiled, ranks, device)
    if recomputes(network):
        torch._dynamo.config.optimize_ddp = False
    together = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules()) and ranks.size > 1
    failure: Exception | None = None
    try:
        with whole.no_sync() if isinstance(whole, DistributedDataParallel) else nullcontext():
            attempt(whole)
    except Exception as error:  # compilers fail in many ways
        if together and isinstance(error, torch.OutOfMemoryError):
            raise  # the others wait for this rank's statistics, not for its word
        failure = error
    no_memory = isinstance(failure, torch.OutOfMemoryError)
    worst = ranks.most(2 if no_memory else int(failure is not None or compiled.gave_up))  # no rank goes on alone
    if worst == 2:
        raise failure if failure is not None and no_memory else torch.OutOfMemoryError("out of memory on another rank")
    if worst:
        compiled.give_up(failure)
    return whole


def part_sizes(faces: int, most: int) -> list[int]:
    """How many faces the passes of a batch have, at most `most` each: the different numbers, the largest first."""
    parts = -(-faces // most)
    return [faces // parts + 1, faces // parts] if faces % parts else [faces // parts]


def spread(network: nn.Module, ranks: Ranks, device: torch.device) -> nn.Module:
    """`network` with its gradients averaged over `ranks`, if they are several.

    The first rank's weights are all ranks'. Statistics of norms stay each rank's own between verifications.
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
