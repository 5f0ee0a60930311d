"""ArcFace that turns to hard negatives as the training goes on."""

import torch
from torch import Tensor

from models.losses.angles import add_to_angle
from models.losses.batch_statistics import counted_mean, move_towards_
from models.losses.interface import MarginLoss, Targets


class CurricularFace(MarginLoss):
    """s cos(t_y + m) for the own class; for another one s cos t_j, or, where that is above cos(t_y + m) (a hard
    negative), s cos t_j (t + cos t_j). s = 64, m = 0.5.

    Huang et al., arXiv:2004.00288, section 3. t is a running mean of the cosine with the own class, from 0, to
    which each batch adds 1 % (`rate`) before it is used, as in the authors' code; no gradient goes through t or
    through the comparison. Both are as published: the value jumps where a negative becomes hard, and falls with a
    cosine below -t / 2.

    Past t_y + m = pi both the logit and what negatives are compared with fall on as -2 - cos(t_y + m). The authors'
    code lets the logit jump to cos t_y - m sin m there, and compares with a cosine that rises again.
    """

    t: Tensor

    def __init__(self, margin: float = 0.5, scale: float = 64.0, rate: float = 0.01) -> None:
        super().__init__(scale)
        self.margin, self.rate = margin, rate
        self.register_buffer("t", torch.zeros(()))

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        if self.training:
            move_towards_(self.t, counted_mean(cosine.detach(), counted), self.rate, self.parts, counted.any())
        value = add_to_angle(cosine, self.margin * self.grown(step))
        return self.scaled(value, bar=value.detach())

    def modulate(self, cosine: Tensor, bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        assert bar is not None  # `targets` gives one
        hard = cosine > bar[:, None]
        value = torch.where(hard, cosine * (self.t + cosine), cosine)
        return value, torch.where(hard, self.t + 2 * cosine.detach(), 1.0)
