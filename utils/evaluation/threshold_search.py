"""The exact scores at given ranks among all impostor pairs of a set, which are too many to keep or to sort.

A threshold is found by radix selection: count the scores into bins, see which bin holds the wanted rank, and count the
scores of that bin into finer bins, until a bin is one float32 value. The first count has uniform bins (which EER, AUC
and plots need); the finer ones divide the order of the float32 values themselves, so nothing is rounded and ties need
no special care.

All scores are computed once. A sample of pairs says beforehand about where the thresholds will be; the scores there are
kept, a few millions at most, and the finer counts run over these. Where the sample misses, or more scores lie there
than are kept, the thresholds take further passes over all pairs: the result is the same.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.evaluation.pair_blocks import PairBlocks
from utils.ranks import Ranks

# Bins of the first count over [-1, 1]. Their width is a power of two, so that a score's bin is computed without
# rounding and every bin's edge is a float32 value.
BINS = 1 << 16
_BINS_PER_UNIT = BINS // 2
# Bins of the later counts.
_FINE_BINS = 1 << 14
# Scores of either kind that are kept, at most.
_KEPT = 1 << 22
# Images of the sample that are compared with each other.
_SAMPLE_ROWS = 32


def promising(blocks: PairBlocks, far: Sequence[float], impostor: int) -> list[tuple[float, float]]:
    """Ranges of scores, low <= score < high, disjoint and from edge to edge of bins, that thresholds probably lie in.

    By the quantiles of a sample: random images, each compared with `_SAMPLE_ROWS` others. The margin is six times the
    sampling error of single pairs, and a twentieth for images that are alike to many.
    """
    images = len(blocks.vectors)
    if images * (images - 1) // 2 <= _KEPT:
        return [(-np.inf, np.inf)]
    groups = min(images, 1 << 16) // _SAMPLE_ROWS
    chosen = torch.randperm(images, generator=torch.Generator().manual_seed(0))[: groups * _SAMPLE_ROWS]
    chosen = chosen.to(blocks.vectors.device)
    vectors = blocks.vectors[chosen].view(groups, _SAMPLE_ROWS, -1)
    people = blocks.labels[chosen].view(groups, _SAMPLE_ROWS)
    others = (people[:, :, None] != people[:, None, :]).triu_(diagonal=1)
    sample = (vectors @ vectors.mT)[others].sort(descending=True).values
    if not len(sample):
        return []
    quantiles = blocks.ranks.broadcast(sample.clone()).tolist()  # other devices may round otherwise
    ranges: list[tuple[float, float]] = []
    room = 0.75 * _KEPT
    for rate in sorted(far):
        rank = rate * len(sample)
        margin = 6 * np.sqrt(rank) + 0.05 * rank + 10
        above, below = int(rank - margin), int(rank + margin)
        room -= (below - max(above, 0)) / len(sample) * impostor
        if room < 0:
            break
        high = _edge(quantiles[above], 1) if above >= 0 else np.inf
        low = _edge(quantiles[below], 0) if below < len(sample) else -np.inf
        if ranges and high >= ranges[-1][0]:
            high = ranges.pop()[1]
        ranges.append((low, high))
    return ranges


def _edge(score: float, up: int) -> float:
    """The edge of the score's bin below it, or with `up` 1 above it; infinite at the ends."""
    edge = float(np.floor(score * _BINS_PER_UNIT) + up) / _BINS_PER_UNIT
    return -np.inf if edge <= -1 else np.inf if edge >= 1 else edge


class KeptRange:
    """The genuine and the impostor scores with low <= score < high."""

    def __init__(self, low: float, high: float, device: torch.device) -> None:
        self.low, self.high, self.device = low, high, device
        # In one piece: many small ones, made between large tensors that come and go, would spread over the memory.
        self._scores = torch.empty(2, _KEPT, device=device)
        self._counts = [0, 0]

    def add(self, kind: int, scores: Tensor) -> None:
        """Append scores: kind 0 genuine, 1 impostor."""
        start = self._counts[kind]
        self._counts[kind] += len(scores)
        self._scores[kind, start : self._counts[kind]] = scores

    def covers(self, search: "Search") -> bool:
        """Whether the search's interval lies within the range."""
        return _key(self.low) <= search.low and search.high <= _key(self.high) - 1

    def visit(self, work: Callable[[Tensor, Tensor, int], None], title: str) -> None:
        """Call `work` once, with all genuine and all impostor scores."""
        genuine, impostor = (scores[:count] for scores, count in zip(self._scores, self._counts, strict=True))
        work(genuine, impostor, 0)


class KeptScores:
    """The scores within some disjoint ranges, as far as there is room."""

    def __init__(self, ranges: list[tuple[float, float]], device: torch.device) -> None:
        self._ranges = [KeptRange(low, high, device) for low, high in ranges]
        self._room = [_KEPT, _KEPT]
        self._lock = threading.Lock()

    @property
    def overflown(self) -> bool:
        """Whether there were more scores than room."""
        return min(self._room) < 0

    def add(self, genuine: Tensor, impostor: Tensor) -> None:
        """Keep what lies within the ranges; safe from several threads."""
        for kind, scores in enumerate((genuine, impostor)):
            if not len(scores):
                continue
            for kept in self._ranges:
                part = _between(scores, kept.low, kept.high)
                with self._lock:
                    self._room[kind] -= len(part)
                    if self.overflown:
                        return
                    kept.add(kind, part)

    def range_of(self, search: "Search") -> KeptRange | None:
        """The range that has all scores of the search's interval."""
        return next((kept for kept in self._ranges if kept.covers(search)), None)


def _between(scores: Tensor, low: float, high: float) -> Tensor:
    """Those of the scores with low <= score < high, in order, as a copy. low, high: float32 values."""
    if scores.device.type != "cpu":
        return scores[(scores >= low) & (scores < high)]
    values = scores.numpy()  # which compares and picks several times faster than torch
    inside = values >= low
    if high < np.inf:
        inside &= values < high
    return torch.from_numpy(values[np.flatnonzero(inside)])


def uniform_bins(scores: Tensor, bins: int) -> Tensor:
    """The bin of each score among `bins`, a power of two, over [-1, 1]: int32. What lies outside is in the outermost.

    Scaling by a power of two and flooring are exact, so the edges are too.
    """
    half = bins // 2
    return (scores * half).floor_().clamp_(-half, half - 1).add_(half).int()


@dataclass(frozen=True)
class Search:
    """The search for one threshold, narrowed down to the scores whose keys are low..high (both included).

    rank: of the threshold's impostor within the interval, from 0 at the top.
    impostors: how many the interval holds.
    genuine_above: how many genuine scores are above the interval.
    """

    low: int
    high: int
    rank: int
    impostors: int
    genuine_above: int

    @property
    def step(self) -> int:
        """How many keys each of the finer bins spans."""
        return -(-(self.high - self.low + 1) // _FINE_BINS)


def first_search(genuine: NDArray[np.int64], impostor: NDArray[np.int64], rank: int) -> Search:
    """The uniform bin with the impostor of that rank. The outermost bins hold also what lies beyond them."""
    bin_, rank_inside = _locate(impostor, rank)
    low = -np.inf if bin_ == 0 else bin_ / _BINS_PER_UNIT - 1
    beyond = np.inf if bin_ == BINS - 1 else (bin_ + 1) / _BINS_PER_UNIT - 1
    return Search(_key(low), _key(beyond) - 1, rank_inside, int(impostor[bin_]), int(genuine[bin_ + 1 :].sum()))


def _locate(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of the item at a rank counted from the top, and its rank within that bin."""
    from_top = counts[::-1].cumsum()
    position = int(np.searchsorted(from_top, rank, side="right"))
    return len(counts) - 1 - position, rank - int(from_top[position] - counts[::-1][position])


def narrow_down(searches: Sequence[Search], kept: KeptScores, blocks: PairBlocks) -> list[Search]:
    """Each search down to a single score: over the scores that were kept where these are all of its interval, else in
    passes over all pairs.
    """
    found, whole = list(searches), not blocks.ranks.any(kept.overflown)
    sources: dict[PairBlocks | KeptRange, list[int]] = {}
    for number, search in enumerate(searches):
        sources.setdefault((kept.range_of(search) if whole else None) or blocks, []).append(number)
    for source, numbers in sources.items():
        done = _finish([searches[i] for i in numbers], source, blocks.ranks)
        for number, search in zip(numbers, done, strict=True):
            found[number] = search
    return found


def _finish(searches: list[Search], source: PairBlocks | KeptRange, ranks: Ranks) -> list[Search]:
    """Narrow each search, a pass over the scores of the source at a time, until it holds a single score."""
    while any(search.low < search.high for search in searches):
        counts = _fine_counts(searches, source, ranks)
        searches = [_narrowed(search, *count) for search, count in zip(searches, counts, strict=True)]
    return searches


def _fine_counts(searches: list[Search], source: PairBlocks | KeptRange, ranks: Ranks) -> NDArray[np.int64]:
    """A later count: genuine and impostor counts in the finer bins of each search, int64 [searches, 2, bins]."""
    device = source.vectors.device if isinstance(source, PairBlocks) else source.device
    counts = torch.zeros(len(searches), 2, _FINE_BINS, dtype=torch.int64, device=device)
    lowest = value_of(min(search.low for search in searches))
    lock = threading.Lock()

    def count(genuine: Tensor, impostor: Tensor, thread: int) -> None:
        for kind, scores in enumerate((genuine, impostor)):
            keys = _keys(_between(scores, lowest, np.inf))  # few are left at the FARs that matter
            for search, total in zip(searches, counts[:, kind], strict=True):
                inside = keys[(keys >= search.low) & (keys <= search.high)]
                if len(inside):
                    found = torch.bincount((inside - search.low) // search.step, minlength=_FINE_BINS)
                    with lock:
                        total += found

    source.visit(count, "all pairs, thresholds")
    return ranks.sum(counts).cpu().numpy()


def _narrowed(search: Search, genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> Search:
    """The search within the finer bin that has its impostor."""
    if impostor.sum() != search.impostors:
        raise RuntimeError("the device computed other scores in the second pass than in the first: no exact result")
    bin_, rank_inside = _locate(impostor, search.rank)
    low = search.low + bin_ * search.step
    return Search(
        low=low,
        high=min(low + search.step - 1, search.high),
        rank=rank_inside,
        impostors=int(impostor[bin_]),
        genuine_above=search.genuine_above + int(genuine[bin_ + 1 :].sum()),
    )


def _keys(scores: Tensor) -> Tensor:
    """int32 numbers in the order of the float32 scores, neighbouring scores having neighbouring keys.

    Positive floats are ordered like their bits, negative ones the other way round. Adding 0 turns -0 into 0.
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _key(score: float) -> int:
    return int(_keys(torch.tensor([score], dtype=torch.float32)))


def value_of(key: int) -> float:
    """The float32 score of a key."""
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(np.int32(bits).view(np.float32))
