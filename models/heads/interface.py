"""What every head is: class centres, the optimizer state that goes with them, and a margin softmax over them."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.heads.classes import initial_centres
from models.heads.row_optimizers import RowOptimizer
from models.losses import MarginLoss, Targets


class HeadOutput(NamedTuple):
    """Of all ranks' faces together.

    `loss`: scalar, the mean over the faces that count; `correct`: scalar, their accuracy, 0..1 (faces nearest to their
    own centre, margin aside); `own`: [faces], the products with their own centre (cosines, but for the plain softmax),
    NaN for faces that do not count. Only the loss has a gradient.
    """

    loss: Tensor
    correct: Tensor
    own: Tensor


class Head(nn.Module):
    """Class centres and the loss over them.

    `weight`: float32 [classes held * sub_centers, embedding_size], class after class. `held`: the classes of this rank.
    A head updates its centres itself: set `lr`, then `forward`, `backward` on the loss, and `update`. The optimizer's
    state and the loss's statistics are buffers, so that `state_dict` has all there is to save.
    """

    def __init__(
        self,
        loss: MarginLoss,
        classes: int,
        held: range,
        embedding_size: int,
        optimizer: RowOptimizer,
        sub_centers: int,
        seed: int,
        centres: Tensor | None,
    ) -> None:
        """`centres`: the initial ones; None: drawn from `seed`."""
        super().__init__()
        if classes < 2:
            raise ValueError(f"a margin softmax needs two classes or more, got {classes}")
        wanted = [len(held) * sub_centers, embedding_size]
        if centres is not None and list(centres.shape) != wanted:
            raise ValueError(f"centres: expected {wanted}, got {list(centres.shape)}")
        self.loss, self.classes, self.held = loss, classes, held
        self.optimizer, self.sub_centers = optimizer, sub_centers
        self.lr = 0.0  # learning rate of the coming step, as in an optimizer's param_groups
        self.batch_size = 0  # faces of one rank in the coming pass at most, where ranks have to agree about it
        self.fused = False  # whether `backward` may update the centres at once, `update` finding nothing left to do
        if centres is None:
            centres = initial_centres(held, sub_centers, embedding_size, seed)
        self.weight = nn.Parameter(centres)
        for name in optimizer.states:
            self.register_buffer(name, torch.zeros_like(centres))

    def optimizer_states(self) -> list[Tensor]:
        """The optimizer's state: tensors of the weight's shape."""
        return [self.get_buffer(name) for name in self.optimizer.states]

    def optimizer_factors(self, step: int) -> list[Tensor]:
        """What the optimizer has to know of `step`, as scalars on the device, which the host does not wait for."""
        return [self.weight.new_full((), value) for value in self.optimizer.factors(self.lr, step + 1)]

    def forward(self, embeddings: Tensor, labels: Tensor, step: int) -> HeadOutput:
        """`embeddings`: [B, embedding_size], any length; `labels`: int64 [B], -1 for faces that do not count;
        `step`: of the run, from 0; whatever is random depends on it. A label beyond the classes makes the loss NaN."""
        raise NotImplementedError

    def update(self, step: int) -> None:
        """Apply the gradients that `backward` left to the centres, at the rate `lr`, and forget them."""
        raise NotImplementedError

    def forget_gradient(self) -> None:
        """Drop what `update` would apply."""
        self.weight.grad = None


class _Silence(torch.autograd.Function):
    """Rows that are not finite become zeros; the gradient of such a row is NaN."""

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, finite: Tensor) -> Tensor:
        ctx.save_for_backward(finite)
        return torch.where(finite[:, None], embeddings, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (finite,) = ctx.saved_tensors
        return torch.where(finite[:, None], gradients[0], torch.nan), None


def silence_broken(embeddings: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """(embeddings with zeros, labels with -1, for rows whose length is not finite or whose label is none of the
    `classes`; which rows are good, bool [B]).

    An overflow in the network must not reach the class centres, which would never recover from it. It shows in the
    network's own gradient, NaN, so that a gradient scaler skips the step, and in the loss, which `mean_loss` makes NaN.
    """
    finite = torch.linalg.vector_norm(embeddings.detach(), dim=1).isfinite() & (labels < classes)
    return _Silence.apply(embeddings, finite), torch.where(finite, labels, -1), finite


def mean_loss(
    targets: Targets, log_others: Tensor, own: Tensor, best: Tensor, counted: Tensor, finite: Tensor
) -> HeadOutput:
    """Mean softmax cross-entropy over the faces that are `counted`, with the loss's penalty.

    [B] each: `log_others`, the log sum exp of the other classes' logits; `own` and `best`, the product with the own
    centre and the largest with another; `counted` and `finite`, bool: a face that is not finite makes the loss NaN.
    """
    # -log(e^own / (e^own + e^others)) = log(1 + e^(others - own))
    losses = torch.where(counted, F.softplus(log_others - targets.logits), 0)
    count = counted.sum().clamp_min(1)
    loss = losses.sum() / count
    if targets.penalty is not None:
        loss = loss + targets.penalty
    loss = torch.where(finite.all(), loss, torch.nan)
    own = own.detach()
    correct = ((own >= best) & counted).sum() / count
    return HeadOutput(loss, correct, torch.where(counted, own, torch.nan))
