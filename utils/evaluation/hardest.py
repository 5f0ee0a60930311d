"""The pairs that a model errs on most: the most alike of two people, and the least alike of one."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_BLOCK = 2048


class HardPairs(NamedTuple):
    """Pairs of images, hardest first. pairs: int64 [K, 2], positions of images. scores: float64 [K], cosines."""

    pairs: NDArray[np.int64]
    scores: NDArray[np.float64]


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
        found.append(HardPairs(index[hardest], cosines[hardest]))
    return found[0], found[1]


@torch.no_grad()
def hardest_of_all(embeddings: Tensor, labels: Tensor, count: int, block: int = _BLOCK) -> tuple[HardPairs, HardPairs]:
    """The same of all pairs of a set: embeddings float32 [N, D], unit rows; labels int64 [N].

    One pass over the pairs in blocks, on the device of the embeddings; memory is that of a few blocks.
    """
    kept = [_Hardest(count, largest=True), _Hardest(count, largest=False)]
    for row, column, scores, genuine, wanted in _blocks(embeddings, labels.to(embeddings.device), block):
        kept[0].add(scores.masked_fill(genuine | ~wanted, -torch.inf), row, column)
        if bool((genuine & wanted).any()):
            kept[1].add(scores.masked_fill(~(genuine & wanted), torch.inf), row, column)
    return kept[0].result(), kept[1].result()


def _blocks(vectors: Tensor, labels: Tensor, block: int) -> Iterator[tuple[int, int, Tensor, Tensor, Tensor]]:
    """(first row, first column, scores, of one person, above the diagonal) of each block of the upper triangle."""
    for row in range(0, len(vectors), block):
        for column in range(row, len(vectors), block):
            scores = vectors[row : row + block] @ vectors[column : column + block].T
            genuine = labels[row : row + block, None] == labels[None, column : column + block]
            wanted = torch.ones_like(genuine)
            yield row, column, scores, genuine, wanted.triu_(1) if row == column else wanted


class _Hardest:
    """The `count` most extreme scores of those added, with their places."""

    def __init__(self, count: int, largest: bool) -> None:
        self._count, self._largest = count, largest
        self._scores, self._pairs = np.empty(0), np.empty((0, 2), np.int64)

    def add(self, scores: Tensor, row: int, column: int) -> None:
        flat = scores.flatten()
        values, places = flat.topk(min(self._count, len(flat)), largest=self._largest)
        values, places = values[values.isfinite()], places[values.isfinite()]
        rows = torch.div(places, scores.shape[1], rounding_mode="floor") + row
        pairs = torch.stack((rows, places % scores.shape[1] + column), 1).cpu().numpy()
        found = np.concatenate([self._scores, values.double().cpu().numpy()])
        self._pairs = np.concatenate([self._pairs, pairs])
        order = np.argsort(-found if self._largest else found, kind="stable")[: self._count]
        self._scores, self._pairs = found[order], self._pairs[order]

    def result(self) -> HardPairs:
        return HardPairs(self._pairs, self._scores)
