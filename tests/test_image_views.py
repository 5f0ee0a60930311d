"""Images decoded straight from the mapped file: the same bytes and pixels as by the careful way, or left to it."""

import os
from pathlib import Path

import cv2
import numpy as np
import pytest

from data.face_set_writer import write_face_set
from data.face_sets import FolderFaceSet, RecFaceSet, image_views, open_face_set
from data.images import (
    ImageError,
    decode_face,
    decode_plain_jpegs,
    decode_rgb,
    encode_jpeg,
    encode_png,
    image_extension,
)
from data.joined_sets import FrequentIdentities, JoinedFaceSet, open_training_set
from data.loading import DecodedFaces
from data.recordio import MAGIC_BYTES, RecordFile, pack_image, write_records
from tiny_faces import tiny_face

SIZE = 16


def face(seed: int, height: int = SIZE, width: int = SIZE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def records(tmp_path: Path) -> RecFaceSet:
    """Ten images, with scalar and array labels; the third is cut at an embedded magic, the fifth is a PNG."""
    with write_records(tmp_path / "rec" / "train.rec") as writer:
        for key in range(1, 11):
            image = encode_png(face(key)) if key == 5 else encode_jpeg(face(key))
            if key == 3:
                image = b"\xff\xd8\xff\xfe\x00\x0c  " + MAGIC_BYTES * 2 + image[2:]  # in a comment, at a multiple of 4
            label = [float(key % 3), 1.0] if key % 2 else float(key % 3)
            writer.write(key, pack_image(label, key, image))
    return RecFaceSet(tmp_path / "rec" / "train.rec")


def test_views_are_the_images(tmp_path: Path, records: RecFaceSet) -> None:
    """Through every kind of set, in any order and again, a view holds the bytes of its own image, or there is none."""
    (tmp_path / "folder" / "a").mkdir(parents=True)
    (tmp_path / "folder" / "a" / "0.png").write_bytes(tiny_face(0, 0))
    joined = JoinedFaceSet([records, FolderFaceSet(tmp_path / "folder"), records])
    frequent = FrequentIdentities(records, 4)  # identity 1: keys 1, 4, 7 and 10
    without = {"rec": {2}, "joined": {2, 10, 13}, "frequent": set()}
    for name, faces in {"rec": records, "joined": joined, "frequent": frequent}.items():
        positions = np.random.default_rng(0).permutation(np.arange(2 * len(faces)) % len(faces))
        views = image_views(faces, positions)
        assert {i for i, view in zip(positions.tolist(), views, strict=True) if view is None} == without[name]
        for i, view in zip(positions.tolist(), views, strict=True):
            if view is not None:
                assert view.tobytes() == faces.encoded(i), f"{name} {i}"
    assert image_views(FolderFaceSet(tmp_path / "folder"), np.array([0])) == [None]


def test_spans_of_what_is_no_record(tmp_path: Path, records: RecFaceSet) -> None:
    """Offsets that are wrong, and records whose heads lie, have no span: nothing outside a payload is decoded."""
    path = records.path
    file = RecordFile(path)
    content = bytearray(path.read_bytes())
    offsets = np.array([int(line.split("\t")[1]) for line in path.with_suffix(".idx").read_text().splitlines()])
    first, end = file.image_spans(offsets)
    assert (end[[0, 1, 3]] > first[[0, 1, 3]]).all()
    assert end[2] == 0, "cut at the magic"
    wrong = np.array([-4, -(10**9), 2, 4, len(content), len(content) - 4, 10 * len(content)])
    assert file.image_spans(wrong)[1].tolist() == [0] * len(wrong)
    for damage, at in ((b"oops", 0), (b"\xff\xff\xff\x1f", 4), (b"\xff\xff\x00\x00", 8), (b"\x18\0\0\0", 4)):
        damaged = content.copy()
        damaged[offsets[1] + at : offsets[1] + at + 4] = damage
        other = tmp_path / "damaged.rec"
        other.write_bytes(damaged)
        assert RecordFile(other).image_spans(offsets)[1][1] == 0, f"{damage!r} at {at}"
    # In a large file the flag of a cut record could pass for a length. This one takes no room on the disk.
    (tmp_path / "large.rec").write_bytes(content)
    os.truncate(tmp_path / "large.rec", 1 << 30)
    assert RecordFile(tmp_path / "large.rec").image_spans(offsets)[1][2] == 0
    (tmp_path / "short.rec").write_bytes(b"\0" * 9)
    assert RecordFile(tmp_path / "short.rec").image_spans(np.array([0]))[1].tolist() == [0]


def test_plain_jpegs(records: RecFaceSet) -> None:
    """Rows hold what `decode_rgb` makes of the bytes; whatever is odd is left, and does not touch its row."""
    jpeg = encode_jpeg(face(0))
    odd = {
        "nothing": None,
        "empty": b"",
        "png": encode_png(face(1)),
        "cut": jpeg[:-2],
        "garbage": b"\xff\xd8 garbage \xff\xd9",
        "one pixel": encode_jpeg(face(0, 1, 1)),
        "a row": encode_jpeg(face(0, 1, SIZE)),
        "larger": encode_jpeg(face(0, SIZE + 1, SIZE)),
        "grey": cv2.imencode(".jpg", face(3)[..., 0])[1].tobytes(),
    }
    faces = np.full((len(odd) + 1, SIZE, SIZE, 3), 7, np.uint8)
    images = [None if image is None else np.frombuffer(image, np.uint8) for image in (*odd.values(), jpeg)]
    left = decode_plain_jpegs(images, faces)
    assert [list(odd)[row] for row in left] == list(odd)[:-1]
    assert (faces[left] == 7).all()
    assert np.array_equal(faces[-1], decode_rgb(jpeg, "jpeg"))
    assert np.array_equal(faces[-2], decode_rgb(odd["grey"] or b"", "grey"))


def test_batches_are_those_of_the_careful_way(records: RecFaceSet) -> None:
    """PNG, cut records and plain JPEGs in one batch: all have the pixels and labels of one image decoded by itself."""
    decoded = DecodedFaces(records, records.labels, SIZE)
    positions = [9, 2, 4, 0, 2, 1]
    batch = decoded.__getitems__(positions)
    expected = [decode_face(records.encoded(i), SIZE, False, i) for i in positions]
    assert np.array_equal(batch.faces.numpy(), np.stack(expected))
    assert batch.labels.tolist() == records.labels[positions].tolist()
    batch.labels[0] = -1
    assert decoded.labels[9] != -1, "a batch's labels are its own"


@pytest.mark.parametrize("name", ["faces_glint24", "kazakh25"])
def test_real_faces_have_views(face_data: Path, name: str) -> None:
    """No image of a real set takes the slow way, and its pixels are those of cv2.imdecode, bit for bit."""
    faces = open_face_set(face_data / name)
    positions = np.random.default_rng(0).permutation(len(faces))[:200]
    views = image_views(faces, positions)
    shape = decode_rgb(faces.encoded(int(positions[0])), "").shape
    rows = np.zeros((len(views), *shape), np.uint8)
    left = decode_plain_jpegs(views, rows)
    same_size = [decode_rgb(faces.encoded(int(i)), "").shape == shape for i in positions]
    assert left == [row for row, same in enumerate(same_size) if not same]
    for row in set(range(len(views))) - set(left):
        encoded = np.frombuffer(faces.encoded(int(positions[row])), np.uint8)
        assert np.array_equal(rows[row], cv2.imdecode(encoded, cv2.IMREAD_COLOR)[..., ::-1])


def test_a_cut_jpeg_is_no_image() -> None:
    """What lacks its end is refused by one rule, whatever the decoder makes of it; a thumbnail's end is no end."""
    jpeg = encode_jpeg(face(0))
    thumbnail = b"\xff\xe1" + (2 + len(jpeg)).to_bytes(2, "big") + jpeg
    whole = jpeg[:2] + thumbnail + jpeg[2:]
    assert np.array_equal(decode_rgb(whole + b"trailing bytes", "x"), decode_rgb(jpeg, "x"))
    for size in (len(whole) - 1, len(whole) - 2, len(whole) - 50):
        with pytest.raises(ImageError, match=f"^x: its JPEG of {size} bytes has no end: it was cut off"):
            decode_rgb(whole[:size], "x")


def test_a_jpeg_with_a_film_behind_it_is_whole() -> None:
    """Phones append the film of a "motion photo", in which the bytes of a scan's start come by chance, half of them
    behind the last that look like an end; a progressive JPEG has several scans, whose ends are none.
    """
    _, progressive = cv2.imencode(".jpg", face(0), [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    for jpeg in (encode_jpeg(face(0)), progressive.tobytes()):
        film = b"ftyp \xff\xd9 \xff\xda \xff"
        assert np.array_equal(decode_rgb(jpeg + film, "x"), decode_rgb(jpeg, "x"))
        with pytest.raises(ImageError, match="has no end: it was cut off"):
            decode_rgb(jpeg[:-2], "x")


def test_extensions() -> None:
    """A file's ending says what its bytes are, so that readers which go by it can read it."""
    for extension in (".jpg", ".png", ".bmp", ".webp"):
        assert image_extension(cv2.imencode(extension, face(0))[1].tobytes()) == extension
    assert image_extension(b"unknown") == ".jpg"


def test_frequent_identities_are_where_they_lie(tmp_path: Path) -> None:
    """Without the one image of the first identity, all others have the names and the places that they have."""
    with write_face_set(tmp_path / "set", SIZE) as out:
        for identity, shots in enumerate((1, 3, 2)):
            out.add_identity(tiny_face(identity, shot) for shot in range(shots))
    whole, frequent = open_face_set(tmp_path / "set"), open_training_set([tmp_path / "set"], 2)
    assert isinstance(whole, RecFaceSet)
    assert isinstance(frequent, FrequentIdentities)
    assert frequent.labels.tolist() == [0, 0, 0, 1, 1]
    assert [frequent.describe(i) for i in range(5)] == [whole.describe(i) for i in range(1, 6)]
    (found,), (expected,) = frequent.spans(np.arange(5)), whole.spans(np.arange(1, 6))
    assert np.array_equal(found.starts, expected.starts)
