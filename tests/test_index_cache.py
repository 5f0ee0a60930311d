"""The kept index of large sets: used while it is true, and never longer."""

import os
import tracemalloc
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from data import face_sets, index_cache, recordio
from data.face_sets import RecFaceSet
from data.index_cache import cache_path
from data.recordio import RecordError, pack_image, write_records


@pytest.fixture(autouse=True)
def small_sets_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (index_cache, face_sets):
        monkeypatch.setattr(module, "CACHED_FROM", 1)


def write_set(folder: Path, labels: Sequence[float]) -> Path:
    with write_records(folder / "train.rec") as writer:
        for key, label in enumerate(labels, 1):
            writer.write(key, pack_image(float(label), key, b"image"))
    return folder / "train.rec"


def contents(faces: RecFaceSet) -> tuple[list[int], list[int], list[str], list[str]]:
    return faces.keys.tolist(), faces.labels.tolist(), faces.identities, [faces.describe(i) for i in range(len(faces))]


def forbid_reading(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RecFaceSet, "_read_index", lambda self: pytest.fail("the set was read through again"))


def test_the_second_opening_reads_the_kept_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same keys, labels, identities and offsets, without a pass over the records."""
    rec = write_set(tmp_path, [7, 7, 3, 9, 3])
    first = contents(RecFaceSet(rec))
    assert cache_path(rec).exists()
    forbid_reading(monkeypatch)
    assert contents(RecFaceSet(rec)) == first


def test_a_changed_set_is_read_anew(tmp_path: Path) -> None:
    """Another .rec or .idx of the same name, even of the same size, is never described by the old index."""
    rec = write_set(tmp_path, [1, 2, 3])
    RecFaceSet(rec)
    write_set(tmp_path, [1, 2, 5])
    assert RecFaceSet(rec).identities == ["1", "2", "5"]
    index = rec.with_suffix(".idx")
    index.write_text("".join(index.read_text().splitlines(keepends=True)[:2]))
    assert RecFaceSet(rec).identities == ["1", "2"]


def write_with_old_times(rec: Path, labels: Sequence[float]) -> None:
    times = [(path, path.stat()) for path in (rec, rec.with_suffix(".idx"))]
    write_set(rec.parent, labels)
    for path, stat in times:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_set_with_the_old_times_is_checked_too(tmp_path: Path) -> None:
    """Sizes and times can lie (a copy that keeps them): the sample of records notices other labels."""
    rec = write_set(tmp_path, [1, 2, 3])
    RecFaceSet(rec)
    write_with_old_times(rec, [1, 4, 3])
    assert RecFaceSet(rec).identities == ["1", "3", "4"]


@pytest.mark.parametrize("label", [np.nan, np.inf, 2.5])
def test_labels_that_are_no_numbers_any_more(tmp_path: Path, label: float) -> None:
    """What a changed bit on the disk makes of a label is told with its record, as without a kept index."""
    rec = write_set(tmp_path, [1, 2, 3])
    RecFaceSet(rec)
    write_with_old_times(rec, [1, label, 3])
    with pytest.raises(RecordError, match=rf"train\.rec, record 2 .* label {label} is no identity number"):
        RecFaceSet(rec)


@pytest.mark.parametrize("damage", [b"", b"no archive", None])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: bytes | None) -> None:
    """Cut off, overwritten or emptied: a warning, and the right labels."""
    rec = write_set(tmp_path, [5, 6])
    RecFaceSet(rec)
    whole = cache_path(rec).read_bytes()
    cache_path(rec).write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    with pytest.warns(UserWarning, match="is damaged"):
        assert RecFaceSet(rec).identities == ["5", "6"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert RecFaceSet(rec).identities == ["5", "6"]


@pytest.mark.parametrize("changed", [{8: 1}, {8: 12}, {6: 1}, {6: 32}])
def test_a_changed_bit_in_what_the_archive_says_of_itself(tmp_path: Path, changed: dict[int, int]) -> None:
    """Another compression, or a password: the index is made anew, as with any other damage."""
    rec = write_set(tmp_path, [5, 6])
    RecFaceSet(rec)
    content = bytearray(cache_path(rec).read_bytes())
    directory = content.find(b"PK\x01\x02")
    for place, value in changed.items():
        content[place] = content[directory + place + 2] = value  # in a file's own head, and in the directory
    cache_path(rec).write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert RecFaceSet(rec).identities == ["5", "6"]


def test_a_number_of_images_that_there_are_not(tmp_path: Path) -> None:
    """No memory is asked for that a .rec of this size cannot need."""
    rec = write_set(tmp_path, [5, 6])
    RecFaceSet(rec)
    with zipfile.ZipFile(cache_path(rec)) as whole:
        parts = {name: whole.read(name) for name in whole.namelist()}
    parts["keys.npy"] = parts["keys.npy"].replace(b"(2,), }" + b" " * 13, b"(%d,), }" % 99**7)
    with zipfile.ZipFile(cache_path(rec), "w") as changed:
        for name, part in parts.items():
            changed.writestr(name, part)
    with pytest.warns(
        UserWarning, match=r"is damaged \(keys has int64 of shape \(\d{14},\), expected 2 of int64 at most\)"
    ):
        assert RecFaceSet(rec).identities == ["5", "6"]


SOUND = {"keys": [1, 2, 3], "labels": [0, 1, 1], "identities": [5, 6]}
UNSOUND = {
    "more images than there is room for": {name: [0] * 99 for name in ("keys", "offsets", "labels")},
    "another type": {"labels": [0.0, 1.0, 1.0]},
    "two dimensions": {"identities": [[5], [6]]},
    "a number": {"keys": 3},
    "fewer keys": {"keys": [1, 2]},
    "fewer labels": {"labels": [0, 1]},
    "no images": {name: np.zeros(0, np.int64) for name in ("keys", "offsets", "labels")},
    "a label below 0": {"labels": [0, 1, -1]},
    "a label of no identity": {"labels": [0, 1, 2]},
    "an identity without images": {"identities": [5, 6, 7]},
    "an identity that comes twice": {"identities": [6, 6]},
    "an identity below 0": {"identities": [-5, 6]},
    "an offset below 0": {"offsets": [-4, 40, 80]},
    "an offset behind the end": {"offsets": [0, 40, 120]},
    "offsets that do not ascend": {"offsets": [0, 80, 40]},
    "an offset that comes twice": {"offsets": [0, 40, 40]},
}


@pytest.mark.parametrize("change", UNSOUND)
def test_an_index_that_cannot_be_one(tmp_path: Path, change: str) -> None:
    """Written with the right sizes and times, as somebody else's may be: it is made anew with a warning, where its
    numbers led to crashes later on, or took memory beyond measure."""
    rec = write_set(tmp_path, [5, 6, 6])
    own = contents(RecFaceSet(rec))
    with np.load(cache_path(rec)) as kept:
        arrays = dict(kept)
    assert arrays["offsets"].tolist() == [0, 40, 80]
    assert {name: arrays[name].tolist() for name in SOUND} == SOUND
    np.savez(cache_path(rec).open("wb"), **arrays | {name: np.array(value) for name, value in UNSOUND[change].items()})
    with pytest.warns(UserWarning, match="is damaged"):
        assert contents(RecFaceSet(rec)) == own
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert contents(RecFaceSet(rec)) == own


def test_an_index_of_records_within_each_other(tmp_path: Path) -> None:
    """That such a set is refused holds where its index lies beside it, as well."""
    rec = write_set(tmp_path, [5, 6, 6])
    RecFaceSet(rec)
    time, content = rec.stat(), bytearray(rec.read_bytes())
    content[44] += 40  # the length of the second record
    rec.write_bytes(content)
    os.utime(rec, ns=(time.st_atime_ns, time.st_mtime_ns))
    with pytest.raises(RecordError, match=r"record 2 at byte 40: its length is wrong"):
        RecFaceSet(rec)


@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_an_index_that_is_no_file(tmp_path: Path, kind: str) -> None:
    """Is not waited for; in the place of a folder, none can be kept."""
    rec = write_set(tmp_path, [5, 6])
    if kind == "pipe":
        os.mkfifo(cache_path(rec))
        assert RecFaceSet(rec).identities == ["5", "6"]
        assert cache_path(rec).is_file()
    else:
        cache_path(rec).mkdir()
        with pytest.warns(UserWarning, match="cannot be written"):
            assert RecFaceSet(rec).identities == ["5", "6"]


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read-only set opens all the same, with a warning that each start will take its time."""

    def read_only(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(index_cache, "atomic_write", read_only)
    rec = write_set(tmp_path, [5, 6])
    with pytest.warns(UserWarning, match="cannot be written .*Permission denied"):
        assert RecFaceSet(rec).identities == ["5", "6"]


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    """An index that somebody else put there cannot run code."""
    rec = write_set(tmp_path, [5, 6])
    evil = np.array([print], dtype=object)
    with cache_path(rec).open("wb") as out:
        np.savez(out, fingerprint=evil, keys=evil, offsets=evil, labels=evil, identities=evil)
    with pytest.warns(UserWarning, match="is damaged"):
        assert RecFaceSet(rec).identities == ["5", "6"]


def test_the_first_opening_takes_little_in_passing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects docs/data.md: 75 bytes an image while the index is read; what is not needed any more is let go of."""
    images = 50_000
    path = write_set(tmp_path, [key // 20 for key in range(images)])
    monkeypatch.setattr(face_sets, "CACHED_FROM", images + 1)
    monkeypatch.setattr(face_sets, "_HEADERS_AT_ONCE", 1000)
    monkeypatch.setattr(recordio, "_HEADS_AT_ONCE", 1000)
    RecFaceSet(path)
    tracemalloc.start()
    try:
        faces = RecFaceSet(path)
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(faces) == images
    assert kept < 30 * images
    assert most < 85 * images
