"""Softmax losses without a margin."""

from torch import Tensor

from models.losses.interface import MarginLoss, Targets


class Softmax(MarginLoss):
    """Plain softmax cross-entropy over the products x . w: neither embeddings nor centres are normalised.

    The head's embedding has length 1, so that the scale is its length: |x| (x / |x| . w) = x . w. No bias, which an
    embedding compared by its angle could not use. `filter_above` looks at x / |x| . w.
    """

    unit_centres = False

    def __init__(self) -> None:
        super().__init__(1.0)

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return Targets(norm * cosine, norm, None, None)


class NormFace(MarginLoss):
    """Softmax over s cos t. Wang et al., arXiv:1704.06369.

    There s is learnt; here it is fixed, 64 as in the losses with a margin that came after.
    """

    def __init__(self, scale: float = 64.0) -> None:
        super().__init__(scale)

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        return self.scaled(cosine)
