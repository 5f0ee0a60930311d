"""--t auto: the threshold from the sets themselves, for a share of wrong joins that one accepts.

Scores that are known to be of different people, and of one person (reference_scores.py), say how many joins would be
wrong at each threshold. docs/merging_threshold.md has the formulas and their test.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from dataset_merge.centres import Centres
from dataset_merge.grouping import Pairs, Rule, mutual_best
from dataset_merge.reference_scores import SEED, Halves, Impostors, genuine_scores
from dataset_merge.tails import Tail, fit_tails

# Below these numbers nothing is said about a tail.
_LEAST_IDENTITIES = 200
_LEAST_SCORES = 50
# A share of wrong joins that needs more than so many times the pairs that were compared is not extrapolated to.
_REACH = 100.0
_BINS = 400
# Thresholds that fewer of the sets' own pairs reach rest on the fitted tail.
_FEW = 10.0
# With so many times the share of wrong joins that was asked for, by the scores as they are, there is a warning. LFW
# with its own labels has up to 2.3, with 5 % of wrong ones 2.8 and more (docs/merging_threshold.md).
_WARNED = 2.5
_ADVICE = "give a threshold (--t 0.65, say), and look at the pairs next to it in the report"


class CalibrationError(ValueError):
    """The sets cannot tell where the threshold should be; the message says why and what to do."""


@dataclass(frozen=True)
class Calibration:
    """`threshold` on the score, from which on a pair joins. `edges` [B + 1] and `genuine`, `impostor` counts [B] of
    scores, for a picture. `expected_wrong` of `expected_joins`, with its 90 % range. `extrapolated`: the threshold lies
    beyond what the sets' own pairs reach. `equivalent_cosine`: that reaches the threshold against the usual rival.
    `expected_recall`: share of halves that would be joined, NaN without halves. `explanation`: paragraphs.
    `counted_wrong`: wrong joins expected if all scores inside the sets are of different people, those too that look
    like one person under two names; NaN where such people are looked for. `warning`: where it is far more; or empty.
    """

    threshold: float
    edges: NDArray[np.float64]
    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    explanation: list[str]
    expected_wrong: float
    expected_wrong_range: tuple[float, float]
    expected_joins: float
    extrapolated: bool
    equivalent_cosine: float
    expected_recall: float
    counted_wrong: float
    warning: str = ""


def require_identities(people: Sequence[int], names: Sequence[str]) -> None:
    """Raise CalibrationError unless one of the sets has as many identities as a calibration needs. `people`: identities
    of each set; `names`: of the sets."""
    largest = max(range(len(people)), key=people.__getitem__)
    if people[largest] < _LEAST_IDENTITIES:
        raise CalibrationError(
            f"--t auto needs {_LEAST_IDENTITIES} identities or more in one of the sets, to see how similar different "
            f"people are; the largest, {names[largest]}, has {people[largest]}: {_ADVICE}"
        )


def calibrate(
    impostors: Sequence[Impostors],
    halves: Sequence[Halves],
    centres: Sequence[Centres],
    found: Sequence[tuple[int, int, Pairs]],
    rule: Rule,
    wrong_joins: float,
    names: Sequence[str],
) -> Calibration:
    """The lowest threshold at which the expected wrong joins are at most `wrong_joins` of the joins.

    `found`: numbers of two sets, and the scored pairs between them. Raises CalibrationError where there are too few
    identities or matches of theirs, or the answer lies too far beyond what was seen.
    """
    scores = np.sort(np.concatenate([part.scores for part in impostors]))
    compared = sum(part.compared for part in impostors)
    people = [int((part.images > 0).sum()) for part in centres]
    largest = max(range(len(people)), key=lambda number: (people[number], impostors[number].usual_rival))
    require_identities(people, names)
    if len(scores) < _LEAST_SCORES:
        raise CalibrationError(
            f"--t auto needs {_LEAST_SCORES} matches of different people inside the sets, to see how high these score, "
            f"and found {len(scores)}: {_ADVICE}"
        )
    genuine = genuine_scores(halves, centres)
    maxima = scores if rule == "mutual" else np.concatenate([part.nearest for part in impostors])
    tails = fit_tails(scores, maxima, genuine, SEED)
    joins = [(one, other, _join_scores(pairs, one == other, rule)) for one, other, pairs in found]
    within = any(one == other for one, other, _ in found)
    every = np.sort(np.concatenate([np.empty(0), *(part for _, _, part in joins)]))
    thresholds = np.linspace(tails[0].start, max(1.0, float(scores[-1])), 2001)
    chances = _open_pairs(joins, people, rule, thresholds) / compared
    expected = _Expected(len(every) - np.searchsorted(every, thresholds), tails[0].above(thresholds) * chances)
    at = expected.lowest(wrong_joins)
    threshold, joined = float(thresholds[at]), expected.joined[at]
    advice = f"take --rule clusters, or {_ADVICE}" if within and rule == "mutual" else _ADVICE
    _require_few_wrong(expected, at, threshold, wrong_joins, within, advice)
    seen = float(tails[0].above(threshold))  # of the scores that the sets gave, those expected above it
    if joined and seen * _REACH < 1:
        raise CalibrationError(
            f"--t auto cannot answer: {wrong_joins:.2%} wrong among {joined:,} joins needs a threshold that "
            f"{seen:.2g} of the {compared:,.0f} pairs inside the sets are expected to reach, too far beyond what they "
            f"show: allow more wrong joins (--wrong-joins), or {advice}"
        )
    lowest, highest = np.percentile([float(tail.above(threshold)) * chances[at] for tail in tails[1:]], [5, 95])
    above = len(scores) - int(np.searchsorted(scores, threshold))
    edges = np.linspace(min(scores[0], genuine.min(initial=1.0)), thresholds[-1], _BINS + 1)
    calibration = Calibration(
        threshold,
        edges,
        genuine=np.histogram(genuine, edges)[0],
        impostor=np.histogram(scores, edges)[0],
        explanation=[],
        expected_wrong=float(expected.wrong[at]),
        expected_wrong_range=(float(lowest), float(highest)),
        expected_joins=float(joined),
        extrapolated=seen < _FEW,
        equivalent_cosine=float(threshold + impostors[largest].usual_rival),
        expected_recall=float((genuine >= threshold).mean()) if len(genuine) else float("nan"),
        counted_wrong=float("nan") if within else above * float(chances[at]),
    )
    return replace(
        calibration,
        explanation=_explain(calibration, tails[0], compared, people, wrong_joins, rule, len(genuine)),
        warning=_warning(calibration, above, seen, wrong_joins),
    )


class _Expected:
    """What rising thresholds would come to: pairs `joined`, int64 [T], and `wrong` ones among them, float64 [T], as
    expected; `shares`: of wrong ones. `right`: the others, 0 where too many are wrong to tell; `many`: where at least
    half of the people in common would be joined."""

    def __init__(self, joined: NDArray[np.int64], wrong: NDArray[np.float64]) -> None:
        self.joined, self.wrong = joined, wrong
        self.shares = wrong / np.maximum(joined, 1)
        self.right = np.where(self.shares < 1 / 3, joined - wrong, 0)
        self.many = self.right >= max(_FEW, self.right.max() / 2)

    def lowest(self, wrong_joins: float) -> int:
        """The number of the lowest threshold that keeps the share of wrong joins."""
        # From where the share is lowest downwards: below, all that are left to join wrongly may have joined already.
        at = _lowest(self.shares, int(self.shares.argmin()), wrong_joins)
        # Among the few highest pairs one wrong is a high share.
        if not self.many[at] and (self.shares[self.many] <= wrong_joins).any():
            at = _lowest(self.shares, int(np.where(self.many, self.shares, np.inf).argmin()), wrong_joins)
        return at


def _require_few_wrong(
    expected: _Expected, at: int, threshold: float, wrong_joins: float, within: bool, advice: str
) -> None:
    """Raise CalibrationError where `threshold`, which is number `at`, does not keep the share of wrong joins, or keeps
    it by joining nothing while there are people to join."""
    joined, shares, many = expected.joined[at], expected.shares, expected.many
    if not joined and many.any():
        raise CalibrationError(
            f"--t auto cannot keep wrong joins at {wrong_joins:.2%}: about {expected.right.max():,.0f} people seem to "
            f"be {'there twice' if within else 'in common'}, but to join half of them {shares[many].min():.1%} or more "
            f"of the joins would be wrong (are there wrong labels in the sets? --clean): allow as many with "
            f"--wrong-joins, or {advice}"
        )
    if shares[at] > wrong_joins:
        reason = (
            "a set holds too many people twice for its own pairs to show how high different people score"
            if within
            else "different people inside the sets score too high"
        )
        raise CalibrationError(
            f"--t auto cannot keep wrong joins at {wrong_joins:.2%}: at the best threshold, {threshold:.3f}, "
            f"{shares[at]:.2%} of {joined:,} joins would be wrong; {reason}: allow as many with --wrong-joins, or "
            f"{advice}"
        )


def _lowest(shares: NDArray[np.float64], start: int, wrong_joins: float) -> int:
    """From `start` downwards the last one before the share of wrong joins is too high."""
    return int(np.flatnonzero(np.append(True, shares[:start] > wrong_joins))[-1])


def _warning(done: Calibration, above: int, seen: float, wrong_joins: float) -> str:
    """What to say where many pairs inside the sets score as one person does; `seen`: what the tail expects of them.

    The tail leaves such pairs out, as people whom a set holds twice. Wrong labels make them, too, and wrong joins with
    them: an identity with images of someone else is joined with that one's identity in another set.
    """
    if above < _FEW or not done.counted_wrong > _WARNED * wrong_joins * done.expected_joins:
        return ""
    return (
        f"The share of wrong joins may be far above {wrong_joins:.2%}: {above:,} pairs of identities inside the sets "
        f"reach the threshold, {seen:,.0f} would for different people. Either the sets hold people twice, or labels "
        f"are wrong; then {done.counted_wrong / max(done.expected_joins, 1):.1%} of the joins may well be wrong, "
        "and more with --centre medoid. Look at --clean report, keep to --centre mean or trimmed, and judge the pairs "
        "next to the threshold in the report."
    )


def _join_scores(pairs: Pairs, within: bool, rule: Rule) -> NDArray[np.float64]:
    """Scores of the pairs that join if they reach the threshold."""
    if rule == "clusters" or not len(pairs):
        return pairs.score
    count = int(pairs.first.max()) + 1
    shift = 0 if within else count
    source = np.zeros(shift + max(count, int(pairs.second.max()) + 1), np.int64)
    source[count:] = 0 if within else 1
    apart = Pairs(pairs.first, pairs.second + shift, pairs.cosine, pairs.score)
    order = np.lexsort((pairs.second, pairs.first, -pairs.cosine, -pairs.score))
    return pairs.score[mutual_best(source, apart, order)]


def _open_pairs(
    joins: Sequence[tuple[int, int, NDArray[np.float64]]], people: Sequence[int], rule: Rule, thresholds: NDArray
) -> NDArray[np.float64]:
    """Pairs that can join wrongly at each threshold: N x M of two sets, N (N - 1) / 2 within one.

    By the rule of mutual best those who have joined are no one else's any more: the pairs of the others are left.
    """
    total = np.zeros(len(thresholds))
    for one, other, scores in joins:
        n, m = people[one], people[other]
        rising = np.sort(scores)
        joined = len(rising) - np.searchsorted(rising, thresholds) if rule == "mutual" else np.zeros(len(thresholds))
        if one == other:
            left = np.maximum(n - 2 * joined, 0)
            total += left * np.maximum(left - 1, 0) / 2
        else:
            total += np.maximum(n - joined, 0) * np.maximum(m - joined, 0)
    return total


def _explain(
    done: Calibration,
    tail: Tail,
    compared: float,
    people: Sequence[int],
    wrong_joins: float,
    rule: Rule,
    halves: int,
) -> list[str]:
    """The calibration in words."""
    low, high = done.expected_wrong_range
    counted = "" if np.isnan(done.counted_wrong) else f", or {done.counted_wrong:.1f} with all that score so in a set"
    texts = [
        f"The threshold is {done.threshold:.3f}, a cosine of {done.equivalent_cosine:.3f} for a pair with the usual "
        f"rival. {done.expected_joins:,.0f} pairs reach it, of which {done.expected_wrong:.1f} ({low:.1f} to "
        f"{high:.1f}, 90 % range of the fit{counted}) are expected to be different people: it is the lowest threshold "
        f"that keeps this share at {wrong_joins:.2%}.",
        f"How high different people score was seen on {compared:,.0f} pairs of identities that one set holds apart "
        f"(sets of {', '.join(f'{n:,}' for n in people)} identities). The scores above {tail.start:.3f} follow a "
        f"generalised Pareto tail with shape {tail.shape:g} and scale {tail.scale:.3f}; pairs in it that look like one "
        f"person under two names are not counted.",
    ]
    if rule == "mutual":
        texts.append(
            "Identities that have joined cannot be joined with anyone else of that set, so only pairs of the others "
            "are counted as chances for a wrong join."
        )
    if halves:
        texts.append(
            f"Of {halves:,} identities cut in two halves, {done.expected_recall:.1%} would be joined, with scores "
            "brought to the numbers of images that the sets' identities have. Photos of one set tend to be more alike "
            "than those of two, so expect fewer."
        )
    else:
        texts.append("No identity has two images, so how many people are missed is not known.")
    if done.extrapolated:
        texts.append(
            f"Fewer than {_FEW:g} pairs inside the sets are expected above the threshold: it rests on the fitted tail. "
            "Look at the pairs next to it."
        )
    return texts
