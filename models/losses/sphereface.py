"""Multiplicative angular margins: m times the angle."""

import math

import torch
from torch import Tensor

from models.losses.angles import angle, continued_cosine
from models.losses.interface import MarginLoss, Targets


class SphereFace(MarginLoss):
    """|x| (psi(t) + lambda cos t) / (1 + lambda), psi(t) = (-1)^k cos(m t) - 2k for m t in [k pi, (k + 1) pi], m = 4.

    Liu et al., arXiv:1704.08063, equation 7. The annealing is that of the authors' code (prototxt of SphereFace-20):
    lambda = max(5, 1000 (1 + 0.12 i)^-1), i the training step from 1; `lambda_base` = `lambda_min` = 0 leaves it out.
    The embedding is not normalised: the scale is its length. Any m >= 1 will do.

    The authors' code replaces the gradient of psi by one of another length; this one is exact.
    """

    def __init__(
        self,
        margin: float = 4.0,
        lambda_base: float = 1000.0,
        lambda_gamma: float = 0.12,
        lambda_power: float = 1.0,
        lambda_min: float = 5.0,
    ) -> None:
        super().__init__(1.0)
        self.margin = margin
        self.lambda_base, self.lambda_gamma = lambda_base, lambda_gamma
        self.lambda_power, self.lambda_min = lambda_power, lambda_min

    def annealing(self, step: int) -> float:
        """lambda at `step`, from 0."""
        return max(self.lambda_min, self.lambda_base * (1 + self.lambda_gamma * (step + 1)) ** -self.lambda_power)

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        plain = self.annealing(step)
        psi = continued_cosine(self.margin * angle(cosine))
        return Targets(norm * (psi + plain * cosine) / (1 + plain), norm, None, None)


class SphereFaceR(MarginLoss):
    """s cos(min(m t, pi)), SphereFace-R v1 with hard feature normalisation: m = 1.5, s = 30.

    Liu et al., SphereFace Revived, arXiv:2109.05565; defaults from the authors' OpenSphere. Past t = pi / m
    the logit stays at its lowest, as published: there only the other classes move a face. The paper's "characteristic
    gradient detachment" gives the target the gradient of cos t instead; this one is exact. OpenSphere multiplies the
    loss by 50 / s, which belongs to the learning rate.
    """

    def __init__(self, margin: float = 1.5, scale: float = 30.0) -> None:
        super().__init__(scale)
        self.margin = margin

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        factor = 1 + self.grown(step) * (self.margin - 1)
        return self.scaled(torch.cos((factor * angle(cosine)).clamp_max(math.pi)))
