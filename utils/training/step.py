"""One optimizer step: forward, backward and update of the network and its head.

A batch that does not fit into memory goes through in several passes (micro-batches), whose gradients add up.
"""

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
from utils.training.micro_batch import can_train, part_sizes, passes_of
from utils.training.optimizers import set_learning_rate

#: What to do when memory runs out in the head. Smaller passes would not help.
_TAKE_ONE_PASS = (
    "A batch of several passes keeps the gradient of the class centres, {:.2g} GiB: let it take one "
    "(train.activation_checkpointing, a lower train.batch_size), or spread the centres over more cards"
)


class StepOutput(NamedTuple):
    """The numbers of a step, on the device, without gradient.

    Scalars over all ranks' faces: `loss`, `correct` (the accuracy, 0..1: faces nearest to their own centre) and
    `gradient_norm` (of the network, before clipping). `norms`: [B], the lengths of the embeddings of this rank's faces;
    `own`: [faces of all ranks], the cosines with their own centres, NaN for faces that do not count.
    """

    loss: Tensor
    correct: Tensor
    gradient_norm: Tensor
    norms: Tensor
    own: Tensor


class _MicroBatch(NamedTuple):
    """A part of the batch. `share`: scalar, its part of all faces of the batch (on all ranks) that count."""

    inputs: Tensor
    labels: Tensor
    share: Tensor


class TrainingStep:
    """Forward, backward and update of a network and its head. Nothing in it waits for the device.

    `network`: float [B, 3, H, W] to embeddings [B, D]; wrapped in DistributedDataParallel where there are several
    ranks. `precision`: what the network computes in; float32 is no autocast. `gradient_clip`: largest norm of the
    network's gradient; the head's is not clipped, as published.

    `micro_batch`: most faces of this rank in a pass. A larger batch is split as evenly as possible; ranks, which have
    equally many faces, exchange gradients once, in the last pass. Per pass are the statistics of batch norm, random
    margins, and sampled classes.

    `shrinking`: given a line for people when a pass, forward or backward, runs out of memory; `micro_batch` is then
    halved and the batch tried again. None: that is an error.
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

        Raises torch.OutOfMemoryError, after which the weights may be those of half a step; a note of the error says
        what to do, where smaller passes would not help.
        """
        self.head.lr = lr
        set_learning_rate(self.optimizer, lr)
        outputs, norms = zip(*self._forward_backward(inputs, labels, step), strict=True)
        self.head.update(step)
        self.scaler.unscale_(self.optimizer)
        learning = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        gradient_norm = clip_grad_norm_(learning, self.gradient_clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return StepOutput(
            torch.stack([output.loss for output in outputs]).sum(),
            torch.stack([output.correct for output in outputs]).sum(),
            gradient_norm,
            torch.cat(norms),
            torch.cat([output.own for output in outputs]),
        )

    def _forward_backward(self, inputs: Tensor, labels: Tensor, step: int) -> list[tuple[HeadOutput, Tensor]]:
        """The gradients of the batch, in network and head; returns the outputs of the passes (see `_pass`). When memory
        runs out, it is done again in smaller ones.

        Doing it again is harmless as long as no class centre was updated; batch norm may have counted faces twice.
        Several ranks do not try: the others would wait for the gradients of the one that does.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            parts = self._split(inputs, labels)
            self.head.fused = len(parts) == 1
            centres = self._centre_versions()
            statistics = {name: value.clone() for name, value in self.head.loss.named_buffers()}
            try:
                return [self._pass(part, step, index, len(parts)) for index, part in enumerate(parts)]
            except torch.OutOfMemoryError:
                largest = len(parts[0].labels)
                if self._centre_versions() != centres or not self._can_shrink(len(labels), largest):
                    raise
            # Outside of the handler, which keeps the failed pass alive.
            self.head.forget_gradient()
            for name, value in self.head.loss.named_buffers():
                value.copy_(statistics[name])
            self._shrink(largest)

    def _split(self, inputs: Tensor, labels: Tensor) -> list[_MicroBatch]:
        """The batch in as few micro-batches as `micro_batch` allows, the largest first."""
        passes = passes_of(len(labels), self.micro_batch)
        split_labels = labels.tensor_split(passes)
        counts = torch.stack([(part >= 0).sum() for part in split_labels]).float()
        shares = self.ranks.sum(counts)
        shares = shares / shares.sum().clamp_min(1)
        return list(map(_MicroBatch, inputs.tensor_split(passes), split_labels, shares.unbind()))

    def _pass(self, part: _MicroBatch, step: int, index: int, passes: int) -> tuple[HeadOutput, Tensor]:
        """Forward and backward of micro-batch `index`, which adds to the gradients: (the head's output, its loss and
        accuracy weighted by `share`; the lengths of the embeddings)."""
        gather_later = isinstance(self.network, DistributedDataParallel) and index < passes - 1
        self.head.batch_size = len(part.labels)  # as on every other rank
        self.head.loss.part, self.head.loss.parts = index, passes
        with self.network.no_sync() if gather_later else nullcontext():  # type: ignore[operator]
            embeddings = self._embed(part.inputs)
            output, gradient = self._head_pass(embeddings.detach(), part, step)
            # The head needs no loss scaling: the network's gradient alone is scaled. DistributedDataParallel averages
            # over ranks what has to be summed.
            gradient = self.scaler.scale(gradient * self.ranks.size)
            norms = torch.linalg.vector_norm(embeddings.detach(), dim=1)
            try:
                embeddings.backward(gradient)
                fits = True
            except torch.OutOfMemoryError:
                fits = False
                if passes > 1 or not self._can_shrink(len(part.labels), len(part.labels)):
                    raise
        del embeddings
        if not fits:
            self._backward_again(part.inputs, gradient)
        return HeadOutput(output.loss.detach() * part.share, output.correct * part.share, output.own), norms

    def _head_pass(self, embeddings: Tensor, part: _MicroBatch, step: int) -> tuple[HeadOutput, Tensor]:
        """The head's forward and backward pass: (its output, the gradient of the embeddings)."""
        embeddings.requires_grad_()
        try:
            output = self.head(embeddings, part.labels, step)
            (output.loss * part.share).backward()
        except torch.OutOfMemoryError as error:
            if not self.head.fused:
                error.add_note(_TAKE_ONE_PASS.format(self.head.weight.nbytes / 2**30))
            raise
        assert embeddings.grad is not None
        return output, embeddings.grad

    def _embed(self, inputs: Tensor) -> Tensor:
        with autocast(inputs.device, self.precision):
            return self.network(inputs).float()

    def _backward_again(self, inputs: Tensor, gradient: Tensor) -> None:
        """The network's gradient from that of the embeddings, [B, D], in smaller passes, after its backward pass of the
        whole batch ran out of memory. The head, which may have updated its centres by then, is done."""
        largest = len(inputs)
        while True:
            self._shrink(largest)
            passes = passes_of(len(inputs), self.micro_batch)
            parts = list(zip(inputs.tensor_split(passes), gradient.tensor_split(passes), strict=True))
            self.optimizer.zero_grad(set_to_none=True)
            try:
                for part, its_gradient in parts:
                    self._embed(part).backward(its_gradient)
                return
            except torch.OutOfMemoryError:
                largest = len(parts[0][0])
                if not self._can_shrink(len(inputs), largest):
                    raise

    def half_a_pass(self, faces: int) -> int:
        """Half of the micro-batch of a batch of `faces`, this rank's; 0 if that is too little for batch norm."""
        half = _half(part_sizes(faces, self.micro_batch)[0])
        return half if can_train(faces, half) else 0

    def _can_shrink(self, faces: int, largest: int) -> bool:
        """Whether `faces`, in passes of `largest`, may go in passes half as large."""
        return self.shrinking is not None and self.ranks.size == 1 and can_train(faces, _half(largest))

    def _shrink(self, largest: int) -> None:
        """Halve the micro-batch, after passes of `largest` faces did not fit, and say so."""
        assert self.shrinking is not None  # by `_can_shrink`
        self.micro_batch = _half(largest)
        torch.cuda.empty_cache()
        self.shrinking(
            f"out of memory with {largest:,} faces in a pass: on with {self.micro_batch:,} (train.micro_batch)"
        )

    def _centre_versions(self) -> list[int]:
        """How often the class centres and each tensor of their optimizer were written to."""
        return [tensor._version for tensor in (self.head.weight, *self.head.optimizer_states())]


def _half(faces: int) -> int:
    return -(-faces // 2)
