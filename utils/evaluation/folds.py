"""The LFW verification protocol: ten folds of pairs, same person or not, judged by one distance threshold.

The protocol is that of Huang et al., "Labeled Faces in the Wild" (2007), in the exact form behind the accuracies that
face recognition papers and model zoos print for LFW, CFP-FP, AgeDB-30 and their like: squared L2 distance between
L2-normalised embeddings, consecutive folds, and for each fold the threshold that does best on all the others.

The programs behind those numbers also print a TAR at FAR 1e-3 that is averaged over the folds: `tar_of_folds`. It hangs
on a tenth of the impostors at a time, three hundred for LFW, so it is here to compare with their output; what is quoted
should be `curves.tar_at_far`, over all pairs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.folds import FOLDS, fold_numbers

# The published grid of squared distances. Unit vectors are never further apart than 4.
THRESHOLDS = np.arange(0, 4, 0.01)
# The finer one that the folds' TAR is taken from.
_TAR_THRESHOLDS = np.arange(0, 4, 0.001)


@dataclass(frozen=True, eq=False)
class FoldResult:
    """What the protocol measured on P pairs in K folds.

    accuracy: mean of the folds' accuracies, 0..1.
    std: their population standard deviation.
    fold_accuracies: float64 [K], 0..1.
    thresholds: float64 [K], the squared L2 distance chosen for each fold, on the other folds.
    distances: float64 [P], squared L2 distance of each pair, 0..4.
    same: bool [P], whether the pair is of one person.
    """

    accuracy: float
    std: float
    fold_accuracies: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    distances: NDArray[np.float64]
    same: NDArray[np.bool_]

    @property
    def cosine_threshold(self) -> float:
        """The mean of the folds' thresholds as a cosine similarity, -1..1."""
        return 1.0 - float(self.thresholds.mean()) / 2.0

    @property
    def cosines(self) -> NDArray[np.float64]:
        """The cosine similarity of each pair, float64 [P]."""
        return 1.0 - self.distances / 2.0

    @property
    def fold(self) -> NDArray[np.int64]:
        """The fold of each pair, int64 [P]."""
        return fold_numbers(len(self.same), len(self.thresholds))

    @property
    def correct(self) -> NDArray[np.bool_]:
        """Whether each pair is judged rightly by the threshold of its fold, bool [P]."""
        return (self.distances < self.thresholds[self.fold]) == self.same


def ten_fold(
    embeddings: NDArray[np.floating], same: Sequence[bool] | NDArray[np.bool_], folds: int = FOLDS
) -> FoldResult:
    """Verification accuracy of pairs of embeddings by cross-validation over consecutive folds.

    embeddings: [2P, D], any float dtype; rows 2i and 2i + 1 are pair i. They need not be normalised.
    same: bool [P], True where the pair is of one person.
    folds: how many, at least 2. As in scikit-learn's `KFold(shuffle=False)` they are runs of consecutive pairs, and
        the first P mod folds of them are one pair longer.

    A pair is called the same person when its distance is below the threshold. Among thresholds of equal accuracy the
    smallest is taken.

    Raises ValueError when the shapes do not fit, when there are fewer pairs than folds, and when a row is not finite
    or has no direction (zero norm).
    """
    same = np.asarray(same, dtype=bool)
    embeddings = np.asarray(embeddings)
    _check_shapes(embeddings, same, folds)

    return ten_fold_of_distances(_pair_distances(embeddings), same, folds)


def ten_fold_of_distances(distances: NDArray[np.float64], same: NDArray[np.bool_], folds: int = FOLDS) -> FoldResult:
    """The same from the squared L2 distances of the pairs, float64 [P] in 0..4, 2 - 2 x cosine."""
    same = np.asarray(same, dtype=bool)
    if distances.shape != same.shape:
        raise ValueError(f"{len(same)} pairs need as many distances, not shape {list(distances.shape)}")
    _check_folds(len(same), folds)
    fold = fold_numbers(len(same), folds)
    correct = correct_counts(first_accepting(distances), fold, folds, np.where(same, 1, -1))
    best = (correct.sum(axis=0) - correct).argmax(axis=1)  # argmax takes the first of equals
    accuracies = correct[np.arange(folds), best] / np.bincount(fold)
    return FoldResult(
        accuracy=float(accuracies.mean()),
        std=float(accuracies.std()),
        fold_accuracies=accuracies,
        thresholds=THRESHOLDS[best],
        distances=distances,
        same=same,
    )


@dataclass(frozen=True)
class FoldTar:
    """TAR at a FAR by folds.

    far: the rate asked for. tar, std: mean over the folds and population standard deviation, 0..1. measured_far: the
    mean share of the impostors in the folds that the thresholds really let through.
    """

    far: float
    tar: float
    std: float
    measured_far: float


def tar_of_folds(result: FoldResult, far: float = 1e-3) -> FoldTar:
    """The TAR at FAR that insightface's verification computes beside the accuracy (first in David Sandberg's facenet).

    For each fold the threshold is where the FAR of the other folds, on a grid of 0.001, crosses `far`, straight
    between grid points; where it stays below `far` on the whole grid, it is 0, and the fold's TAR too.

    Raises ValueError for a fold without genuine or without impostor pairs.
    """
    folds = len(result.thresholds)
    fold, same = result.fold, result.same
    for kind, which in (("genuine", same), ("impostor", ~same)):
        lacking = np.flatnonzero(np.bincount(fold[which], minlength=folds) == 0)
        if lacking.size:
            raise ValueError(f"fold {lacking[0]} has no {kind} pairs: it has no TAR at FAR {far:g}")
    cells = np.searchsorted(_TAR_THRESHOLDS, result.distances, side="right")
    accepted = _counts(fold[~same], cells[~same], (folds, len(_TAR_THRESHOLDS) + 1)).cumsum(axis=1)
    elsewhere = (accepted[:, -1].sum() - accepted[:, -1])[:, None]
    shares = (accepted.sum(axis=0) - accepted)[:, :-1] / elsewhere
    thresholds = np.array([np.interp(far, share, _TAR_THRESHOLDS) if share[-1] >= far else 0.0 for share in shares])
    passed = result.distances < thresholds[fold]
    tar, measured = (
        np.bincount(fold[which], passed[which], folds) / np.bincount(fold[which], minlength=folds)
        for which in (same, ~same)
    )
    return FoldTar(far, float(tar.mean()), float(tar.std()), float(measured.mean()))


def _check_shapes(embeddings: NDArray[np.floating], same: NDArray[np.bool_], folds: int) -> None:
    if same.ndim != 1:
        raise ValueError(f"same must be one-dimensional, not of shape {same.shape}")
    if embeddings.ndim != 2 or len(embeddings) != 2 * len(same):
        raise ValueError(
            f"{len(same)} pairs need embeddings of shape [{2 * len(same)}, D], not {list(embeddings.shape)}"
        )
    _check_folds(len(same), folds)


def _check_folds(pairs: int, folds: int) -> None:
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, not {folds}")
    if pairs < folds:
        raise ValueError(f"{pairs} pairs cannot make {folds} folds")


def _pair_distances(embeddings: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared L2 distance, float64 [P], of each two consecutive rows of [2P, D] after normalisation."""
    vectors = embeddings.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    _refuse_rows(~np.isfinite(norms[:, 0]), "is not finite")
    _refuse_rows(norms[:, 0] == 0, "has zero norm")
    vectors /= norms
    difference = vectors[0::2] - vectors[1::2]
    return np.einsum("pd,pd->p", difference, difference)


def _refuse_rows(bad: NDArray[np.bool_], complaint: str) -> None:
    if bad.any():
        raise ValueError(f"embedding row {int(bad.argmax())} {complaint} ({int(bad.sum())} such rows)")


def first_accepting(distances: NDArray[np.float64]) -> NDArray[np.int64]:
    """The number of the first threshold above each distance, int64 [P]: it and all that follow accept the pair."""
    return np.searchsorted(THRESHOLDS, distances, side="right")


def correct_counts(
    first: NDArray[np.integer], fold: NDArray[np.integer], folds: int, times: NDArray[np.integer]
) -> NDArray[np.float64]:
    """How many pairs of each fold each threshold judges rightly: whole numbers, float64 [folds, thresholds].

    first [P]: see `first_accepting`; fold [P]; times: integers [P], how often each pair counts, below 0 for impostors.
    Counting the pairs by their first threshold, and summing the counts up along the thresholds, gives every threshold's
    acceptances at once.
    """
    shape = (folds, len(THRESHOLDS) + 1)  # the last column is for pairs that no threshold accepts
    gains = np.bincount(fold * shape[1] + first, times, shape[0] * shape[1]).reshape(shape)
    return gains.cumsum(axis=1)[:, :-1] + np.bincount(fold, np.maximum(-times, 0), folds)[:, None]


def _counts(rows: NDArray[np.integer], columns: NDArray[np.integer], shape: tuple[int, int]) -> NDArray[np.int64]:
    return np.bincount(rows * shape[1] + columns, minlength=shape[0] * shape[1]).reshape(shape)
