"""Genuine and impostor scores to the measures of verification: TAR at FAR, ROC, AUC, EER.

Definitions are those of ISO/IEC 19795-1. The false accept rate (FAR) is the share of impostor pairs (two persons) that
are accepted, the true accept rate (TAR) the share of genuine pairs (one person). Higher scores mean more alike.
Everything is counted, not fitted: scores are sorted once, and equal scores share a point of the curve.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import numpy as np
from numpy.typing import NDArray

FAR_POINTS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
Support = Literal["good", "weak", "none"]
# Accepts that are expected at least of a rate that is quoted without a note.
_GOOD_SUPPORT = 10


class ErrorRate:
    """What is known at a rate of errors; subclasses say which, and how many trials there are."""

    trials = "impostor pairs"

    @property
    def errors(self) -> tuple[float, int]:
        """The rate asked for, and the trials it is a share of."""
        raise NotImplementedError

    @property
    def support(self) -> Support:
        """Whether there are trials enough to speak of this rate: see `support_of`."""
        return support_of(*self.errors)

    @property
    def supported(self) -> bool:
        """Whether there are at least 1 / rate trials."""
        return self.support != "none"

    @property
    def note(self) -> str:
        """What to print behind the number; empty where it needs no word."""
        return support_note(self.support, self.trials)


@dataclass(frozen=True)
class TarAtFar(ErrorRate):
    """A point of operation.

    far: the false accept rate asked for.
    tar: the share of genuine pairs accepted, 0..1.
    threshold: the score it takes.
    impostors: impostor pairs in all.
    """

    far: float
    tar: float
    threshold: float
    impostors: int

    @property
    def errors(self) -> tuple[float, int]:
        """The rate asked for, and the pairs it is a share of."""
        return self.far, self.impostors


def working_point(points: Sequence[TarAtFar], far: float = 1e-3) -> TarAtFar:
    """The point at `far`. Of a set with too few impostor pairs for it, the one at the lowest rate above that they can
    tell about; if there is none, at the highest rate."""
    enough = [point for point in points if point.far >= far and point.supported]
    return min(enough, key=lambda point: point.far) if enough else max(points, key=lambda point: point.far)


def support_of(rate: float, trials: int) -> Support:
    """Whether `trials` can tell about errors at `rate`: by the number that is expected, rate x trials.

    Below 1 they cannot ("none"): the threshold is the highest score there is. Below 10 the point hangs on a few pairs
    ("weak"): by the binomial law its rate is known no better than to a third.
    """
    expected = exact_rate(rate) * trials
    return "none" if expected < 1 else "weak" if expected < _GOOD_SUPPORT else "good"


def support_note(support: Support, trials: str = "impostor pairs") -> str:
    """The support in words, for tables; empty for good support."""
    return {"good": "", "weak": f"few {trials}", "none": f"too few {trials} to tell"}[support]


def exact_rate(rate: float) -> Fraction:
    """The decimal that was meant: 0.29 x 100 impostors is rank 29, in binary floats it is 28."""
    return Fraction(str(float(rate)))


def check_rates(rates: Sequence[float]) -> None:
    """Raise ValueError for a rate that is not above 0 and below 1."""
    for rate in rates:
        if not 0 < rate < 1:
            raise ValueError(f"a false accept rate lies between 0 and 1, not at {rate}")


def tar_at_far(
    genuine: NDArray[np.floating], impostor: NDArray[np.floating], far: Sequence[float] = FAR_POINTS
) -> tuple[TarAtFar, ...]:
    """TAR by rank, exact: the genuine scores strictly above that of one impostor pair, the threshold.

    It is the impostor at rank floor(FAR x impostors), counted from 0 from the top, so that no more than the share FAR
    of the impostor pairs is strictly above. genuine [G], impostor [I]: scores, finite. Raises ValueError for bad ones
    or none, and for a rate outside of 0..1.
    """
    genuine, impostor = _checked(genuine, impostor)
    check_rates(far)
    ranks = [int(exact_rate(rate) * len(impostor)) for rate in far]
    places = [len(impostor) - 1 - rank for rank in ranks]
    thresholds = np.partition(impostor, places)[places]
    above = len(genuine) - np.searchsorted(np.sort(genuine), thresholds, side="right")
    return tuple(
        TarAtFar(float(rate), float(count / len(genuine)), float(threshold), len(impostor))
        for rate, count, threshold in zip(far, above, thresholds, strict=True)
    )


@dataclass(frozen=True, eq=False)
class Roc:
    """The ROC: pairs whose score is at or above a threshold are accepted.

    far, tar: float64 [S + 1], both rising from 0 to 1. thresholds: float64 [S + 1], infinity and then the S distinct
    scores, falling. genuine, impostor: numbers of pairs.
    """

    far: NDArray[np.float64]
    tar: NDArray[np.float64]
    thresholds: NDArray[np.float64]
    genuine: int
    impostor: int

    @property
    def auc(self) -> float:
        """The area under the ROC, 0..1: the chance that a genuine pair scores above an impostor, ties counting half."""
        return float(np.trapezoid(self.tar, self.far))

    @property
    def eer(self) -> float:
        """The equal error rate, 0..1: where FAR and FRR, 1 - TAR, meet, the ROC being straight between its points."""
        return crossing(self.far, 1 - self.tar)

    def corners(self) -> "Roc":
        """Without the points that lie within a straight run of equal steps, as scikit-learn leaves them out."""
        accepted = np.rint(np.stack([self.far * self.impostor, self.tar * self.genuine]))
        inside = (np.diff(accepted, 2) == 0).all(axis=0)
        # The first of all is a point that scikit-learn puts before the scores only after it has dropped others.
        kept = (
            np.concatenate([[True, True], ~inside[1:], [True]]) if len(self.far) > 2 else np.ones(len(self.far), bool)
        )
        return Roc(self.far[kept], self.tar[kept], self.thresholds[kept], self.genuine, self.impostor)


def crossing(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """The value where two sequences meet, straight between their points: one of them rises, the other falls."""
    excess = one - other
    if excess[0] > 0:
        excess = -excess
    after = int((excess >= 0).argmax())
    if after == 0:
        return float(one[0])
    share = excess[after - 1] / (excess[after - 1] - excess[after])
    return float(one[after - 1] + share * (one[after] - one[after - 1]))


def roc(genuine: NDArray[np.floating], impostor: NDArray[np.floating]) -> Roc:
    """The ROC with a point for every distinct score, equal to scikit-learn's `roc_curve(drop_intermediate=False)`.

    genuine [G], impostor [I]: scores. Raises ValueError for scores that are not finite, and without any of a kind.
    """
    genuine, impostor = _checked(genuine, impostor)
    scores = np.concatenate([genuine, impostor])
    order = np.argsort(-scores, kind="stable")
    is_genuine = order < len(genuine)
    scores = scores[order]
    last = np.append(scores[1:] != scores[:-1], True)  # of the equal ones
    accepted = np.cumsum(is_genuine)[last]
    return Roc(
        far=np.append(0.0, (np.flatnonzero(last) + 1 - accepted) / len(impostor)),
        tar=np.append(0.0, accepted / len(genuine)),
        thresholds=np.append(np.inf, scores[last]),
        genuine=len(genuine),
        impostor=len(impostor),
    )


def roc_of_pairs(scores: NDArray[np.floating], same: NDArray[np.bool_]) -> Roc:
    """The ROC of pairs: scores [P], same bool [P]."""
    return roc(*split_scores(scores, same))


def split_scores(
    scores: NDArray[np.floating], same: NDArray[np.bool_]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    """The genuine and the impostor scores of pairs: scores [P], same bool [P]."""
    scores, same = np.asarray(scores), np.asarray(same, bool)
    if scores.ndim != 1 or scores.shape != same.shape:
        raise ValueError(f"pairs need a score and a flag each, not shapes {scores.shape} and {same.shape}")
    return scores[same], scores[~same]


def tar_at_nearest_roc_point(
    genuine: NDArray[np.floating], impostor: NDArray[np.floating], far: Sequence[float] = FAR_POINTS
) -> tuple[TarAtFar, ...]:
    """TAR by the rule behind published IJB-B and IJB-C numbers, which is not that of `tar_at_far`.

    Of the points of scikit-learn's `roc_curve`, with what it leaves out by default, the one whose FAR is nearest; of
    several with that FAR the highest, and between two equally near the one of the higher FAR. That may lie above the
    FAR asked for, and where the set has too few impostors it is 0 or 1 / impostors, whatever was asked for.
    """
    check_rates(far)
    curve = roc(genuine, impostor).corners()
    points = []
    for rate in far:
        distance = np.abs(curve.far - rate)
        place = len(distance) - 1 - int(distance[::-1].argmin())
        points.append(TarAtFar(float(rate), float(curve.tar[place]), float(curve.thresholds[place]), curve.impostor))
    return tuple(points)


def _checked(
    genuine: NDArray[np.floating], impostor: NDArray[np.floating]
) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
    kinds = {"genuine": np.asarray(genuine), "impostor": np.asarray(impostor)}
    for kind, scores in kinds.items():
        if scores.ndim != 1 or not len(scores):
            raise ValueError(f"there are no {kind} scores" if not scores.size else f"{kind} scores must be in a row")
        if not np.isfinite(scores).all():
            raise ValueError(f"{kind} score {int((~np.isfinite(scores)).argmax())} is not finite")
    return kinds["genuine"], kinds["impostor"]
