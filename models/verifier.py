"""Accuracy on verification sets during training."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from data.verification_bin import VerificationPairs
from models.embedders import NetworkEmbedder
from models.embedding import check_pairs, verify
from utils.evaluation.folds import FoldResult
from utils.ranks import Ranks


class Verifier:
    """The 10-fold protocol on several sets, shared by the ranks. Its images are those of `image_size`, pixels.

    `precision`: what the network computes in; the training's own is several times faster than the float32 of quoted
    accuracies, and hardly differs. Raises ValueError, naming the set, for one that the protocol cannot be run on.
    """

    def __init__(
        self,
        sets: Sequence[VerificationPairs],
        image_size: int,
        device: torch.device,
        precision: torch.dtype,
        batch_size: int,
        workers: int,
        mirror: bool,
        ranks: Ranks,
    ) -> None:
        for pairs in sets:
            check_pairs(pairs, image_size)
        self.sets, self._image_size, self._device, self._precision = sets, image_size, device, precision
        self._batch_size, self._workers, self._mirror, self._ranks = batch_size, workers, mirror, ranks

    def __call__(self, network: nn.Module, poll: Callable[[], None] | None = None) -> dict[str, FoldResult]:
        """What `network`, put into eval mode, reaches on each set; the same on all ranks.

        `poll` is called before every batch, equally often on all ranks; an error of it ends the verification.
        The first rank's statistics of norms hold for all. Raises ValueError, naming the set, for embeddings that are
        not finite.
        """
        network.eval()
        for buffer in network.buffers():
            self._ranks.broadcast(buffer)
        embedder = NetworkEmbedder(network, self._image_size, self._device, "training", self._precision)
        options = (self._batch_size, self._workers, self._mirror, self._ranks, poll)
        results = verify(embedder, self.sets, *options)
        return {pairs.name: result for pairs, result in zip(self.sets, results, strict=True)}
