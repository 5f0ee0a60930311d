"""Confidence intervals by drawing again from the people, not from the pairs.

Pairs are no independent trials: two that share an image or a person err together. What is drawn again, with
replacement, are therefore whole groups. In a list of pairs these are the pairs that are connected by shared images. In
the all-pairs test they are the identities: one that is drawn m times counts m times with its genuine pairs, and the
impostor pairs of two identities m1 x m2 times (copies of one identity are not compared). This is the vertex bootstrap
of T. Snijders and S. Borgatti (Connections 22, 1999); R. Fogliato, P. Patil and P. Perona, "Confidence intervals for
error rates in 1:1 matching tasks" (IJCV 2024), compare it with others for faces. Intervals are quantiles of the draws.

Nothing is compared again for a draw. For pairs it is a weighted count along scores sorted once, for all pairs a product
of the draws with counts by identity and score: see `identity_counts.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.all_pairs import AllPairsResult
from utils.evaluation.curves import FAR_POINTS, check_rates, crossing, exact_rate
from utils.evaluation.folds import FoldResult, correct_counts, first_accepting
from utils.evaluation.identity_counts import IdentityCounts

# With one group of more than this share of the pairs, drawing groups would be drawing that one or not.
_LARGEST_GROUP = 0.2
_DRAWS_AT_ONCE = 50


@dataclass(frozen=True)
class Interval:
    """A number and the interval that holds it with the probability `level`."""

    estimate: float
    low: float
    high: float
    level: float

    @property
    def known(self) -> bool:
        """Whether the draws told an interval: of a share that is 0 or 1 in each of them, they tell nothing."""
        return self.low < self.high

    def __str__(self) -> str:
        return f"{100 * self.estimate:.3f} % ({self.level:.0%}: {100 * self.low:.3f} .. {100 * self.high:.3f})"


@dataclass(frozen=True)
class Intervals:
    """Measures with their intervals. accuracy: None where there are no folds. unit: what was drawn again, in words."""

    accuracy: Interval | None
    auc: Interval
    eer: Interval
    far: tuple[float, ...]
    tar: tuple[Interval, ...]
    unit: str
    replicates: int
    seed: int


def connected_groups(index: NDArray[np.integer]) -> NDArray[np.int64]:
    """A group for each pair, int64 [P]: pairs that share an image, directly or through others, have the same.

    index: integers [P, 2], the images (or people) of each pair.
    """
    first, second = np.asarray(index, np.int64).T
    lowest = np.arange(int(max(first.max(), second.max())) + 1)  # of the images known to be connected with each
    while (lowest[first] != lowest[second]).any():
        least = np.minimum(lowest[first], lowest[second])
        np.minimum.at(lowest, lowest[first], least)
        np.minimum.at(lowest, lowest[second], least)
        while (lowest != lowest[lowest]).any():
            lowest = lowest[lowest]
    return np.unique(lowest[first], return_inverse=True)[1]


def drawn_groups(pairs: int, groups: NDArray[np.integer] | None) -> tuple[NDArray[np.int64], str]:
    """The group 0..G-1 of each pair that draws go by, and their description.

    Without groups, and where one of them has more than a fifth of the pairs, each pair is a group of its own.
    """
    if groups is None:
        return np.arange(pairs), f"{pairs:,} pairs, taken as independent"
    if np.shape(groups) != (pairs,):
        raise ValueError(f"{pairs} pairs need as many groups, not shape {np.shape(groups)}")
    names, numbers, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if sizes.max() > _LARGEST_GROUP * pairs:
        return np.arange(pairs), (
            f"{pairs:,} pairs, taken as independent: {sizes.max():,} of them hang together by shared images"
        )
    return numbers, f"{len(names):,} groups of pairs that share images, of {pairs:,} pairs"


class PairMeasures:
    """Accuracy, AUC, EER and TAR at FAR of the pairs of a verification set, each pair with a weight.

    What does not depend on the weights, the order of the scores and the first threshold that accepts each, is worked
    out once.
    """

    def __init__(self, result: FoldResult, far: Sequence[float]) -> None:
        check_rates(far)
        if result.same.all() or not result.same.any():
            raise ValueError("intervals need genuine and impostor pairs")
        self._rates = [exact_rate(rate) for rate in far]
        self._order = np.argsort(result.distances, kind="stable")
        distances = result.distances[self._order]
        self._genuine = result.same[self._order].astype(np.int64)
        new = np.append(True, distances[1:] != distances[:-1])
        self._last = np.append(new[1:], True)
        self._first = np.maximum.accumulate(np.where(new, np.arange(len(new)), 0))  # of the equal ones
        self._fold, self._folds = result.fold, len(result.thresholds)
        self._first_accepting = first_accepting(result.distances)
        self._sign = np.where(result.same, 1, -1)

    def __call__(self, weights: NDArray[np.integer]) -> NDArray[np.float64]:
        """Accuracy, AUC, EER and the TARs, float64 [3 + rates]; NaN without weight on either kind of pair.

        weights: integers [P], how many times each pair counts.
        """
        sorted_weights = weights[self._order]
        accepted = np.cumsum(sorted_weights)
        genuine = np.cumsum(sorted_weights * self._genuine)
        impostor = accepted - genuine
        if not (genuine[-1] and impostor[-1]):
            return np.full(3 + len(self._rates), np.nan)
        far = np.append(0.0, impostor[self._last] / impostor[-1])
        tar = np.append(0.0, genuine[self._last] / genuine[-1])
        above = np.append(0, genuine)
        ranks = [rate.numerator * int(impostor[-1]) // rate.denominator for rate in self._rates]
        places = self._first[np.searchsorted(impostor, ranks, side="right")]
        measures = [self._accuracy(weights), np.trapezoid(tar, far), crossing(far, 1 - tar)]
        return np.array([*measures, *(above[places] / genuine[-1])])

    def _accuracy(self, weights: NDArray[np.integer]) -> float:
        correct = correct_counts(self._first_accepting, self._fold, self._folds, weights * self._sign)
        best = (correct.sum(axis=0) - correct).argmax(axis=1)
        sizes = np.bincount(self._fold, weights, self._folds)
        drawn = sizes > 0
        return float((correct[np.arange(self._folds), best][drawn] / sizes[drawn]).mean())


def pair_draws(
    measures: Sequence[PairMeasures], groups: NDArray[np.int64], replicates: int, seed: int
) -> NDArray[np.float64]:
    """The measures of drawn groups, float64 [models, replicates, measures]; every model has the same draws."""
    random = np.random.default_rng(seed)
    count = int(groups.max()) + 1
    drawn = np.empty((len(measures), replicates, len(measures[0](np.ones(len(groups), np.int64)))))
    for replicate in range(replicates):
        weights = np.bincount(random.integers(0, count, count), minlength=count)[groups]
        for values, measure in zip(drawn, measures, strict=True):
            values[replicate] = measure(weights)
    return drawn


def interval(estimate: float, draws: NDArray[np.float64], level: float) -> Interval:
    """The interval between the quantiles of the draws that leave (1 - level) / 2 on either side."""
    tail = (1 - level) / 2
    low, high = np.nanquantile(draws, [tail, 1 - tail])
    return Interval(float(estimate), float(low), float(high), level)


def bootstrap_pairs(
    result: FoldResult,
    groups: NDArray[np.integer] | None = None,
    far: Sequence[float] = FAR_POINTS,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Intervals:
    """Intervals for the numbers of a list of pairs.

    groups: integers [P], what is drawn again as one: `connected_groups` of the pairs' images, or of the people where
    they are known. None, or one group with more than a fifth of all pairs: the pairs are drawn; `unit` says so.
    """
    check_drawing(replicates, level)
    numbers, unit = drawn_groups(len(result.same), groups)
    measures = PairMeasures(result, far)
    exact = measures(np.ones(len(result.same), np.int64))
    draws = pair_draws([measures], numbers, replicates, seed)[0]
    accuracy, auc, eer, *tar = (interval(*column, level) for column in zip(exact, draws.T, strict=True))
    return Intervals(accuracy, auc, eer, tuple(map(float, far)), tuple(tar), unit, replicates, seed)


def identity_draws(counts: Sequence[IdentityCounts], far: Sequence[float], replicates: int, seed: int) -> NDArray:
    """AUC, EER and TARs of drawn identities, float64 [models, replicates, 2 + rates], the same draws for each model."""
    random = np.random.default_rng(seed)
    people = len(counts[0].people)
    parts = []
    for start in range(0, replicates, _DRAWS_AT_ONCE):
        size = min(_DRAWS_AT_ONCE, replicates - start)
        times = random.multinomial(people, np.full(people, 1 / people), size)
        parts.append([count.measures(times, far) for count in counts])
    return np.concatenate(parts, axis=1)


def identity_estimates(result: AllPairsResult) -> NDArray[np.float64]:
    """AUC, EER and the TARs as `all_pairs` has them, float64 [2 + rates]."""
    return np.array([result.auc, result.eer, *result.tar])


def bootstrap_identities(
    counts: IdentityCounts, result: AllPairsResult, replicates: int = 1000, level: float = 0.95, seed: int = 0
) -> Intervals:
    """Intervals for the numbers of the all-pairs test, `result`, over the identities of `counts`.

    How counts by bins differ from the exact numbers is taken off the draws.
    """
    check_drawing(replicates, level)
    exact = identity_estimates(result)
    once = counts.measures(np.ones((1, len(counts.people)), np.int64), result.far)[0]
    draws = (identity_draws([counts], result.far, replicates, seed)[0] + exact - once).clip(0, 1)
    auc, eer, *tar = (interval(*column, level) for column in zip(exact, draws.T, strict=True))
    unit = f"{len(counts.people):,} identities"
    return Intervals(None, auc, eer, result.far, tuple(tar), unit, replicates, seed)


def check_drawing(replicates: int, level: float) -> None:
    """Raise ValueError for numbers that give no interval."""
    if replicates < 2 or not 0 < level < 1:
        raise ValueError(f"an interval needs 2 draws or more and a level within 0..1, not {replicates} and {level}")
