"""report of a set whose .idx is lost, cut or another file's."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from config import ReportConfig
from damaged_set import BROKEN, JPEG, PNG, SPLIT, people, read_csv, report_on, write_damaged
from data import report as report_module
from data.face_sets import open_face_set
from data.recordio import RecordError, pack_image, write_records
from data.report import make_report
from data.tolerant_records import open_records
from utils.arrays import distinct


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A set with every kind of damage."""
    return write_damaged(tmp_path / "sets" / "damaged")


def test_without_an_index(damaged: Path, tmp_path: Path) -> None:
    """A lost .idx, in a damaged file: whatever still begins with a magic is found, and the report says how."""
    (damaged / "train.idx").unlink()
    report = report_on(damaged, tmp_path / "out", check=True)
    # 17, 18 and 19 were only wrong in the index; 14 has no magic and 16 no start of a record, so they are not seen.
    keys = {int(row["key"]) for row in read_csv(tmp_path / "out" / "broken.csv")}
    assert keys == set(BROKEN) - {14, 16, 17, 18, 19}
    assert (report.images, report.broken) == (7, 11)
    assert report.remarks[0] == "the index is not used, records were searched in train.rec: there is no train.idx"


@pytest.mark.parametrize("index", ["", "1\n2\n", "1\tone\n"])
def test_with_an_unreadable_index(damaged: Path, tmp_path: Path, index: str) -> None:
    """An .idx that is none counts as lost."""
    (damaged / "train.idx").write_text(index)
    report = report_on(damaged, tmp_path / "out", check=True)
    assert report.images == 7
    assert "train.idx" in report.remarks[0]


def test_an_index_that_was_cut(tmp_path: Path) -> None:
    """The records that it lists are reported, with a note of what it does not list; damage alone makes no such note."""
    rec = tmp_path / "a.rec"
    with write_records(rec) as writer:
        for key in range(1, 9):
            writer.write(key, pack_image(0.0, key, SPLIT))
    index = rec.with_suffix(".idx")
    lines = index.read_text().splitlines(keepends=True)
    content = bytearray(rec.read_bytes())
    content[len(content) // 2] ^= 1  # the magic of record 5
    rec.write_bytes(content)
    whole = report_on(rec, tmp_path / "out")
    assert (whole.records, whole.broken, whole.remarks) == (8, 1, [])
    index.write_text("".join(lines[:6]))
    cut = report_on(rec, tmp_path / "out")
    assert (cut.records, cut.broken) == (6, 1)
    assert f"has no line for {len(content) // 4:,} of the {len(content):,} bytes" in cut.remarks[0]


def test_an_index_of_another_set(tmp_path: Path) -> None:
    """A good .rec beside a foreign .idx is searched, not called broken and repaired to next to nothing; a .rec that was
    cut off keeps its own.
    """
    for name, images in (("a", [JPEG] * 20), ("b", [PNG, JPEG] * 30)):
        with write_records(tmp_path / f"{name}.rec") as writer:
            for key, image in enumerate(images, 1):
                writer.write(key, pack_image(float(key % 4), key, image))
    own = (tmp_path / "a.idx").read_bytes()
    (tmp_path / "a.idx").write_bytes((tmp_path / "b.idx").read_bytes())
    records, survey = make_report(tmp_path / "a.rec", tmp_path / "out", ReportConfig(check=True), 0)[1:]
    remarks = json.loads((tmp_path / "out" / "report.json").read_text())["remarks"]
    assert "a.idx seems to be another file's" in remarks[0]
    report_module.repair(records, survey, tmp_path / "mended")
    assert people(open_face_set(tmp_path / "mended")) == [(label, JPEG) for label in range(4) for _ in range(5)]
    (tmp_path / "a.idx").write_bytes(own)
    os.truncate(tmp_path / "a.rec", (tmp_path / "a.rec").stat().st_size // 2)
    report = report_on(tmp_path / "a.rec", tmp_path / "out")
    assert (report.images, report.broken, report.remarks) == (10, 10, [])


def test_keys_that_occur_twice(tmp_path: Path) -> None:
    """Training refuses such a set, the report says so, and repair makes a good one of it."""
    with write_records(tmp_path / "a.rec") as writer:
        for key in (1, 1, 2):
            writer.write(key, pack_image(float(key), key, PNG))
    with pytest.raises(RecordError, match="more than once"):
        open_face_set(tmp_path / "a.rec")
    records, survey = make_report(tmp_path / "a.rec", tmp_path / "out", ReportConfig(check=True), 0)[1:]
    report_module.repair(records, survey, tmp_path / "mended")
    remarks = json.loads((tmp_path / "out" / "report.json").read_text())["remarks"]
    assert remarks[0].startswith("some keys occur more than once")
    assert people(open_face_set(tmp_path / "mended")) == [(0, PNG), (0, PNG), (1, PNG)]


def test_millions_of_keys_are_sorted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether keys occur twice is asked of a sorted array: the hash table of numpy's `unique` took a minute for 42
    million of them, 50 times as long."""
    with write_records(tmp_path / "a.rec") as writer:
        for key in (3, 1, 2):
            writer.write(key, pack_image(float(key), key, PNG))
    monkeypatch.delattr(np, "unique")
    assert open_records(tmp_path / "a.rec")[1] == []
    (tmp_path / "a.idx").unlink()
    assert len(open_records(tmp_path / "a.rec")[0]) == 3


@pytest.mark.parametrize("values", [[], [5], [2, 2, 2], [3, -1, 3, 7, -1]])
def test_distinct_values(values: list[int]) -> None:
    """The values of numpy's `unique`, none of them twice."""
    given = np.array(values, np.int64)
    np.testing.assert_array_equal(distinct(given), np.unique(given))
    assert given.tolist() == values
