"""Face sets are written as insightface reads them, whole or not at all."""

import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.face_set_writer import write_face_set
from data.face_sets import RecFaceSet, open_face_set
from data.recordio import (
    MAGIC_BYTES,
    IndexedRecordReader,
    pack_image,
)
from face_set_files import contents, write_rec


def test_writer_lays_out_what_insightface_reads(tmp_path: Path) -> None:
    """Keys, labels, identity ranges, record 0 and property, record by record, as the format says."""
    with write_face_set(tmp_path / "set", image_size=96) as out:
        assert out.add_identity([b"a1", b"a2"]) == 0
        assert out.add_identity(iter([b"b1"])) == 1
        (out.folder / "merge.json").write_text("{}")
    assert sorted(p.name for p in (tmp_path / "set").iterdir()) == ["merge.json", "property", "train.idx", "train.rec"]
    assert (tmp_path / "set" / "property").read_text() == "2,96,96"
    reader = IndexedRecordReader(tmp_path / "set" / "train.rec")
    assert reader.keys.tolist() == [1, 2, 3, 4, 5, 0]
    written = {key: reader.read(key) for key in reader.keys.tolist()}
    assert written == {
        1: struct.pack("<IfQQ", 0, 0.0, 1, 0) + b"a1",
        2: struct.pack("<IfQQ", 0, 0.0, 2, 0) + b"a2",
        3: struct.pack("<IfQQ", 0, 1.0, 3, 0) + b"b1",
        4: struct.pack("<IfQQff", 2, 0.0, 4, 0, 1.0, 3.0),
        5: struct.pack("<IfQQff", 2, 0.0, 5, 0, 3.0, 4.0),
        0: struct.pack("<IfQQff", 2, 0.0, 0, 0, 4.0, 6.0),
    }


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.binary(min_size=1, max_size=9) | st.just(MAGIC_BYTES), min_size=1), min_size=1, max_size=5))
def test_writer_round_trip(tmp_path_factory: pytest.TempPathFactory, people: list[list[bytes]]) -> None:
    """What is written is read again, in order, without a warning about `property`."""
    folder = tmp_path_factory.mktemp("written") / "set"
    with write_face_set(folder, image_size=112) as out:
        for images in people:
            out.add_identity(images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        faces = open_face_set(folder)
    assert [faces.encoded(i) for i in range(len(faces))] == [image for images in people for image in images]
    assert faces.labels.tolist() == [label for label, images in enumerate(people) for _ in images]


def write_interrupted(folder: Path) -> None:
    with write_face_set(folder, image_size=112) as out:
        out.add_identity([b"a"])
        raise KeyboardInterrupt


def write_empty_image(folder: Path) -> None:
    with write_face_set(folder, image_size=112) as out:
        out.add_identity([b"a", b""])


def write_identity_without_images(folder: Path) -> None:
    with write_face_set(folder, image_size=112) as out:
        out.add_identity([b"a"])
        out.add_identity([])


@pytest.mark.parametrize(
    ("write", "error", "message"),
    [
        (write_interrupted, KeyboardInterrupt, None),
        (write_empty_image, ValueError, "image 1 of identity 0 is empty"),
        (write_identity_without_images, ValueError, "identity 1 has no images"),
    ],
)
def test_nothing_is_left_behind_when_writing_fails(
    tmp_path: Path, write: Callable[[Path], None], error: type[BaseException], message: str | None
) -> None:
    """An interrupted or refused set leaves no folder, no temporary one, and no half of a file."""
    with pytest.raises(error, match=message):
        write(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


def test_writer_refuses_to_overwrite(tmp_path: Path) -> None:
    """A folder with anything in it stays as it is; an empty one may be used."""
    (tmp_path / "set").mkdir()
    with write_face_set(tmp_path / "set", image_size=112) as out:
        out.add_identity([b"a"])
    before = (tmp_path / "set" / "train.rec").read_bytes()
    with pytest.raises(FileExistsError, match="set exists and is not empty"), write_face_set(tmp_path / "set", 112):
        pytest.fail("the block must not be entered")
    assert (tmp_path / "set" / "train.rec").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["set"]


def test_set_travels_to_worker_processes(tmp_path: Path) -> None:
    """A pickled set carries labels and offsets, not the images, and reads the same."""
    records = {key: pack_image(float(key), key, bytes([key]) * 50_000) for key in range(1, 5)}
    faces = RecFaceSet(write_rec(tmp_path, records))
    pickled = pickle.dumps(faces)
    assert len(pickled) < 5_000
    assert contents(pickle.loads(pickled)) == contents(faces)


def test_labels_that_a_record_cannot_hold(tmp_path: Path) -> None:
    """They are float32: two people more than 2^24 would have been one."""
    with pytest.raises(ValueError, match="labels up to 16,777,216"), write_face_set(tmp_path / "set", 32) as out:
        out.ranges += [(1, 1)] * 2**24
        out.add_image(b"the last one")
        out.end_identity()
        out.add_image(b"one too many")
    assert not (tmp_path / "set").exists()
