"""The LFW verification protocol: ten folds of pairs, same person or not, judged by one distance threshold.

The protocol is that of Huang et al., "Labeled Faces in the Wild" (2007), in the exact form behind the accuracies that
face recognition papers and model zoos print for LFW, CFP-FP, AgeDB-30 and their like: squared L2 distance between
L2-normalised embeddings, consecutive folds, and for each fold the threshold that does best on all the others.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# The published grid of squared distances. Unit vectors are never further apart than 4.
_THRESHOLDS = np.arange(0, 4, 0.01)
FOLDS = 10


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

    distances = _pair_distances(embeddings)
    sizes = np.full(folds, len(same) // folds)
    sizes[: len(same) % folds] += 1
    correct = _correct_counts(distances, same, np.repeat(np.arange(folds), sizes))

    best = (correct.sum(axis=0) - correct).argmax(axis=1)  # argmax takes the first of equals
    accuracies = correct[np.arange(folds), best] / sizes
    return FoldResult(
        accuracy=float(accuracies.mean()),
        std=float(accuracies.std()),
        fold_accuracies=accuracies,
        thresholds=_THRESHOLDS[best],
        distances=distances,
        same=same,
    )


def _check_shapes(embeddings: NDArray[np.floating], same: NDArray[np.bool_], folds: int) -> None:
    if same.ndim != 1:
        raise ValueError(f"same must be one-dimensional, not of shape {same.shape}")
    if embeddings.ndim != 2 or len(embeddings) != 2 * len(same):
        raise ValueError(
            f"{len(same)} pairs need embeddings of shape [{2 * len(same)}, D], not {list(embeddings.shape)}"
        )
    if folds < 2:
        raise ValueError(f"cross-validation needs at least 2 folds, not {folds}")
    if len(same) < folds:
        raise ValueError(f"{len(same)} pairs cannot make {folds} folds")


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


def _correct_counts(
    distances: NDArray[np.float64], same: NDArray[np.bool_], fold: NDArray[np.integer]
) -> NDArray[np.int64]:
    """How many pairs of each fold each threshold judges rightly: int64 [folds, thresholds].

    A pair is accepted by all thresholds from the first one above its distance on. So counting the pairs by that first
    threshold, and summing the counts up along the thresholds, gives every threshold's acceptances at once.
    """
    shape = (int(fold[-1]) + 1, len(_THRESHOLDS) + 1)  # the last column is for pairs that no threshold accepts
    cell = fold * shape[1] + np.searchsorted(_THRESHOLDS, distances, side="right")

    def accepted(which: NDArray[np.bool_]) -> NDArray[np.int64]:
        counts = np.bincount(cell[which], minlength=shape[0] * shape[1]).reshape(shape)
        return counts.cumsum(axis=1)[:, :-1]

    different_pairs = np.bincount(fold[~same], minlength=shape[0])
    return accepted(same) + different_pairs[:, None] - accepted(~same)
