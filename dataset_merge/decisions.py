"""What becomes of every identity of every set, from groups of people: the rows of `merge.csv`.

Decisions are: `added`, an identity of the merged set; `joined`, its images come under the label of another one that was
added; `dropped`, its images are not taken because another set has the person; `excluded`, a person of a test set.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from data.face_sets import FaceSet

OnMatch = Literal["join", "drop", "keep-larger"]
KEPT, LEFT = ("added", "joined"), ("dropped", "excluded")


class DecisionsError(ValueError):
    """A table of decisions does not fit the sets, or contradicts itself; the message names file and line."""


class Decision(NamedTuple):
    """What became of one identity; a row of `merge.csv`.

    `source`: number of its set, from 0; `label`: its name there; `images`: how many it has there; `new_label`: its
    label in the merged set, None for one that is not in it; `match_source`, `match_label`: the most similar identity of
    another set, for an excluded one the set and the image or identity there; `score`: how similar; `decision`.
    """

    source: int
    label: str
    images: int
    new_label: int | None
    match_source: int | str | None
    match_label: str | None
    score: float | None
    decision: str


COLUMNS = Decision._fields


class Match(NamedTuple):
    """The most similar identity: set (a number, or the path of an excluded one), name there, and how similar."""

    source: int | str
    label: str
    score: float


class Identities:
    """The identities of several sets, numbered one set after another: `source` and `own` (class in its set), int64
    [identities]; `images`, how many each has; `firsts`, int64 [sets + 1], where each set begins, and their number.
    """

    def __init__(self, sets: Sequence[FaceSet]) -> None:
        counts = [len(faces.identities) for faces in sets]
        self._sets = sets
        self.firsts = np.cumsum([0, *counts])
        self.source = np.repeat(np.arange(len(sets)), counts)
        self.own = np.arange(self.firsts[-1]) - self.firsts[self.source]
        self.images = np.concatenate(
            [np.bincount(faces.labels, minlength=len(faces.identities)) for faces in sets]
        ).astype(np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, identity: int) -> str:
        """What its set calls an identity."""
        return self._sets[int(self.source[identity])].identities[int(self.own[identity])]


def decide_groups(
    people: Identities,
    group: np.ndarray,
    matches: Sequence[Match | None],
    on_match: OnMatch,
    excluded: Mapping[int, Match],
) -> list[Decision]:
    """A decision for every identity, in their order.

    `group`: int64 [identities], who is who, numbered in the order of their first members, which is that of the new
    labels; `matches`: of each identity; `excluded`: people of test sets, by number. Who is one person with an
    excluded identity is excluded, too.
    """
    first_excluded: dict[int, Match] = {}
    for identity in sorted(excluded):
        first_excluded.setdefault(int(group[identity]), excluded[identity])
    kept_source = _kept_sources(people, group, on_match)
    labels: dict[int, int] = {}
    order = np.argsort(group, kind="stable").tolist()
    decisions: list[Decision | None] = [None] * len(people)
    for identity in order:
        number, source = int(group[identity]), int(people.source[identity])
        match, new_label, decision = matches[identity], None, "dropped"
        if number in first_excluded:
            match, decision = excluded.get(identity, first_excluded[number]), "excluded"
        elif on_match == "join" or source == kept_source[number]:
            decision = "joined" if number in labels else "added"
            new_label = labels.setdefault(number, len(labels))
        decisions[identity] = Decision(
            source,
            people.name(identity),
            int(people.images[identity]),
            new_label,
            match.source if match else None,
            match.label if match else None,
            round(match.score, 6) if match else None,
            decision,
        )
    return [decision for decision in decisions if decision is not None]


def _kept_sources(people: Identities, group: np.ndarray, on_match: OnMatch) -> np.ndarray:
    """The set whose images each group keeps, int64 [groups]: the first that has it, or that with most images of it."""
    groups = int(group.max()) + 1 if len(group) else 0
    kept = np.full(groups, np.iinfo(np.int64).max)
    if on_match != "keep-larger":
        np.minimum.at(kept, group, people.source)
        return kept
    most = np.full(groups, -1)
    for source in range(int(people.source.max()) + 1):
        own = people.source == source
        images = np.bincount(group[own], weights=people.images[own], minlength=groups).astype(np.int64)
        better = images > most
        kept[better], most[better] = source, images[better]
    return kept


def members(decisions: Sequence[Decision]) -> list[list[int]]:
    """The numbers of the identities under each new label, in order."""
    found: list[list[int]] = [
        [] for _ in range(1 + max((d.new_label for d in decisions if d.new_label is not None), default=-1))
    ]
    for identity, decision in enumerate(decisions):
        if decision.new_label is not None:
            found[decision.new_label].append(identity)
    return found


def decision_counts(
    titles: Sequence[str], decisions: Sequence[Decision], duplicates: int
) -> tuple[tuple[str, ...], list[tuple[str | int, ...]]]:
    """What became of each set, as a table's columns and rows; the last row is the merged set."""
    shown = ["joined", "added"] + [name for name in LEFT if any(row.decision == name for row in decisions)]
    rows: list[tuple[str | int, ...]] = []
    for source, title in enumerate(titles):
        own = [row for row in decisions if row.source == source]
        counts = [sum(row.decision == name for row in own) for name in shown]
        rows.append((title, len(own), sum(row.images for row in own), *counts))
    kept = [row for row in decisions if row.new_label is not None]
    images = sum(row.images for row in kept) - duplicates
    rows.append(("merged", len({row.new_label for row in kept}), images, *("" for _ in shown)))
    return ("set", "identities", "images", *shown), rows
