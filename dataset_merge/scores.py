"""Scores of pairs of identities: the cosine of their centres, less a share of what speaks for someone else.

An identity has at most one counterpart in another set that holds its identities apart. So the most similar of all
others there shows how high impostors score against this very identity, and is held against the pair (the idea of
Lowe's ratio test, and of score normalisation with the nearest impostors as cohort).
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset_merge.grouping import Pairs
from dataset_merge.matching import TopMatches
from utils.arrays import distinct

# Share of the nearest competitor's cosine that is taken off a pair's; found on people of LFW that no result is quoted
# for, see docs/merging_threshold.md.
RIVAL_WEIGHT = 0.5

# Pairs whose cosines are computed at once: 24 x D bytes each.
_CHUNK = 1 << 12


def score_pairs(
    first: Tensor, second: Tensor | None, matches: tuple[TopMatches, TopMatches], rival_weight: float
) -> Pairs:
    """The pairs in `matches`, each once, between `first` [N, D] and `second` [M, D] (None: within the first).

    Score: cosine - rival_weight x max(0, the highest cosine that either one has in the other's set, but for the pair
    itself). Cosines are computed anew, in float64 and the same for (a, b) as for (b, a), so that neither blocks nor the
    order of the sets show in them.
    """
    width = len(first if second is None else second)
    rows, columns = (_entries(kept) for kept in matches)
    if second is None:  # both results are the same
        low, high = np.minimum(*rows), np.maximum(*rows)
    else:
        low, high = (np.concatenate(side) for side in zip(rows, columns[::-1], strict=True))
    i, j = np.divmod(distinct(low * width + high), width)
    cosine = pair_cosines(first, first if second is None else second, i, j)
    score = cosine - rival_weight * _rivals(i, j, cosine, second is None) if rival_weight else cosine.copy()
    return Pairs(i, j, cosine, score)


def _entries(matches: TopMatches) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Row and column of each match there is."""
    index = matches.index.cpu().numpy()
    rows, places = np.nonzero(index >= 0)
    return rows, index[rows, places]


def pair_cosines(first: Tensor, second: Tensor, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
    """The cosine of each of the rows `i` of `first` with the row of `second` at the same place in `j`, float64."""
    cosine = np.empty(len(i))
    for start in range(0, len(i), _CHUNK):
        part = slice(start, start + _CHUNK)
        products = first[torch.from_numpy(i[part]).to(first.device)].double()
        products *= second[torch.from_numpy(j[part]).to(second.device)]
        cosine[part] = products.sum(1).cpu().numpy()
    return cosine


def _rivals(
    i: NDArray[np.int64], j: NDArray[np.int64], cosine: NDArray[np.float64], within: bool
) -> NDArray[np.float64]:
    """Of each pair the highest cosine, 0 or more, of another pair that one of the two is in."""
    if within:  # either one can stand on either side
        sides = [(np.concatenate([i, j]), np.concatenate([cosine, cosine]))] * 2
    else:
        sides = [(i, cosine), (j, cosine)]
    rival = np.zeros(len(i))
    for own, (ids, values) in zip((i, j), sides, strict=True):
        best = np.zeros((2, int(max(ids.max(initial=-1), own.max(initial=-1))) + 1))
        order = np.lexsort((-values, ids))
        ids, values = ids[order], values[order]
        place = np.arange(len(ids)) - np.searchsorted(ids, ids)  # of each among those of its identity
        for rank in (0, 1):
            chosen = place == rank
            best[rank, ids[chosen]] = values[chosen]
        # A pair that is its identity's best competes with the second best, any other one with the best.
        is_best = cosine >= best[0, own]
        rival = np.maximum(rival, np.where(is_best, best[1, own], best[0, own]))
    return rival
