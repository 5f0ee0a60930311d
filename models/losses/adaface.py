"""A margin that stresses hard faces where the embedding is long (a good image), easy ones where it is short."""

import torch
from torch import Tensor

from models.losses.angles import add_to_angle
from models.losses.batch_statistics import counted_mean, counted_std, move_towards_
from models.losses.interface import MarginLoss, Targets

_EPS = 1e-3  # as in the authors' code


class AdaFace(MarginLoss):
    """s (cos(t - m q) - m (1 + q)), q = clip(h (|x| - mean) / (std + 0.001), -1, 1). s = 64, m = 0.4, h = 0.333.

    Kim et al., arXiv:2204.00964, section 3.3. Mean and standard deviation of |x| are running ones, from 20 and
    100, to which each batch adds 1 % (`rate`) before they are used, as in the authors' code. No gradient goes through
    |x|, as published. A batch of one face leaves the standard deviation as it is.

    The authors' code holds the angle t - m q within (0, pi), so that the farthest faces of poor images have no
    gradient. Here the logit falls on past pi; below 0, nearer to the centre than the margin asks, it stays at
    s (1 - m (1 + q)), where the paper's formula would push a face away. The code also clips every cosine at +-0.999 and
    |x| at 100, after which all longer embeddings are of equal quality; this does not.
    """

    norm_mean: Tensor
    norm_std: Tensor

    def __init__(self, margin: float = 0.4, h: float = 0.333, scale: float = 64.0, rate: float = 0.01) -> None:
        super().__init__(scale)
        self.margin, self.h, self.rate = margin, h, rate
        self.register_buffer("norm_mean", torch.full((), 20.0))
        self.register_buffer("norm_std", torch.full((), 100.0))

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        norm = norm.detach()
        if self.training:
            move_towards_(self.norm_mean, counted_mean(norm, counted), self.rate, self.parts, counted.any())
            move_towards_(self.norm_std, counted_std(norm, counted), self.rate, self.parts, counted.sum() > 1)
        quality = (self.h * (norm - self.norm_mean) / (self.norm_std + _EPS)).clamp(-1, 1)
        margin = self.margin * self.grown(step)
        return self.scaled(add_to_angle(cosine, -margin * quality) - margin * (1 + quality))
