"""Our record files against those of the real mxnet, both ways. Run by `make conformance`, not by `make test`.

mxnet works in its own environment (mxnet_process.py); `FACE_DATA` names the folder of real sets.
"""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest

from conformance import cases
from conformance.mxnet_process import Mxnet
from data.face_set_writer import write_face_set
from data.face_sets import RecFaceSet
from data.images import decode_rgb
from data.recordio import (
    IndexedRecordReader,
    RecordFile,
    pack_image,
    read_index,
    unpack_image,
    write_records,
)
from golden.records import IMAGES, PAYLOADS, PEOPLE

pytest_plugins = ["conformance.mxnet_plugin"]
GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def write(rec_path: Path, records: dict[int, bytes]) -> None:
    with write_records(rec_path) as file:
        for key, payload in records.items():
            file.write(key, payload)


def hashed(content: bytes) -> str:
    return sha256(content).hexdigest()


# What mxnet_side.py tells under the same names, from our reader.


def read(rec_path: Path) -> dict[str, Any]:
    reader = IndexedRecordReader(rec_path)
    in_order = [hashed(reader.file.read(offset)) for offset in reader.offsets.tolist()]
    return {"by_key": {str(key): hashed(reader.read(key)) for key in reader.keys.tolist()}, "in_order": in_order}


def read_images(rec_path: Path) -> dict[str, Any]:
    reader = IndexedRecordReader(rec_path)
    records = {str(key): unpack_image(reader.read(key), "record") for key in reader.keys.tolist()}
    return {key: [r.labels.tobytes().hex(), r.id, r.id2, hashed(r.image)] for key, r in records.items()}


def read_faces(rec_path: Path) -> list[list]:
    faces = RecFaceSet(rec_path)
    return [[label, hashed(faces.encoded(i))] for i, label in enumerate(faces.labels.tolist())]


def read_pixels(rec_path: Path) -> dict[str, Any]:
    reader = IndexedRecordReader(rec_path)
    images = ((key, unpack_image(reader.read(key), "record").image) for key in reader.keys.tolist()[::10])
    decoded = {str(key): decode_rgb(image, str(key)) for key, image in images if image}
    return {key: [list(pixels.shape), hashed(pixels.tobytes())] for key, pixels in decoded.items()}


def assert_same_files(ours: Path, mxnets: Path) -> None:
    """Both files of a set, byte for byte; names the first byte that differs instead of printing a megabyte."""
    for ending in (".rec", ".idx"):
        mine, other = ours.with_suffix(ending).read_bytes(), mxnets.with_suffix(ending).read_bytes()
        if mine != other:
            at = next((i for i, (a, b) in enumerate(zip(mine, other, strict=False)) if a != b), "the end of one")
            pytest.fail(f"{ending}: {len(mine)} bytes of ours, {len(other)} of mxnet's, first difference at {at}")


def assert_same_reading(expected: dict | list, found: dict | list) -> None:
    """What two sides tell, record for record; names the first few that differ instead of printing them all."""
    wanted, got = (dict(enumerate(told)) if isinstance(told, list) else told for told in (expected, found))
    differing = [key for key in wanted | got if wanted.get(key) != got.get(key)]
    few = "; ".join(f"record {key}: {wanted.get(key)} expected, found {got.get(key)}" for key in differing[:3])
    assert not differing, f"{len(differing)} of {len(wanted)} records differ: {few}"


def assert_payloads(payloads: dict[int, bytes], found: dict[str, Any]) -> None:
    """`read` found these payloads under these keys, and in this order."""
    expected = {str(key): hashed(payload) for key, payload in payloads.items()}
    assert_same_reading(expected, found["by_key"])
    assert_same_reading(list(expected.values()), found["in_order"])


def test_golden_files(mxnet: Mxnet, tmp_path: Path, compared: Callable[..., None]) -> None:
    """The committed golden files, which `make test` believes, are what this mxnet writes."""
    mxnet.run(GOLDEN / "make_golden.py", tmp_path)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == sorted(path.name for path in GOLDEN.iterdir() if path.suffix in (".rec", ".idx"))
    for path in tmp_path.glob("*.rec"):
        assert_same_files(GOLDEN / path.name, path)
    records = len(PAYLOADS) + len(IMAGES) + sum(map(len, PEOPLE)) + len(PEOPLE) + 1
    compared("golden files made anew", records)


def test_payloads(mxnet: Mxnet, tmp_path: Path, compared: Callable[..., None]) -> None:
    """Any bytes under any key: magics at every offset, nothing at all, megabytes."""
    payloads = cases.payloads(6_000, Random(1))
    ours, mxnets = tmp_path / "ours.rec", tmp_path / "mxnets.rec"
    write(ours, payloads)
    mxnet.write_payloads(mxnets, payloads)
    assert_same_files(ours, mxnets)
    assert_payloads(payloads, mxnet.read("read", ours))
    assert_payloads(payloads, read(mxnets))
    compared("payloads", *[len(payloads)] * 3)


def test_image_records(mxnet: Mxnet, tmp_path: Path, compared: Callable[..., None]) -> None:
    """`pack_image` is mxnet's pack and `unpack_image` its unpack: labels to the bit, both ids, the image."""
    images = cases.images(4_000, Random(2))
    ours, mxnets = tmp_path / "ours.rec", tmp_path / "mxnets.rec"
    write(ours, {key: pack_image(label, id, image, id2) for key, (label, id, id2, image) in images.items()})
    mxnet.write_images(mxnets, images)
    assert_same_files(ours, mxnets)
    by_mxnet = mxnet.read("read-images", ours)
    assert_same_reading(by_mxnet, read_images(mxnets))
    given = {str(key): [image.id, image.id2, hashed(image.image)] for key, image in images.items()}
    assert_same_reading(given, {key: fields for key, (_, *fields) in by_mxnet.items()})
    compared("image records", *[len(images)] * 3)


def test_insightface_layout(mxnet: Mxnet, tmp_path: Path, compared: Callable[..., None]) -> None:
    """Our sets are those of insightface's writers, and its way through record 0 and the ranges finds the same faces."""
    people = cases.people(300, Random(3))
    with write_face_set(tmp_path / "ours", image_size=112) as out:
        for images in people:
            out.add_identity(images)
    ours, mxnets = tmp_path / "ours" / "train.rec", tmp_path / "mxnets.rec"
    mxnet.write_faces(mxnets, people)
    assert_same_files(ours, mxnets)
    faces = [[label, hashed(image)] for label, images in enumerate(people) for image in images]
    assert_same_reading(faces, mxnet.read("read-faces", ours))
    assert_same_reading(faces, read_faces(mxnets))
    assert_index_is_rebuilt(mxnets)
    compared("insightface's layout", *[len(faces) + len(people) + 1] * 3)


def assert_index_is_rebuilt(rec_path: Path) -> None:
    """Walking the `.rec` gives the keys and offsets that mxnet wrote to the `.idx`."""
    found = RecordFile(rec_path).scan()
    for rebuilt, written in zip(found, read_index(rec_path.with_suffix(".idx")), strict=True):
        assert_same_reading(written.tolist(), rebuilt.tolist())


def test_real_sets(mxnet: Mxnet, face_data: Path, tmp_path: Path, compared: Callable[..., None]) -> None:
    """Every record of real sets: read by both; written again by us, the file is the same and mxnet reads that too."""
    found = sorted(path.with_suffix(".rec") for path in face_data.glob("*/*.idx"))
    assert found, f"FACE_DATA: {face_data} has no */*.rec with an .idx"
    for theirs in found:
        reader = IndexedRecordReader(theirs)
        ours = tmp_path / theirs.parent.name / theirs.name
        ours.parent.mkdir()
        write(ours, {key: reader.read(key) for key in reader.keys.tolist()})
        assert_same_files(ours, theirs)
        by_mxnet, by_us = mxnet.read("read", ours), read(theirs)
        assert_same_reading(by_mxnet["by_key"], by_us["by_key"])
        assert_same_reading(by_mxnet["in_order"], by_us["in_order"])
        assert_same_reading(mxnet.read("read-images", ours), read_images(theirs))
        pixels = mxnet.read("read-pixels", ours)
        assert_same_reading(pixels, read_pixels(theirs))
        assert_index_is_rebuilt(theirs)
        compared(f"{theirs.parent.name}/{theirs.name}", *[len(reader)] * 3, len(pixels))
