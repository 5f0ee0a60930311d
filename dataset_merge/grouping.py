"""Which identities are one person: from scores of pairs to groups, the same whatever the order of the sets.

Mutual best: a pair joins when each is the other's best in its set, and the score reaches the threshold. Clusters: every
pair that reaches the threshold joins. Either way the links are taken from the strongest to the weakest, and a link that
would bring together two identities which one set holds apart is refused: of a chain A-B-C it is the weakest link.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Rule = Literal["mutual", "clusters"]
PairDecision = Literal["joined", "below", "not mutual", "split"]


@dataclass(frozen=True)
class Pairs:
    """Pairs of identities that may be one person, each pair once: `first` < `second`, int64 [P]; `cosine` of their
    centres and `score` that decides, float64 [P].
    """

    first: NDArray[np.int64]
    second: NDArray[np.int64]
    cosine: NDArray[np.float64]
    score: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.first)


def join_pairs(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of all parts, one after another."""
    none = Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0), np.empty(0))
    columns = ((part.first, part.second, part.cosine, part.score) for part in (none, *parts))
    return Pairs(*map(np.concatenate, zip(*columns, strict=True)))


@dataclass(frozen=True)
class Split:
    """A link between `first` and `second` that was refused: it would have joined `held_apart`, two of one set."""

    first: int
    second: int
    score: float
    cosine: float
    held_apart: tuple[int, int]


@dataclass(frozen=True)
class Grouping:
    """Who is who. `group`: int64 [identities], 0..groups-1 by their first members; `match`: int64 [identities], the
    best-scored other one, -1 for none; `cosine`, `score`: float32 [identities], of that pair, NaN for none;
    `threshold` on the score; `pairs` and the `decision` on each; `splits`, from the strongest on.
    """

    group: NDArray[np.int64]
    match: NDArray[np.int64]
    cosine: NDArray[np.float32]
    score: NDArray[np.float32]
    threshold: float
    pairs: Pairs
    decision: list[PairDecision]
    splits: list[Split]


def group_identities(
    source: NDArray[np.int64],
    pairs: Pairs,
    threshold: float,
    rule: Rule = "mutual",
    within: bool = False,
    score: Callable[[int, int], float] = lambda first, second: -np.inf,
) -> Grouping:
    """Groups of the identities of several sets. `source`: int64 [identities], the set of each.

    Identities of one set are held apart; with `within` only those are whose own pair does not reach the threshold;
    `score` is asked for that of a pair that is not among `pairs`, which hold the best ones of each identity. Of equal
    scores the higher cosine goes first, then the lower numbers.
    """
    order = np.lexsort((pairs.second, pairs.first, -pairs.cosine, -pairs.score))
    enough = pairs.score >= threshold
    best = mutual_best(source, pairs, order)
    decision: list[PairDecision] = ["below"] * len(pairs)
    near = set(zip(pairs.first[enough].tolist(), pairs.second[enough].tolist(), strict=True)) if within else set()

    def allowed(one: int, other: int) -> bool:
        return within and ((one, other) in near or score(one, other) >= threshold)

    groups = _Groups(source, allowed)
    splits = []
    for pair in order[enough[order]]:
        first, second = int(pairs.first[pair]), int(pairs.second[pair])
        if rule == "mutual" and not best[pair]:
            decision[pair] = "not mutual"
            continue
        held_apart = groups.join(first, second)
        decision[pair] = "split" if held_apart else "joined"
        if held_apart:
            splits.append(Split(first, second, float(pairs.score[pair]), float(pairs.cosine[pair]), held_apart))
    return Grouping(groups.numbers(), *best_of_each(len(source), pairs, order), threshold, pairs, decision, splits)


def mutual_best(source: NDArray[np.int64], pairs: Pairs, order: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether each of a pair is the other's first in `order` (best pairs first) among the identities of its set."""
    sets = int(source.max(initial=0)) + 1
    best = np.ones(len(pairs), bool)
    for own, other in ((pairs.first, pairs.second), (pairs.second, pairs.first)):
        # Also within one set an identity can stand on either side of a pair, so both sides count for both.
        keys = np.concatenate([own[order] * sets + source[other[order]], other[order] * sets + source[own[order]]])
        rank = np.concatenate([np.arange(len(order))] * 2)
        firsts = np.full(len(source) * sets, len(order), np.int64)
        np.minimum.at(firsts, keys, rank)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        best &= firsts[own * sets + source[other]] == place
    return best


def best_of_each(
    identities: int, pairs: Pairs, order: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.float32]]:
    """Of each identity the other one in its best pair (-1: none), that pair's cosine and score (NaN: none)."""
    match = np.full(identities, -1, np.int64)
    cosine, score = np.full(identities, np.nan, np.float32), np.full(identities, np.nan, np.float32)
    last_first = order[::-1]
    own = np.stack([pairs.first[last_first], pairs.second[last_first]], 1).reshape(-1)
    other = np.stack([pairs.second[last_first], pairs.first[last_first]], 1).reshape(-1)
    match[own] = other
    cosine[own] = np.repeat(pairs.cosine[last_first], 2)
    score[own] = np.repeat(pairs.score[last_first], 2)
    return match, cosine, score


class _Groups:
    """Disjoint groups that keep apart what has to be. `allowed`: whether two of one set, the lower number first, may be
    together.
    """

    def __init__(self, source: NDArray[np.int64], allowed: Callable[[int, int], bool]) -> None:
        self._source, self._allowed = source, allowed
        self._members: dict[int, list[int]] = {}
        self._root = np.arange(len(source))

    def join(self, first: int, second: int) -> tuple[int, int] | None:
        """Join the groups of two identities, or return two of one set that this would bring together."""
        one, other = int(self._root[first]), int(self._root[second])
        if one == other:
            return None
        ones, others = self._members.get(one, [one]), self._members.get(other, [other])
        seen: dict[int, list[int]] = {}
        for member in ones:
            seen.setdefault(int(self._source[member]), []).append(member)
        for member in others:
            for twin in seen.get(int(self._source[member]), []):
                pair = (min(twin, member), max(twin, member))
                if not self._allowed(*pair):
                    return pair
        if len(ones) < len(others):
            one, ones, others = other, others, ones
        self._root[others] = one
        self._members[one] = ones + others
        return None

    def numbers(self) -> NDArray[np.int64]:
        """The group of each, numbered by their first members."""
        _, first, inverse = np.unique(self._root, return_index=True, return_inverse=True)
        rank = np.empty(len(first), np.int64)
        rank[np.argsort(first)] = np.arange(len(first))
        return rank[inverse]
