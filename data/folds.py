"""The ten folds that a test cuts pairs into, in their order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FOLDS = 10


def fold_numbers(pairs: int, folds: int) -> NDArray[np.int64]:
    """The fold of each pair, int64 [pairs]: runs of equal length, the first pairs mod folds of them one pair longer."""
    sizes = np.full(folds, pairs // folds)
    sizes[: pairs % folds] += 1
    return np.repeat(np.arange(folds), sizes)


def unmixed_folds(same: Sequence[bool] | NDArray[np.bool_]) -> int:
    """How many of the folds lack one of the two kinds of pairs, `same` telling those of one person; 0 where there are
    fewer than two pairs a fold.
    """
    pairs = np.asarray(same, bool)
    if len(pairs) < 2 * FOLDS:
        return 0
    folds = fold_numbers(len(pairs), FOLDS)
    return sum(len(set(pairs[folds == fold].tolist())) == 1 for fold in range(FOLDS))
