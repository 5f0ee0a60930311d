"""Accuracy on verification sets, all in one pass; during training as well."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from data.folds import FOLDS
from data.loading import DecodedFaces
from data.verification_bin import PairImages, VerificationPairs
from models.embedders import Embedder, NetworkEmbedder
from models.embedding import embed_images
from utils.evaluation.folds import FoldResult, ten_fold
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


def verify(
    embedder: Embedder,
    sets: Sequence[VerificationPairs],
    batch_size: int,
    workers: int,
    mirror: bool,
    ranks: Ranks | None = None,
    poll: Callable[[], None] | None = None,
) -> list[FoldResult]:
    """The 10-fold protocol on verification sets; every distinct image of a set is embedded once, by one of the `ranks`.

    All sets go through in one pass: workers start once, and one batch at most is not full. Memory: the embeddings of
    all of them. `poll`: as for `embed_images`.
    """
    if not sets:
        return []
    title = sets[0].name if len(sets) == 1 else f"{len(sets)} verification sets"
    embeddings = embed_images(embedder, PairImages(*sets), batch_size, workers, mirror, title, ranks, poll=poll)
    ends = np.cumsum([len(pairs.images) for pairs in sets])
    return [_accuracy(part, pairs) for part, pairs in zip(np.split(embeddings, ends[:-1]), sets, strict=True)]


def _accuracy(embeddings: np.ndarray, pairs: VerificationPairs) -> FoldResult:
    try:
        return ten_fold(embeddings[pairs.index.reshape(-1)], pairs.same)
    except ValueError as error:
        raise ValueError(f"{pairs.name}: {error}") from None


def check_pairs(pairs: VerificationPairs, image_size: int) -> None:
    """Raise ValueError, naming the set, unless the protocol can be run on it: 10 pairs or more, and images that decode.

    Called before training: a set that fails should not fail after an epoch.
    """
    if len(pairs.same) < FOLDS:
        raise ValueError(f"{pairs.name}: {len(pairs.same)} pairs cannot make {FOLDS} folds")
    faces = DecodedFaces(PairImages(pairs), np.zeros(len(pairs.images), np.int64), image_size)
    for i in range(len(faces)):
        faces.__getitems__([i])
