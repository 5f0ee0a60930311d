"""Error versus reject: what happens to the error rates when the images of the lowest quality are turned away.

Quality is whatever rises with it: the length of the embedding before it is scaled to 1, which networks trained with a
margin make short for bad images, or a column of a CSV. After P. Grother and E. Tabassi, "Performance of biometric
quality measures" (IEEE PAMI 29, 2007): a pair is as good as its worse image; the threshold stays that of all pairs. A
quality that says something makes the curve of false rejects fall at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.curves import TarAtFar, split_scores

SHARES = tuple(round(0.02 * step, 2) for step in range(16))


@dataclass(frozen=True, eq=False)
class RejectCurve:
    """R points.

    rejected: float64 [R], the share of the pairs turned away, rising; with ties less than what was asked for. fnmr,
    fmr: float64 [R], shares of the genuine pairs that fail and of the impostor pairs that pass, of those left; NaN
    where none is left. genuine, impostor: int64 [R], pairs left. point: of all pairs, which the threshold is of.
    """

    rejected: NDArray[np.float64]
    fnmr: NDArray[np.float64]
    fmr: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    point: TarAtFar

    @property
    def area(self) -> float:
        """The mean FNMR over the shares rejected, relative to that of all pairs: below 1 for a quality that helps.

        NaN when no genuine pair fails at all.
        """
        left = ~np.isnan(self.fnmr)
        span = self.rejected[left][-1] - self.rejected[left][0]
        if not span or not self.fnmr[0]:
            return float("nan")
        return float(np.trapezoid(self.fnmr[left], self.rejected[left]) / (span * self.fnmr[0]))


def pair_quality(quality: NDArray[np.floating], index: NDArray[np.integer]) -> NDArray[np.floating]:
    """The quality of pairs, [P], that of the worse image: quality [N] of images, index [P, 2] into them."""
    return np.asarray(quality)[index].min(axis=1)


def error_versus_reject(
    scores: NDArray[np.floating],
    same: NDArray[np.bool_],
    quality: NDArray[np.floating],
    point: TarAtFar,
    shares: Sequence[float] = SHARES,
) -> RejectCurve:
    """The error rates of pairs when those of the lowest quality are turned away, for each of the `shares` of all.

    scores [P]; same bool [P]; quality [P], see `pair_quality`. Pairs of equal quality stay or go together. Scores
    strictly above the threshold of `point`, which may be that of more pairs, are accepted. Raises ValueError for
    quality that is not finite, and for shares outside of 0..1 (1 excluded) or not rising.
    """
    split_scores(scores, same)
    same, quality, asked = np.asarray(same, bool), np.asarray(quality), np.asarray(shares, np.float64)
    if quality.shape != same.shape or not np.isfinite(quality).all():
        raise ValueError(f"{len(same)} pairs need as many qualities, all finite, not shape {quality.shape}")
    if not len(asked) or asked[0] < 0 or asked[-1] >= 1 or (np.diff(asked) <= 0).any():
        raise ValueError(f"shares to reject must rise within 0..1, not {list(shares)}")
    order = np.argsort(quality, kind="stable")
    ranked = quality[order]
    passed, is_genuine = np.asarray(scores)[order] > point.threshold, same[order]
    start = np.searchsorted(ranked, ranked[(asked * len(order)).astype(np.int64)])  # the first of equals

    def left(which: NDArray[np.bool_]) -> NDArray[np.int64]:
        return np.append(which[::-1].cumsum()[::-1], 0)[start]

    count, others = left(is_genuine), left(~is_genuine)
    with np.errstate(invalid="ignore", divide="ignore"):
        fnmr, fmr = left(is_genuine & ~passed) / count, left(~is_genuine & passed) / others
    return RejectCurve(start / len(order), fnmr, fmr, count, others, point)
