"""The all-pairs test: every image of a set against every other, and the exact TAR at given FARs.

Ten folds of a few thousand pairs say little once a model is right on 99.8 % of them. All pairs of the same images are
thousands of times as many, enough to measure false accept rates (FAR) of 1e-6, where recognition systems work. The
measures are those of ISO/IEC 19795-1: the true accept rate (TAR) is the share of genuine pairs (one person) accepted
at a threshold that lets through the share FAR of the impostor pairs (two persons).

Scores are cosine similarities in float32; how thresholds are found among so many of them, threshold_search.py tells.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.devices import full_precision
from utils.evaluation.curves import FAR_POINTS, TarAtFar, check_rates, crossing, exact_rate
from utils.evaluation.pair_blocks import PairBlocks, check_embeddings
from utils.evaluation.threshold_search import (
    BINS,
    KeptScores,
    first_search,
    narrow_down,
    promising,
    uniform_bins,
    value_of,
)
from utils.ranks import Ranks

# Bins of the histograms in the result.
_RESULT_BINS = 1 << 14


@dataclass(frozen=True, eq=False)
class AllPairsResult:
    """What the test measured.

    genuine, impostor: the number of pairs of one person and of two.
    far: the false accept rates asked for, in the order given.
    tar: for each, the share of genuine scores strictly above the threshold, 0..1.
    threshold: for each, the cosine similarity of the impostor pair at rank floor(FAR x impostor), counted from 0 from
        the top. Where there are fewer than 1 / FAR of them it is the highest, and tar is no estimate for so low a FAR
        (`supported` of the point says so).
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

    Raises ValueError when shapes or types do not fit, a FAR or the block size is out of range, a row is not finite or
    has zero norm, or the set has no genuine or no impostor pair. Raises RuntimeError if the device does not repeat
    its own matrix product bit for bit.
    """
    check_embeddings(embeddings, labels, block)
    check_rates(far)
    genuine, impostor = count_pairs(labels)
    ranks = ranks or Ranks()
    with torch.no_grad(), full_precision(embeddings.device):
        blocks = PairBlocks(embeddings, labels, block, ranks, progress)
        kept = KeptScores(promising(blocks, far, impostor), embeddings.device)
        genuine_counts, impostor_counts = _histograms(blocks, kept)
        searches = [first_search(genuine_counts, impostor_counts, int(exact_rate(rate) * impostor)) for rate in far]
        searches = narrow_down(searches, kept, blocks)

    fold = BINS // _RESULT_BINS
    eer, eer_bound = _equal_error_rate(genuine_counts, impostor_counts)
    auc, auc_bound = _area_under_roc(genuine_counts, impostor_counts)
    return AllPairsResult(
        genuine=genuine,
        impostor=impostor,
        far=tuple(float(rate) for rate in far),
        tar=tuple(search.genuine_above / genuine for search in searches),
        threshold=tuple(value_of(search.low) for search in searches),
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


def _histograms(blocks: PairBlocks, kept: KeptScores) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The first count: how many genuine and impostor scores there are in each of the uniform bins."""
    counts = torch.zeros(blocks.threads, 2, BINS, dtype=torch.int64, device=blocks.vectors.device)

    def count(genuine: Tensor, impostor: Tensor, thread: int) -> None:
        for total, scores in zip(counts[thread], (genuine, impostor), strict=True):
            if len(scores):
                total += torch.bincount(uniform_bins(scores, BINS), minlength=BINS)
        kept.add(genuine, impostor)

    blocks.visit(count, "all pairs")
    genuine, impostor = blocks.ranks.sum(counts.sum(0)).cpu().numpy()
    return genuine, impostor


def _equal_error_rate(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> tuple[float, float]:
    """Where the share of impostors accepted equals that of genuine pairs rejected, straight between bin edges.

    With it the share of the pairs of either kind in the one bin where they meet.
    """
    rejected = np.append(0, genuine.cumsum()) / genuine.sum()
    accepted = 1 - np.append(0, impostor.cumsum()) / impostor.sum()
    after = int((rejected >= accepted).argmax())
    bound = min(rejected[after] - rejected[after - 1], accepted[after - 1] - accepted[after])
    return crossing(rejected, accepted), float(bound)


def _area_under_roc(genuine: NDArray[np.int64], impostor: NDArray[np.int64]) -> tuple[float, float]:
    """The chance that a genuine pair scores above an impostor pair, pairs of one bin counting half.

    With it the largest error that this counting can make.
    """
    couples = float(genuine.sum()) * float(impostor.sum())
    beaten = impostor.cumsum() - impostor / 2
    return float(genuine @ beaten / couples), float(genuine @ (impostor / 2) / couples)
