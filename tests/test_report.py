"""report: what it says about good sets is exact, no damage stops it, and a repaired set has every good byte."""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import cv2
import numpy as np
import pytest

from config import ReportConfig
from conftest import ROOT
from damaged_set import BROKEN, HIDDEN, JPEG, PNG, SPLIT, people, read_csv, report_on, write_damaged
from data import report as report_module
from data import survey as survey_module
from data import tolerant_records
from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.images import encode_png
from data.recordio import MAGIC_BYTES, RecordError, RecordFile, pack_image, read_index, write_records
from data.report import Report, as_text, main, make_report, set_name
from data.tolerant_records import find_records, open_records
from tiny_faces import tiny_face

SCRIPT = ROOT / "data" / "report.py"


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A set with every kind of damage."""
    return write_damaged(tmp_path / "sets" / "damaged")


def test_the_damaged_set_is_one(damaged: Path) -> None:
    """Opening it for training fails, so the report cannot lean on that."""
    with pytest.raises(RecordError):
        open_face_set(damaged)


def test_check_lists_every_damage(damaged: Path, tmp_path: Path) -> None:
    """Each broken record with file, key, offset and its own reason, no good one among them, and the counts fit."""
    report = report_on(damaged, tmp_path / "out", check=True)
    found = read_csv(tmp_path / "out" / "broken.csv")
    assert {int(row["key"]) for row in found} == set(BROKEN)
    for row in found:
        assert BROKEN[int(row["key"])][2] in row["reason"]
        assert row["file"] == str(damaged / "train.rec")
        assert row["reason"].count("train.rec") == 0, "the place has columns of its own"
    assert {row["key"]: row["identity"] for row in found if row["identity"]} == {
        "3": "0",
        "9": "2",
        "10": "3",
        "11": "3",
    }
    assert {row["key"]: row["offset"] for row in found}["18"] == str(10**12)
    assert (report.records, report.images, report.without_image, report.broken) == (25, 4, 5, 16)
    assert (report.identities, report.identities_lost) == (3, ["2"])
    assert report.sizes == {"32x32": 4}
    assert report.kinds == {"JPEG": 2, "PNG": 2}
    assert report.remarks == [
        "property says 4 identities, the images have 3",
        "property says 112x112, 4 of 4 images have another size",
    ]
    assert json.loads((tmp_path / "out" / "report.json").read_text())["broken"] == 16


def test_heads_show_all_but_what_decoding_shows(damaged: Path, tmp_path: Path) -> None:
    """Without --check the damage of records is found; the images that happen to be decoded are counted too."""
    records, _ = open_records(damaged)
    survey = survey_module.survey_heads(records)
    broken = {records.place(i).key for i in np.flatnonzero(survey.broken)}
    assert broken == set(BROKEN) - HIDDEN
    report = report_on(damaged, tmp_path / "out")  # 8 images: the sample is all of them
    assert report.broken == 16
    assert not report.checked


def test_heads_are_read_in_blocks(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Block boundaries change nothing: not for records of equal offset, nor for what is decoded."""
    whole = report_on(damaged, tmp_path / "whole", check=True)
    monkeypatch.setattr(survey_module, "HEADS_AT_ONCE", 1)
    monkeypatch.setattr(survey_module, "BLOCK", 2)
    monkeypatch.setattr(tolerant_records, "SCAN_BYTES", 64)
    assert report_on(damaged, tmp_path / "blocks", check=True) == whole
    assert (tmp_path / "blocks" / "broken.csv").read_bytes() == (tmp_path / "whole" / "broken.csv").read_bytes()
    file = RecordFile(damaged / "train.rec")
    small = find_records(file)
    monkeypatch.undo()
    assert [part.tolist() for part in small] == [part.tolist() for part in find_records(file)]


def test_repair_keeps_every_good_byte(damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The repaired set opens, holds the good images bit for bit and no other, and says what became of each identity."""
    before = {path: path.read_bytes() for path in damaged.iterdir()}
    out = tmp_path / "mended"
    main([str(damaged), "--repair", str(out), "--output", str(tmp_path / "report"), "--workers", "0"])
    repaired = open_face_set(out)
    assert people(repaired) == [(0, JPEG), (0, PNG), (1, SPLIT), (2, PNG)]
    assert (out / "property").read_text() == "3,32,32"
    assert [list(row.values()) for row in read_csv(out / "repair.csv")] == [
        ["0", "0", "2", "1"],
        ["1", "1", "1", "0"],
        ["2", "", "0", "1"],
        ["3", "2", "1", "2"],
    ]
    assert b"\r" not in (out / "repair.csv").read_bytes()  # as in all other tables
    assert "every image of identity 2 is broken" in capsys.readouterr().out
    assert report_on(out, tmp_path / "again", check=True).broken == 0
    assert {path: path.read_bytes() for path in damaged.iterdir()} == before


def test_repair_never_writes_over_anything(damaged: Path, tmp_path: Path) -> None:
    """A folder that is there is refused at once, before hours of checking."""
    out = tmp_path / "mine"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(SystemExit, match="mine exists and is not empty"):
        main([str(damaged), "--repair", str(out), "--output", str(tmp_path / "report")])
    assert [path.name for path in out.iterdir()] == ["precious"]
    assert not (tmp_path / "report").exists()


def test_repair_that_fails_leaves_nothing(damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error midway leaves no folder that looks like a set, nor a temporary one."""
    records, survey = make_report(damaged, tmp_path / "report", ReportConfig(check=True), 0)[1:]
    monkeypatch.setattr(type(records), "encoded", lambda self, i: b"")  # broken since it was checked
    with pytest.raises(ValueError, match="image 0 of identity 0 is empty"):
        report_module.repair(records, survey, tmp_path / "mended")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "sets"]


@pytest.mark.parametrize("text", ["9" * 5000, f"4,{'1' * 19},112", "4,112"])
def test_a_property_that_is_none(tmp_path: Path, text: str) -> None:
    """Is quoted, its beginning at most; digits of which Python makes no number ended the report without a word of
    where they were."""
    with write_records(tmp_path / "a.rec") as writer:
        writer.write(1, pack_image(0.0, 1, PNG))
    (tmp_path / "property").write_text(text)
    report = report_on(tmp_path / "a.rec", tmp_path / "out")
    assert report.remarks == [f"property says {text[:100]!r} in place of identities,height,width"]


def test_many_lost_identities_are_counted() -> None:
    """The screen names some of the identities that are broken as a whole, and says how many there are besides."""
    lost = [str(number) for number in range(25)]
    report = Report("a", True, 25, 0, 0, 25, 0, None, lost, {}, {}, {}, {"sum": 0}, None, [])
    lines = as_text(report).splitlines()
    assert lines[-2:] == ["  every image of identity 19 is broken", "  and of 5 more identities"]


def test_identity_records_beyond_float32(tmp_path: Path) -> None:
    """id_start may be rounded up: an identity record is not taken for an image that lost its bytes."""
    first = 2**24 + 3  # stored as 2**24 + 4
    with write_records(tmp_path / "a.rec") as writer:
        writer.write(first - 1, pack_image(0.0, first - 1, PNG))
        writer.write(first, pack_image([first - 1, first], first, b""))
        writer.write(0, pack_image([first, first + 1], 0, b""))
    report = report_on(tmp_path / "a.rec", tmp_path / "out", check=True)
    assert (report.images, report.without_image, report.broken) == (1, 2, 0)


@pytest.mark.parametrize("content", [b"\0" * 4, b"no records here, but long enough for one", MAGIC_BYTES])
def test_a_file_without_any_record(tmp_path: Path, content: bytes) -> None:
    """With or without an .idx there is nothing to report on, and that is an error."""
    rec = tmp_path / "a.rec"
    rec.write_bytes(content)
    with pytest.raises(RecordError, match=r"a\.rec holds no record"):
        report_on(rec, tmp_path / "out")
    rec.with_suffix(".idx").write_text("0\t0\n1\t40\n")
    with pytest.raises(RecordError, match=r"a\.rec holds no record"):
        report_on(rec, tmp_path / "out")


def test_a_set_of_broken_images_only(tmp_path: Path) -> None:
    """The report is written all the same; repair has nothing to write, and says so."""
    rec = tmp_path / "a.rec"
    with write_records(rec) as writer:
        for key in range(2):
            writer.write(key, pack_image(0.5, key, PNG))
    report = report_on(rec, tmp_path / "out", check=True)
    assert (report.images, report.broken, report.identities, report.sizes) == (0, 2, 0, {})
    assert not (tmp_path / "out" / "faces.png").exists()
    with pytest.raises(SystemExit, match=r"mended is not written: .*a\.rec has not one good image"):
        main([str(rec), "--repair", str(tmp_path / "mended"), "--output", str(tmp_path / "out"), "--workers", "0"])
    assert not (tmp_path / "mended").exists()


def test_folder_of_identities(tmp_path: Path) -> None:
    """Files instead of records: empty, unreadable and undecodable ones are named, and repair packs the rest."""
    root = tmp_path / "people"
    images = {"Ada/1.jpg": JPEG, "Ada/2.png": PNG, "Ada/3.jpg": b"", "Bea/1.jpg": b"text", "Cai/1.png": PNG}
    for name, image in images.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(image)
    (root / "Cai" / "2.jpg").symlink_to("gone")
    report = report_on(root, tmp_path / "out")
    assert (report.images, report.broken, report.identities_lost) == (3, 3, ["Bea"])
    rows = read_csv(tmp_path / "out" / "broken.csv")
    assert [(Path(row["file"]).name, row["key"], row["identity"]) for row in rows] == [
        ("3.jpg", "", ""),
        ("1.jpg", "", "Bea"),
        ("2.jpg", "", ""),
    ]
    assert ["empty" in rows[0]["reason"], "no image" in rows[1]["reason"], "No such file" in rows[2]["reason"]] == [
        True
    ] * 3
    main([str(root), "--repair", str(tmp_path / "mended"), "--output", str(tmp_path / "out"), "--workers", "0"])
    assert people(open_face_set(tmp_path / "mended")) == [(0, JPEG), (0, PNG), (1, PNG)]
    assert [row["identity"] for row in read_csv(tmp_path / "mended" / "repair.csv")] == ["Ada", "Bea", "Cai"]


def test_report_within_a_folder_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started in the set's own folder, it does not add its pictures to the set as one more identity."""
    (tmp_path / "Ada").mkdir()
    (tmp_path / "Ada" / "1.png").write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="is within the set"):
        main(["."])
    assert [path.name for path in tmp_path.iterdir()] == ["Ada"]


def test_numbers_of_a_real_set(face_data: Path, tmp_path: Path) -> None:
    """A set that mxnet wrote: the counts that its makers state, and nothing broken, with two processes decoding."""
    options = ReportConfig(check=True)
    report, _, _ = make_report(face_data / "faces_glint24", tmp_path, options, workers=2)
    assert (report.records, report.images, report.without_image, report.broken) == (4219, 4194, 25, 0)
    assert (report.identities, report.identities_lost, report.remarks) == (24, [], [])
    assert report.sizes == {"112x112": 4194}
    assert report.kinds == {"JPEG": 4194}
    assert report.property == "24,112,112"
    faces = open_face_set(face_data / "faces_glint24")
    counts = np.bincount(faces.labels)
    assert report.images_per_identity["max"] == counts.max()
    assert report.images_per_identity["mean"] == pytest.approx(counts.mean(), abs=0.051)
    assert report.image_bytes["sum"] == sum(len(faces.encoded(i)) for i in range(len(faces)))
    assert report.copies == {"images": 3, "under_another_identity": 0}


@pytest.mark.parametrize("workers", [0, 2])
def test_copies_are_named_with_the_first(tmp_path: Path, workers: int) -> None:
    """Bytes that come again, under the same identity or another; a broken image is nobody's copy."""
    a, b, c = tiny_face(0, 0), tiny_face(1, 0), tiny_face(2, 0)
    folder = tmp_path / "set"
    with write_face_set(folder, 32) as out:
        for images in ([a, b, b"broken", b], [c, a, b"broken"], [b, tiny_face(3, 0)], [a]):
            out.add_identity(images)
    output = tmp_path / "out"
    report = make_report(folder, output, ReportConfig(check=True), workers)[0]
    assert report.copies == {"images": 4, "under_another_identity": 3}
    lines = read_csv(output / "copies.csv")
    names = ("key", "identity", "first_key", "first_identity")
    found = [tuple(int(line[name]) for name in names) for line in lines]
    assert found == [(4, 0, 2, 0), (6, 1, 1, 0), (8, 2, 2, 0), (10, 3, 1, 0)]
    assert "copies               4, 3 of them under another identity" in as_text(report)
    offsets = dict(zip(*(part.tolist() for part in read_index(folder / "train.idx")), strict=True))
    assert [int(line["offset"]) for line in lines] == [offsets[int(line["key"])] for line in lines]
    assert report_on(folder, output).copies is None
    assert not (output / "copies.csv").exists(), "a report that did not look has no list of an earlier one"


def test_repair_of_a_real_set(face_data: Path, tmp_path: Path) -> None:
    """An im2rec set in shuffled order, two images damaged: all others come out bit for bit, sorted by identity."""
    source = face_data / "kazakh25"
    content = bytearray((source / "validation.rec").read_bytes())
    faces = open_face_set(source)
    for i in (7, 100):
        start = content.index(faces.encoded(i))
        content[start : start + 20] = bytes(20)
    damaged = tmp_path / "kazakh"
    damaged.mkdir()
    (damaged / "validation.rec").write_bytes(content)
    (damaged / "validation.idx").write_bytes((source / "validation.idx").read_bytes())
    records, survey = make_report(damaged, tmp_path / "out", ReportConfig(check=True), 0)[1:]
    report_module.repair(records, survey, tmp_path / "mended")
    expected = [face for i, face in enumerate(people(faces)) if i not in (7, 100)]
    assert people(open_face_set(tmp_path / "mended")) == sorted(expected, key=lambda face: face[0])


def test_sample_and_sheet_follow_the_seed(face_data: Path, tmp_path: Path) -> None:
    """Without --check only a sample is decoded, and says so; one seed gives one picture, another another."""
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        report = report_on(face_data / "faces_glint24", tmp_path / name, seed=seed, sample=30, rows=3)
        assert sum(report.sizes.values()) == 30
        assert not report.checked
    pictures = [cv2.imread(str(tmp_path / name / "faces.png")) for name in "abc"]
    assert (pictures[0] == pictures[1]).all()
    assert pictures[0].shape != pictures[2].shape or (pictures[0] != pictures[2]).any()


def test_a_set_whose_images_all_turn_out_broken_is_reported(tmp_path: Path) -> None:
    """A small one is broken altogether once the sheet of faces was tried: it ended in an IndexError."""
    with write_records(tmp_path / "train.rec") as writer:
        for key in range(3):
            writer.write(key, pack_image(float(key), key, JPEG[:20]))
    report = report_on(tmp_path / "train.rec", tmp_path / "out", sample=1)
    assert (report.images, report.broken, report.identities_lost) == (0, 3, ["0", "1", "2"])
    assert not (tmp_path / "out" / "images_per_identity.png").exists()


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    """A set that has broken since has none, and those of before would lie beside the new numbers."""
    with write_records(tmp_path / "train.rec") as writer:
        writer.write(1, pack_image(0.0, 1, JPEG[:20]))
    (tmp_path / "out").mkdir()
    for name in ("faces.png", "images_per_identity.png"):
        (tmp_path / "out" / name).write_text("of an earlier report")
    report_on(tmp_path / "train.rec", tmp_path / "out", check=True)
    assert not list((tmp_path / "out").glob("*.png"))


def test_a_tree_of_folders_keeps_no_object_an_image(tmp_path: Path) -> None:
    """Trees have millions of images, whose paths alone were gigabytes; a part of them has the same ones."""
    for person in range(20):
        (tmp_path / "tree" / f"{person:03}").mkdir(parents=True)
        for image in range(50):
            (tmp_path / "tree" / f"{person:03}" / f"{image:03}.png").write_bytes(PNG)
    tracemalloc.start()
    try:
        records, _ = open_records(tmp_path / "tree")
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 80 * len(records)
    part = records.part(990, 2000)
    assert (len(part), part.place(9), part.encoded(9)) == (10, records.place(999), PNG)


def test_pictures_of_images_of_any_size(tmp_path: Path) -> None:
    """Loose crops and one-image identities: the sheet has a white-framed tile for each, and both pictures open."""
    sizes = [(5, 40), (300, 100), (1, 1)]
    with write_face_set(tmp_path / "set", 112) as out:
        for identity in range(3):
            out.add_identity(encode_png(np.full((*size, 3), 60 * identity, np.uint8)) for size in sizes[identity:])
    report = report_on(tmp_path / "set", tmp_path / "out")
    assert report.sizes == {"1x1": 3, "100x300": 2, "40x5": 1}
    assert report.remarks == ["property says 112x112, 6 of 6 images have another size"]
    for name in ("faces.png", "images_per_identity.png"):
        assert cv2.imread(str(tmp_path / "out" / name)) is not None


@pytest.mark.parametrize(
    ("path", "name"), [("ms1", "ms1"), ("ms1/train.rec", "ms1"), ("ms1/val.rec", "val"), ("people.v2", "people.v2")]
)
def test_name_of_the_report(tmp_path: Path, path: str, name: str) -> None:
    """Reports of several sets in one working directory do not overwrite each other."""
    (tmp_path / path).parent.mkdir(exist_ok=True)
    if path.endswith(".rec"):
        (tmp_path / path).touch()
    else:
        (tmp_path / path).mkdir()
    assert set_name(tmp_path / path) == name


def test_nothing_heavy_is_imported() -> None:
    """A report needs no torch, and matplotlib only once it draws."""
    program = (
        "import sys, data.report; sys.exit(', '.join({'torch', 'matplotlib', 'sklearn'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("how", "workers"), [("script", "1"), ("module", "0")])
def test_from_another_directory(damaged: Path, tmp_path: Path, how: str, workers: str) -> None:
    """As a script and as a module, from anywhere: the same table, a folder beside nobody's set, status 1 for damage."""
    program = [str(SCRIPT)] if how == "script" else ["-m", "data.report"]
    done = subprocess.run(
        [sys.executable, *program, "sets/damaged", "--check", "--workers", workers],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT) if how == "module" else ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "  broken               16\n" in done.stdout
    assert "train.rec, record 3 at byte" in done.stdout
    assert sorted(path.name for path in (tmp_path / "report-damaged").iterdir()) == [
        "broken.csv",
        "copies.csv",
        "faces.png",
        "images_per_identity.png",
        "report.json",
    ]
    assert sorted(path.name for path in damaged.iterdir()) == ["property", "train.idx", "train.rec"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "nothing does not exist"),
        ([], r"no set is named: report\.py A \(data\.root is datasets/ms1mv3, which does not exist\)"),
        (
            ["--data.root", "empty,file.txt"],
            r"data\.root names 2 sets \(empty, file\.txt\): one at a time, report",
        ),
        (["file.txt"], "is no face set"),
        (["empty"], "has no folders of images"),
    ],
)
def test_errors_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    """A wrong path ends the program with one line that names it, and leaves no folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit, match=message) as error:
        main(arguments)
    assert str(error.value).startswith("report: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file.txt"]
