"""One optimizer step, whatever the batch takes: several forward and backward passes, several ranks, any precision."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from models.heads import Head, HeadOutput
from utils.devices import autocast
from utils.ranks import Ranks
from utils.training.optimizers import set_learning_rate

#: What to do when memory runs out in the head. Smaller passes would not help.
_LET_IT_TAKE_ONE = (
    "A batch of several passes keeps the gradient of the class centres, {:.2g} GiB: let it take one "
    "(train.activation_checkpointing, a lower train.batch_size), or spread the centres over more cards"
)


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
    most; a batch of more goes through in parts as equal as can be, whose gradients add up to those of the whole batch
    (batch norm sees the parts; random margins are each part's own, and of sampled classes those of its faces), and
    ranks, which have equally many faces, exchange gradients once. `shrinking`: what to tell (a line for people) when
    memory runs out, be it in a backward pass, and `micro_batch` is halved for the batch to be tried again; None: that
    is an error.
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
        shrinking: Callable[[str], object] | None = None,
    ) -> None:
        self.network, self.head, self.optimizer, self.scaler = network, head, optimizer, scaler
        self.precision, self.gradient_clip, self.micro_batch, self.ranks = precision, gradient_clip, micro_batch, ranks
        self.shrinking = shrinking

    def __call__(self, inputs: Tensor, labels: Tensor, step: int, lr: float) -> StepOutput:
        """`inputs`: float [B, 3, H, W], this rank's; `labels`: int64 [B], -1 for faces that do not count; `lr`: the
        learning rate of this step.

        Raises torch.OutOfMemoryError, after which the weights may be those of half a step; its note says what to do
        where that is special.
        """
        self.head.lr = lr
        set_learning_rate(self.optimizer, lr)
        parts = self._passes(inputs, labels, step)
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

    def _passes(self, inputs: Tensor, labels: Tensor, step: int) -> list[StepOutput]:
        """Forward and backward of all parts; again, in smaller ones, if memory runs out.

        That is without harm as long as no centre has its update. Statistics of the network's norms may then have seen
        faces twice. Several ranks do not try: the others would wait for the gradients of the one that does.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            parts = self._parts(inputs, labels)
            self.head.fused = len(parts) == 1
            centres = self._centre_versions()
            statistics = {name: value.clone() for name, value in self.head.loss.named_buffers()}
            try:
                return [self._pass(*part, step, number, len(parts)) for number, part in enumerate(parts)]
            except torch.OutOfMemoryError:
                largest = len(parts[0][1])
                if self._centre_versions() != centres or not self._can_shrink(len(labels), largest):
                    raise
            # Outside of the handler, which keeps the failed pass alive.
            self.head.forget_gradient()
            for name, value in self.head.loss.named_buffers():
                value.copy_(statistics[name])
            self._shrink(largest)

    def half_a_pass(self, faces: int) -> int:
        """Half of what the passes of a batch of `faces`, this rank's, have; 0 if batch norm could not train on that."""
        half = _half(-(-faces // -(-faces // self.micro_batch)))
        return half if _enough(faces, half) else 0

    def _can_shrink(self, faces: int, largest: int) -> bool:
        """Whether `faces`, in passes of `largest`, may go in passes half as large."""
        return self.shrinking is not None and self.ranks.size == 1 and _enough(faces, _half(largest))

    def _shrink(self, largest: int) -> None:
        """Halve the passes, of which the largest did not fit, and say so."""
        assert self.shrinking is not None  # by `_can_shrink`
        self.micro_batch = _half(largest)
        torch.cuda.empty_cache()
        self.shrinking(
            f"out of memory with {largest:,} faces in a pass: on with {self.micro_batch:,} (train.micro_batch)"
        )

    def _centre_versions(self) -> list[int]:
        """How often the centres and each tensor of their optimizer were written to."""
        return [tensor._version for tensor in (self.head.weight, *self.head.optimizer_states())]

    def _parts(self, inputs: Tensor, labels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Inputs, labels, and share of the batch's faces that count: of each part."""
        number = -(-len(labels) // self.micro_batch)
        by_part = labels.tensor_split(number)
        counts = torch.stack([(part >= 0).sum() for part in by_part]).float()
        shares = self.ranks.sum(counts)
        shares = shares / shares.sum().clamp_min(1)
        return list(zip(inputs.tensor_split(number), by_part, shares.unbind(), strict=True))

    def _pass(self, inputs: Tensor, labels: Tensor, share: Tensor, step: int, number: int, parts: int) -> StepOutput:
        """Forward and backward of a part; gradients add up."""
        gather_later = isinstance(self.network, DistributedDataParallel) and number < parts - 1
        self.head.batch_size = len(labels)  # as on every other rank
        self.head.loss.part, self.head.loss.parts = number, parts
        with self.network.no_sync() if gather_later else nullcontext():  # type: ignore[operator]
            embeddings = self._embed(inputs)
            output, gradient = self._head_pass(embeddings.detach(), labels, share, step)
            # The head needs no loss scaling: the scale is put on what the network gets back from it. Ranks average the
            # network's gradients, which have to be summed.
            gradient = self.scaler.scale(gradient * self.ranks.size)
            norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
            try:
                embeddings.backward(gradient)
                fits = True
            except torch.OutOfMemoryError:
                fits = False
                if parts > 1 or not self._can_shrink(len(labels), len(labels)):
                    raise
        del embeddings
        if not fits:
            self._network_in_parts(inputs, gradient)
        return StepOutput(output.loss.detach() * share, output.correct * share, share, norms, output.own)

    def _head_pass(self, embeddings: Tensor, labels: Tensor, share: Tensor, step: int) -> tuple[HeadOutput, Tensor]:
        """The head's forward and backward pass: (its output, the gradient of the embeddings)."""
        embeddings.requires_grad_()
        try:
            output = self.head(embeddings, labels, step)
            (output.loss * share).backward()
        except torch.OutOfMemoryError as error:
            if not self.head.fused:
                error.add_note(_LET_IT_TAKE_ONE.format(self.head.weight.nbytes / 2**30))
            raise
        assert embeddings.grad is not None
        return output, embeddings.grad

    def _embed(self, inputs: Tensor) -> Tensor:
        with autocast(inputs.device, self.precision):
            return self.network(inputs).float()

    def _network_in_parts(self, inputs: Tensor, gradient: Tensor) -> None:
        """The network's gradient from that of the embeddings, in smaller passes, after its backward pass of the whole
        did not fit. The head, whose centres may have their update by then, has done its part."""
        largest = len(inputs)
        while True:
            self._shrink(largest)
            number = -(-len(inputs) // self.micro_batch)
            parts = list(zip(inputs.tensor_split(number), gradient.tensor_split(number), strict=True))
            self.optimizer.zero_grad(set_to_none=True)
            try:
                for part, its_gradient in parts:
                    self._embed(part).backward(its_gradient)
                return
            except torch.OutOfMemoryError:
                largest = len(parts[0][0])
                if not self._can_shrink(len(inputs), largest):
                    raise


def _half(faces: int) -> int:
    return -(-faces // 2)


def _enough(faces: int, most: int) -> bool:
    """Whether each pass of `faces`, `most` at a time and as equal as can be, has the two that batch norm needs."""
    return faces >= 2 * -(-faces // most)
