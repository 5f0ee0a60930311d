"""ArcFace and CosFace with a random margin for every face and step."""

import numpy as np
import torch
from torch import Tensor

from models.losses.angles import add_to_angle
from models.losses.interface import MarginLoss, Targets

_STREAM = 3  # of random numbers; data/loading.py has 1, data/augment.py 2


class ElasticFace(MarginLoss):
    """A margin drawn from a normal distribution of mean `margin` and deviation `std`; None and 0: as published.

    Boutros et al., arXiv:2109.09416, section III. With `plus` (ElasticFace+) the batch's margins are handed out by
    rank: the largest to the face farthest from its centre. The authors' code means to do that, but indexes by the
    sorting order where it needs the ranks, which hands them out at random.

    Margins depend on `seed`, the step and the part of the batch only, so that they are the same on every rank and after
    resuming.
    """

    #: Published mean, and deviation without and with `plus`.
    margin_default: float
    std_defaults: tuple[float, float]

    def __init__(
        self, margin: float | None = None, std: float = 0.0, scale: float = 64.0, plus: bool = False, seed: int = 0
    ) -> None:
        super().__init__(scale)
        self.margin = self.margin_default if margin is None else margin
        self.std = std or self.std_defaults[plus]
        self.plus, self.seed = plus, seed

    def margins(self, cosine: Tensor, counted: Tensor, step: int) -> Tensor:
        """[B], without gradient. Of faces that do not count: anything finite."""
        draws = np.random.default_rng([self.seed, step, _STREAM, self.part]).normal(self.margin, self.std, len(cosine))
        margins = torch.from_numpy(draws).to(cosine.dtype).to(cosine.device, non_blocking=True)
        if not self.plus:
            return margins
        # Faces that do not count come last in both orders.
        nearest_first = torch.where(counted, -cosine.detach(), torch.inf).argsort(stable=True)
        smallest_first = torch.where(counted, margins, torch.inf).sort().values
        return torch.where(counted, margins.scatter(0, nearest_first, smallest_first), self.margin)


class ElasticArc(ElasticFace):
    """s cos(t + m_i), s = 64, m_i of mean 0.5 and deviation 0.05, 0.0175 with `plus` (ElasticFace-Arc, Arc+).

    Falls on past t + m_i = pi, where the authors' code rises again.
    """

    margin_default, std_defaults = 0.5, (0.05, 0.0175)

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return self.scaled(add_to_angle(cosine, self.grown(step) * self.margins(cosine, counted, step)))


class ElasticCos(ElasticFace):
    """s (cos t - m_i), s = 64, m_i of mean 0.35 and deviation 0.05, 0.025 with `plus` (ElasticFace-Cos, Cos+).

    The deviation of Cos+ is the paper's; the authors' code has 0.02.
    """

    margin_default, std_defaults = 0.35, (0.05, 0.025)

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return self.scaled(cosine - self.grown(step) * self.margins(cosine, counted, step))
