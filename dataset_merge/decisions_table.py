"""`merge.csv` on the disk: written, and read back as people and their spreadsheets leave it."""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np

from data.face_sets import FaceSet
from dataset_merge.decisions import COLUMNS, KEPT, LEFT, Decision, DecisionsError, Identities
from utils.files import write_csv_atomic
from utils.progress import progress_bar
from utils.text_files import is_empty_row, open_text, read_rows


def write_decisions(path: Path, decisions: Iterable[Decision]) -> None:
    """Write the rows as `merge.csv`."""
    write_csv_atomic(path, COLUMNS, decisions)


class _Row(NamedTuple):
    """`left_label`: the new_label that stands in a row which is left out."""

    line: int
    identity: int
    decision: Decision
    left_label: str


class Names:
    """Finds identities by set and name."""

    def __init__(self, people: Identities, sets: Sequence[FaceSet]) -> None:
        self._numbers = [
            {name: number for number, name in enumerate(faces.identities, int(first))}
            for faces, first in zip(sets, people.firsts, strict=False)
        ]
        self._by_value: dict[int, dict[int, list[int]]] = {}

    def find(self, source: int, label: str) -> list[int]:
        """The numbers, among all, of the identities that can be meant: several where a table program has taken the
        zeros from `007`, and the set has another name of that value.
        """
        if label in self._numbers[source]:
            return [self._numbers[source][label]]
        text = _without_point(label)
        return self._of_value(source).get(int(text), []) if _is_number(text) else []

    def of_match(self, decision: Decision) -> int | None:
        """The number of the identity that the match columns name, None where they name none, or several."""
        source, label = decision.match_source, decision.match_label
        if not isinstance(source, int) or source >= len(self._numbers) or label is None:
            return None
        same = self.find(source, label)
        return same[0] if len(same) == 1 else None

    def _of_value(self, source: int) -> dict[int, list[int]]:
        if source not in self._by_value:
            values = self._by_value[source] = {}
            for name, number in self._numbers[source].items():
                if _is_number(name):
                    values.setdefault(int(name), []).append(number)
        return self._by_value[source]


def read_decisions(path: Path, sets: Sequence[FaceSet]) -> list[Decision]:
    """The decisions in a table that `write_decisions` wrote and people may have edited, for every identity in order.

    Rows may stand in any order. Those with one new_label become one identity; a `joined` one without a new_label joins
    its match. One that has its new_label to itself is an identity by itself where a row that is left out has that
    new_label; else it is refused, as nobody can tell whom it is to join. New labels are numbered without holes, in
    their order; kept rows without one come last. Raises DecisionsError with the line.
    """
    people = Identities(sets)
    names = Names(people, sets)
    read = progress_bar(len(people), "row", f"read {path}", iterable=_read_rows(path, people, names, sets))
    rows = sorted(read, key=lambda row: row.identity)
    if len(rows) < len(people):
        given = np.zeros(len(people), bool)
        given[[row.identity for row in rows]] = True
        missing = np.flatnonzero(~given)
        source = int(people.source[missing[0]])
        raise DecisionsError(
            f"{path}: no row for identity {people.name(int(missing[0]))!r} of set {source} ({sets[source].path}), "
            f"{len(missing):,} such: leave identities out with the decision dropped, not by removing rows"
        )
    return _relabelled(path, rows, names)


def _read_rows(path: Path, people: Identities, names: Names, sets: Sequence[FaceSet]) -> Iterator[_Row]:
    lines: dict[int, int] = {}
    wheres = [f"set {source} ({faces.path})" for source, faces in enumerate(sets)]
    with open_text(path) as file:
        line = 1
        try:
            for line, row in _open_table(file, path):
                if is_empty_row(row):
                    continue
                cells = row[: len(COLUMNS)] + _without_empty_end(row[len(COLUMNS) :])
                decision = _parse(cells, sets)
                where = wheres[decision.source]
                number, match = _identity_of(decision, people, names, where), names.of_match(decision)
                labels = people.name(number), decision.match_label if match is None else people.name(match)
                if labels != (decision.label, decision.match_label):
                    decision = decision._replace(label=labels[0], match_label=labels[1])
                if number in lines:
                    raise ValueError(
                        f"identity {decision.label!r} of {where} has a row in line {lines[number]} already"
                    )
                if decision.images != people.images[number]:
                    raise ValueError(
                        f"identity {decision.label!r} of {where} has {people.images[number]:,} images, not "
                        f"{decision.images:,}: the table was made of another set"
                    )
                lines[number] = line
                left_label = "" if decision.decision in KEPT else cells[COLUMNS.index("new_label")]
                yield _Row(line, number, decision, _without_point(left_label))
        except DecisionsError:
            raise
        except (ValueError, csv.Error) as error:
            raise DecisionsError(f"{path}, line {line}: {error}") from None


def _identity_of(decision: Decision, people: Identities, names: Names, where: str) -> int:
    """The number of the identity that a row is of; `where`: its set, in words."""
    same = names.find(decision.source, decision.label)
    if len(same) > 1:
        raise ValueError(
            f"the zeros in front of the name {decision.label!r} are lost, and {where} has "
            f"{' and '.join(map(people.name, same))}: let the table program read names as text"
        )
    if not same:
        raise ValueError(
            f"{where} has no identity {decision.label!r}: give the sets, and the flags of cleaning, with which the "
            "table was made"
        )
    return same[0]


def _open_table(file: TextIO, path: Path) -> Iterator[tuple[int, list[str]]]:
    """The line and the cells of each row behind the header, which tells by what the cells are parted."""
    header = file.readline()
    delimiter = max(",;\t", key=header.count)
    columns = _without_empty_end(next(csv.reader([header], delimiter=delimiter), []))
    if tuple(columns) != COLUMNS:
        raise ValueError(f"the first line must be {','.join(COLUMNS)}, it is {','.join(columns)!r}")
    return read_rows(file, path, DecisionsError, delimiter, first_line=2)


def _without_empty_end(cells: list[str]) -> list[str]:
    """The cells up to the last that has something in it."""
    end = len(cells)
    while end and not cells[end - 1].strip():
        end -= 1
    return cells[:end]


def _parse(cells: Sequence[str], sets: Sequence[FaceSet]) -> Decision:
    if len(cells) != len(COLUMNS):
        raise ValueError(f"{len(cells)} fields, expected {len(COLUMNS)}")
    set_number, label, images, new_label, match_set, match_label, score, decision = cells
    decision = decision.strip().lower()
    if decision not in KEPT + LEFT:
        raise ValueError(f"decision must be one of {', '.join(KEPT + LEFT)}, found {decision!r}")
    source = _whole(set_number, "source")
    if source >= len(sets):
        raise ValueError(f"source must be a set's number, 0 to {len(sets) - 1}, found {source}")
    new_label = new_label.strip()
    match_source: int | str | None = match_set or None
    if decision != "excluded" and (number := _without_point(match_set)).isdecimal():
        match_source = int(number)
    return Decision(
        source,
        label,
        _whole(images, "images"),
        _whole(new_label, "new_label") if new_label and decision in KEPT else None,
        match_source,
        match_label or None,
        _score(score),
        decision,
    )


def _score(text: str) -> float | None:
    """The score, of which nothing depends; None for what is no number."""
    try:
        return float(text.replace(",", "."))
    except ValueError:
        return None


def _without_point(text: str) -> str:
    """A number as it was before a table program made it `3.0`, as those do where a column has empty cells."""
    return text.strip().removesuffix(".0")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _whole(text: str, name: str) -> int:
    text = _without_point(text)
    if not _is_number(text):
        raise ValueError(f"{name} must be a whole number from 0, found {text!r}")
    return int(text)


def _relabelled(path: Path, rows: Sequence[_Row], names: Names) -> list[Decision]:
    """The decisions with labels that go together and have no holes; `rows` are all identities in order."""
    kept = [row.decision.decision in KEPT for row in rows]
    roots = _roots(path, rows, names, kept)
    added: dict[int, _Row] = {}
    orders: dict[int, tuple[float, int]] = {}
    for row, root in zip(rows, roots, strict=True):
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
    decisions = []
    led = set(added)  # of a group without an added identity the first one becomes that
    for row, root in zip(rows, roots, strict=True):
        decision = row.decision
        if kept[row.identity]:
            name = decision.decision if root in led else "added"
            led.add(root)
            decision = decision._replace(new_label=new_labels[root], decision=name)
        decisions.append(decision)
    return decisions


def _roots(path: Path, rows: Sequence[_Row], names: Names, kept: Sequence[bool]) -> list[int]:
    """Of each identity the number of one that stands for all it becomes one person with: those of its new_label, and
    of a `joined` one without a new_label those of its match.
    """
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
            parent[find(row.identity)] = find(_match_of(path, row, names, kept))
        elif len(by_label[label]) == 1 and str(label) not in left_labels:
            raise DecisionsError(
                f"{path}, line {row.line}: it is joined, but no other row has its new_label ({label}): leave that "
                "empty to join its match, give the new_label of another identity, or say added to keep it apart"
            )
    return [find(identity) for identity in range(len(rows))]


def _match_of(path: Path, row: _Row, names: Names, kept: Sequence[bool]) -> int:
    """The number of the identity that a row's match columns name."""
    match = names.of_match(row.decision)
    if match is None or match == row.identity:
        wrong = "match_source and match_label name no other identity"
    elif not kept[match]:
        wrong = f"its match, identity {row.decision.match_label!r} of set {row.decision.match_source}, is left out"
    else:
        return match
    raise DecisionsError(
        f"{path}, line {row.line}: it is joined and has no new_label, but {wrong}: give the new_label of the identity "
        "that it joins"
    )
