"""Face sets: every layout found in the wild loads, damaged ones say what is wrong, and ours is written exactly."""

import pickle
import struct
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.face_set_writer import write_face_set
from data.face_sets import FaceSet, FaceSetError, FolderFaceSet, RecFaceSet, find_rec, open_face_set
from data.images import ImageError, decode_plain_jpegs, decode_rgb, encode_jpeg, encode_png, image_extension
from data.recordio import (
    MAGIC,
    MAGIC_BYTES,
    IndexedRecordReader,
    RecordError,
    pack_image,
    unpack_image,
    write_records,
)
from data.survey import survey_heads
from data.tolerant_records import open_records
from data.verification_bin import PairImages, VerificationPairs

Records = dict[int, bytes]

# The small set that every layout below holds: key, label, encoded image.
FACES = [(1, 0, b"\xff\xd8 Ada 1"), (2, 0, b"\xff\xd8 Ada"), (3, 1, b"\x89PNG Bea"), (4, 1, b"\xff\xd8 Bea 44")]
FACES_BY_KEY = {key: (str(label), image) for key, label, image in FACES}


def write_rec(folder: Path, records: Records, name: str = "train.rec") -> Path:
    with write_records(folder / name) as writer:
        for key, payload in records.items():
            writer.write(key, payload)
    return folder / name


def contents(faces: RecFaceSet) -> dict[int, tuple[str, bytes]]:
    """{key: (identity, image)} of a set, whatever its order."""
    return {
        int(key): (faces.identities[faces.labels[i]], faces.encoded(i)) for i, key in enumerate(faces.keys.tolist())
    }


def scalar_images() -> Records:
    return {key: pack_image(float(label), key, image) for key, label, image in FACES}


def array_images(*more: float) -> Records:
    return {key: pack_image([label, *more], key, image) for key, label, image in FACES}


def identity_records(*ranges: tuple[float, float]) -> Records:
    return {key: pack_image(images, key, b"") for key, images in enumerate(ranges, 5)}


def header(*label: float) -> Records:
    return {0: pack_image(label, 0, b"")}


def backwards(records: Records) -> Records:
    return dict(reversed(records.items()))


RANGES = identity_records((1, 3), (3, 5))
LAYOUTS: dict[str, Records] = {
    "insightface, record 0 last": {**scalar_images(), **RANGES, **header(5, 7)},
    "record 0 first": {**header(5, 7), **scalar_images(), **RANGES},
    "face2rec2, label and aligned": {**header(5, 7), **array_images(1.0), **RANGES},
    "label in an array of one": {**array_images(), **RANGES, **header(5, 7)},
    "many labels": {**array_images(1.0, 2.0, 3.0), **RANGES, **header(5, 7)},
    "scalar and array labels mixed": {**scalar_images(), 4: pack_image([1.0, 1.0], 4, FACES[3][2]), **RANGES},
    "record 0 missing": {**scalar_images(), **RANGES},
    "no identity records": {**scalar_images(), **header(5, 5)},
    "images only": scalar_images(),
    "header and identities with flag 1": {
        **scalar_images(),
        **{key: pack_image([float(key)], key, b"") for key in (5, 6, 0)},
    },
    "header and identities with flag 0": {
        **scalar_images(),
        **{key: pack_image(float(key), key, b"") for key in (5, 6, 0)},
    },
    "identity ranges wrong": {**scalar_images(), **identity_records((3, 4), (1, 99)), **header(5, 7)},
    "id_start wrong": {**scalar_images(), **RANGES, **header(3, 5)},
    "label of an identity record is no label": {**scalar_images(), **identity_records((float("nan"), -1.5))},
    "keys in shuffled order": backwards({**scalar_images(), **RANGES, **header(5, 7)}),
}


@pytest.mark.parametrize("records", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout_gives_the_same_faces(tmp_path: Path, records: Records) -> None:
    """Writers differ in headers, label arrays and order; the faces and who they are must not."""
    faces = RecFaceSet(write_rec(tmp_path, records))
    assert contents(faces) == FACES_BY_KEY
    assert faces.labels.dtype == np.int64
    assert len(faces) == 4


def test_order_is_that_of_the_file(tmp_path: Path) -> None:
    """Images come in the order of the file, not of the keys: reading on never seeks."""
    faces = RecFaceSet(write_rec(tmp_path, backwards(scalar_images())))
    assert faces.keys.tolist() == [4, 3, 2, 1]
    assert faces.labels.tolist() == [1, 1, 0, 0]


def test_lines_of_the_index_in_any_order(tmp_path: Path) -> None:
    """An .idx sorted by key, as some tools leave it, means the same set."""
    path = write_rec(tmp_path, backwards(scalar_images()))
    index = path.with_suffix(".idx")
    index.write_text("".join(sorted(index.read_text().splitlines(keepends=True))))
    assert contents(RecFaceSet(path)) == FACES_BY_KEY


def test_missing_index(tmp_path: Path) -> None:
    """A set whose .idx was lost has its header and identity records told from images all the same."""
    path = write_rec(tmp_path, LAYOUTS["insightface, record 0 last"])
    path.with_suffix(".idx").unlink()
    assert contents(RecFaceSet(path)) == FACES_BY_KEY


def test_labels_with_holes_become_classes_without(tmp_path: Path) -> None:
    """Classes are counted from 0 without holes, and each remembers its label in the file."""
    labels = [70, 3, 1_000_000, 3]
    faces = RecFaceSet(write_rec(tmp_path, {k: pack_image(float(v), k, b"x") for k, v in enumerate(labels, 1)}))
    assert faces.labels.tolist() == [1, 0, 2, 0]
    assert faces.identities == ["3", "70", "1000000"]


def test_keys_that_float32_cannot_hold(tmp_path: Path) -> None:
    """Beyond 2**24 the ranges in header and identity records are rounded: the images' own labels decide."""
    first = 2**24 + 1  # becomes 2**24 in float32
    images = {first + i: pack_image(float(i // 2), first + i, b"image %d" % i) for i in range(4)}
    end = first + 4
    ranges = {end: pack_image([first, first + 2], end, b""), end + 1: pack_image([first + 2, end], end + 1, b"")}
    assert unpack_image(ranges[end], "x").labels[0] == 2**24  # so the trap is there
    faces = RecFaceSet(write_rec(tmp_path, {**images, **ranges, 0: pack_image([end, end + 2], 0, b"")}))
    assert contents(faces) == {first + i: (str(i // 2), b"image %d" % i) for i in range(4)}


@pytest.mark.parametrize(
    "payload",
    [
        pack_image(1.0, MAGIC, b"image"),
        pack_image(1.0, MAGIC << 32, b"image"),
        pack_image(1.0, 2, b"image", id2=MAGIC),
        pack_image(1.0, MAGIC | MAGIC << 32, b"image", id2=MAGIC | MAGIC << 32),
        pack_image([1.0, struct.unpack("<f", MAGIC_BYTES)[0]], 2, b"image"),
        pack_image([1.0, 1.0], MAGIC, b"image"),
        pack_image(1.0, 2, MAGIC_BYTES * 3 + b"image"),
        pack_image(1.0, 2, b"image..." + MAGIC_BYTES),
        pack_image(1.0, 2, b"img" + MAGIC_BYTES),
    ],
    ids=["id", "id high", "id2", "all ids", "second label", "id with array", "image", "image end", "not aligned"],
)
@pytest.mark.parametrize("keys", [(1, 2, 3), (1, 3, 2)], ids=["in the middle", "at the end"])
def test_magic_inside_a_record(tmp_path: Path, payload: bytes, keys: tuple[int, ...]) -> None:
    """A payload that holds the magic is stored in parts, which may even cut its header: label and image are right."""
    records = {1: pack_image(0.0, 1, b"first"), 2: payload, 3: pack_image(2.0, 3, b"third")}
    faces = RecFaceSet(write_rec(tmp_path, {key: records[key] for key in keys}))
    image = unpack_image(payload, "x").image
    assert contents(faces) == {1: ("0", b"first"), 2: ("1", image), 3: ("2", b"third")}


_ids = st.sampled_from([0, 1, MAGIC, MAGIC << 32])
_labels = st.integers(0, 5).map(float) | st.lists(st.integers(0, 5).map(float), min_size=1, max_size=4)
_images = st.lists(st.sampled_from([b"", b"a", b"bcde", MAGIC_BYTES]), max_size=5).map(b"".join)


@settings(max_examples=60, deadline=None)
@given(
    records=st.lists(st.builds(pack_image, _labels, _ids, _images, _ids), min_size=1, max_size=8), seed=st.integers()
)
def test_scan_of_the_headers_agrees_with_reading_each_record(
    tmp_path_factory: pytest.TempPathFactory, records: list[bytes], seed: int
) -> None:
    """The fast pass over all headers sees what taking the records apart one by one sees."""
    keys = np.random.default_rng(abs(seed)).permutation(len(records)).tolist()
    path = write_rec(tmp_path_factory.mktemp("rec"), dict(zip(keys, records, strict=True)))
    plain = {key: unpack_image(payload, "x") for key, payload in zip(keys, records, strict=True)}
    expected = {key: (str(int(record.labels[0])), record.image) for key, record in plain.items() if record.image}
    if expected:
        assert contents(RecFaceSet(path)) == expected
    else:
        with pytest.raises(FaceSetError, match="not one image"):
            RecFaceSet(path)


def test_scan_in_several_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers are read a block at a time; records whose header is cut at a magic are found in later blocks too."""
    monkeypatch.setattr("data.face_sets._HEADERS_AT_ONCE", 3)
    images = {key: pack_image(float(key), MAGIC if key % 4 == 0 else key, b"x" * key) for key in range(1, 11)}
    faces = RecFaceSet(write_rec(tmp_path, images))
    assert contents(faces) == {key: (str(key), b"x" * key) for key in images}


MIXED = {**scalar_images(), 8: pack_image(1.0, 8, MAGIC_BYTES * 2 + b"ab"), 9: pack_image(1.0, 9, b"last")}


def with_lines(path: Path, lines: slice) -> Path:
    """The set at `path`, its index having these lines only."""
    index = path.with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[lines]))
    return path


@pytest.mark.parametrize(
    ("lines", "missing"),
    [
        (slice(4), (4, 6)),
        (slice(5), (5, 6)),
        (slice(1, None), (0, 1)),
        (slice(0, 6, 2), (1, 2, 3, 4, 5, 6)),
    ],
    ids=["cut", "cut behind a split record", "first missing", "every other"],
)
def test_an_index_that_does_not_list_all_is_a_warning(
    tmp_path: Path, lines: slice, missing: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cut .idx loses images, so each opening says how many bytes are in none of its lines; split records count whole,
    and the kept index of large sets does not hide it.
    """
    monkeypatch.setattr("data.face_sets.CACHED_FROM", 1)
    path = write_rec(tmp_path, MIXED)
    starts = [*IndexedRecordReader(path).offsets.tolist(), path.stat().st_size]
    size = sum(starts[end] - starts[first] for first, end in zip(missing[::2], missing[1::2], strict=True))
    with_lines(path, lines)
    for _ in range(2):
        with pytest.warns(UserWarning, match=rf"train\.idx has no line for {size} of the {starts[-1]} bytes .*rebuilt"):
            faces = RecFaceSet(path)
    assert faces.keys.tolist() == list(MIXED)[lines]


def test_an_index_that_lists_all_is_none(tmp_path: Path) -> None:
    """Split records, and one at the end whose padding was lost, do not look like records without a line."""
    path = write_rec(tmp_path, {**MIXED, 10: pack_image(1.0, 10, b"a")})
    path.write_bytes(path.read_bytes()[:-3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(RecFaceSet(path)) == 7


# --- what is wrong with a set -----------------------------------------------------------------------------------------


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


# --- property ---------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(("text", "stated"), [("3,112,112", "'3'"), ("", "''"), ("a,b\n2,112,112", "'a'")])
def test_property_that_contradicts(tmp_path: Path, text: str, stated: str) -> None:
    """A wrong count is a warning that names the file and both numbers; the images are believed."""
    (tmp_path / "property").write_text(text)
    with pytest.warns(UserWarning, match=rf"property states {stated} identities, the images have 2"):
        assert contents(RecFaceSet(write_rec(tmp_path, scalar_images()))) == FACES_BY_KEY


# --- what a path holds ------------------------------------------------------------------------------------------------


def test_open_finds_the_rec_of_a_folder(tmp_path: Path) -> None:
    """`train.rec` is the set of a folder; a sole .rec of another name too; several others are a question."""
    other = write_rec(tmp_path, scalar_images(), "validation.rec")
    assert find_rec(tmp_path) == other
    assert open_face_set(tmp_path).path == other
    write_rec(tmp_path, scalar_images(), "more.rec")
    with pytest.raises(FaceSetError, match=r"several \.rec files \(more\.rec, validation\.rec\): name the one"):
        open_face_set(tmp_path)
    train = write_rec(tmp_path, scalar_images())
    assert open_face_set(tmp_path).path == train
    assert open_face_set(str(other)).path == other


def test_open_names_what_is_no_face_set(tmp_path: Path) -> None:
    """Neither a missing path nor another file nor an empty folder is taken for a set."""
    with pytest.raises(FaceSetError, match="nothing does not exist"):
        open_face_set(tmp_path / "nothing")
    (tmp_path / "set.lst").write_text("x")
    with pytest.raises(FaceSetError, match=r"set\.lst is no face set: .*data/pack_set\.py makes of a list"):
        open_face_set(tmp_path / "set.lst")
    with pytest.raises(FaceSetError, match="has no folders of images"):
        open_face_set(tmp_path)
    (tmp_path / "face.png").write_bytes(b"")
    with pytest.raises(FaceSetError, match=r"has no folders .*: face\.png \(in no folder\)$"):
        open_face_set(tmp_path)
    assert find_rec(tmp_path) is None


def test_folder_set(tmp_path: Path) -> None:
    """Identities and images by name; what else is there does not count, and a warning names it, save hidden entries.

    Each reason is told once, however many files have it."""
    files = ["Bea/2.PNG", "Bea/1.jpg", "Ada/x.jpeg", "Ada/.hidden.jpg", ".cache/z.jpg", "prepared.csv", "Ada/Thumbs.db"]
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_face_set(tmp_path)) == 3
    for name in (*(f"Ada/{i}.tif" for i in range(2, 6)), "Cleo/readme", "Dora/2019/1.jpg", "stray.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(name.encode())
    told = (
        r"not taken are stray\.jpg \(in no folder\); Ada/2\.tif, Ada/3\.tif, Ada/4\.tif and 2 more \(not named \.bmp, "
        r".*\.webp\); Cleo, Dora \(a folder without images\); Dora/2019 \(a folder within that of an identity\)$"
    )
    with pytest.warns(UserWarning, match=told):
        faces = open_face_set(tmp_path)
    assert isinstance(faces, FolderFaceSet)
    assert faces.identities == ["Ada", "Bea"]
    assert faces.labels.tolist() == [0, 1, 1]
    assert faces.labels.dtype == np.int64
    assert [faces.encoded(i) for i in range(len(faces))] == [b"Ada/x.jpeg", b"Bea/1.jpg", b"Bea/2.PNG"]
    assert faces.describe(2) == str(tmp_path / "Bea" / "2.PNG")


def test_folder_set_of_which_a_disk_is_gone(tmp_path: Path) -> None:
    """An identity that is a link to nowhere is an error, not a person less."""
    (tmp_path / "Ada").mkdir()
    (tmp_path / "Ada" / "1.jpg").write_bytes(b"x")
    (tmp_path / "Bea").symlink_to("/nowhere/Bea")
    with pytest.raises(FaceSetError, match="Bea is a link to /nowhere/Bea, which is not there"):
        open_face_set(tmp_path)


def test_folder_set_that_lies_deeper(tmp_path: Path) -> None:
    """A tree with one level more is refused, and the message shows the level."""
    (tmp_path / "train" / "Ada").mkdir(parents=True)
    (tmp_path / "train" / "Ada" / "1.jpg").write_bytes(b"x")
    with pytest.raises(
        FaceSetError, match=r"no folders of images .*: train/Ada \(a folder within .*/train, name that$"
    ):
        open_face_set(tmp_path)


def test_images_of_verification_pairs() -> None:
    """An image of a verification set is named by the first pair that uses it, and its side."""
    pairs = VerificationPairs("lfw", [b"a", b"b", b"c"], np.array([[0, 1], [1, 2]]), np.array([True, False]))
    images = PairImages(pairs)
    assert [images.encoded(i) for i in range(len(images))] == [b"a", b"b", b"c"]
    assert images.describe(1) == "lfw, image B of pair 0"
    assert images.describe(2) == "lfw, image B of pair 1"
    other = VerificationPairs("cfp", [b"d", b"e"], np.array([[0, 0], [1, 0]]), np.array([True, False]))
    images = PairImages(pairs, other)
    assert [images.encoded(i) for i in range(len(images))] == [b"a", b"b", b"c", b"d", b"e"]
    assert [images.describe(i) for i in (2, 4)] == ["lfw, image B of pair 1", "cfp, image A of pair 1"]


# --- writing ----------------------------------------------------------------------------------------------------------


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


# --- images -----------------------------------------------------------------------------------------------------------


def test_colours_are_rgb() -> None:
    """Red is the first channel on the way in and out; PNG keeps every value, JPEG nearly."""
    image = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    assert np.array_equal(decode_rgb(encode_png(image), "x"), image)
    assert np.abs(decode_rgb(encode_jpeg(image, quality=95), "x").astype(int) - image).max() <= 4
    # A PNG by hand, one pixel of pure red, so that encoder and decoder cannot be wrong together.
    red = _png(1, 1, b"\0\xff\0\0")
    assert decode_rgb(red, "x").tolist() == [[[255, 0, 0]]]


def test_grey_is_repeated_over_the_channels() -> None:
    """A grey image (PNG colour type 0) still gives three channels."""
    assert decode_rgb(_png(1, 1, b"\0\x80", colour_type=0), "x").tolist() == [[[128, 128, 128]]]


def test_extension_follows_the_bytes() -> None:
    """PNG is told from JPEG by its signature, not by where it came from."""
    image = np.zeros((8, 8, 3), np.uint8)
    assert image_extension(encode_png(image)) == ".png"
    assert image_extension(encode_jpeg(image)) == ".jpg"


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\xff\xd8\xff", encode_png(np.zeros((8, 8, 3), np.uint8))[:20]])
def test_what_is_no_image(encoded: bytes) -> None:
    """Undecodable bytes are an error with the image's name and their number."""
    with pytest.raises(ImageError, match=rf"set\.rec, record 7: its {len(encoded)} bytes are no image"):
        decode_rgb(encoded, "set.rec, record 7")


@pytest.mark.parametrize("side", [17_000, 100_000])
def test_image_whose_header_claims_a_gigantic_size(side: int) -> None:
    """A few bytes can claim to be gigabytes of pixels: refused by the header, before memory is taken for them."""
    with pytest.raises(ImageError, match=r"record 7: its \d+ bytes claim to be a gigantic image"):
        decode_rgb(_png(side, side, b"\0"), "record 7")
    jpeg = bytearray(encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", *[min(side, 65_000)] * 2)
    assert decode_plain_jpegs([np.frombuffer(jpeg, np.uint8)], np.zeros((1, 8, 8, 3), np.uint8)) == [0]
    with pytest.raises(ImageError, match="claim to be a gigantic image"):
        decode_rgb(bytes(jpeg), "record 7")


def test_photos_of_large_cameras_are_decoded() -> None:
    """Those of 100 million pixels are below the limit: the header is not what is wrong with this one."""
    with pytest.raises(ImageError, match="are no image that OpenCV can decode"):
        decode_rgb(_png(11_648, 8_736, b""), "photo")


def _png(width: int, height: int, pixels: bytes, colour_type: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


# --- real sets --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "people", "images"), [("faces_glint24", 24, 4_194), ("faces_celeba5k", 5_429, 10_000)]
)
def test_sets_written_by_mxnet(face_data: Path, name: str, people: int, images: int) -> None:
    """Counts, and every label against the range that its identity record states."""
    faces = open_face_set(face_data / name)
    assert isinstance(faces, RecFaceSet)
    assert (len(faces.identities), len(faces)) == (people, images)
    reader = IndexedRecordReader(faces.path)
    id_start, id_end = unpack_image(reader.read(0), "record 0").labels.astype(int)
    assert (id_start, id_end) == (images + 1, images + 1 + people)
    label_of_key = dict(zip(faces.keys.tolist(), faces.labels.tolist(), strict=True))
    stated = {}
    for label, key in enumerate(range(id_start, id_end)):
        first, end = unpack_image(reader.read(key), "identity").labels.astype(int)
        stated |= dict.fromkeys(range(first, end), label)
    assert label_of_key == stated
    assert decode_rgb(faces.encoded(images - 1), "x").shape == (112, 112, 3)


def test_set_written_by_im2rec(face_data: Path) -> None:
    """No record 0, no identity records, keys shuffled: labels and keys are those of the .lst it was made from."""
    faces = open_face_set(face_data / "kazakh25")
    assert isinstance(faces, RecFaceSet)
    lines = [line.split("\t") for line in (face_data / "kazakh25" / "validation.lst").read_text().splitlines()]
    listed = {int(key): str(int(float(label))) for key, label, _ in lines}
    assert len(listed) == 229
    assert {key: identity for key, (identity, _) in contents(faces).items()} == listed
    assert len(faces.identities) == 25
    names = {int(key): path.split("/")[0] for key, _, path in lines}
    people = {(names[key], label) for key, label in zip(faces.keys.tolist(), faces.labels.tolist(), strict=True)}
    assert len(people) == 25, "a class is one person and a person one class"


def test_folder_and_rec_are_interchangeable(face_data: Path) -> None:
    """Whatever kind of set, the same attributes: LFW's folders, counted."""
    faces: FaceSet = open_face_set(face_data / "lfw" / "images")
    assert (len(faces), len(faces.identities)) == (13_233, 5_749)
    assert faces.identities[faces.labels[0]] in faces.describe(0)


def test_a_tree_keeps_no_object_an_image(tmp_path: Path) -> None:
    """Trees have millions of images: names take their letters and a number."""
    for person in range(20):
        folder = tmp_path / "tree" / f"{person:03}"
        folder.mkdir(parents=True)
        for image in range(50):
            (folder / f"{image:03}.jpg").touch()
    tracemalloc.start()
    try:
        faces = FolderFaceSet(tmp_path / "tree")
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 80 * len(faces)
    assert faces.relative_file(51) == "001/001.jpg"
    assert faces.file(51) == tmp_path / "tree" / "001" / "001.jpg"
