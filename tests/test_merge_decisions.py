"""The table of a merge: what groups become under each rule, and edits by hand that are honoured or refused by line."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dataset_merge.decisions import (
    COLUMNS,
    Decision,
    DecisionsError,
    Identities,
    Match,
    decide_groups,
    members,
)
from dataset_merge.decisions_table import read_decisions, write_decisions


class Named:
    """A face set as far as decisions look at it: names, and how many images each has."""

    def __init__(self, **images: int) -> None:
        self.path = Path("set")
        self.identities = list(images)
        self.labels = np.repeat(np.arange(len(images)), list(images.values()))


SETS = [Named(a=2, b=3), Named(x=5, y=1, z=4)]
GROUP = np.array([0, 1, 0, 2, 1])  # a is x, b is z
MATCHES = [Match(1, "x", 0.8), Match(1, "z", 0.7), Match(0, "a", 0.8), Match(0, "a", 0.3), Match(0, "b", 0.7)]


def decide(on_match: str = "join", excluded: dict[int, Match] | None = None) -> list[Decision]:
    return decide_groups(Identities(SETS), GROUP, MATCHES, on_match, excluded or {})


def outcome(decisions: list[Decision]) -> list[tuple[str, int | None]]:
    return [(row.decision, row.new_label) for row in decisions]


def test_join_puts_all_images_under_one_label() -> None:
    """Labels of the first set come first, in its order; who matches comes under them."""
    assert outcome(decide()) == [("added", 0), ("added", 1), ("joined", 0), ("added", 2), ("joined", 1)]
    assert members(decide()) == [[0, 2], [1, 4], [3]]


def test_drop_keeps_the_first_sets_images() -> None:
    """A person whom an earlier set has is not taken again."""
    assert outcome(decide("drop")) == [("added", 0), ("added", 1), ("dropped", None), ("added", 2), ("dropped", None)]


def test_keep_larger_takes_the_set_with_most_images() -> None:
    """x has 5 images against 2 of a, z has 4 against 3 of b; labels keep their order."""
    assert outcome(decide("keep-larger")) == [
        ("dropped", None),
        ("dropped", None),
        ("added", 0),
        ("added", 2),
        ("added", 1),
    ]


def test_of_equally_large_sets_the_first_is_kept() -> None:
    """A tie is no reason to prefer the later set."""
    sets = [Named(a=3), Named(x=3)]
    rows = decide_groups(Identities(sets), np.array([0, 0]), [None, None], "keep-larger", {})
    assert outcome(rows) == [("added", 0), ("dropped", None)]


def test_keep_larger_counts_all_identities_of_a_set_together() -> None:
    """Two halves of a person in one set (within) are that set's images of the person."""
    sets = [Named(a=3), Named(x=2, y=2)]
    rows = decide_groups(Identities(sets), np.array([0, 0, 0]), [None] * 3, "keep-larger", {})
    assert outcome(rows) == [("dropped", None), ("added", 0), ("joined", 0)]


def test_who_is_one_person_with_an_excluded_one_is_excluded() -> None:
    """Else the person would stay in the training data under another identity; labels have no holes afterwards."""
    rows = decide(excluded={2: Match("lfw.bin", "lfw, image A of pair 3", 0.9)})
    assert outcome(rows) == [("excluded", None), ("added", 0), ("excluded", None), ("added", 1), ("joined", 0)]
    assert (rows[0].match_source, rows[0].match_label) == ("lfw.bin", "lfw, image A of pair 3")


@pytest.mark.parametrize("on_match", ["join", "drop", "keep-larger"])
def test_a_table_that_nobody_edited_says_the_same(tmp_path: Path, on_match: str) -> None:
    """Written, read, and applied again: the same decisions, also for excluded people and odd names."""
    rows = decide(on_match, {3: Match("some, where/lfw.bin", 'a "name"', 0.5)})
    write_decisions(tmp_path / "merge.csv", rows)
    assert read_decisions(tmp_path / "merge.csv", SETS) == rows


def table(folder: Path, *edits: tuple[int, str, str]) -> Path:
    """The table of `decide()` with cells edited: (row from 0, column, text)."""
    write_decisions(folder / "merge.csv", decide())
    lines = [line.split(",") for line in (folder / "merge.csv").read_text().splitlines()]
    for row, column, text in edits:
        lines[row + 1][COLUMNS.index(column)] = text
    (folder / "merge.csv").write_text("\n".join(",".join(line) for line in lines) + "\n")
    return folder / "merge.csv"


@pytest.mark.parametrize(
    ("edits", "expected"),
    [
        # A wrong join undone: added, with no label of its own yet.
        ([(2, "decision", "added"), (2, "new_label", "")], [0, 1, 3, 2, 1]),
        # The same by a label that nobody has.
        ([(2, "decision", "added"), (2, "new_label", "77")], [0, 1, 3, 2, 1]),
        # A missed join: y joins its best match.
        ([(3, "decision", "joined"), (3, "new_label", "")], [0, 1, 0, 0, 1]),
        # y joins another one than its match, by its label.
        ([(3, "decision", "joined"), (3, "new_label", "1")], [0, 1, 0, 1, 1]),
        # Left out, with the label still standing there.
        ([(3, "decision", "dropped")], [0, 1, 0, None, 1]),
        # The one who was joined goes: x is an identity by itself.
        ([(0, "decision", "dropped")], [None, 1, 0, 2, 1]),
        # The same, where its most similar one is somebody else who it was never joined with.
        ([(0, "decision", "dropped"), (2, "match_source", "1"), (2, "match_label", "y")], [None, 1, 0, 2, 1]),
        # The one who was joined is parted by the other row: both have a row that says what they are.
        ([(0, "new_label", ""), (2, "decision", "added")], [3, 1, 0, 2, 1]),
        # Of a column with empty cells some programs make numbers with a point.
        ([(row, "new_label", f"{label}.0") for row, label in enumerate((0, 1, 0, 2, 1))], [0, 1, 0, 2, 1]),
        ([(3, "decision", "joined"), (3, "new_label", ""), (3, "match_source", "0.0")], [0, 1, 0, 0, 1]),
        # Labels ordered anew.
        ([(0, "new_label", "9"), (2, "new_label", "9")], [2, 0, 2, 1, 0]),
    ],
)
def test_edits_are_honoured(tmp_path: Path, edits: list[tuple[int, str, str]], expected: list[int | None]) -> None:
    """What a person changes in decision and new_label is what the merged set gets, with labels without holes."""
    rows = read_decisions(table(tmp_path, *edits), SETS)
    assert [row.new_label for row in rows] == expected
    for label in {row.new_label for row in rows} - {None}:
        assert [row.decision for row in rows if row.new_label == label].count("added") == 1


def test_rows_may_stand_in_any_order(tmp_path: Path) -> None:
    """Spreadsheets sort: by score, say, and with a byte order mark in front."""
    path = table(tmp_path)
    header, *rows = path.read_text().splitlines()
    path.write_text("\ufeff" + "\n".join([header, *reversed(rows)]) + "\n", encoding="utf-8")
    assert read_decisions(path, SETS) == decide()


@pytest.mark.parametrize(
    ("delimiter", "encoding", "line_end"), [(";", "utf-8-sig", "\r\n"), ("\t", "utf-16", "\n"), (",", "utf-8", "\r\n")]
)
def test_tables_of_spreadsheets_are_read(tmp_path: Path, delimiter: str, encoding: str, line_end: str) -> None:
    """Semicolons or tabs, UTF-16, empty rows and columns at the end, capital letters, a comma in scores."""
    lines = [line.split(",") for line in table(tmp_path).read_text().splitlines()]
    for cells in lines[1:]:
        cells[6] = cells[6].replace(".", ",") if delimiter == ";" else "high"
        cells[7] = cells[7].capitalize()
    rows = [*([*line, "", ""] for line in lines), [""] * 10, [""]]
    (tmp_path / "edited.csv").write_bytes(line_end.join(map(delimiter.join, rows)).encode(encoding))
    wanted = [row._replace(score=row.score if delimiter == ";" else None) for row in decide()]
    assert read_decisions(tmp_path / "edited.csv", SETS) == wanted


def test_lost_zeros_are_put_back(tmp_path: Path) -> None:
    """A table program makes 118 of the name 000118: taken for it where one identity can be meant, else said."""
    sets = [Named(**{"000118": 2, "000007": 3}), Named(**{"000118": 4, "0": 1})]
    matches = [Match(1, "000118", 0.9), None, Match(0, "000118", 0.9), None]
    rows = decide_groups(Identities(sets), np.array([0, 1, 0, 2]), matches, "join", {})
    path = tmp_path / "merge.csv"
    write_decisions(path, rows)
    path.write_text(path.read_text().replace("000118", "118").replace("000007", "7.0").replace("1,0,", "1,000,"))
    assert read_decisions(path, sets) == rows
    path.write_text(path.read_text().replace("4,0,0,118,0.9,joined", "4,,0,118,0.9,joined"))
    assert read_decisions(path, sets) == rows
    sets[0].identities[1] = "0118"
    with pytest.raises(
        DecisionsError, match=r"line 2: the zeros in front of the name '118' are lost, and set 0 .* has"
    ):
        read_decisions(path, sets)


def test_empty_labels_of_many_are_quick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A join with the match of each row is looked up, not searched for in the list of names; a bar shows how far it is,
    as millions of rows take a while.
    """
    sets = [Named(**{f"a{i}": 1 for i in range(20_000)}), Named(**{f"b{i}": 1 for i in range(20_000)})]
    people = Identities(sets)
    group = np.tile(np.arange(20_000), 2)
    matches = [*(Match(1, f"b{i}", 0.5) for i in range(20_000)), *(Match(0, f"a{i}", 0.5) for i in range(20_000))]
    rows = decide_groups(people, group, matches, "join", {})
    write_decisions(tmp_path / "merge.csv", [row._replace(new_label=None) for row in rows])
    start = time.process_time()
    assert read_decisions(tmp_path / "merge.csv", sets) == rows
    assert time.process_time() - start < 3
    assert "merge.csv: 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([(1, "decision", "merge")], "line 3: decision must be one of added, joined, dropped, excluded, found 'merge'"),
        ([(1, "new_label", "-1")], "line 3: new_label must be a whole number from 0, found '-1'"),
        ([(4, "source", "2")], "line 6: source must be a set's number, 0 to 1, found 2"),
        ([(4, "label", "nobody")], "line 6: set 1 .* has no identity 'nobody'"),
        ([(4, "label", "y")], "line 6: identity 'y' of set 1 .* has a row in line 5 already"),
        ([(0, "images", "7")], "line 2: identity 'a' of set 0 .* has 2 images, not 7: the table was made of another"),
        ([(2, "decision", "added")], "lines 2 and 4: both are added under one new_label"),
        ([(3, "decision", "")], "line 5: decision must be one of added, joined, dropped, excluded, found ''"),
        # Joined with whom? The most similar one need not be the one that it was joined with, or is parted from now.
        (
            [(3, "decision", "joined")],
            r"line 5: it is joined, but no other row has its new_label \(2\): leave that empty",
        ),
        ([(0, "new_label", "")], r"line 4: it is joined, but no other row has its new_label \(0\)"),
        ([(0, "new_label", "77")], r"line 4: it is joined, but no other row has its new_label \(0\)"),
        (
            [(0, "decision", "dropped"), (0, "new_label", "")],
            r"line 4: it is joined, but no other row has its new_label \(0\)",
        ),
        (
            [(3, "decision", "joined"), (3, "new_label", ""), (3, "match_label", "")],
            "line 5: it is joined and has no new_label, but match_source and match_label name no other identity",
        ),
        (
            [(3, "decision", "joined"), (3, "new_label", ""), (3, "match_source", "7")],
            "line 5: it is joined and has no new_label, but match_source and match_label name no other identity",
        ),
        (
            [(3, "decision", "joined"), (3, "new_label", ""), (3, "match_source", "1"), (3, "match_label", "y")],
            "line 5: it is joined and has no new_label, but match_source and match_label name no other identity",
        ),
        (
            [(0, "decision", "dropped"), (3, "decision", "joined"), (3, "new_label", "")],
            "line 5: it is joined and has no new_label, but its match, identity 'a' of set 0, is left out",
        ),
        ([(0, "new_label", "1.5")], "line 2: new_label must be a whole number from 0, found '1.5'"),
        ([(row, "decision", "dropped") for row in range(5)], "nothing is left to write"),
    ],
)
def test_mistakes_are_named_by_line(tmp_path: Path, edits: list[tuple[int, str, str]], message: str) -> None:
    """A table that cannot be meant is refused before anything is written."""
    with pytest.raises(DecisionsError, match=rf"merge\.csv.*{message}"):
        read_decisions(table(tmp_path, *edits), SETS)


def test_a_quote_that_is_not_closed_is_named_with_its_line(tmp_path: Path) -> None:
    """The line of the quote, and not the last one that was good."""
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    lines[3] = lines[3].replace(",", ',"', 1)
    path.write_text("\n".join(lines))
    with pytest.raises(DecisionsError, match=r"line 4: unexpected end of data: is a quote"):
        read_decisions(path, SETS)


def test_missing_rows_and_headers_are_named(tmp_path: Path) -> None:
    """Leaving out is a decision, not a deleted line."""
    path = table(tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:4] + lines[5:]))
    with pytest.raises(DecisionsError, match="no row for identity 'y' of set 1"):
        read_decisions(path, SETS)
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(DecisionsError, match="line 1: the first line must be source,label"):
        read_decisions(path, SETS)
    path.write_text(lines[0] + "\n" + lines[1] + ",x\n")
    with pytest.raises(DecisionsError, match="line 2: 9 fields, expected 8"):
        read_decisions(path, SETS)


class Sized:
    """Identities of as many sets, with an image each."""

    def __init__(self, count: int) -> None:
        self.source, self.images = np.arange(count), np.ones(count, np.int64)

    def __len__(self) -> int:
        return len(self.source)

    def name(self, identity: int) -> str:
        return str(identity)


def test_who_is_excluded_with_somebody_has_that_ones_match() -> None:
    """Each excluded identity is listed with its own match, and the others of its group with that of the first."""
    people: Any = Sized(3)
    excluded = {0: Match("t.bin", "first", 0.9), 2: Match("t.bin", "second", 0.8)}
    rows = decide_groups(people, np.zeros(3, np.int64), [None] * 3, "join", excluded)
    assert [(row.decision, row.match_label) for row in rows] == [
        ("excluded", "first"), ("excluded", "first"), ("excluded", "second")
    ]  # fmt: skip
