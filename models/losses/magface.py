"""ArcFace whose margin grows with the length of the embedding, which thereby tells the quality of a face."""

from torch import Tensor

from models.losses.angles import add_to_angle
from models.losses.batch_statistics import counted_mean
from models.losses.interface import MarginLoss, Targets


class MagFace(MarginLoss):
    """s cos(t + m(a)), a the embedding's length, plus lambda_g times the mean of g(a) = 1 / a + a / u_a^2. s = 64.

    Meng et al., arXiv:2103.06627, section 3. m(a) rises linearly from `margin_low` (0.45) at
    a = `norm_low` (l_a = 10) to `margin_high` (0.8) at `norm_high` (u_a = 110), a being held within these bounds, where
    it has no gradient; `penalty_weight` is lambda_g = 35. Defaults from the authors' training script. The gradient goes
    through the length, by way of both m and g, as published.

    The authors' code applies the margin only where cos t > 0, with a jump there; this one applies it everywhere, and
    falls on past t + m = pi.
    """

    def __init__(
        self,
        scale: float = 64.0,
        norm_low: float = 10.0,
        norm_high: float = 110.0,
        margin_low: float = 0.45,
        margin_high: float = 0.8,
        penalty_weight: float = 35.0,
    ) -> None:
        super().__init__(scale)
        self.norm_low, self.norm_high = norm_low, norm_high
        self.margin_low, self.margin_high = margin_low, margin_high
        self.penalty_weight = penalty_weight

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        length = norm.clamp(self.norm_low, self.norm_high)
        rise = (self.margin_high - self.margin_low) / (self.norm_high - self.norm_low)
        margin = self.grown(step) * (self.margin_low + rise * (length - self.norm_low))
        penalty = self.penalty_weight * counted_mean(1 / length + length / self.norm_high**2, counted)
        return self.scaled(add_to_angle(cosine, margin), penalty=penalty)
