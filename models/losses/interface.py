"""What a margin loss defines: the logit of a face's own class, and the logits of the other classes.

The heads compute the products of embeddings and class centres (cosines, but for the plain softmax) and the softmax over
them. A loss gets the product with the own class of each face, [B], and blocks of those with the other classes, [B, n].
The loss of a face is the cross-entropy: logsumexp over all logits - logit of the own class; the mean over the faces
that count, plus the penalty, is minimised.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Targets(NamedTuple):
    """The logits of the faces' own classes, and what the other logits are made with."""

    #: float32 [B]: the logit of the own class, scale included.
    logits: Tensor
    #: float32 [B] or scalar: what `MarginLoss.others` is multiplied by.
    scale: Tensor
    #: float32 [B], without gradient: a value for each face that `others` may need, such as CurricularFace's threshold.
    bar: Tensor | None
    #: Scalar, added to the mean loss.
    penalty: Tensor | None


class MarginLoss(nn.Module):
    """`scale`: factor on the cosines before the softmax (s).

    `margin_warmup`: over so many steps the margin grows in equal parts, from none at step 0 to the full one; a random
    or adaptive margin is multiplied by the share that it has grown to, a factor on the angle grows from 1. 0: it is
    full from the start. SphereFace has an annealing of its own.

    `filter_above` > 0 is the inter-class filtering of insightface's PartialFC (An et al., arXiv:2203.15565): a cosine
    with another class above it counts as 0 and has no gradient, for that class may well be the same person.

    The arithmetic is that of the dtype given: float32, float64 in tests.
    """

    #: Centres are normalised, so that products are cosines.
    unit_centres: bool = True

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        # Set by `create_loss`.
        self.filter_above, self.margin_warmup = 0.0, 0
        # Set by the training step: which of how many micro-batches of the batch is next. Random margins depend on it;
        # statistics move a part of the way.
        self.part, self.parts = 0, 1

    def targets(self, cosine: Tensor, norm: Tensor, counted: Tensor, step: int) -> Targets:
        """`cosine`: [B], product of the embedding, of length 1, with its own class centre; `norm`: [B], the length that
        the embedding had; both differentiable. `counted`: bool [B], False where the label is -1: such faces get any
        finite value and must influence nothing. `step`: of the run, from 0; what is random derives from it.

        B are the faces of all ranks, so that statistics are the same on each.
        """
        raise NotImplementedError

    def others(self, cosine: Tensor, bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(values [B, n], to be multiplied by the scale for logits; their slopes d value / d cosine [B, n], None: 1).

        `cosine`: [B, n], the products with a block of classes; `bar`: of the Targets. Autograd through the values gives
        the slopes, too.
        """
        value, slope = self.modulate(cosine, bar)
        if self.filter_above > 0:
            kept = cosine <= self.filter_above
            value = torch.where(kept, value, 0.0)
            slope = kept.to(cosine.dtype) if slope is None else torch.where(kept, slope, 0.0)
        return value, slope

    def modulate(self, cosine: Tensor, bar: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """`others` before the filter. Most losses leave the other classes as they are."""
        del bar  # CurricularFace's
        return cosine, None

    def grown(self, step: int) -> float:
        """The share of the margin at `step`, 0..1."""
        return min(1.0, step / self.margin_warmup) if self.margin_warmup else 1.0

    def scaled(self, value: Tensor, bar: Tensor | None = None, penalty: Tensor | None = None) -> Targets:
        """Targets with the fixed scale: `value`, [B], times the scale is the logit of the own class."""
        return Targets(self.scale * value, value.new_full((), self.scale), bar, penalty)
