"""Score counts of the all-pairs test by identity, from which any drawing of identities can be measured.

If identity i is drawn m_i times, an impostor pair of i and j counts m_i m_j = m_i + m_j - 1 + (m_i - 1)(m_j - 1) times.
The sum of the first three terms needs only counts by identity and bin of scores. The last is added up pair by pair
for the highest impostor scores, where single pairs decide; below these its share of the variance is under a hundredth,
and it is left out. Genuine pairs count m_i times.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.devices import full_precision
from utils.evaluation.all_pairs import AllPairsResult
from utils.evaluation.curves import crossing
from utils.evaluation.pair_blocks import Block, PairBlocks
from utils.evaluation.threshold_search import uniform_bins
from utils.ranks import Ranks

# Impostor pairs, from the top, that are listed one by one.
_LISTED = 1 << 15
_BINS_PER_DECADE = 24
_QUANTILES = 64
_PEOPLE_AT_ONCE = 4096


@dataclass(frozen=True, eq=False)
class IdentityCounts:
    """Counts of scores. C identities, B bins, K listed impostor pairs.

    people: int64 [C], the identities' labels, ascending. edges: float64 [B + 1], rising, the outermost infinite.
    genuine: int64 [C, B], pairs of each identity. impostor: int64 [C, B], pairs with each identity on either side.
    listed: int64 [K, 3], the impostor pairs of highest score: both identities, 0..C-1, and the bin.
    """

    people: NDArray[np.int64]
    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    listed: NDArray[np.int64]

    def measures(self, times: NDArray[np.integer], far: Sequence[float]) -> NDArray[np.float64]:
        """AUC, EER and TAR at each FAR, float64 [R, 2 + rates], scores taken as spread evenly within the bins.

        times: integers [R, C], how many times each identity is drawn. NaN where that leaves no pairs of a kind.
        """
        bins = len(self.edges) - 1
        weights = times.astype(np.float64)
        genuine = _times(weights, self.genuine)
        impostor = _times(weights, self.impostor) - self.impostor.sum(axis=0) / 2
        first, second, place = self.listed.T
        for row, drawn in zip(impostor, weights - 1, strict=True):
            row += np.bincount(place, drawn[first] * drawn[second], bins)
        impostor = impostor.clip(min=0)
        accepted = [
            np.concatenate([np.zeros((len(times), 1)), counts[:, ::-1].cumsum(axis=1)], axis=1)
            for counts in (impostor, genuine)
        ]
        return np.array([_measures(false, true, far) for false, true in zip(*accepted, strict=True)])


def _times(weights: NDArray[np.float64], counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """weights [R, C] @ counts [C, B], which become float64 a part at a time: there are gigabytes of them."""
    product = np.zeros((len(weights), counts.shape[1]))
    for first in range(0, len(counts), _PEOPLE_AT_ONCE):
        people = slice(first, first + _PEOPLE_AT_ONCE)
        product += weights[:, people] @ counts[people].astype(np.float64)
    return product


def _measures(impostor: NDArray[np.float64], genuine: NDArray[np.float64], far: Sequence[float]) -> NDArray[np.float64]:
    """From pairs accepted at the edges, from the top edge down."""
    if impostor[-1] <= 0 or genuine[-1] <= 0:
        return np.full(2 + len(far), np.nan)
    false, true = impostor / impostor[-1], genuine / genuine[-1]
    return np.array([np.trapezoid(true, false), crossing(false, 1 - true), *np.interp(far, false, true)])


def identity_counts(
    embeddings: Tensor,
    labels: Tensor,
    result: AllPairsResult,
    block: int = 0,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> IdentityCounts:
    """Count the scores of all pairs by identity; takes a pass over them.

    embeddings, labels, block, progress, ranks: as for `all_pairs`, whose `result` says where to put the bins.
    Memory beside that of `all_pairs`: 16 bytes for each identity and bin (5 to 7 KiB an identity) and 3 MiB.
    """
    ranks = ranks or Ranks()
    places = _edges(result)
    begins = np.zeros(len(result.edges) - 1, np.int64)
    begins[places[1:-1]] = 1
    table = np.cumsum(begins)
    bins = len(places) - 1
    above = result.impostor_counts[::-1].cumsum()[::-1]
    few = [place for place in places[:-1] if above[place] <= _LISTED]
    lowest = int(table[few[0]]) if few else bins
    with torch.no_grad(), full_precision(embeddings.device):
        blocks = PairBlocks(embeddings, labels, block, ranks, progress)
        device, people = blocks.vectors.device, len(blocks.people)
        lookup = torch.from_numpy(table.astype(np.int32)).to(device)
        counts = torch.zeros(2, people, bins, dtype=torch.int64, device=device)
        # Made at once: small tensors that stay, made between the large ones of each block, keep the memory of those
        # from being used again, up to a gigabyte for every two thousand blocks.
        listed = torch.zeros(int(above[few[0]]) if few else 0, 3, dtype=torch.int64, device=device)
        used = 0
        lock = threading.Lock()

        def add(kind: int, who: Tensor, bin_: Tensor) -> None:
            first, last = int(who.min()), int(who.max()) + 1
            found = torch.bincount(((who - first) * bins + bin_).flatten(), minlength=(last - first) * bins)
            with lock:
                counts[kind, first:last] += found.view(last - first, bins)

        def count(pairs: Block, thread: int) -> None:
            nonlocal used
            bin_ = lookup[uniform_bins(pairs.scores, len(table))]
            rows, columns = blocks.labels[pairs.rows].int(), blocks.labels[pairs.columns].int()
            rows, columns = torch.broadcast_tensors(rows[:, None], columns[None, :])
            if pairs.mixed:
                genuine, impostor = blocks.masks(pairs)
                if genuine.any():
                    add(0, rows[genuine], bin_[genuine])
                rows, columns, bin_ = rows[impostor], columns[impostor], bin_[impostor]
                if not len(bin_):
                    return
            add(1, rows, bin_)
            add(1, columns, bin_)
            high = bin_ >= lowest
            if high.any():
                found = torch.stack([rows[high], columns[high], bin_[high]], dim=1)
                with lock:
                    listed[used : used + len(found)] = found
                    used += len(found)

        blocks.each(count, "all pairs, by identity")
        counts = ranks.sum(counts)
        whole = _gathered(listed[:used], ranks)
    genuine, impostor = counts.cpu().numpy()
    edges = result.edges[places]
    edges[[0, -1]] = -np.inf, np.inf
    return IdentityCounts(blocks.people.cpu().numpy().astype(np.int64), edges, genuine, impostor, whole)


def _edges(result: AllPairsResult) -> NDArray[np.int64]:
    """Edges of the result's histogram to use: so many to each decade of FAR, and to quantiles of either kind."""
    from_top = result.impostor_counts[::-1].cumsum()
    decades = np.log10(result.impostor)
    ranks = np.logspace(0, decades, int(decades * _BINS_PER_DECADE) + 2)
    places = [len(from_top) - np.searchsorted(from_top, ranks)]
    shares = np.arange(1, _QUANTILES) / _QUANTILES
    for counts in (result.genuine_counts, result.impostor_counts):
        places.append(np.searchsorted(counts.cumsum(), shares * counts.sum()))
    return np.unique(np.concatenate([*places, [0, len(from_top)]]).clip(0, len(from_top)))


def _gathered(mine: Tensor, ranks: Ranks) -> NDArray[np.int64]:
    """The rows of all ranks, int64 [K, 3], sorted."""
    sizes = torch.zeros(ranks.size, dtype=torch.int64, device=mine.device)
    sizes[ranks.rank] = len(mine)
    ends = ranks.sum(sizes).cumsum(0).tolist()
    whole = mine.new_zeros(ends[-1], 3)
    whole[ends[ranks.rank] - len(mine) : ends[ranks.rank]] = mine
    rows = ranks.sum(whole).cpu().numpy()
    return rows[np.lexsort(rows.T[::-1])]
