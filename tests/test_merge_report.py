"""The report of a merge: its pictures and lists tell of people as they were merged, not as single pairs scored."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.joined_sets import JoinedFaceSet
from dataset_merge import merge_report
from dataset_merge.decisions import Decision, Identities, Match, decide_groups
from dataset_merge.exclude import HeldOutSet, Leaks
from dataset_merge.grouping import Pairs, group_identities
from dataset_merge.merge_report import Merge, write_report
from tiny_faces import tiny_face

THRESHOLD = 0.65


def merge_of(folder: Path, people: list[int], links: list[tuple[int, int, float]], excluded: dict[int, Match]) -> Merge:
    """A merge of sets with so many people each, by links between their numbers in all."""
    paths = [folder / str(number) for number in range(len(people))]
    for number, path in enumerate(paths):
        with write_face_set(path, 32) as out:
            for person in range(people[number]):
                out.add_identity([tiny_face(person, number)])
    sets = [open_face_set(path) for path in paths]
    numbers = Identities(sets)
    first, second, score = (np.array(column) for column in zip(*links, strict=True))
    grouping = group_identities(numbers.source, Pairs(first, second, score, score), THRESHOLD)
    matches = [
        Match(int(numbers.source[match]), numbers.name(match), float(score))
        for match, score in zip(grouping.match.tolist(), grouping.score.tolist(), strict=True)
    ]
    decisions = decide_groups(numbers, grouping.group, matches, "join", excluded)
    return Merge(paths, sets, sets, JoinedFaceSet(sets), {}, 32, decisions, 1, grouping)


def listed(merge: Merge, rows: list[Decision]) -> Merge:
    """The same merge by a table that has these rows."""
    return replace(merge, grouping=None, settings={"merge.decisions": "merge.csv"}, decisions=rows)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """The labels of the rows of each picture, by its name."""
    pictures: dict[str, list[str]] = {}

    def draw(path: Path, cells: object, columns: int, title: str | None, labels: list[str]) -> None:
        path.write_bytes(tiny_face(0, 0))
        pictures[path.stem] = [label.split(" ", 1)[1] for label in labels]

    monkeypatch.setattr(merge_report, "draw_contact_sheet", draw)
    return pictures


def test_who_was_joined_by_others_is_not_shown_as_too_different(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    """0 and 2 are one person through 1: that their own pair is below the threshold is no reason to lower it."""
    merge = merge_of(tmp_path, [1, 1, 2], [(0, 1, 0.8), (1, 2, 0.75), (0, 2, 0.5), (0, 3, 0.3)], {})
    assert [row.new_label for row in merge.decisions] == [0, 0, 0, 1]
    write_report(tmp_path, merge)
    assert drawn["above_t"] == ["1:0 2:0", "0:0 1:0"]
    assert drawn["below_t"] == ["0:0 2:1"]


def test_names_that_pictures_have_no_letters_for(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    """Pictures name the row of merge.csv, also behind a name of two lines; the tables of the page have the letters."""
    merge = merge_of(tmp_path, [2, 2], [(0, 2, 0.8), (0, 3, 0.3), (1, 2, 0.71), (1, 3, 0.2)], {})
    merge.sets[0].identities[:] = ["two\nlines", "\u738b"]
    write_report(tmp_path, merge)
    assert drawn == {"above_t": ["0:row 2 1:0"], "below_t": ["0:row 2 1:1", "0:row 3 1:1"]}
    assert "<td>0:\u738b</td><td>1:0</td>" in (tmp_path / "report.html").read_text()


def test_conflicts_are_of_people_who_stayed_two(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    """A pair that is not mutual, but whose two were joined by others, was no conflict."""
    links = [(0, 1, 0.9), (1, 2, 0.9), (0, 2, 0.7), (0, 3, 0.71), (1, 3, 0.2), (2, 3, 0.2)]
    merge = merge_of(tmp_path, [1, 1, 2], links, {})
    assert merge.grouping is not None
    assert merge.grouping.decision[2:4] == ["not mutual", "split"]
    assert [row.new_label for row in merge.decisions] == [0, 0, 0, 1]
    write_report(tmp_path, merge)
    text = re.sub("<[^>]*>", " ", (tmp_path / "report.html").read_text())
    assert "1 pairs reach the threshold and were not joined" in text


def test_who_is_excluded_with_another_is_not_shown_as_kept(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    """1 is one person with 0, who is excluded, though it does not reach the threshold itself."""
    test_set = open_face_set(merge_of(tmp_path / "test", [2], [(0, 1, 0.0)], {}).paths[0])
    leaks = Leaks([Match("held out", "0", score) for score in (0.9, 0.7, 0.6)], 0.75)
    merge = merge_of(tmp_path, [1, 2], [(0, 1, 0.8), (0, 2, 0.1)], leaks.excluded)
    write_report(tmp_path, replace(merge, leaks=leaks, held_out=[HeldOutSet("held out", test_set, test_set)]))
    assert [row.decision for row in merge.decisions] == ["excluded", "excluded", "added"]
    assert (drawn["excluded"], drawn["not_excluded"]) == (["0:0"], ["1:1"])


def test_who_was_left_out_by_hand_is_not_shown_as_joined(tmp_path: Path, drawn: dict[str, list[str]]) -> None:
    """A row that a person wrote `dropped` into has a match all the same, often a stranger."""
    merge = merge_of(tmp_path, [1, 2], [(0, 1, 0.8), (0, 2, 0.1)], {})
    rows: list[Decision] = [*merge.decisions[:2], merge.decisions[2]._replace(decision="dropped", new_label=None)]
    write_report(tmp_path, listed(merge, rows))
    assert drawn == {"above_t": ["0:0 1:0"]}
    assert "Identities that the table drops are in neither" in (tmp_path / "report.html").read_text()


def test_who_matched_an_identity_left_out_is_not_shown_as_too_different(
    tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    """A table of --on-match drop that is applied: that the score was high enough, it does not say."""
    merge = merge_of(tmp_path, [1, 2], [(0, 1, 0.8), (0, 2, 0.1)], {})
    rows = [*merge.decisions]
    rows[1] = rows[1]._replace(decision="dropped", new_label=None)
    write_report(tmp_path, listed(merge, rows))
    assert drawn == {"below_t": ["0:0 1:1"]}


def test_who_joined_someone_else_is_not_shown_as_joined_with_the_match(
    tmp_path: Path, drawn: dict[str, list[str]]
) -> None:
    """A table may join an identity with another one than its match, as a person says or because that one has a better
    match: the two are no wrong join."""
    merge = merge_of(tmp_path, [2, 1], [(0, 2, 0.8), (1, 2, 0.3)], {})
    rows = [*merge.decisions]
    rows[2] = rows[2]._replace(match_label="1", score=0.3)  # joined with 0
    rows[1] = rows[1]._replace(match_source=None, match_label=None, score=None)
    assert [(row.new_label, row.decision) for row in rows] == [(0, "added"), (1, "added"), (0, "joined")]
    write_report(tmp_path, listed(merge, rows))
    assert drawn == {"above_t": ["0:0 1:0"]}


def test_one_set_of_which_nobody_is_joined_has_no_threshold(tmp_path: Path) -> None:
    """Cleaned, or without people of a test set, and by no table: there are no joins to judge, and no t to raise."""
    merge = merge_of(tmp_path, [2], [(0, 1, 0.1)], {})
    write_report(tmp_path, replace(merge, grouping=None, settings={"merge.decisions": ""}))
    page = (tmp_path / "report.html").read_text()
    assert "What became of the sets" in page
    assert not any(text in page for text in ("in a table", "Judge by eye", "The threshold"))
