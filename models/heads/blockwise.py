"""A head for millions of classes: the softmax is computed block by block of classes, and logits are never stored.

Forward, each block adds to a running log sum exp. Backward, each block's products are computed again; from them come
its part of the embeddings' gradient and the gradient of its own centres, which the optimizer applies at once (`fused`).
That takes four matrix products instead of three, but neither all logits [B, classes] nor the gradient of all centres
are ever in memory: beyond the centres and the optimizer's state a step holds O(B x D + block x (B + D)) floats, B being
the faces of all ranks together.

The same code holds the classes of one rank out of several (class-parallel), and samples negatives (PartialFC).
"""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads.block_steps import EPS, Block, BlockMaths, RawGradient
from models.heads.fused_steps import FusedMaths, can_fuse
from models.heads.interface import Head, HeadOutput, mean_loss, silence_broken
from models.heads.row_optimizers import RowOptimizer
from models.heads.sampling import sample_classes, sampled_count
from models.losses import MarginLoss, Targets
from utils.compiling import Compiled, shortly
from utils.ranks import Ranks, share_of


class Chosen(NamedTuple):
    """Classes of this rank that take part in a step: `size` of them, int64 ascending, None for all; `place`: int64 [B],
    the index among them of each face's own class, -1 where that is another rank's or none."""

    classes: Tensor | None
    size: int
    place: Tensor


class BlockwiseHead(Head):
    """The class centres of this rank, and the margin softmax over those of all ranks.

    `block`: classes computed at a time. `sample_rate`: share of the classes that take part in a step, those of the
    batch always among them. `batch_size`: most faces of one rank in a step; on several ranks smaller batches are padded
    to it. `fused`: update the centres during `backward`, at the rate `lr`; otherwise gradients add up until `update`.
    `matmul`: dtype of the operands of matrix products, which are summed in float32; None: the weight's own float32.
    `centres`: the initial ones; None: drawn from `seed`.

    The loss is the mean over all ranks' faces, the same number on each. The embeddings' gradients are those of this
    loss: the ranks' gradients of the network have to be summed, not averaged.
    """

    def __init__(
        self,
        loss: MarginLoss,
        classes: int,
        embedding_size: int,
        optimizer: RowOptimizer,
        batch_size: int,
        block: int = 4096,
        sub_centers: int = 1,
        sample_rate: float = 1.0,
        seed: int = 0,
        ranks: Ranks | None = None,
        fused: bool = True,
        matmul: torch.dtype | None = None,
        centres: Tensor | None = None,
    ) -> None:
        ranks = ranks or Ranks()
        held = share_of(classes, ranks.rank, ranks.size)
        super().__init__(loss, classes, held, embedding_size, optimizer, sub_centers, seed, centres)
        self.batch_size, self.block, self.ranks, self.seed = batch_size, block, ranks, seed
        self.sample_rate, self.fused = sample_rate, fused
        self.forward_block = block  # as `block`, in the forward pass, where kernels take more classes at a time
        self.maths = BlockMaths(loss, sub_centers, matmul, optimizer)
        self.block_forward: Callable[..., Any] = self.maths.forward
        self.block_backward: Callable[..., Any] = self.maths.backward
        self.block_update: Callable[..., Any] = self.maths.update
        self._touched: Tensor | None = None  # rows with a gradient, when not all have one

    def compile_blocks(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Have what is computed of a block go through torch.compile, or through kernels of our own where there are any
        for the device that the centres are on by now."""
        if can_fuse(self.maths, self.weight.shape[1], self.weight.device):
            try:
                FusedMaths.of(self.maths).attempt(self.batch_size * self.ranks.size, self.weight)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # compilers fail in many ways
                warnings.warn(
                    f"the head's kernels do not run here, torch.compile's will ({shortly(error)})", stacklevel=2
                )
            else:
                self.fuse_blocks()
                return
        self.block_forward = Compiled(self.maths.forward, backend)
        self.block_backward = Compiled(self.maths.backward, backend)
        self.block_update = Compiled(self.maths.update, backend, in_place=True)

    def fuse_blocks(self) -> None:
        """Have what is computed of a block go through kernels of our own (see `can_fuse`)."""
        self.maths = fused = FusedMaths.of(self.maths)
        forward, backward = fused.most_classes(self.weight.shape[1], self.batch_size * self.ranks.size)
        self.block = min(self.block, backward)
        self.block_forward, self.block_backward, self.block_update = fused.forward, fused.backward, fused.update
        if self.sample_rate == 1:
            self.forward_block = min(max(len(self.held), 1), forward)  # nothing in its memory is as long as that
        else:
            self.forward_block = self.block

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> HeadOutput:
        with torch.autocast(embeddings.device.type, enabled=False):
            embeddings, labels, finite = silence_broken(embeddings.to(self.weight.dtype), labels, self.classes)
            if self.ranks.size > 1:
                missing = self.batch_size - len(labels)
                if missing < 0:
                    raise ValueError(f"a batch of {len(labels)} faces, but the head was made for {self.batch_size}")
                embeddings, labels = F.pad(embeddings, (0, 0, 0, missing)), F.pad(labels, (0, missing), value=-1)
                finite = F.pad(finite, (0, missing), value=True)
            norm = torch.linalg.vector_norm(embeddings, dim=1)
            unit = embeddings / norm.clamp_min(EPS)[:, None]
            return HeadOutput(*_MarginSoftmax.apply(unit, norm, self.weight, labels, finite, self, step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """What `fused` has not done already, block by block."""
        gradient, self.weight.grad = self.weight.grad, None
        touched, self._touched = self._touched, None
        if gradient is None:
            return
        rows_at_once, factors = self.block * self.sub_centers, self.optimizer_factors(step)
        for start in range(0, len(self.weight), rows_at_once):
            rows = slice(start, start + rows_at_once)
            parts = [self.weight[rows], *(state[rows] for state in self.optimizer_states())]
            undo = [] if touched is None else [(part, part.clone(), ~touched[rows, None]) for part in parts]
            self.optimizer.step(parts[0], parts[1:], gradient[rows], factors)
            for part, before, rests in undo:
                part.copy_(torch.where(rests, before, part))

    def forget_gradient(self) -> None:
        super().forget_gradient()
        self._touched = None

    def take_gradient(self, rows: slice | Tensor, centres: Tensor, raw: RawGradient, factors: list[Tensor]) -> None:
        """Update the centres, `rows` of the weight, now (`fused`), or add their gradient to what `update` will apply.

        `raw`: as `BlockMaths.backward` gives it; `factors`: the optimizer's, of the step.
        """
        if self.fused:
            states = self.optimizer_states()
            parts = [state[rows] for state in states]
            self.block_update(raw, centres, parts, factors)
            if isinstance(rows, Tensor):  # the parts are copies
                for whole, part in zip([self.weight, *states], [centres, *parts], strict=True):
                    whole[rows] = part
            return
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad[rows] += self.maths.gradient(raw, centres)
        if self.sample_rate < 1:  # of several passes one may have all classes, and another a sample
            if self._touched is None:
                self._touched = torch.zeros(len(self.weight), dtype=torch.bool, device=self.weight.device)
            if isinstance(rows, Tensor):
                self._touched.index_fill_(0, rows, True)
            else:
                self._touched[rows].fill_(True)

    def choose(self, labels: Tensor, step: int) -> Chosen:
        """The classes of this rank that take part in a step with the faces `labels` of all ranks."""
        held, place = len(self.held), self.local_labels(labels)
        count = sampled_count(held, self.sample_rate, len(labels))
        if count == held:
            return Chosen(None, held, place)
        classes = sample_classes(place, held, count, (self.seed, step, self.ranks.rank))
        return Chosen(classes, count, torch.where(place >= 0, torch.searchsorted(classes, place), -1))

    def local_labels(self, labels: Tensor) -> Tensor:
        """`labels` counted from this rank's first class; -1 for classes that it does not hold."""
        mine = (labels >= self.held.start) & (labels < self.held.stop)
        return torch.where(mine, labels - self.held.start, -1)

    def blocks(self, chosen: Chosen, at_once: int) -> Iterator[Block]:
        """The chosen classes, `at_once` of them at a time."""
        k, weight = self.sub_centers, self.weight.detach()
        starts = range(0, chosen.size, at_once)
        on_device = torch.arange(0, chosen.size, at_once, device=weight.device).unbind()
        for start, start_on_device in zip(starts, on_device, strict=True):
            stop = min(start + at_once, chosen.size)
            rows: slice | Tensor = slice(start * k, stop * k)
            if chosen.classes is not None:
                each = torch.arange(k, device=chosen.classes.device)
                rows = (chosen.classes[start:stop, None] * k + each).flatten()
            yield Block(rows, weight[rows], start_on_device)

    def own_products(self, unit: Tensor, labels: Tensor) -> Tensor:
        """Products [B] of the faces with their own class's centre, from whichever rank has it; 0 without a class."""
        if not len(self.held):
            return self.ranks.sum(unit.new_zeros(len(unit)))
        local = self.local_labels(labels)
        centres = self.weight.unflatten(0, (-1, self.sub_centers))[local.clamp_min(0)]
        products = torch.einsum("bd,bkd->bk", unit, centres)
        if self.loss.unit_centres:
            products = products / torch.linalg.vector_norm(centres, dim=2).clamp_min(EPS)
        return self.ranks.sum(torch.where(local >= 0, products.amax(1), 0))


class _MarginSoftmax(torch.autograd.Function):
    """(loss, accuracy, own products) of all ranks' faces over all classes, as `mean_loss` gives them."""

    @staticmethod
    def forward(
        ctx: Any,
        unit: Tensor,
        norm: Tensor,
        weight: Tensor,
        labels: Tensor,
        finite: Tensor,
        head: BlockwiseHead,
        step: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        del weight  # an argument so that autograd knows of it
        ranks = head.ranks
        unit, norm, labels = ranks.gather(unit.detach()), ranks.gather(norm.detach()), ranks.gather(labels)
        finite, counted = ranks.gather(finite), labels >= 0
        chosen = head.choose(labels, step)
        own = head.own_products(unit, labels)
        # Autograd does what is as long as the batch, [B]; what is as wide as the classes is written out below.
        with torch.enable_grad():
            own.requires_grad_()
            norm.requires_grad_()
            targets = head.loss.targets(own, norm, counted, step)
        log_others, best = _log_sum_exp(head, unit, chosen, targets)
        log_others = ranks.logsumexp(log_others)
        best = ranks.maximum(best)
        with torch.enable_grad():
            log_others.requires_grad_()
            output = mean_loss(targets, log_others, own, best, counted, finite)
        scale_learns = targets.scale.requires_grad
        ctx.gradients = torch.autograd.grad(
            output.loss, [own, norm, log_others], retain_graph=scale_learns, materialize_grads=True
        )
        ctx.norm, ctx.scale, ctx.bar = norm, targets.scale, targets.bar
        ctx.save_for_backward(unit, log_others.detach())
        ctx.head, ctx.step, ctx.chosen = head, step, chosen
        ctx.mark_non_differentiable(output.correct, output.own)
        return output.loss.detach(), output.correct, output.own

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        unit, log_others = ctx.saved_tensors
        head: BlockwiseHead = ctx.head
        d_own, d_norm, d_others = (gradient * outputs[0] for gradient in ctx.gradients)
        scale, bar = ctx.scale.detach().reshape(-1, 1), ctx.bar
        d_unit, d_scale = torch.zeros_like(unit), torch.zeros_like(d_own) if ctx.scale.requires_grad else None
        place, unit, factors = ctx.chosen.place, head.maths.rounded(unit), head.optimizer_factors(ctx.step)
        for rows, centres, start in head.blocks(ctx.chosen, head.block):
            raw, d_unit, d_scale = head.block_backward(
                unit, centres, place, start, scale, bar, log_others, d_own, d_others, d_unit, d_scale
            )
            head.take_gradient(rows, centres, raw, factors)
            del raw, centres  # not to be in memory beside the next block's
        if d_scale is not None:
            (by_scale,) = torch.autograd.grad(ctx.scale, ctx.norm, head.ranks.sum(d_scale).reshape(ctx.scale.shape))
            d_norm = d_norm + by_scale
        faces = len(d_norm) // head.ranks.size
        d_norm = d_norm[head.ranks.rank * faces :][:faces]  # every rank has all of it
        return head.ranks.scatter_sum(d_unit), d_norm, None, None, None, None, None


def _log_sum_exp(head: BlockwiseHead, unit: Tensor, chosen: Chosen, targets: Targets) -> tuple[Tensor, Tensor]:
    """Over the other classes of this rank: log sum exp of the logits, and the largest product; [B] each."""
    scale, bar = targets.scale.detach().reshape(-1, 1), targets.bar
    total = unit.new_full((len(unit),), -torch.inf)
    best, unit = total.clone(), head.maths.rounded(unit)
    for _, centres, start in head.blocks(chosen, head.forward_block):
        total, best = head.block_forward(unit, centres, chosen.place, start, scale, bar, total, best)
    return total, best
