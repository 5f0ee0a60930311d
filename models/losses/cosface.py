"""An additive margin on the cosine."""

from torch import Tensor

from models.losses.interface import MarginLoss, Targets


class CosFace(MarginLoss):
    """s (cos t - m), s = 64, m = 0.35. Wang et al., arXiv:1801.09414, equation 4 and section 4.1.

    insightface's recipes have m = 0.4.
    """

    def __init__(self, margin: float = 0.35, scale: float = 64.0) -> None:
        super().__init__(scale)
        self.margin = margin

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return self.scaled(cosine - self.margin * self.grown(step))
