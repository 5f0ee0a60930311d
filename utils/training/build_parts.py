"""Network, head and learning rates of a run, built from its settings."""

from dataclasses import asdict

import numpy as np
import torch
from torch import nn

from config import Config, TrainConfig
from models import create_network
from models.heads import DenseHead, Head, RowAdamW, RowSGD, create_head
from models.losses import create_loss
from models.recompute import recompute_blocks
from models.weights import load_weights
from utils.checkpoints import CheckpointError
from utils.ranks import Ranks
from utils.training.optimizers import freeze
from utils.training.schedules import learning_rates, peak_lr


def build_network(config: Config, device: torch.device, with_init: bool = True) -> nn.Module:
    """The network on `device`, channels last, with its initial weights: random ones from the seed, or those of
    `train.init`, which a resumed run (`with_init` False) does not need."""
    model, settings = config.model, config.train
    torch.manual_seed(settings.seed)
    published = {"drop_path": model.drop_path, "mask_ratio": model.mask_ratio, "dropout": model.dropout}
    options = {name: value for name, value in published.items() if value >= 0}
    if model.pretrained and with_init and not settings.init:
        options["pretrained"] = True
    network = create_network(model.network, model.embedding_size, config.data.image_size, **options)
    if settings.init and with_init:
        try:
            load_weights(network, settings.init, model.network, model.colour)
        except CheckpointError as error:
            raise CheckpointError(f"train.init: {error}") from None
    freeze(network, settings.frozen)
    if settings.activation_checkpointing:
        recompute_blocks(network)
    return network.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]


def build_head(
    config: Config, classes: int, steps_per_epoch: int, device: torch.device, precision: torch.dtype, ranks: Ranks
) -> Head:
    """The head over `classes` on `device`, this rank's part of it; `precision` is the network's.

    Raises torch.OutOfMemoryError, with a note of what would help, when class centres do not fit.
    """
    loss, settings = config.loss, config.train
    options = asdict(loss) | {"margin": loss.margin or None, "scale": loss.scale or None, "seed": settings.seed}
    options["margin_warmup"] = round(loss.margin_warmup_epochs * steps_per_epoch)
    half = loss.products == "bf16" or (
        loss.products == "auto" and device.type == "cuda" and precision == torch.bfloat16
    )
    try:
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
            compiled=compiles(settings, device),
        )
    except torch.OutOfMemoryError as error:
        each = 1 if settings.optimizer == "sgd" else 2  # numbers of the optimizer's state for one of a centre
        gib = (1 + each) * classes * loss.sub_centers * config.model.embedding_size * 4 / ranks.size / 2**30
        error.add_note(
            f"The centres of {classes:,} classes and the state of {settings.optimizer} take {gib:.3g} GiB a card: "
            "spread them over more cards (torchrun), leave people out (data.min_images), or take a smaller "
            "model.embedding_size" + (", or sgd" if settings.optimizer != "sgd" else "")
        )
        raise


def compiles(settings: TrainConfig, device: torch.device) -> bool:
    """Whether torch.compile is to be used on `device`."""
    return settings.compile == "on" or (settings.compile == "auto" and device.type == "cuda")


def build_schedule(settings: TrainConfig, steps_an_epoch: int) -> np.ndarray:
    """The learning rate of each step of the run."""
    return learning_rates(
        settings.schedule,
        settings.epochs * steps_an_epoch,
        steps_an_epoch,
        peak_lr(settings.lr, settings.optimizer, settings.batch_size),
        warmup_epochs=settings.warmup_epochs,
        power=settings.schedule_power,
        milestones=settings.milestones,
        milestone_factor=settings.milestone_factor,
        decay_epochs=settings.decay_epochs,
        final=settings.final_lr,
    )


def describe_rates(settings: TrainConfig, network: nn.Module) -> str:
    """What is told of the learning rate, and of the weights that do not learn."""
    peak, by_rule = (peak_lr(lr, settings.optimizer, settings.batch_size) for lr in (settings.lr, 0))
    text = f"learning rate {peak:.4g} at its peak"
    if settings.backbone_lr != 1:
        text += f", {settings.backbone_lr * peak:.4g} for the network"
    if settings.frozen:
        weights = list(network.parameters())
        frozen = sum(weight.numel() for weight in weights if not weight.requires_grad)
        text += f"; {frozen:,} of the network's {sum(map(torch.numel, weights)):,} weights are frozen"
    if settings.optimizer != "sgd" and peak > 10 * by_rule:  # a preset's, most likely, which is meant for SGD
        text += f"; that is {peak / by_rule:.0f} times what {settings.optimizer} takes by rule (--lr 0)"
    return text


def unused_here(config: Config, device: torch.device, ranks: Ranks, head: Head) -> list[str]:
    """A line for each setting that was given but has no effect on this `device`, with these `ranks` and this `head`.
    Those without effect beside other settings are found by the sections in config.py."""
    model, settings = config.model, config.train
    off_cuda, for_cuda = device.type != "cuda", f"it is for CUDA, not {device.type}"
    lines = [
        f"{name} not used: {why}"
        for name, unused, why in (
            ("loss.products", config.loss.products != "auto" and isinstance(head, DenseHead), "the head is dense"),
            ("train.cuda_graph", settings.cuda_graph and off_cuda, for_cuda),
            ("data.decode", config.data.decode == "gpu" and off_cuda, for_cuda),
            ("train.sync_bn", settings.sync_bn and ranks.size == 1, "there is one process"),
            ("model.pretrained", model.pretrained and bool(settings.init), "train.init names other weights"),
            ("model.colour", model.colour != "auto" and not settings.init, "train.init names no weights"),
        )
        if unused
    ]
    warmup, epochs = config.loss.margin_warmup_epochs, settings.epochs
    if warmup > epochs and "margin_warmup_epochs" not in config.loss.unused():
        lines.append(f"loss.margin_warmup_epochs is {warmup:g}: the margin is never whole, as train.epochs is {epochs}")
    return lines
