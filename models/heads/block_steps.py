"""What is computed for one block of classes, forward and backward: functions of tensors alone, so that they compile.

Compiled, each is its matrix products and a kernel before and after each of them: what is as large as the block goes
through memory once between two products, and once with the centres and the optimizer's state in `update`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from models.heads.row_optimizers import RowOptimizer
from models.losses import MarginLoss

_EPS = 1e-12  # as in torch.nn.functional.normalize


class Block(NamedTuple):
    """n classes of a step.

    `rows`: where their centres are in the weight; `centres`: those, [n * sub_centers, D], a view where `rows` is a
    slice. `start`: int64 scalar on the device, the place of the first among the classes of the step.
    """

    rows: slice | Tensor
    centres: Tensor
    start: Tensor


@dataclass(frozen=True)
class BlockMaths:
    """The loss, how products come about, and how centres are updated.

    `matmul`: dtype that factors are rounded to, None: as they are. In what follows `unit` is [B, D], embeddings of
    length 1, `rounded`; `place`: int64 [B], where among the classes of the step each face's own one is, -1 for none;
    `start`: a Block's; `scale`: [B, 1] or [1, 1].
    """

    loss: MarginLoss
    sub_centers: int
    matmul: torch.dtype | None
    optimizer: RowOptimizer

    def rounded(self, values: Tensor) -> Tensor:
        """`values` as a factor of a product."""
        return values if self.matmul is None else values.to(self.matmul)

    def forward(
        self,
        unit: Tensor,
        centres: Tensor,
        place: Tensor,
        start: Tensor,
        scale: Tensor,
        bar: Tensor | None,
        total: Tensor,
        best: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Over the other classes so far, this block's included: log sum exp of the logits, and the largest product;
        [B] each. `total` and `best` are those without this block."""
        products, _ = self._products(unit, self.rounded(centres), centres)
        cosine, _ = _pool(products, self.sub_centers)
        logits = self.loss.others(cosine, bar)[0] * scale
        column = place - start
        logs = _put(logits, column, -torch.inf).logsumexp(1)
        return torch.logaddexp(total, logs), torch.maximum(best, _put(cosine, column, -torch.inf).amax(1))

    def backward(
        self,
        unit: Tensor,
        centres: Tensor,
        place: Tensor,
        start: Tensor,
        scale: Tensor,
        bar: Tensor | None,
        log_others: Tensor,
        d_own: Tensor,
        d_others: Tensor,
        d_unit: Tensor,
        d_scale: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """The gradient of `centres` as if their lengths stood still [rows, D], for `gradient`; and with this block's
        part `d_unit` [B, D] and, where the scale learns, `d_scale` [B].

        `log_others`: [B], of all blocks; `d_own`, `d_others`: [B], gradients of the own product and of `log_others`.
        """
        factors = self.rounded(centres)
        products, inverse = self._products(unit, factors, centres)
        cosine, which = _pool(products, self.sub_centers)
        others, slope = self.loss.others(cosine, bar)
        column = place - start
        d_logits = (others * scale - log_others[:, None]).exp() * d_others[:, None]
        d_logits = _put(d_logits, column, 0.0)
        d_cosine = d_logits * scale if slope is None else d_logits * scale * slope
        d_products = _unpool(_put(d_cosine, column, d_own[:, None]), which, self.sub_centers)
        if inverse is not None:
            d_products = d_products * inverse
        d_products = self.rounded(d_products)
        if d_scale is not None:
            d_scale = d_scale + (d_logits * others).sum(1)
        return multiply(d_products.T, unit), d_unit + multiply(d_products, factors), d_scale

    def gradient(self, still: Tensor, centres: Tensor) -> Tensor:
        """The gradient of `centres` [rows, D] from what `backward` gave, which is used up."""
        if torch.compiler.is_compiling():
            still = still.clone()  # a compiler would write into it what nobody reads
        if not self.loss.unit_centres:
            return still
        # c = u.w / |w|, so dc/dw = u / |w| - (u / |w|).w w / |w|^2: the part along w goes.
        length = torch.linalg.vector_norm(centres, dim=1).clamp_min(_EPS)
        along = (still * centres).sum(1) / (length * length)
        return still.addcmul_(centres, along[:, None], value=-1)

    def update(self, still: Tensor, centres: Tensor, states: list[Tensor], factors: list[Tensor]) -> None:
        """Apply the gradient to `centres` [rows, D] and the optimizer's `states` of theirs, in place.

        `still`: as for `gradient`; `factors`: the optimizer's, of the step.
        """
        self.optimizer.step(centres, states, self.gradient(still, centres), factors)

    def _products(self, unit: Tensor, factors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products [B, rows] with the centres, and one over the centres' lengths where these do not count."""
        products = multiply(unit, factors.T)
        if not self.loss.unit_centres:
            return products, None
        inverse = torch.linalg.vector_norm(centres, dim=1).clamp_min(_EPS).reciprocal()
        return products * inverse, inverse


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The product of two matrices, of float32 ones or of half ones, summed in float32."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _put(values: Tensor, column: Tensor, own: Tensor | float) -> Tensor:
    """`values` [B, n] with `own`, [B, 1] or a number, in the `column` [B] of each face, if it has that one.

    Two ways to the same: eagerly a few elements change in place, compiled it is part of the kernel that makes `values`,
    which a scatter would cut in two.
    """
    if torch.compiler.is_compiling():
        return torch.where(torch.arange(values.shape[1], device=values.device) == column[:, None], own, values)
    here = ((column >= 0) & (column < values.shape[1]))[:, None]
    column = column.clamp(0, values.shape[1] - 1)[:, None]
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
    if torch.compiler.is_compiling():  # see `_put`
        chosen = torch.arange(sub_centers, device=which.device) == which[..., None]
        return torch.where(chosen, gradient[..., None], 0.0).flatten(1)
    parts = gradient.new_zeros(*gradient.shape, sub_centers)
    return parts.scatter_(2, which[..., None], gradient[..., None]).flatten(1)
