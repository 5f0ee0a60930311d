"""A moving average of a network's weights, which often verifies better than the weights of any one step.

Polyak and Juditsky (1992); the slow start is that of TensorFlow's ExponentialMovingAverage.
"""

import copy

import torch
from torch import Tensor, nn


class WeightAverage:
    """average = decay x average + (1 - decay) x weights after every step.

    `network`: the average, a copy of the network in eval mode, to be verified and saved; its state dict is all there is
    to save. Floating-point buffers (the statistics of norms) are averaged like weights, others are copied.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        """`decay`: from 0 (no memory) to below 1; 0.999 remembers about the last 1,000 steps. Raises ValueError
        for others."""
        if not 0 <= decay < 1:
            raise ValueError(f"train.ema: must be from 0 to below 1, got {decay}")
        self.decay = decay
        self.network = copy.deepcopy(network).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Update the average with the weights after `step`, counted from 0.

        The decay is at most (1 + step) / (10 + step), so that initial weights are soon forgotten. It depends on the
        step alone, so that a resumed run is the same.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        own, new = _tensors(self.network), _tensors(network)
        averaged = [i for i, tensor in enumerate(new) if tensor.is_floating_point()]
        torch._foreach_lerp_([own[i] for i in averaged], [new[i] for i in averaged], 1 - decay)
        copied = [i for i, tensor in enumerate(new) if not tensor.is_floating_point()]
        if copied:  # a network may have no norms that count batches
            torch._foreach_copy_([own[i] for i in copied], [new[i] for i in copied])


def _tensors(network: nn.Module) -> list[Tensor]:
    return [*network.parameters(), *network.buffers()]
