"""An additive margin on the angle."""

from torch import Tensor

from models.losses.angles import add_to_angle
from models.losses.interface import MarginLoss, Targets


class ArcFace(MarginLoss):
    """s cos(t + m), s = 64, m = 0.5 radians. Deng et al., arXiv:1801.07698, equation 3.

    Past t + m = pi it falls on as -2 - cos(t + m). insightface applies the margin without gradient, so that the
    target's slope is 1 where that of the formula is sin(t + m) / sin t, and lets the logit rise again past pi (or, in
    older versions, jump); this one is exact and monotone.
    """

    def __init__(self, margin: float = 0.5, scale: float = 64.0) -> None:
        super().__init__(scale)
        self.margin = margin

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return self.scaled(add_to_angle(cosine, self.margin * self.grown(step)))
