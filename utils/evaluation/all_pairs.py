"""The all-pairs test: every image of a set against every other, and the exact TAR at given FARs.

Ten folds of a few thousand pairs say little once a model is right on 99.8 % of them. All pairs of the same images are
thousands of times as many, enough to measure false accept rates (FAR) of 1e-6, where recognition systems work. The
measures are those of ISO/IEC 19795-1: the true accept rate (TAR) is the share of genuine pairs (one person) accepted
at a threshold that lets through the share FAR of the impostor pairs (two persons).

Scores are cosine similarities in float32. There are far too many of them to keep or to sort, so the threshold is found
by radix selection: count the scores into bins, see which bin holds the wanted rank, and count the scores of that bin
into finer bins, until a bin is one float32 value. The first count has uniform bins (which EER, AUC and plots need); the
finer ones divide the order of the float32 values themselves, so nothing is rounded and ties need no special care.

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

from utils.devices import full_precision
from utils.evaluation.curves import FAR_POINTS, TarAtFar, exact_rate
from utils.evaluation.pair_blocks import PairBlocks
from utils.ranks import Ranks

# Bins of the first count over [-1, 1]. Their width is a power of two, so that a score's bin is computed without
# rounding and every bin's edge is a float32 value.
_BINS = 1 << 16
_BINS_PER_UNIT = _BINS // 2
_RESULT_BINS = 1 << 14
# Bins of the later counts.
_FINE_BINS = 1 << 14
# Scores of either kind that are kept, at most.
_KEPT = 1 << 22
# Images of the sample that are compared with each other.
_SAMPLE_ROWS = 32


@dataclass(frozen=True, eq=False)
class AllPairsResult:
    """What the test measured.

    genuine, impostor: the number of pairs of one person and of two.
    far: the false accept rates asked for, in the order given.
    tar: for each, the share of genuine scores strictly above the threshold, 0..1.
    threshold: for each, the cosine similarity of the impostor pair at rank floor(FAR x impostor), counted from 0 from
        the top.
    supported: for each, whether there are at least 1 / FAR impostor pairs. Where there are fewer, the threshold is
        the highest impostor score and tar is no estimate for so low a FAR.
    eer: equal error rate, 0..1, the ROC taken as straight between bin edges, 3e-5 apart.
    eer_bound: it is off by no more than this, the share of the pairs in the one bin where the error rates meet.
    auc: area under the ROC, 0..1. Pairs that share a bin 3e-5 wide are counted as ties.
    auc_bound: it is off by no more than this, half the share of genuine-impostor couples that share a bin. Scores that
        are spread evenly within bins leave an error far below either bound.
    genuine_counts, impostor_counts: int64 [16384], histograms of the scores. Bins hold their lower edge; the few
        scores that rounding puts outside -1..1 are in the outermost bins.
    edges: float64 [16385], the bin edges, -1..1.
    """

    genuine: int
    impostor: int
    far: tuple[float, ...]
    tar: tuple[float, ...]
    threshold: tuple[float, ...]
    supported: tuple[bool, ...]
    eer: float
    eer_bound: float
    auc: float
    auc_bound: float
    genuine_counts: NDArray[np.int64]
    impostor_counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    @property
    def points(self) -> tuple[TarAtFar, ...]:
        """The points of operation, in the order asked for."""
        return tuple(
            TarAtFar(far, tar, threshold, self.impostor)
            for far, tar, threshold in zip(self.far, self.tar, self.threshold, strict=True)
        )

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FAR and TAR, float64 [16384] each and rising, when scores at or above a bin's lower edge are accepted."""
        return (
            self.impostor_counts[::-1].cumsum() / self.impostor,
            self.genuine_counts[::-1].cumsum() / self.genuine,
        )


def all_pairs(
    embeddings: Tensor,
    labels: Tensor,
    far: Sequence[float] = FAR_POINTS,
    block: int = 0,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> AllPairsResult:
    """Compare all N (N - 1) / 2 pairs of embeddings, on the device where they lie.

    embeddings: [N, D], any float dtype, any norm but zero.
    labels: integers [N], the person of each row.
    far: false accept rates, each above 0 and below 1.
    block: scores are computed block x block at a time; 0 chooses for the device.
    progress: show a progress bar for each pass.
    ranks: processes that all call this with the same arguments share the work, and all get the result.

    Beside the embeddings it takes at most 8 N D + 48 N bytes, 40 block^2 bytes and 4 MiB for each thread, and
    256 MiB, however many pairs there are. The product is in full float32 whatever TF32 or autocast settings are in
    force.

    Raises ValueError when a row is not finite or has zero norm, or the set has no genuine or no impostor pair. Raises
    RuntimeError if the device does not repeat its own matrix product bit for bit.
    """
    genuine, impostor = count_pairs(labels)
    ranks = ranks or Ranks()
    with torch.no_grad(), full_precision(embeddings.device):
        blocks = PairBlocks(embeddings, labels, block, ranks, progress)
        kept = _Kept(_promising(blocks, far, impostor), embeddings.device)
        genuine_counts, impostor_counts = _histograms(blocks, kept)
        searches = [_first_search(genuine_counts, impostor_counts, int(exact_rate(rate) * impostor)) for rate in far]
        sources: dict[PairBlocks | _KeptRange, list[int]] = {}
        whole = not ranks.any(kept.overflown)
        for number, search in enumerate(searches):
            sources.setdefault((kept.range_of(search) if whole else None) or blocks, []).append(number)
        for source, numbers in sources.items():
            for number, search in zip(numbers, _finish([searches[i] for i in numbers], source, ranks), strict=True):
                searches[number] = search

    fold = _BINS // _RESULT_BINS
    eer, eer_bound = _equal_error_rate(genuine_counts, impostor_counts)
    auc, auc_bound = _area_under_roc(genuine_counts, impostor_counts)
    return AllPairsResult(
        genuine=genuine,
        impostor=impostor,
        far=tuple(float(rate) for rate in far),
        tar=tuple(search.genuine_above / genuine for search in searches),
        threshold=tuple(_value(search.low) for search in searches),
        supported=tuple(exact_rate(rate) * impostor >= 1 for rate in far),
        eer=eer,
        eer_bound=eer_bound,
        auc=auc,
        auc_bound=auc_bound,
        genuine_counts=genuine_counts.reshape(-1, fold).sum(axis=1),
        impostor_counts=impostor_counts.reshape(-1, fold).sum(axis=1),
        edges=np.linspace(-1.0, 1.0, _RESULT_BINS + 1),
    )


def count_pairs(labels: Tensor) -> tuple[int, int]:
    """The number of genuine and of impostor pairs. Raises ValueError without any of a kind."""
    images = len(labels)
    genuine = sum(count * (count - 1) // 2 for count in labels.unique(return_counts=True)[1].tolist())
    impostor = images * (images - 1) // 2 - genuine
    if genuine == 0:
        raise ValueError(f"no genuine pairs: each of the {images} images has a label of its own")
    if impostor == 0:
        raise ValueError(f"no impostor pairs: all {images} images have the same label")
    return genuine, impostor


def _promising(blocks: PairBlocks, far: Sequence[float], impostor: int) -> list[tuple[float, float]]:
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


class _KeptRange:
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

    def covers(self, search: "_Search") -> bool:
        """Whether the search's interval lies within the range."""
        return _key(self.low) <= search.low and search.high <= _key(self.high) - 1

    def visit(self, work: Callable[[Tensor, Tensor, int], None], title: str) -> None:
        """Call `work` once, with all genuine and all impostor scores."""
        genuine, impostor = (scores[:count] for scores, count in zip(self._scores, self._counts, strict=True))
        work(genuine, impostor, 0)


class _Kept:
    """The scores within some disjoint ranges, as far as there is room."""

    def __init__(self, ranges: list[tuple[float, float]], device: torch.device) -> None:
        self._ranges = [_KeptRange(low, high, device) for low, high in ranges]
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

    def range_of(self, search: "_Search") -> _KeptRange | None:
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


def _histograms(blocks: PairBlocks, kept: _Kept) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first count: how many genuine and impostor scores there are in each of the uniform bins."""
    counts = torch.zeros(blocks.threads, 2, _BINS, dtype=torch.int64, device=blocks.vectors.device)

    def count(genuine: Tensor, impostor: Tensor, thread: int) -> None:
        for total, scores in zip(counts[thread], (genuine, impostor), strict=True):
            if len(scores):
                total += torch.bincount(uniform_bins(scores, _BINS), minlength=_BINS)
        kept.add(genuine, impostor)

    blocks.visit(count, "all pairs")
    genuine, impostor = blocks.ranks.sum(counts.sum(0)).cpu().numpy()
    return genuine, impostor


def uniform_bins(scores: Tensor, bins: int) -> Tensor:
    """The bin of each score among `bins`, a power of two, over [-1, 1]: int32. What lies outside is in the outermost.

    Scaling by a power of two and flooring are exact, so the edges are too.
    """
    half = bins // 2
    return (scores * half).floor_().clamp_(-half, half - 1).add_(half).int()


def _keys(scores: Tensor) -> Tensor:
    """int32 numbers in the order of the float32 scores, neighbouring scores having neighbouring keys.

    Positive floats are ordered like their bits, negative ones the other way round. Adding 0 turns -0 into 0.
    """
    bits = (scores + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _key(score: float) -> int:
    return int(_keys(torch.tensor([score], dtype=torch.float32)))


def _value(key: int) -> float:
    """The float32 score of a key."""
    bits = key if key >= 0 else key ^ 0x7FFFFFFF
    return float(np.int32(bits).view(np.float32))


@dataclass(frozen=True)
class _Search:
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


def _first_search(genuine: NDArray[np.int64], impostor: NDArray[np.int64], rank: int) -> _Search:
    """The uniform bin with the impostor of that rank. The outermost bins hold also what lies beyond them."""
    bin_, rank_inside = _locate(impostor, rank)
    low = -np.inf if bin_ == 0 else bin_ / _BINS_PER_UNIT - 1
    beyond = np.inf if bin_ == _BINS - 1 else (bin_ + 1) / _BINS_PER_UNIT - 1
    return _Search(_key(low), _key(beyond) - 1, rank_inside, int(impostor[bin_]), int(genuine[bin_ + 1 :].sum()))


def _locate(counts: NDArray[np.int64], rank: int) -> tuple[int, int]:
    """The bin of the item at a rank counted from the top, and its rank within that bin."""
    from_top = counts[::-1].cumsum()
    position = int(np.searchsorted(from_top, rank, side="right"))
    return len(counts) - 1 - position, rank - int(from_top[position] - counts[::-1][position])


def _finish(searches: list[_Search], source: PairBlocks | _KeptRange, ranks: Ranks) -> list[_Search]:
    """Narrow each search, a pass over the scores of the source at a time, until it holds a single score."""
    while any(search.low < search.high for search in searches):
        counts = _fine_counts(searches, source, ranks)
        searches = [_narrowed(search, *count) for search, count in zip(searches, counts, strict=True)]
    return searches


def _fine_counts(searches: list[_Search], source: PairBlocks | _KeptRange, ranks: Ranks) -> NDArray[np.int64]:
    """A later count: genuine and impostor counts in the finer bins of each search, int64 [searches, 2, bins]."""
    device = source.vectors.device if isinstance(source, PairBlocks) else source.device
    counts = torch.zeros(len(searches), 2, _FINE_BINS, dtype=torch.int64, device=device)
    lowest = _value(min(search.low for search in searches))
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


def _narrowed(search: _Search, genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> _Search:
    """The search within the finer bin that has its impostor."""
    if impostor.sum() != search.impostors:
        raise RuntimeError("the device computed other scores in the second pass than in the first: no exact result")
    bin_, rank_inside = _locate(impostor, search.rank)
    low = search.low + bin_ * search.step
    return _Search(
        low=low,
        high=min(low + search.step - 1, search.high),
        rank=rank_inside,
        impostors=int(impostor[bin_]),
        genuine_above=search.genuine_above + int(genuine[bin_ + 1 :].sum()),
    )


def _equal_error_rate(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> tuple[float, float]:
    """Where the share of impostors accepted equals that of genuine pairs rejected, straight between bin edges.

    With it the share of the pairs of either kind in the one bin where they meet.
    """
    rejected = np.append(0, genuine.cumsum()) / genuine.sum()
    accepted = 1 - np.append(0, impostor.cumsum()) / impostor.sum()
    excess = accepted - rejected  # falls from 1 to -1
    after = int((excess <= 0).argmax())
    share = excess[after - 1] / (excess[after - 1] - excess[after])
    rate = float(rejected[after - 1] + share * (rejected[after] - rejected[after - 1]))
    return rate, float(min(rejected[after] - rejected[after - 1], accepted[after - 1] - accepted[after]))


def _area_under_roc(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> tuple[float, float]:
    """The chance that a genuine pair scores above an impostor pair, pairs of one bin counting half.

    With it the largest error that this counting can make.
    """
    couples = float(genuine.sum()) * float(impostor.sum())
    beaten = impostor.cumsum() - impostor / 2
    return float(genuine @ beaten / couples), float(genuine @ (impostor / 2) / couples)
