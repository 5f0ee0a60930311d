"""The all-pairs test: every image of a set against every other, and the exact TAR at given FARs.

Ten folds of a few thousand pairs say little once a model is right on 99.8 % of them. All pairs of the same images are
thousands of times as many, enough to measure false accept rates (FAR) of 1e-6, where recognition systems work. The
measures are those of ISO/IEC 19795-1: the true accept rate (TAR) is the share of genuine pairs (one person) accepted
at a threshold that lets through the share FAR of the impostor pairs (two persons).

Scores are cosine similarities in float32. There are far too many of them to keep or to sort, so the threshold is found
by radix selection: count the scores into bins, see which bin holds the wanted rank, go through the pairs again and
count the scores of that bin into finer bins, until a bin is one float32 value. The first pass has uniform bins (which
EER, AUC and plots need); the finer ones divide the order of the float32 values themselves, so nothing is rounded and
ties need no special care. Two passes do, but for thresholds within 0.001 of 0 or at the very ends of the range, where
the floats of a bin are so many that it takes a third or a fourth.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.devices import full_precision
from utils.progress import progress_bar

# Bins of the first pass over [-1, 1]. Their width is a power of two, so that a score's bin is computed without
# rounding and every bin's edge is a float32 value.
_BINS = 1 << 20
_BINS_PER_UNIT = _BINS // 2
_RESULT_BINS = 1 << 14
# Bins of the later passes: a bin of the first pass has no more float32 values than this unless it is near zero.
_FINE_BINS = 1 << 14


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
    eer: equal error rate, 0..1, the ROC taken as straight between bin edges. It is off by no more than the share of
        the pairs in the one bin, 2e-6 wide, where the error rates meet.
    auc: area under the ROC, 0..1. Pairs that share a bin 2e-6 wide are counted as ties; that is their whole error.
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
    auc: float
    genuine_counts: NDArray[np.int64]
    impostor_counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    def roc(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """FAR and TAR, float64 [16384] each and rising, when scores at or above a bin's lower edge are accepted."""
        return (
            self.impostor_counts[::-1].cumsum() / self.impostor,
            self.genuine_counts[::-1].cumsum() / self.genuine,
        )


def all_pairs(
    embeddings: Tensor,
    labels: Tensor,
    far: Sequence[float] = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6),
    block: int = 2048,
    progress: bool = False,
) -> AllPairsResult:
    """Compare all N (N - 1) / 2 pairs of embeddings, on the device where they lie.

    embeddings: [N, D], any float dtype, any norm but zero.
    labels: integers [N], the person of each row.
    far: false accept rates, each above 0 and below 1.
    block: scores are computed block x block at a time. On a GPU larger blocks are faster.
    progress: show a progress bar for each pass.

    Beside the embeddings it takes at most 40 block^2 + 24 N D + 32 N bytes and 64 MiB, however many pairs there are.
    The product is in full float32 whatever TF32 or autocast settings are in force.

    Raises ValueError when shapes or types do not fit, a FAR or the block size is out of range, a row is not finite or
    has zero norm, or the set has no genuine or no impostor pair. Raises RuntimeError if the device does not repeat
    its own matrix product bit for bit.
    """
    _check_arguments(embeddings, labels, far, block)
    genuine, impostor = _count_pairs(labels)

    order = labels.to(embeddings.device).argsort(stable=True)
    pairs = _Pairs(_normalised(embeddings)[order], labels.to(embeddings.device)[order], block, progress)
    with torch.no_grad(), full_precision(embeddings.device):
        genuine_counts, impostor_counts = _histograms(pairs)
        searches = [
            # str gives the decimal that was meant: 0.29 x 100 impostors is rank 29, in binary floats it is 28.
            _first_search(genuine_counts, impostor_counts, int(Fraction(str(float(rate))) * impostor))
            for rate in far
        ]
        searches = _finish(searches, pairs)

    fold = _BINS // _RESULT_BINS
    return AllPairsResult(
        genuine=genuine,
        impostor=impostor,
        far=tuple(float(rate) for rate in far),
        tar=tuple(search.genuine_above / genuine for search in searches),
        threshold=tuple(_value(search.low) for search in searches),
        supported=tuple(Fraction(str(float(rate))) * impostor >= 1 for rate in far),
        eer=_equal_error_rate(genuine_counts, impostor_counts),
        auc=_area_under_roc(genuine_counts, impostor_counts),
        genuine_counts=genuine_counts.reshape(-1, fold).sum(axis=1),
        impostor_counts=impostor_counts.reshape(-1, fold).sum(axis=1),
        edges=np.linspace(-1.0, 1.0, _RESULT_BINS + 1),
    )


def _check_arguments(embeddings: Tensor, labels: Tensor, far: Sequence[float], block: int) -> None:
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(f"embeddings must be floats of shape [N, D], not {embeddings.dtype} {list(embeddings.shape)}")
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(f"{len(embeddings)} embeddings need as many labels, not shape {list(labels.shape)}")
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(f"labels must be integers, not {labels.dtype}")
    if block < 1:
        raise ValueError(f"block must be at least 1, not {block}")
    for rate in far:
        if not 0 < rate < 1:
            raise ValueError(f"a false accept rate lies between 0 and 1, not at {rate}")


def _count_pairs(labels: Tensor) -> tuple[int, int]:
    """The number of genuine and of impostor pairs."""
    images = len(labels)
    genuine = sum(count * (count - 1) // 2 for count in labels.unique(return_counts=True)[1].tolist())
    impostor = images * (images - 1) // 2 - genuine
    if genuine == 0:
        raise ValueError(f"no genuine pairs: each of the {images} images has a label of its own")
    if impostor == 0:
        raise ValueError(f"no impostor pairs: all {images} images have the same label")
    return genuine, impostor


def _normalised(embeddings: Tensor) -> Tensor:
    """Rows of unit length, float32: normalised in float64, so that each component is rounded only once."""
    vectors = embeddings.detach().double()
    norms = torch.linalg.vector_norm(vectors, dim=1)
    for bad, complaint in ((~norms.isfinite(), "is not finite"), (norms == 0, "has zero norm")):
        if bad.any():
            row = int(bad.int().argmax())
            raise ValueError(f"embedding row {row} {complaint} ({int(bad.sum())} such rows)")
    return (vectors / norms[:, None]).float()


@dataclass(frozen=True)
class _Pairs:
    """All pairs of a set, as often as wanted, in the same blocks and so with bit-identical scores.

    vectors: float32 [N, D], unit rows. labels: [N], ascending: then only blocks near the diagonal have genuine pairs.
    """

    vectors: Tensor
    labels: Tensor
    block: int
    progress: bool

    def scores(self, title: str) -> Iterator[tuple[Tensor, Tensor]]:
        """For each block of the upper triangle the genuine and the impostor scores, float32, one-dimensional."""
        strips = list(zip(self.vectors.split(self.block), self.labels.split(self.block), strict=True))
        people = [(int(labels[0]), int(labels[-1])) for _, labels in strips]
        with progress_bar(len(strips) * (len(strips) + 1) // 2, "block", title, disable=not self.progress) as bar:
            for row, (rows, row_labels) in enumerate(strips):
                for column, (columns, column_labels) in enumerate(strips[row:], start=row):
                    scores = rows @ columns.T
                    if people[row][1] < people[column][0]:
                        yield scores.new_empty(0), scores.flatten()
                    else:
                        genuine = row_labels[:, None] == column_labels
                        impostor = ~genuine
                        if column == row:
                            genuine.triu_(diagonal=1)
                            impostor.triu_(diagonal=1)
                        yield scores[genuine], scores[impostor]
                    bar.update()


def _histograms(pairs: _Pairs) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first pass: how many genuine and impostor scores there are in each of the uniform bins."""
    counts = torch.zeros(2, _BINS, dtype=torch.int64, device=pairs.vectors.device)
    for block in pairs.scores("all pairs, histogram"):
        for count, scores in zip(counts, block, strict=True):
            if len(scores):
                count += torch.bincount(_bin(scores), minlength=_BINS)
    genuine, impostor = counts.cpu().numpy()
    return genuine, impostor


def _bin(scores: Tensor) -> Tensor:
    """The uniform bin of each score, int32. Scaling by a power of two and flooring are exact, so the edges are too."""
    scaled = (scores * _BINS_PER_UNIT).floor_().clamp_(-_BINS_PER_UNIT, _BINS_PER_UNIT - 1)
    return scaled.add_(_BINS_PER_UNIT).int()


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


def _finish(searches: list[_Search], pairs: _Pairs) -> list[_Search]:
    """Narrow each search, a pass over the pairs at a time, until it holds a single score."""
    while any(search.low < search.high for search in searches):
        counts = _fine_counts(searches, pairs)
        searches = [_narrowed(search, *count) for search, count in zip(searches, counts, strict=True)]
    return searches


def _fine_counts(searches: list[_Search], pairs: _Pairs) -> NDArray[np.int64]:
    """A later pass: genuine and impostor counts in the finer bins of each search, int64 [searches, 2, bins]."""
    counts = torch.zeros(len(searches), 2, _FINE_BINS, dtype=torch.int64, device=pairs.vectors.device)
    lowest = _value(min(search.low for search in searches))
    for block in pairs.scores("all pairs, thresholds"):
        for kind, scores in enumerate(block):
            keys = _keys(scores[scores >= lowest])  # few are left at the FARs that matter
            for search, count in zip(searches, counts[:, kind], strict=True):
                inside = keys[(keys >= search.low) & (keys <= search.high)]
                if len(inside):
                    count += torch.bincount((inside - search.low) // search.step, minlength=_FINE_BINS)
    return counts.cpu().numpy()


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


def _equal_error_rate(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> float:
    """Where the share of impostors accepted equals that of genuine pairs rejected, straight between bin edges."""
    rejected = np.append(0, genuine.cumsum()) / genuine.sum()
    accepted = 1 - np.append(0, impostor.cumsum()) / impostor.sum()
    excess = accepted - rejected  # falls from 1 to -1
    after = int((excess <= 0).argmax())
    share = excess[after - 1] / (excess[after - 1] - excess[after])
    return float(rejected[after - 1] + share * (rejected[after] - rejected[after - 1]))


def _area_under_roc(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> float:
    """The chance that a genuine pair scores above an impostor pair, pairs of one bin counting half."""
    beaten = impostor.cumsum() - impostor / 2
    return float(genuine @ beaten / (float(genuine.sum()) * float(impostor.sum())))
