"""Activation checkpointing: blocks keep only their input, and recompute their activations in the backward pass."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute_blocks(network: nn.Module) -> int:
    """Checkpoint the activations of all blocks of `network` that are `recomputable = True`; returns how many they are.

    Outputs, gradients and the statistics of norms are the same as before. Raises ValueError for a network without such
    blocks.
    """
    blocks = [module for module in network.modules() if getattr(module, "recomputable", False)]
    if not blocks:
        raise ValueError(
            f"train.activation_checkpointing: {type(network).__name__} has no blocks to recompute; set it to false"
        )
    for block in blocks:
        block.forward = partial(_forward, block, block.forward)
    return len(blocks)


def recomputes(network: nn.Module) -> bool:
    """Whether `network` has blocks that `recompute_blocks` changed."""
    return any(isinstance(vars(module).get("forward"), partial) for module in network.modules())


def _forward(block: nn.Module, forward: Callable[..., Tensor], *inputs: Any, **options: Any) -> Any:
    if not (block.training and torch.is_grad_enabled()):
        return forward(*inputs, **options)
    if torch.compiler.is_compiling():  # what the compiler recomputes has no side effects
        return checkpoint(forward, *inputs, use_reentrant=False, **options)
    return checkpoint(forward, *inputs, use_reentrant=False, context_fn=partial(_contexts, block), **options)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """The contexts of the forward pass and of the recomputation."""
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Batch norms do not update their running statistics in the block: the forward pass did."""
    norms = [module for module in block.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm, (_, count) in zip(norms, before, strict=True):
        # Running statistics stay arguments: without them the pass would not save what the first one saved.
        norm.momentum, norm.num_batches_tracked = 0.0, None if count is None else torch.empty_like(count)
    try:
        yield
    finally:
        for norm, (momentum, count) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, count
