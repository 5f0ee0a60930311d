"""Golden files that mxnet 1.9.1 wrote (golden/make_golden.py): read by our reader, written again by our writers."""

from pathlib import Path

import numpy as np
import pytest

from data.face_set_writer import write_face_set
from data.face_sets import RecFaceSet
from data.recordio import IndexedRecordReader, RecordFile, pack_image, unpack_image, write_records
from golden.records import IMAGES, PAYLOADS, PEOPLE

GOLDEN = Path(__file__).resolve().parent / "golden"
IMAGE_PAYLOADS = {key: pack_image(label, id, image, id2) for key, (label, id, id2, image) in IMAGES.items()}


@pytest.mark.parametrize(("name", "records"), [("payloads", PAYLOADS), ("images", IMAGE_PAYLOADS)])
def test_written_as_mxnet_does(tmp_path: Path, name: str, records: dict[int, bytes]) -> None:
    """Both files, byte for byte: cuts at magics, padding, labels and ids, keys in any order."""
    with write_records(tmp_path / f"{name}.rec") as file:
        for key, payload in records.items():
            file.write(key, payload)
    for ending in (".rec", ".idx"):
        assert (tmp_path / name).with_suffix(ending).read_bytes() == (GOLDEN / name).with_suffix(ending).read_bytes()


def test_payloads_are_read() -> None:
    """Every payload under its key, in the order of the file: magics are put back, padding is left out."""
    reader = IndexedRecordReader(GOLDEN / "payloads.rec")
    assert reader.keys.tolist() == list(PAYLOADS)
    assert {key: reader.read(key) for key in PAYLOADS} == PAYLOADS


@pytest.mark.parametrize("key", IMAGES)
def test_image_records_are_read(key: int) -> None:
    """Labels as the nearest float32 to the bit, infinities and NaN included; ids of 64 bits; the image."""
    record = unpack_image(IndexedRecordReader(GOLDEN / "images.rec").read(key), "golden")
    given = IMAGES[key]
    labels = given.label if given.label != [] else 0.0  # mxnet's pack makes the label 0 of none
    assert record.labels.tobytes() == np.atleast_1d(np.array(labels, "<f4")).tobytes()
    assert (record.id, record.id2, record.image) == given[1:]


def test_insightface_layout(tmp_path: Path) -> None:
    """A set of ours is the one that mxnet wrote, and both open as the same faces."""
    with write_face_set(tmp_path / "set", image_size=112) as out:
        for images in PEOPLE:
            out.add_identity(images)
    for ending in (".rec", ".idx"):
        written = (tmp_path / "set" / "train").with_suffix(ending).read_bytes()
        assert written == (GOLDEN / "faces").with_suffix(ending).read_bytes()
    faces = RecFaceSet(GOLDEN / "faces.rec")
    assert [faces.encoded(i) for i in range(len(faces))] == [image for images in PEOPLE for image in images]
    assert faces.labels.tolist() == [label for label, images in enumerate(PEOPLE) for _ in images]


def test_index_is_rebuilt() -> None:
    """Walking mxnet's `.rec` gives the keys and offsets of its `.idx`."""
    keys, offsets = RecordFile(GOLDEN / "faces.rec").scan()
    lines = [f"{key}\t{offset}\n" for key, offset in zip(keys, offsets, strict=True)]
    assert "".join(lines) == (GOLDEN / "faces.idx").read_text()
