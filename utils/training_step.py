"""One optimizer step, whatever the batch takes: several forward and backward passes, several ranks, any precision."""

from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from models.heads import Head
from utils.optimizers import set_learning_rate
from utils.ranks import Ranks


class StepOutput(NamedTuple):
    """What a step saw, on the device, without gradient.

    Scalars over all ranks' faces: `loss`, `correct` (share of faces nearest to their own centre) and `gradient_norm`
    (of the network, before clipping). `norms`: lengths of this rank's embeddings; `own`: cosines of faces with their
    own centres, NaN for faces that do not count.
    """

    loss: Tensor
    correct: Tensor
    gradient_norm: Tensor
    norms: Tensor
    own: Tensor


class TrainingStep:
    """Forward, backward and update of a network and its head. Nothing in it waits for the device.

    `network`: float [B, 3, H, W] to embeddings [B, D]; wrapped in DistributedDataParallel where there are several
    ranks. `precision`: what the network computes in; float32 is no autocast. `gradient_clip`: largest norm of the
    network's gradient; the head's is left alone, as published. `micro_batch`: faces of this rank in a forward pass at
    most; a batch of more goes through in equal parts whose gradients are those of the whole batch (batch norm sees the
    parts), and ranks exchange gradients once.
    """

    def __init__(
        self,
        network: nn.Module,
        head: Head,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        precision: torch.dtype,
        gradient_clip: float,
        micro_batch: int,
        ranks: Ranks,
    ) -> None:
        self.network, self.head, self.optimizer, self.scaler = network, head, optimizer, scaler
        self.precision, self.gradient_clip, self.micro_batch, self.ranks = precision, gradient_clip, micro_batch, ranks

    def __call__(self, inputs: Tensor, labels: Tensor, step: int, lr: float) -> StepOutput:
        """`inputs`: float [B, 3, H, W], this rank's; `labels`: int64 [B], -1 for faces that do not count; `lr`: the
        learning rate of this step."""
        self.head.lr = lr
        set_learning_rate(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=True)
        parts_in = self._parts(inputs, labels)
        self.head.fused = len(parts_in) == 1
        parts = [self._pass(*part, step) for part in parts_in]
        self.head.update(step)
        self.scaler.unscale_(self.optimizer)
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradient_norm = clip_grad_norm_(learning, self.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepOutput(
            torch.stack([part.loss for part in parts]).sum(),
            torch.stack([part.correct for part in parts]).sum(),
            gradient_norm,
            torch.cat([part.norms for part in parts]),
            torch.cat([part.own for part in parts]),
        )

    def _parts(self, inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor, bool]]:
        """Inputs, labels, share of the batch's faces that count, and whether it is the last: of each part."""
        number = -(-len(labels) // self.micro_batch)
        size = -(-len(labels) // number)
        by_part = labels.split(size)
        counts = torch.stack([(part >= 0).sum() for part in by_part]).float()
        shares = self.ranks.sum(counts)
        shares = shares / shares.sum().clamp_min(1)
        last = len(by_part) - 1
        return [
            (*part, i == last) for i, part in enumerate(zip(inputs.split(size), by_part, shares.unbind(), strict=True))
        ]

    def _pass(self, inputs: Tensor, labels: Tensor, share: Tensor, last: bool, step: int) -> StepOutput:
        """Forward and backward of a part; gradients add up."""
        gather_later = isinstance(self.network, DistributedDataParallel) and not last
        with self.network.no_sync() if gather_later else nullcontext():  # type: ignore[operator]
            with torch.autocast(inputs.device.type, self.precision, enabled=self.precision != torch.float32):
                embeddings = self.network(inputs).float()
            # The head needs no loss scaling: the scale is put on what the network gets back from it. Ranks average the
            # network's gradients, which have to be summed.
            embeddings.register_hook(lambda gradient: self.scaler.scale(gradient * self.ranks.size))
            output = self.head(embeddings, labels, step)
            (output.loss * share).backward()
        norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
        return StepOutput(output.loss.detach() * share, output.correct * share, share, norms, output.own)
