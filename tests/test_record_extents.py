"""Records whose lengths are wrong, so that they reach over those behind them."""

import struct
from pathlib import Path

import numpy as np
import pytest

from config import ReportConfig
from damaged_set import JPEG, PNG, SPLIT, people, read_csv, report_on
from data.face_sets import RecFaceSet
from data.prepare_data import prepare
from data.record_extents import overlong
from data.recordio import MAGIC, IndexedRecordReader, RecordError, RecordFile, pack_image, write_records
from data.report import make_report, repair

# Of identities 0, 0, 1, 1 ...: one cut at embedded magics, others whole.
IMAGES = [JPEG, PNG, SPLIT, JPEG, PNG, SPLIT, JPEG, PNG]


def write_set(folder: Path) -> tuple[Path, list[int]]:
    """The `.rec`, and the offsets of its records."""
    rec = folder / "train.rec"
    with write_records(rec) as writer:
        for key, image in enumerate(IMAGES):
            writer.write(key, pack_image(float(key // 2), key, image))
    return rec, IndexedRecordReader(rec).offsets.tolist()


def lengthen(rec: Path, offset: int, more: int) -> None:
    """Add to the length of the record part at `offset`."""
    content = bytearray(rec.read_bytes())
    (length,) = struct.unpack_from("<I", content, offset + 4)
    struct.pack_into("<I", content, offset + 4, length + more)
    rec.write_bytes(content)


@pytest.mark.parametrize("wrong", [0, 2, 3])
@pytest.mark.parametrize("reached", ["the next", "all of the next", "the last"])
def test_a_record_that_reaches_over_others(tmp_path: Path, wrong: int, reached: str) -> None:
    """One flipped bit of a length made an image of several records, and no one was told: sets are refused with the
    record's key and place; a report counts that one record as broken."""
    rec, offsets = write_set(tmp_path)
    end = {"the next": offsets[wrong + 1] + 4, "all of the next": offsets[wrong + 2], "the last": offsets[-1] + 8}
    last_part = offsets[wrong + 1] - 8 if IMAGES[wrong] is SPLIT else offsets[wrong]
    lengthen(rec, last_part, end[reached] - offsets[wrong + 1])
    place = f"record {wrong} at byte {offsets[wrong]}: its length is wrong: the record has [0-9,]+ bytes"
    for refusing in (RecFaceSet, lambda path: prepare(path, tmp_path / "images", 0)):
        with pytest.raises(RecordError, match=rf"train\.rec, {place}.* \(1 such records\): .*--repair OUT"):
            refusing(rec)
    assert not (tmp_path / "images").exists()
    report = report_on(rec, tmp_path / "out", check=True)
    assert (report.images, report.broken, report.remarks) == (len(IMAGES) - 1, 1, [])
    (broken,) = read_csv(tmp_path / "out" / "broken.csv")
    assert broken["key"] == str(wrong)
    assert broken["reason"].startswith("its length is wrong")


def test_repair_leaves_out_that_record_alone(tmp_path: Path) -> None:
    """With or without an index."""
    rec, offsets = write_set(tmp_path)
    lengthen(rec, offsets[3], offsets[6] - offsets[4])
    expected = [(key // 2, image) for key, image in enumerate(IMAGES) if key != 3]
    for name in ("with", "without"):
        records, survey = make_report(rec, tmp_path / "out", ReportConfig(check=True), 0)[1:]
        repair(records, survey, tmp_path / name)
        assert people(RecFaceSet(tmp_path / name / "train.rec")) == expected
        rec.with_suffix(".idx").unlink(missing_ok=True)


def test_sets_that_are_as_they_should_be(tmp_path: Path) -> None:
    """Padding, records in parts, an index that leaves some out, in any order: no length is wrong."""
    rec, offsets = write_set(tmp_path)
    lines = rec.with_suffix(".idx").read_text().splitlines(keepends=True)
    file = RecordFile(rec)
    for chosen in (range(8), (0, 2, 5, 7), (3,), ()):
        some = np.array([offsets[i] for i in chosen], np.int64)
        assert not overlong(file, some, file.extents(some)).size
    assert len(RecFaceSet(rec)) == 8
    rec.with_suffix(".idx").write_text("".join(reversed(lines[1::2])))
    with pytest.warns(UserWarning, match="has no line for"):
        assert len(RecFaceSet(rec)) == 4


def test_offsets_of_an_index_at_which_no_record_begins(tmp_path: Path) -> None:
    """Within a record, in the middle of one in parts, behind the end, twice: that is no fault of the record there."""
    rec, offsets = write_set(tmp_path)
    file = RecordFile(rec)
    middle = offsets[3] - 16  # the second part of record 2
    assert file.words_at(np.array([middle]), 0)[0] == MAGIC
    wrong = np.sort(np.array([*offsets, -4, offsets[1] + 4, offsets[1] + 9, middle, offsets[5], 10**12]))
    assert not overlong(file, wrong, file.extents(wrong)).size
    lengthen(rec, offsets[1], 4)
    file = RecordFile(rec)
    assert wrong[overlong(file, wrong, file.extents(wrong))].tolist() == [offsets[1]]


def test_records_within_each_other(tmp_path: Path) -> None:
    """Thousands of heads whose records all reach to the end of the file: gigabytes, if they were images."""
    count, rec = 5_000, tmp_path / "train.rec"
    lengths = range(32 * count - 8 + len(PNG), 0, -32)
    heads = [struct.pack("<II", MAGIC, lengths[i]) + pack_image(float(i), i, b"") for i in range(count)]
    rec.write_bytes(b"".join(heads) + PNG)
    rec.with_suffix(".idx").write_text("".join(f"{i}\t{32 * i}\n" for i in range(count)))
    with pytest.raises(RecordError, match=r"record 0 at byte 0: its length is wrong.* \(4,999 such records\)"):
        RecFaceSet(rec)
    report = report_on(rec, tmp_path / "out", check=True)
    assert (report.records, report.images, report.broken) == (count, 1, count - 1)
