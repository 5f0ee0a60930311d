"""Is model B better than model A? Both on the same pairs, so that what is hard for both says nothing about either.

Differences get an interval by drawing groups of pairs, or identities, again, for both models at once (see
`bootstrap.py`). For the accuracy there are also exact tests: McNemar's, which takes pairs as independent, and the
permutation test over groups: were the models equal, either could have been called A in any group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.all_pairs import AllPairsResult
from utils.evaluation.bootstrap import (
    Interval,
    PairMeasures,
    check_drawing,
    drawn_groups,
    identity_draws,
    identity_estimates,
    interval,
    pair_draws,
)
from utils.evaluation.curves import FAR_POINTS
from utils.evaluation.folds import FoldResult
from utils.evaluation.identity_counts import IdentityCounts

_LOWER_IS_BETTER = {"EER"}


@dataclass(frozen=True)
class Comparison:
    """One measure of two models.

    a, b: what they reach, 0..1. difference: of B less A, with its interval. p_value: the chance of a difference as
    large or larger, either way, between equal models. test: how that was found.
    """

    measure: str
    a: float
    b: float
    difference: Interval
    p_value: float
    test: str

    @property
    def better(self) -> Literal["A", "B"] | None:
        """The better model, if p is below 1 - level of the interval; else None."""
        if self.p_value >= 1 - self.difference.level or self.a == self.b:
            return None
        return "B" if (self.b > self.a) != (self.measure in _LOWER_IS_BETTER) else "A"

    def sentence(self, a: str, b: str) -> str:
        """What was found, for people; `a` and `b` are the models' names."""
        gap = self.difference
        found = {
            "A": f"{a} is better than {b}",
            "B": f"{b} is better than {a}",
            None: f"{a} and {b} do not differ surely",
        }
        points = f"{100 * gap.estimate:+.3f} points ({gap.level:.0%}: {100 * gap.low:+.3f} .. {100 * gap.high:+.3f})"
        return (
            f"{self.measure}: {found[self.better]}: {a} {100 * self.a:.3f} %, {b} {100 * self.b:.3f} %, "
            f"{points}, p = {self.p_value:.2g} ({self.test})"
        )


def permutation_p_value(differences: NDArray[np.integer]) -> float:
    """How often random signs make the sum of whole numbers as large as it is, either way: exact, over all signs.

    differences: integers [G], for each group how many more pairs B judges rightly than A. With groups of one pair this
    is McNemar's exact test, which takes pairs as independent, and is too sure where they share images.
    """
    sizes = np.abs(np.asarray(differences, np.int64))
    sizes = sizes[sizes > 0]
    reach = int(sizes.sum())
    chance = np.zeros(2 * reach + 1)  # of each sum from -reach to reach
    chance[reach] = 1.0
    for size in sizes:
        chance = (np.roll(chance, size) + np.roll(chance, -size)) / 2  # never rolls over: the ends are still 0
    sums = np.arange(-reach, reach + 1)
    return min(1.0, float(chance[np.abs(sums) >= abs(int(np.sum(differences)))].sum()))


def compare_pairs(
    a: FoldResult,
    b: FoldResult,
    groups: NDArray[np.integer] | None = None,
    far: Sequence[float] = FAR_POINTS,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Accuracy, AUC, EER and TAR at each FAR of two models on one list of pairs; groups as for `bootstrap_pairs`.

    Raises ValueError when the results are not of the same pairs.
    """
    check_drawing(replicates, level)
    if not np.array_equal(a.same, b.same) or len(a.thresholds) != len(b.thresholds):
        raise ValueError("the models were tested on different pairs: test both on the same set")
    numbers, unit = drawn_groups(len(a.same), groups)
    measures = [PairMeasures(result, far) for result in (a, b)]
    once = np.ones(len(a.same), np.int64)
    draws = pair_draws(measures, numbers, replicates, seed)
    names = ["accuracy", "AUC", "EER", *(_tar_name(rate) for rate in far)]
    found = _compared(names, measures[0](once), measures[1](once), draws, level, f"bootstrap over {unit}")
    gains = b.correct.astype(np.int64) - a.correct.astype(np.int64)
    accuracy = found[0]
    exact = permutation_p_value(np.rint(np.bincount(numbers, gains)).astype(np.int64))
    test = f"exact permutation over {unit}; McNemar over pairs: p = {permutation_p_value(gains):.2g}"
    return (Comparison("accuracy", accuracy.a, accuracy.b, accuracy.difference, exact, test), *found[1:])


def compare_identities(
    a: IdentityCounts,
    b: IdentityCounts,
    result_a: AllPairsResult,
    result_b: AllPairsResult,
    replicates: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """AUC, EER and TAR at each FAR of two models in the all-pairs test, by drawing identities for both at once.

    Raises ValueError when the results are not of the same set and rates.
    """
    check_drawing(replicates, level)
    pairs_a, pairs_b = ((r.genuine, r.impostor, r.far) for r in (result_a, result_b))
    if pairs_a != pairs_b or not np.array_equal(a.people, b.people):
        raise ValueError("the models were tested on different sets or rates: test both on the same")
    draws = identity_draws([a, b], result_a.far, replicates, seed)
    for values, counts, result in zip(draws, (a, b), (result_a, result_b), strict=True):
        once = counts.measures(np.ones((1, len(counts.people)), np.int64), result.far)[0]
        values += identity_estimates(result) - once
    names = ["AUC", "EER", *(_tar_name(rate) for rate in result_a.far)]
    estimates = identity_estimates(result_a), identity_estimates(result_b)
    return tuple(_compared(names, *estimates, draws, level, f"bootstrap over {len(a.people):,} identities"))


def _tar_name(rate: float) -> str:
    return f"TAR at FAR {rate:.0e}"


def _compared(
    names: Sequence[str],
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    draws: NDArray[np.float64],
    level: float,
    test: str,
) -> list[Comparison]:
    """draws: float64 [2, replicates, measures], the models drawn alike."""
    found = []
    for name, of_a, of_b, gaps in zip(names, a, b, (draws[1] - draws[0]).T, strict=True):
        gaps = gaps[~np.isnan(gaps)]
        # The draw that is the set itself counts too, so that p is never 0.
        beyond = 1 + min(int((gaps <= 0).sum()), int((gaps >= 0).sum()))
        p_value = min(1.0, 2 * beyond / (1 + len(gaps)))
        found.append(Comparison(name, float(of_a), float(of_b), interval(of_b - of_a, gaps, level), p_value, test))
    return found
