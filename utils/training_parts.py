"""The network, the head and what else a run has, made as its settings say."""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import Config, DataConfig, TrainConfig
from data.verification_bin import VerificationPairs, find_bins, read_bin
from models import create_network
from models.heads import Head, RowAdamW, RowSGD, create_head
from models.losses import create_loss
from models.recompute import recompute_blocks, recomputes
from models.weights import load_weights
from utils.compiling import CompiledNetwork
from utils.optimizers import freeze
from utils.ranks import Ranks
from utils.run_folders import TrainingError
from utils.schedules import learning_rates, peak_lr


def build_network(config: Config, device: torch.device, with_init: bool = True) -> nn.Module:
    """The network on `device`, channels last, with its first weights: random ones that the seed decides, or those of
    `train.init`, which a run that goes on (`with_init` False) does not need."""
    model, settings = config.model, config.train
    torch.manual_seed(settings.seed)
    published = {"drop_path": model.drop_path, "mask_ratio": model.mask_ratio, "dropout": model.dropout}
    options = {name: value for name, value in published.items() if value >= 0}
    if model.pretrained and with_init and not settings.init:
        options["pretrained"] = True
    network = create_network(model.network, model.embedding_size, config.data.image_size, **options)
    if settings.init and with_init:
        load_weights(network, settings.init, model.network, model.colour)
    freeze(network, settings.frozen)
    if settings.activation_checkpointing:
        recompute_blocks(network)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_head(config: Config, classes: int, device: torch.device, precision: torch.dtype, ranks: Ranks) -> Head:
    """The head over `classes` on `device`, this rank's part of it; `precision` is the network's."""
    loss, settings = config.loss, config.train
    options = asdict(loss) | {"margin": loss.margin or None, "scale": loss.scale or None, "seed": settings.seed}
    half = loss.products == "bf16" or (
        loss.products == "auto" and device.type == "cuda" and precision == torch.bfloat16
    )
    return create_head(
        create_loss(**options),
        classes,
        config.model.embedding_size,
        RowSGD(settings.momentum, settings.weight_decay)
        if settings.optimizer == "sgd"
        else RowAdamW(weight_decay=settings.weight_decay),
        settings.batch_size // ranks.size,
        device=device,
        engine=loss.engine,
        block=loss.block,
        sub_centers=loss.sub_centers,
        sample_rate=loss.sample_rate,
        seed=settings.seed,
        ranks=ranks,
        matmul=torch.bfloat16 if half else None,
        compiled=settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda"),
    )


def build_schedule(settings: TrainConfig, steps_an_epoch: int) -> tuple[float, np.ndarray]:
    """(the peak learning rate, the learning rate of each step of the run)."""
    peak = peak_lr(settings.lr, settings.optimizer, settings.batch_size)
    return peak, learning_rates(
        settings.schedule,
        settings.epochs * steps_an_epoch,
        steps_an_epoch,
        peak,
        warmup_epochs=settings.warmup_epochs,
        power=settings.schedule_power,
        milestones=settings.milestones,
        milestone_factor=settings.milestone_factor,
        decay_epochs=settings.decay_epochs,
        final=settings.final_lr,
    )


def verification_sets(data: DataConfig) -> list[VerificationPairs]:
    """The sets of `data.verification`, or every `.bin` beside the training set. Raises TrainingError."""
    beside = [path for root in data.root for path in find_bins(root)]
    try:
        tests = [read_bin(path) for path in data.verification or beside]
    except (ValueError, OSError) as error:
        raise TrainingError(f"data.verification: {error}") from None
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise TrainingError(f"data.verification: two sets have the same name ({', '.join(names)}): rename one")
    return tests


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
    failure: Exception | None = None
    try:
        with whole.no_sync() if isinstance(whole, DistributedDataParallel) else nullcontext():
            attempt(whole)
    except Exception as error:  # compilers fail in many ways
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
    # The option has a new name since torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    own_statistics: dict[str, Any] = {
        "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False
    }
    return DistributedDataParallel(network, ids, process_group=ranks.group, **own_statistics)
