"""The pairs that a model errs on most: the most alike of two people, and the least alike of one."""

import json
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.devices import full_precision
from utils.evaluation.pair_blocks import Block, PairBlocks
from utils.ranks import Ranks


class HardPairs(NamedTuple):
    """Pairs of images, hardest first. pairs: int64 [K, 2], positions of images. scores: float64 [K], cosines. numbers:
    int64 [K], of the pairs in their list, from 0; None for pairs of a set."""

    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]
    numbers: NDArray[np.int64] | None = None


def hardest_of_pairs(
    scores: NDArray[np.floating], same: NDArray[np.bool_], index: NDArray[np.int64], count: int
) -> tuple[HardPairs, HardPairs]:
    """(impostor pairs of the highest scores, genuine pairs of the lowest) of a list of pairs, `count` at most.

    scores [P], same bool [P], index int64 [P, 2]: the images of each pair.
    """
    cosines = np.asarray(scores, np.float64)
    found = []
    for chosen, order in ((np.flatnonzero(~same), -cosines), (np.flatnonzero(same), cosines)):
        hardest = chosen[np.argsort(order[chosen], kind="stable")[:count]]
        found.append(HardPairs(index[hardest], cosines[hardest], hardest))
    return found[0], found[1]


def hardest_of_all(
    embeddings: Tensor,
    labels: Tensor,
    count: int,
    block: int = 0,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> tuple[HardPairs, HardPairs]:
    """The same of all pairs of a set; takes a pass over them.

    embeddings, labels, block, progress, ranks: as for `all_pairs`; every rank gets the pairs of all.
    """
    ranks = ranks or Ranks()
    if count == 0:
        nothing = HardPairs(np.empty((0, 2), np.int64), np.empty(0))
        return nothing, nothing
    with full_precision(embeddings.device):
        blocks = PairBlocks(embeddings, labels, block, ranks, progress)
        kept = [(_Hardest(count, largest=True), _Hardest(count, largest=False)) for _ in range(blocks.threads)]

        def add(pairs: Block, thread: int) -> None:
            impostors, genuine = kept[thread]
            if not pairs.mixed:
                impostors.add(pairs.scores, pairs)
                return
            is_genuine, is_impostor = blocks.masks(pairs)
            impostors.add(pairs.scores.masked_fill(~is_impostor, -torch.inf), pairs)
            genuine.add(pairs.scores.masked_fill(~is_genuine, torch.inf), pairs)

        blocks.each(add, "all pairs, the hardest")
    found = _Hardest(count, largest=True), _Hardest(count, largest=False)
    for whole, of_threads in zip(found, zip(*kept, strict=True), strict=True):
        for one in of_threads:
            whole.take(one.scores, one.pairs)
        for text in ranks.texts(json.dumps([whole.scores.tolist(), whole.pairs.tolist()])):
            scores, pairs = json.loads(text)
            whole.take(np.array(scores, np.float64), np.array(pairs, np.int64).reshape(-1, 2))
    order = blocks.order.cpu().numpy()
    impostors, genuine = (HardPairs(np.sort(order[one.pairs], axis=1), one.scores) for one in found)
    return impostors, genuine


class _Hardest:
    """The `count` most extreme scores of those added, as far as they are finite; float64 [K], hardest first.

    pairs: int64 [K, 2], rows of `PairBlocks.vectors`. It does not matter in what order what is added.
    """

    def __init__(self, count: int, largest: bool) -> None:
        self._count, self._largest = count, largest
        self.scores, self.pairs = np.empty(0), np.empty((0, 2), np.int64)

    def add(self, scores: Tensor, block: Block) -> None:
        """Take in what counts of a block's scores, [rows, columns]."""
        most = float(scores.amax() if self._largest else scores.amin())
        if len(self.scores) == self._count and (most < self.scores[-1] if self._largest else most > self.scores[-1]):
            return
        values, places = scores.flatten().topk(min(self._count, scores.numel()), largest=self._largest)
        values, places = values[values.isfinite()], places[values.isfinite()]
        rows = torch.div(places, scores.shape[1], rounding_mode="floor") + block.rows.start
        pairs = torch.stack((rows, places % scores.shape[1] + block.columns.start), 1)
        self.take(values.double().cpu().numpy(), pairs.cpu().numpy())

    def take(self, scores: NDArray[np.float64], pairs: NDArray[np.int64]) -> None:
        """Take in a list of pairs; one that is there already is not taken twice."""
        scores, pairs = np.concatenate([self.scores, scores]), np.concatenate([self.pairs, pairs])
        _, once = np.unique(pairs, axis=0, return_index=True)
        scores, pairs = scores[once], pairs[once]
        order = np.argsort(-scores if self._largest else scores, kind="stable")[: self._count]
        self.scores, self.pairs = scores[order], pairs[order]
