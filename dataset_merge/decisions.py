"""What becomes of every identity of every set: the rows of `merge.csv`, made from groups of people or read back.

Decisions are: `added`, an identity of the merged set; `joined`, its images come under the label of another one that was
added; `dropped`, its images are not taken because another set has the person; `excluded`, a person of a test set.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.face_sets import FaceSet
from utils.files import write_csv_atomic

OnMatch = Literal["join", "drop", "keep-larger"]
KEPT, LEFT = ("added", "joined"), ("dropped", "excluded")


class DecisionsError(ValueError):
    """A table of decisions does not fit the sets, or contradicts itself; the message names file and line."""


@dataclass(frozen=True, slots=True)
class Decision:
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


COLUMNS = tuple(field.name for field in fields(Decision))


class Match(NamedTuple):
    """The most similar identity: set (a number, or the path of an excluded one), name there, and how similar."""

    source: int | str
    label: str
    score: float


class Identities:
    """The identities of several sets, numbered one set after another: `source` and `own` (class in its set), int64
    [identities]; `images`, how many each has.
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


def write_decisions(path: Path, decisions: Iterable[Decision]) -> None:
    """Write the rows as `merge.csv`."""
    write_csv_atomic(path, COLUMNS, (astuple(decision) for decision in decisions))


class _Row(NamedTuple):
    """`left_label`: the new_label that stands in a row which is left out."""

    line: int
    identity: int
    decision: Decision
    left_label: str


def read_decisions(path: Path, sets: Sequence[FaceSet]) -> list[Decision]:
    """The decisions in a table that `write_decisions` wrote and people may have edited, for every identity in order.

    Rows may stand in any order. Those with one new_label become one identity; a `joined` one without a new_label joins
    its match. One that has its new_label to itself is an identity by itself where a row that is left out has that
    new_label; else it is refused, as nobody can tell whom it is to join. New labels are numbered without holes, in
    their order; kept rows without one come last. Raises DecisionsError with the line.
    """
    people = Identities(sets)
    rows = sorted(_read_rows(path, people, sets), key=lambda row: row.identity)
    if len(rows) < len(people):
        given = np.zeros(len(people), bool)
        given[[row.identity for row in rows]] = True
        missing = np.flatnonzero(~given)
        source = int(people.source[missing[0]])
        raise DecisionsError(
            f"{path}: no row for identity {people.name(int(missing[0]))!r} of set {source} ({sets[source].path}), "
            f"{len(missing):,} such: leave identities out with the decision dropped, not by removing rows"
        )
    return _relabelled(path, rows, people, sets)


def _read_rows(path: Path, people: Identities, sets: Sequence[FaceSet]) -> Iterator[_Row]:
    names = [{name: number for number, name in enumerate(faces.identities)} for faces in sets]
    lines: dict[int, int] = {}
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        table = csv.reader(file)
        try:
            header = next(table, [])
            if tuple(header) != COLUMNS:
                raise ValueError(f"the first line must be {','.join(COLUMNS)}, it is {','.join(header)!r}")
            for cells in table:
                if not cells:
                    continue
                decision = _parse(cells, sets)
                identity = names[decision.source].get(decision.label)
                where = f"set {decision.source} ({sets[decision.source].path})"
                if identity is None:
                    raise ValueError(
                        f"{where} has no identity {decision.label!r}: give the sets, and the flags of cleaning, "
                        "with which the table was made"
                    )
                number = int(people.firsts[decision.source]) + identity
                if number in lines:
                    raise ValueError(
                        f"identity {decision.label!r} of {where} has a row in line {lines[number]} already"
                    )
                if decision.images != people.images[number]:
                    raise ValueError(
                        f"identity {decision.label!r} of {where} has {people.images[number]:,} images, not "
                        f"{decision.images:,}: the table was made of another set"
                    )
                lines[number] = table.line_num
                left_label = "" if decision.decision in KEPT else cells[COLUMNS.index("new_label")]
                yield _Row(table.line_num, number, decision, _without_point(left_label))
        except (ValueError, csv.Error) as error:
            raise DecisionsError(f"{path}, line {max(1, table.line_num)}: {error}") from None


def _parse(cells: Sequence[str], sets: Sequence[FaceSet]) -> Decision:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} fields, expected {len(COLUMNS)}")
    row = dict(zip(COLUMNS, cells, strict=True))
    decision = row["decision"].strip()
    if decision not in KEPT + LEFT:
        raise ValueError(f"decision must be one of {', '.join(KEPT + LEFT)}, found {decision!r}")
    source = _whole(row["source"], "source")
    if source >= len(sets):
        raise ValueError(f"source must be a set's number, 0 to {len(sets) - 1}, found {source}")
    new_label = row["new_label"].strip()
    try:
        score = float(row["score"]) if row["score"].strip() else None
    except ValueError:
        raise ValueError(f"score must be a number or empty, found {row['score']!r}") from None
    match_source: int | str | None = row["match_source"] or None
    if decision != "excluded" and _without_point(row["match_source"]).isdecimal():
        match_source = int(_without_point(row["match_source"]))
    return Decision(
        source,
        row["label"],
        _whole(row["images"], "images"),
        _whole(new_label, "new_label") if new_label and decision in KEPT else None,
        match_source,
        row["match_label"] or None,
        score,
        decision,
    )


def _without_point(text: str) -> str:
    """A number as it was before a table program made it `3.0`, as those do where a column has empty cells."""
    return text.strip().removesuffix(".0")


def _whole(text: str, name: str) -> int:
    text = _without_point(text)
    if not (text.isascii() and text.isdecimal()):
        raise ValueError(f"{name} must be a whole number from 0, found {text!r}")
    return int(text)


def _relabelled(path: Path, rows: Sequence[_Row], people: Identities, sets: Sequence[FaceSet]) -> list[Decision]:
    """The decisions with labels that go together and have no holes; `rows` are all identities in order."""
    kept = [row.decision.decision in KEPT for row in rows]
    parent = list(range(len(rows)))

    def find(identity: int) -> int:
        while parent[identity] != identity:
            parent[identity] = parent[parent[identity]]
            identity = parent[identity]
        return identity

    by_label: dict[int, list[int]] = {}
    for row in rows:
        if row.decision.new_label is not None:
            by_label.setdefault(row.decision.new_label, []).append(row.identity)
    for same in by_label.values():
        for other in same[1:]:
            parent[find(other)] = find(same[0])
    left_labels = {row.left_label for row in rows}
    for row in rows:
        label = row.decision.new_label
        if row.decision.decision != "joined":
            continue
        if label is None:
            parent[find(row.identity)] = find(_match_of(path, row, people, sets, kept))
        elif len(by_label[label]) == 1 and str(label) not in left_labels:
            raise DecisionsError(
                f"{path}, line {row.line}: it is joined, but no other row has its new_label ({label}): leave that "
                "empty to join its match, give the new_label of another identity, or say added to keep it apart"
            )
    added: dict[int, _Row] = {}
    orders: dict[int, tuple[float, int]] = {}
    for row in rows:
        root = find(row.identity)
        own = row.decision.new_label
        place = (float("inf") if own is None else own, row.identity)
        if row.decision.decision == "added":
            if root in added:
                lines = sorted((added[root].line, row.line))
                raise DecisionsError(
                    f"{path}, lines {lines[0]} and {lines[1]}: both are added under one new_label ({own}): say joined "
                    "in one of them to join them, or leave its new_label empty to keep them apart"
                )
            added[root], orders[root] = row, place
        elif kept[row.identity] and root not in added:
            orders[root] = min(orders.get(root, place), place)
    new_labels = {root: label for label, root in enumerate(sorted(orders, key=orders.__getitem__))}
    if not new_labels:
        raise DecisionsError(f"{path}: every identity is dropped or excluded: nothing is left to write")
    seen: set[int] = set()
    decisions = []
    for row in rows:
        root, decision = find(row.identity), row.decision
        if kept[row.identity]:
            name = "joined" if root in added and decision.decision == "joined" else "added"
            if root not in added:
                name = "joined" if root in seen else "added"
            seen.add(root)
            decision = replace(decision, new_label=new_labels[root], decision=name)
        decisions.append(decision)
    return decisions


def _match_of(path: Path, row: _Row, people: Identities, sets: Sequence[FaceSet], kept: Sequence[bool]) -> int:
    """The number of the identity that a row's match columns name."""
    source, label = row.decision.match_source, row.decision.match_label
    match = row.identity
    if isinstance(source, int) and source < len(sets) and label in (names := sets[source].identities):
        match = int(people.firsts[source]) + names.index(label)
    if match == row.identity:
        wrong = "match_source and match_label name no other identity"
    elif not kept[match]:
        wrong = f"its match, identity {label!r} of set {source}, is left out"
    else:
        return match
    raise DecisionsError(
        f"{path}, line {row.line}: it is joined and has no new_label, but {wrong}: give the new_label of the identity "
        "that it joins"
    )


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
