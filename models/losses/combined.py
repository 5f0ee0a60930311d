"""The margins of SphereFace, ArcFace and CosFace in one."""

from torch import Tensor

from models.losses.angles import angle, continued_cosine
from models.losses.interface import MarginLoss, Targets


class CombinedMargin(MarginLoss):
    """s (cos(m1 t + m2) - m3), s = 64, (m1, m2, m3) = (1, 0.3, 0.2). Deng et al., arXiv:1801.07698, equation 4.

    The paper's other choice is (0.9, 0.4, 0.15). The cosine goes on falling past every multiple of pi, as in
    SphereFace. insightface's PyTorch code takes only one of m2 and m3 at a time, and has no gradient of the margin.
    """

    def __init__(self, m1: float = 1.0, m2: float = 0.3, m3: float = 0.2, scale: float = 64.0) -> None:
        super().__init__(scale)
        self.m1, self.m2, self.m3 = m1, m2, m3

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        grown = self.grown(step)
        m1, m2, m3 = 1 + grown * (self.m1 - 1), grown * self.m2, grown * self.m3
        return self.scaled(continued_cosine(m1 * angle(cosine) + m2) - m3)
