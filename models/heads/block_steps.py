"""What is computed for one block of classes, forward and backward: functions of tensors alone, so that they compile."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.losses import MarginLoss

_EPS = 1e-12  # as in torch.nn.functional.normalize


class Block(NamedTuple):
    """n classes of a step.

    `rows`: where their centres are in the weight; `centres`: those, [n * sub_centers, D], a view where `rows` is a
    slice. `column`: int64 [B, 1], the place of each face's own class in the block; `here`: bool [B, 1], whether it is
    in this block at all.
    """

    rows: slice | Tensor
    centres: Tensor
    column: Tensor
    here: Tensor


@dataclass(frozen=True)
class BlockMaths:
    """The loss, and how products come about. `matmul`: dtype that factors are rounded to, None: as they are."""

    loss: MarginLoss
    sub_centers: int
    matmul: torch.dtype | None

    def products(self, unit: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products [B, rows] with the centres, and one over the centres' lengths where these do not count."""
        products = multiply(unit, centres.T, self.matmul)
        if not self.loss.unit_centres:
            return products, None
        inverse = torch.linalg.vector_norm(centres, dim=1).clamp_min(_EPS).reciprocal()
        return products * inverse, inverse

    def forward(
        self, unit: Tensor, centres: Tensor, column: Tensor, here: Tensor, scale: Tensor, bar: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Over the block's other classes: log sum exp of the logits, and the largest product; [B] each.

        `unit`: [B, D], embeddings of length 1; `scale`: [B, 1] or [1, 1].
        """
        products, _ = self.products(unit, centres)
        cosine, _ = _pool(products, self.sub_centers)
        logits = self.loss.others(cosine, bar)[0] * scale
        return _put(logits, column, here, -torch.inf).logsumexp(1), _put(cosine, column, here, -torch.inf).amax(1)

    def backward(
        self,
        unit: Tensor,
        centres: Tensor,
        column: Tensor,
        here: Tensor,
        scale: Tensor,
        bar: Tensor | None,
        log_others: Tensor,
        d_own: Tensor,
        d_others: Tensor,
        scale_learns: bool,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient of `centres` [rows, D], and the block's part of those of `unit` [B, D] and, where
        `scale_learns`, of `scale` [B].

        `log_others`: [B], of all blocks; `d_own`, `d_others`: [B], gradients of the own product and of `log_others`.
        """
        products, inverse = self.products(unit, centres)
        cosine, which = _pool(products, self.sub_centers)
        others, slope = self.loss.others(cosine, bar)
        d_logits = (others * scale - log_others[:, None]).exp() * d_others[:, None]
        d_logits = _put(d_logits, column, here, 0.0)
        d_cosine = d_logits * scale if slope is None else d_logits * scale * slope
        d_products = _unpool(_put(d_cosine, column, here, d_own[:, None]), which, self.sub_centers)
        radial = None
        if inverse is not None:
            # c = u.w / |w|, so dc/dw = u / |w| - c w / |w|^2
            radial = torch.linalg.vecdot(d_products, products, dim=0) * inverse * inverse
            d_products = d_products * inverse
        d_centres = multiply(d_products.T, unit, self.matmul)
        if radial is not None:
            d_centres = d_centres.addcmul_(centres, radial[:, None], value=-1)
        d_scale = (d_logits * others).sum(1) if scale_learns else None
        return d_centres, multiply(d_products, centres, self.matmul), d_scale


def multiply(left: Tensor, right: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The product of two matrices, rounded to `dtype` first if there is one, summed in float32."""
    if dtype is None:
        return left @ right
    left, right = left.to(dtype), right.to(dtype)
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _put(values: Tensor, column: Tensor, here: Tensor, own: Tensor | float) -> Tensor:
    """`values` [B, n] with `own` in the columns of the faces' own classes."""
    return values.scatter_(1, column, torch.where(here, own, values.gather(1, column)))


def _pool(products: Tensor, sub_centers: int) -> tuple[Tensor, Tensor | None]:
    """The largest of each class's products, [B, n], and which sub-center it is from (None where there is but one)."""
    if sub_centers == 1:
        return products, None
    return products.unflatten(1, (-1, sub_centers)).max(2)


def _unpool(gradient: Tensor, which: Tensor | None, sub_centers: int) -> Tensor:
    """The gradient [B, n] given to the sub-centers that the values were from: [B, n * sub_centers]."""
    if which is None:
        return gradient
    parts = gradient.new_zeros(*gradient.shape, sub_centers)
    return parts.scatter_(2, which[..., None], gradient[..., None]).flatten(1)
