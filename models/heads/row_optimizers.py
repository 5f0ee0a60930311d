"""Optimizers that update some rows of a large matrix: the class centres that took part in a step.

What changes from step to step is passed in tensors, `factors`: torch.compile would compile a number in.
"""

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

    def factors(self, lr: float, steps: int) -> tuple[float, ...]:
        """The numbers that `step` needs at the rate `lr`; it gets them as scalar tensors of the weight's dtype and
        device.

        `steps`: of the run, this one included, for bias corrections.
        """
        del steps
        return (lr,)

    def step(self, weight: Tensor, states: list[Tensor], gradient: Tensor, factors: list[Tensor]) -> None:
        """Update rows `weight` [n, D] and their `states` in place; `gradient` [n, D] is used up."""
        (momentum,), (lr,) = states, factors
        gradient.add_(weight, alpha=self.weight_decay)
        momentum.mul_(self.momentum).add_(gradient)
        weight.addcmul_(momentum, lr, value=-1)


@dataclass(frozen=True)
class RowAdamW:
    """AdamW, its steps those of `torch.optim.AdamW`; the correction for the start counts the steps of the run."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.1
    eps: float = 1e-8

    states: ClassVar[tuple[str, ...]] = ("mean", "square")

    def factors(self, lr: float, steps: int) -> tuple[float, ...]:
        """As `RowSGD.factors`."""
        return (1 - lr * self.weight_decay, lr / (1 - self.betas[0] ** steps), (1 - self.betas[1] ** steps) ** -0.5)

    def step(self, weight: Tensor, states: list[Tensor], gradient: Tensor, factors: list[Tensor]) -> None:
        """As `RowSGD.step`."""
        (mean, square), (decay, lr, correction) = states, factors
        mean.lerp_(gradient, 1 - self.betas[0])
        square.mul_(self.betas[1]).addcmul_(gradient, gradient, value=1 - self.betas[1])
        root = torch.sqrt(square).mul_(correction).add_(self.eps)
        weight.mul_(decay).addcmul_(torch.div(mean, root), lr, value=-1)


RowOptimizer = RowSGD | RowAdamW
