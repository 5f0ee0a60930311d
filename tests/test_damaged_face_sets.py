"""Damaged face sets say what is wrong, where, and what to do; a property file is compared, not believed."""

import struct
import warnings
from pathlib import Path

import pytest

from data.face_sets import FaceSetError, RecFaceSet
from data.recordio import (
    MAGIC_BYTES,
    RecordError,
    pack_image,
)
from data.survey import survey_heads
from data.tolerant_records import open_records
from face_set_files import (
    FACES_BY_KEY,
    RANGES,
    contents,
    header,
    scalar_images,
    write_rec,
)


@pytest.mark.parametrize("label", [0.5, -1.0, float("nan"), float("inf"), 2.0**31])
@pytest.mark.parametrize("image", [b"x", MAGIC_BYTES], ids=["plain", "cut at a magic"])
def test_labels_that_are_no_identity(tmp_path: Path, label: float, image: bytes) -> None:
    """A label that is no whole number from 0 is an error that names file, record and label, not a wrong class."""
    path = write_rec(tmp_path, {**scalar_images(), 9: pack_image(label, 9, image)})
    with pytest.raises(RecordError, match=rf"record 9 at byte \d+: label {label} is no identity number \(1 such") as e:
        RecFaceSet(path)
    assert f"data/report.py {path} --repair" in str(e.value)


def test_no_images(tmp_path: Path) -> None:
    """A set of headers only is refused with the number of records in it."""
    path = write_rec(tmp_path, {**RANGES, **header(5, 7)})
    with pytest.raises(FaceSetError, match=r"train\.rec has 3 records and not one image"):
        RecFaceSet(path)


@pytest.mark.parametrize("cut", [1, 4, 20, 35])
def test_truncated_rec(tmp_path: Path, cut: int) -> None:
    """A file that was cut off is noticed when it is opened, wherever the cut is in its last record."""
    path = write_rec(tmp_path, {1: pack_image(0.0, 1, b"x" * 8), 2: pack_image(1.0, 2, b"four")})
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(RecordError, match=rf"(the file ends at {size - cut}|the file has {size - cut} bytes)") as error:
        RecFaceSet(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("offset", "message"),
    [
        (-4, "no record can begin at byte -4"),
        (10**9, "no record can begin at byte 1000000000"),
        (-(10**9), "no record can begin at byte -1000000000"),
        (-124, "no record can begin at byte -124"),  # the size of the file: counted from its end, a record begins there
        (4, "no record begins at byte 4"),
    ],
)
def test_index_of_another_file(tmp_path: Path, offset: int, message: str) -> None:
    """An offset where no record begins is an error when the set is opened, with file and byte."""
    path = write_rec(tmp_path, {1: pack_image(0.0, 1, b"x" * 60), 2: pack_image(1.0, 2, b"")})
    assert path.stat().st_size == 124
    with path.with_suffix(".idx").open("a") as index:
        index.write(f"7\t{offset}\n")
    with pytest.raises(RecordError, match=message) as error:
        RecFaceSet(path)
    assert str(path) in str(error.value)


def test_bytes_that_are_no_number_are_told_of_as_damage_only(tmp_path: Path) -> None:
    """Where no record begins, the bytes of its label may be a signalling NaN: no warning of numpy's comes of them."""
    path = write_rec(tmp_path, {**scalar_images(), 9: pack_image(0.0, 9, b"x")})
    content = bytearray(path.read_bytes())
    last = int(path.with_suffix(".idx").read_text().split()[-1])
    content[last : last + 4], content[last + 12 : last + 16] = b"oops", b"\1\0\x80\x7f"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecordError, match="no record begins"):
            RecFaceSet(path)
        assert survey_heads(open_records(path)[0]).broken.tolist() == [False] * 4 + [True]


def test_damaged_beginning_of_a_record(tmp_path: Path) -> None:
    """A record whose magic was overwritten is an error when the set is opened, even if all else fits."""
    path = write_rec(tmp_path, scalar_images())
    path.write_bytes(b"oops" + path.read_bytes()[4:])
    with pytest.raises(RecordError, match=r"train\.rec: no record begins at byte 0 \(found 0x73706f6f"):
        RecFaceSet(path)


def test_header_that_announces_too_many_labels(tmp_path: Path) -> None:
    """A record whose label array would pass its end is refused by key."""
    path = write_rec(tmp_path, {**scalar_images(), 8: struct.pack("<IfQQ", 1000, 0.0, 8, 0) + b"image"})
    with pytest.raises(RecordError, match=r"train\.rec, record 8 at byte \d+: its header announces 1000 labels"):
        RecFaceSet(path)


def test_record_without_room_for_a_header(tmp_path: Path) -> None:
    """A record of three bytes is no image record."""
    with pytest.raises(RecordError, match=r"record 1 at byte 0: 3 bytes are too few"):
        RecFaceSet(write_rec(tmp_path, {1: b"abc"}))


@pytest.mark.parametrize(
    "text",
    [
        *(b"2,112,112", b"2,112,112\n", b"2,112,112\nmade by x\n9\n", b"2,96,96", b"2", b"2\n9,9,9"),
        *(b"\xef\xbb\xbf2,112,112\r\n", b"2,112,112\nby Andr\xe9\n"),
    ],
)
def test_property_that_agrees(tmp_path: Path, text: bytes) -> None:
    """Only the first line counts, with or without line break, and only its number of identities; other lines may be in
    any encoding.
    """
    (tmp_path / "property").write_bytes(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RecFaceSet(write_rec(tmp_path, scalar_images()))


@pytest.mark.parametrize(
    ("text", "stated"), [("3,112,112", "'3'"), ("", "''"), ("a,b\n2,112,112", "'a'"), ("9" * 5000, "'9{100}'")]
)
def test_property_that_contradicts(tmp_path: Path, text: str, stated: str) -> None:
    """A wrong count is a warning that names the file and both numbers; the images are believed."""
    (tmp_path / "property").write_text(text)
    with pytest.warns(UserWarning, match=rf"property states {stated} identities, the images have 2"):
        assert contents(RecFaceSet(write_rec(tmp_path, scalar_images()))) == FACES_BY_KEY
