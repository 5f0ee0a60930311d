"""Optimizers that update some rows of a large matrix: the class centres that took part in a step."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSGD:
    """SGD with momentum, its steps those of `torch.optim.SGD`. A row's momentum rests while the row does."""

    momentum: float = 0.9
    weight_decay: float = 5e-4

    #: Tensors of the weight's shape that belong to it.
    states: ClassVar[tuple[str, ...]] = ("momentum",)

    def step(self, weight: Tensor, states: list[Tensor], gradient: Tensor, lr: float, steps: int) -> None:
        """Update rows `weight` [n, D] and their `states` in place; `gradient` [n, D] is used up.

        `steps`: how many the run has made with this one, for optimizers that start slowly.
        """
        (momentum,) = states
        gradient.add_(weight, alpha=self.weight_decay)
        momentum.mul_(self.momentum).add_(gradient)
        weight.add_(momentum, alpha=-lr)


@dataclass(frozen=True)
class RowAdamW:
    """AdamW, its steps those of `torch.optim.AdamW`; the correction for the start counts the steps of the run."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    eps: float = 1e-8

    states: ClassVar[tuple[str, ...]] = ("mean", "square")

    def step(self, weight: Tensor, states: list[Tensor], gradient: Tensor, lr: float, steps: int) -> None:
        """As `RowSGD.step`."""
        mean, square = states
        mean.lerp_(gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        root = torch.sqrt(square).div_((1 - self.betas[1] ** steps) ** 0.5).add_(self.eps)
        weight.mul_(1 - lr * self.weight_decay)
        weight.addcdiv_(mean, root, value=-lr / (1 - self.betas[0] ** steps))


RowOptimizer = RowSGD | RowAdamW
