"""What is computed for one block of classes, forward and backward: functions of tensors alone, so that they compile.

Compiled, each is its matrix products and one kernel before and after each of them, so that no more than that is read
from and written to memory.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from models.heads.row_optimizers import RowOptimizer
from models.losses import MarginLoss

EPS = 1e-12  # as in torch.nn.functional.normalize

#: What `backward` of a BlockMaths gives of the centres' gradient to its own `gradient` and `update`, and to nobody
#: else: a tensor [rows, D], or what that is computed from.
RawGradient: TypeAlias = Any


class Block(NamedTuple):
    """n classes of those that take part in a step.

    `rows`: of the weight, where their centres are; `centres`: those, [n * sub_centers, D], a view where `rows` is a
    slice. `start`: int64 scalar on the device, the index of the first among the classes of the step.
    """

    rows: slice | Tensor
    centres: Tensor
    start: Tensor


@dataclass(frozen=True)
class BlockMaths:
    """The margin softmax over a block, and the update of its centres.

    `matmul`: dtype of the operands of matrix products, None: as they are. Arguments of the methods: `unit`: [B, D],
    embeddings of length 1, `rounded`; `place`: int64 [B], the index of each face's own class among the classes of the
    step, -1 for none; `start`: of the Block; `scale`: [B, 1] or [1, 1]; `bar`: of the Targets.
    """

    loss: MarginLoss
    sub_centers: int
    matmul: torch.dtype | None
    optimizer: RowOptimizer

    def rounded(self, values: Tensor) -> Tensor:
        """`values` as an operand of a matrix product."""
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
        """`total` and `best` with this block's classes, the own ones left out: the log sum exp of the logits and the
        largest product, [B] each."""
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
    ) -> tuple[RawGradient, Tensor, Tensor | None]:
        """(the gradient of `centres` with their lengths held constant, [rows, D], for `gradient`; `d_unit` [B, D] and
        `d_scale` [B], None where it needs none, with this block's part added).

        `log_others`: [B], the log sum exp over all blocks; `d_own`, `d_others`: [B], gradients of the own product and
        of `log_others`.
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

    def gradient(self, raw: RawGradient, centres: Tensor) -> Tensor:
        """The gradient of `centres` [rows, D] from `raw`, what `backward` gave, which is overwritten."""
        if torch.compiler.is_compiling():
            raw = raw.clone()  # a compiler would write into it what nobody reads
        if not self.loss.unit_centres:
            return raw
        # c = u.w / |w|, so dc/dw = u / |w| - (u / |w|).w w / |w|^2: the part along w goes.
        length = torch.linalg.vector_norm(centres, dim=1).clamp_min(EPS)
        along = (raw * centres).sum(1) / (length * length)
        return raw.addcmul_(centres, along[:, None], value=-1)

    def update(self, raw: RawGradient, centres: Tensor, states: list[Tensor], factors: list[Tensor]) -> None:
        """One optimizer step of `centres` [rows, D] and their optimizer `states`, in place.

        `raw`: as for `gradient`; `factors`: the optimizer's, of the step.
        """
        self.optimizer.step(centres, states, self.gradient(raw, centres), factors)

    def _products(self, unit: Tensor, factors: Tensor, centres: Tensor) -> tuple[Tensor, Tensor | None]:
        """Products [B, rows] with the centres, and 1 / length of the centres where these are normalised."""
        products = multiply(unit, factors.T)
        if not self.loss.unit_centres:
            return products, None
        inverse = torch.linalg.vector_norm(centres, dim=1).clamp_min(EPS).reciprocal()
        return products * inverse, inverse


def multiply(left: Tensor, right: Tensor) -> Tensor:
    """The matrix product in float32, whatever the dtype of the operands."""
    if left.dtype not in (torch.bfloat16, torch.float16):
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def _put(values: Tensor, column: Tensor, own: Tensor | float) -> Tensor:
    """`values` [B, n] with `own`, [B, 1] or a number, in each face's `column` [B], unless that is not from 0 to n - 1.

    Eagerly a few elements change in place; compiled it is part of the kernel that makes `values`, which a scatter would
    cut in two.
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
