"""What every margin loss is: a value for the own class, a value for the others, and a scale.

The heads compute products and log sum exps; a loss sees the product with the own class of each face ([B]) and blocks of
the products with the other classes ([B, n]). The loss of a face is logsumexp over all classes - logit of its own class;
the mean over the faces that count, plus the penalty, is what is minimised.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Targets(NamedTuple):
    """What the softmax sees of each face's own class, and what goes with it."""

    #: float32 [B]: the logit of the own class, scale included.
    logits: Tensor
    #: float32 [B] or scalar: factor on what `others` gives.
    scale: Tensor
    #: float32 [B], no gradient: a value for each face that `others` may need.
    bar: Tensor | None
    #: Scalar, added to the mean loss.
    penalty: Tensor | None


class MarginLoss(nn.Module):
    """`scale`: factor on the cosines before the softmax (s).

    `filter_above` > 0 is the inter-class filtering of insightface's PartialFC (An et al., arXiv:2203.15565): a cosine
    with another class above it counts as 0 and has no gradient, for that class may well be the same person.

    The arithmetic is that of the dtype given: float32, float64 in tests.
    """

    #: Centres are normalised, so that products are cosines.
    unit_centres: bool = True

    def __init__(self, scale: float, filter_above: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.filter_above = filter_above
        # Of the passes that a batch takes, which one is next: random margins differ, statistics move a part of the way.
        self.part, self.parts = 0, 1

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        """`cosine`: [B], product of the unit embedding with its own class centre; `norm`: [B], lengths of the
        embeddings; both differentiable. `counted`: bool [B], False where the label is -1: such faces have any finite
        value and influence nothing. `step`: of the training, from 0; what is random derives from it.

        B is the whole batch, of all ranks, so that statistics are the same everywhere.
        """
        raise NotImplementedError

    def others(self, cosine: Tensor, bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`cosine`: [B, n], products with a block of classes, to what is multiplied by the scale ([B, n]) and its slope
        d value / d cosine ([B, n], None: 1 everywhere). The value is differentiable too, with the same result."""
        value, slope = self.modulate(cosine, bar)
        if self.filter_above > 0:
            kept = cosine <= self.filter_above
            value = torch.where(kept, value, 0.0)
            slope = kept.to(cosine.dtype) if slope is None else torch.where(kept, slope, 0.0)
        return value, slope

    def modulate(self, cosine: Tensor, bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`others` before the filter; most losses leave the other classes alone."""
        del bar  # CurricularFace's
        return cosine, None

    def scaled(self, value: Tensor, bar: Tensor | None = None, penalty: Tensor | None = None) -> Targets:
        """Targets with the fixed scale, `value` ([B]) taking the place of the own cosine."""
        return Targets(self.scale * value, value.new_full((), self.scale), bar, penalty)
