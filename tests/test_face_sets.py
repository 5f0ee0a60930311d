"""Face sets: every layout found in the wild loads, and a path says what it holds."""

import struct
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.face_sets import FaceSet, FaceSetError, FolderFaceSet, RecFaceSet, find_rec, open_face_set
from data.images import decode_rgb
from data.recordio import (
    MAGIC,
    MAGIC_BYTES,
    IndexedRecordReader,
    pack_image,
    unpack_image,
)
from data.verification_bin import PairImages, VerificationPairs
from face_set_files import (
    FACES,
    FACES_BY_KEY,
    RANGES,
    Records,
    contents,
    header,
    identity_records,
    scalar_images,
    write_rec,
)


def array_images(*more: float) -> Records:
    return {key: pack_image([label, *more], key, image) for key, label, image in FACES}


def backwards(records: Records) -> Records:
    return dict(reversed(records.items()))


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


def test_folders_with_the_names_of_files(tmp_path: Path) -> None:
    """A person called alice.rec, and a folder called zz.jpg, are folders."""
    (tmp_path / "alice.rec" / "zz.jpg").mkdir(parents=True)
    (tmp_path / "alice.rec" / "1.jpg").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"not taken are alice\.rec/zz\.jpg \(a folder within that of an identity\)$"):
        faces = open_face_set(tmp_path)
    assert (faces.identities, len(faces)) == (["alice.rec"], 1)


def test_links_that_lead_nowhere_stop_no_tree(tmp_path: Path) -> None:
    """Around in a circle, or through a file: among the images they are files that cannot be read, beside them nothing
    that counts."""
    (tmp_path / "Ada").mkdir()
    (tmp_path / "Ada" / "1.jpg").write_bytes(b"x")
    for name, target in (("2.jpg", "2.jpg"), ("3.jpg", "1.jpg/x"), ("circle", "circle")):
        (tmp_path / "Ada" / name).symlink_to(target)
    with pytest.warns(UserWarning, match=r"not taken are Ada/circle \(not named"):
        faces = open_face_set(tmp_path)
    assert len(faces) == 3
    with pytest.raises(OSError, match="symbolic links"):
        faces.encoded(1)


def test_a_folder_of_sets_is_no_set(tmp_path: Path) -> None:
    """A level too shallow: the pictures that lie beside a set's records are not the faces of one person."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "samples.png").write_bytes(b"x")
    (tmp_path / "mine" / "train.rec").touch()
    with pytest.raises(FaceSetError, match=r"mine holds train\.rec, so it is a set of its own, and .*: name the set"):
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
    """Trees have millions of images: names take their letters and a number, and so do those of a file beside each."""
    for person in range(20):
        folder = tmp_path / "tree" / f"{person:03}"
        folder.mkdir(parents=True)
        for image in range(50):
            (folder / f"{image:03}.jpg").touch()
            (folder / f"{image:03}.json").touch()
    tracemalloc.start()
    try:
        with pytest.warns(UserWarning, match="000.json, 000/001.json, 000/002.json and 997 more "):
            faces = FolderFaceSet(tmp_path / "tree")
        kept = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert kept < 130 * len(faces)
    assert faces.relative_file(51) == "001/001.jpg"
    assert faces.file(51) == tmp_path / "tree" / "001" / "001.jpg"
