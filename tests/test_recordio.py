"""RecordIO: the bytes that mxnet writes, and every way a file can be damaged."""

import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.recordio import (
    MAGIC_BYTES,
    IndexedRecordReader,
    RecordError,
    RecordFile,
    encode_record,
    pack_image,
    unpack_image,
    write_records,
)

# What mxnet 1.9.1 wrote for pack(IRHeader(0, 3.0, 1, 0), b"abc") and for the payload magic x 3 + "xx".
GOLDEN_IMAGE = bytes.fromhex("0a23d7ce 1b000000 00000000 00004040 0100000000000000 0000000000000000 616263 00")
GOLDEN_MAGICS = bytes.fromhex("0a23d7ce 00000020 0a23d7ce 00000040 0a23d7ce 00000040 0a23d7ce 02000060 7878 0000")

# Payloads made of words that are likely to hit the magic, at aligned and at odd offsets.
payloads = st.lists(st.sampled_from([MAGIC_BYTES, MAGIC_BYTES[:3], b"a", b"bcde", b""]), max_size=12).map(b"".join)


def write(folder: Path, payloads: dict[int, bytes]) -> Path:
    path = folder / "train.rec"
    with write_records(path) as writer:
        for key, payload in payloads.items():
            writer.write(key, payload)
    return path


def test_writes_the_bytes_that_mxnet_writes(tmp_path: Path) -> None:
    """Files of ours are files of mxnet, byte for byte, the cut at an embedded magic included."""
    path = write(tmp_path, {0: pack_image(3.0, 1, b"abc"), 1: MAGIC_BYTES * 3 + b"xx"})
    assert path.read_bytes() == GOLDEN_IMAGE + GOLDEN_MAGICS
    assert path.with_suffix(".idx").read_bytes() == b"0\t0\n1\t36\n"


def test_reads_the_bytes_that_mxnet_writes(tmp_path: Path) -> None:
    """Golden bytes, taken apart: header fields, label, image, and a payload of nothing but magics."""
    (tmp_path / "x.rec").write_bytes(GOLDEN_IMAGE + GOLDEN_MAGICS)
    file = RecordFile(tmp_path / "x.rec")
    record = unpack_image(file.read(0), "x")
    assert (record.labels.tolist(), record.id, record.id2, record.image) == ([3.0], 1, 0, b"abc")
    assert file.read(36) == MAGIC_BYTES * 3 + b"xx"


@given(st.lists(payloads, min_size=1, max_size=8))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, written: list[bytes]) -> None:
    """Whatever the payload, magics anywhere included, what comes out is what went in."""
    path = write(tmp_path_factory.mktemp("rec"), dict(enumerate(written)))
    reader = IndexedRecordReader(path)
    assert [reader.read(key) for key in range(len(written))] == written
    assert path.stat().st_size % 4 == 0


def test_array_labels_follow_the_header() -> None:
    """Several labels are stored behind the header with their count in `flag`, as mxnet's pack does."""
    payload = pack_image([7.0, 1.0], 5, b"jpeg")
    record = unpack_image(payload, "x")
    assert record.labels.tolist() == [7.0, 1.0]
    assert record.image == b"jpeg"
    assert payload[:8] == b"\x02\0\0\0" + b"\0\0\0\0"


def test_keys_in_any_order(tmp_path: Path) -> None:
    """Records are found by key, not by position: many writers put record 0 last."""
    reader = IndexedRecordReader(write(tmp_path, {5: b"five", 2: b"two", 0: b"zero"}))
    assert [reader.read(key) for key in (0, 2, 5)] == [b"zero", b"two", b"five"]
    with pytest.raises(KeyError, match="no record 3"):
        reader.read(3)


def test_missing_index_is_rebuilt(tmp_path: Path) -> None:
    """A set whose .idx was lost still opens, with the ids in the headers as keys."""
    path = write(tmp_path, {key: pack_image(1.0, key, MAGIC_BYTES * key) for key in (4, 3, 9)})
    path.with_suffix(".idx").unlink()
    reader = IndexedRecordReader(path)
    assert reader.keys.tolist() == [4, 3, 9]
    assert unpack_image(reader.read(9), "x").image == MAGIC_BYTES * 9


@pytest.mark.parametrize("ids", [(0, 0, 0), (7, 8, 7), (1, 2, 2**63)], ids=["all 0", "one twice", "no int64"])
def test_missing_index_with_ids_that_are_no_keys(tmp_path: Path, ids: tuple[int, ...]) -> None:
    """Without an .idx, records whose headers have no ids of their own are called by their positions."""
    path = write(tmp_path, {key: pack_image(1.0, id, b"%d" % key) for key, id in enumerate(ids)})
    path.with_suffix(".idx").unlink()
    reader = IndexedRecordReader(path)
    assert reader.keys.tolist() == [0, 1, 2]
    assert unpack_image(reader.read(2), "x").image == b"2"


def test_missing_index_of_a_large_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Walking it takes minutes, so it shows how far it is; the images of whole records are not read."""
    records = {key: pack_image(1.0, key, b"\xff" * 50) for key in range(6)} | {9: pack_image(1.0, 9, MAGIC_BYTES)}
    path = write(tmp_path, records)
    path.with_suffix(".idx").unlink()
    split = []
    read = RecordFile._read_with_end
    monkeypatch.setattr(RecordFile, "_read_with_end", lambda self, offset: split.append(offset) or read(self, offset))
    assert RecordFile(path).scan()[0].tolist() == list(records)
    assert len(split) == 1
    assert not capsys.readouterr().err
    monkeypatch.setattr("data.recordio._SCAN_SHOWN", 100)
    monkeypatch.setattr("data.recordio._HEADS_AT_ONCE", 2)
    assert RecordFile(path).scan()[0].tolist() == list(records)
    assert f"index of {path}: 100%" in capsys.readouterr().err


def test_a_damaged_record_beside_an_index(tmp_path: Path) -> None:
    """Where no record begins, the index may be the wrong one: the message says what to do about it."""
    path = write(tmp_path, {0: b"abcd", 1: b"efgh"})
    message = r"the \.idx was cut off or is another file's \(move it away, and it is rebuilt\), or the \.rec is damaged"
    with pytest.raises(RecordError, match=message):
        RecordFile(path).read(4)


def test_reader_travels_to_worker_processes(tmp_path: Path) -> None:
    """A pickled reader maps the file anew instead of carrying its bytes."""
    reader = IndexedRecordReader(write(tmp_path, {0: b"x" * 100_000}))
    pickled = pickle.dumps(reader)
    assert len(pickled) < 2000
    assert pickle.loads(pickled).read(0) == b"x" * 100_000


def test_nothing_is_left_behind_when_writing_fails(tmp_path: Path) -> None:
    """An interrupted writer leaves neither a half-written file nor its temporary one."""

    with pytest.raises(KeyboardInterrupt), write_records(tmp_path / "train.rec") as writer:
        writer.write(0, b"abc")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b: b[:-8], "the file ends at 28: it was cut off"),
        (
            lambda b: b"\0" + b[1:] + b,
            r"no record begins at byte 0 .*: the \.rec is damaged \(.* by data/report\.py --repair",
        ),
        (lambda b: b"<!DOCTYPE html> Not found", r"it is no \.rec file, it begins with b'<!DOCTYPE html> ': copy it"),
        (
            lambda b: encode_record(MAGIC_BYTES)[8:] + b,
            "expected the start of a record at byte 0, found a part with cflag",
        ),
        (lambda b: encode_record(MAGIC_BYTES)[:8] + b, "expected a continuation at byte 8, found a part with cflag 0"),
        (lambda b: b"", "holds no record: it is empty, copy it again"),
        (lambda b: b[:3], "holds no record: it has 3 bytes, copy it again"),
    ],
)
def test_damaged_records_say_what_and_where(tmp_path: Path, damage, message: str) -> None:
    """Every kind of damage is an error with file and offset, never wrong bytes."""
    path = tmp_path / "train.rec"
    path.write_bytes(damage(GOLDEN_IMAGE))
    with pytest.raises(RecordError, match=message) as error:
        RecordFile(path).read(0)
    assert str(path) in str(error.value)


def test_damaged_image_header() -> None:
    """A header that announces more labels than there are bytes is refused."""
    with pytest.raises(RecordError, match=r"x: its header announces 9 labels"):
        unpack_image(b"\x09" + bytes(23), "x")
    with pytest.raises(RecordError, match=r"x: 3 bytes are too few"):
        unpack_image(b"abc", "x")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0\tabc\n", "every line must be"),
        ("0\t0.5\n", "every line must be"),
        ("0\t99999999999999999999\n", "every line must be"),
        ("0\n1\n", "found 1 columns.* move it away"),
        ("\n\n \n", "has blank lines only: move it away"),
        ("0\t0\n0\t36\n", r"key 0 occurs more than once .*: move it away.*report.py .*train.rec --repair OUT"),
        ("0\t0\n1\t36\n2\t36\n", r"records 1 and 2 have the same offset, 36 \(1 such pairs\).* move it away"),
    ],
)
def test_damaged_index(tmp_path: Path, text: str, message: str) -> None:
    """An .idx that is no index names itself and what a line should be."""
    (tmp_path / "train.rec").write_bytes(GOLDEN_IMAGE + GOLDEN_MAGICS)
    (tmp_path / "train.idx").write_text(text)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RecordError, match=message):
            IndexedRecordReader(tmp_path / "train.rec")


def test_file_view_matches_bytes(tmp_path: Path) -> None:
    """The array view used for label scans shows the file as it is."""
    path = write(tmp_path, {0: b"abcd"})
    assert RecordFile(path).view().tobytes() == path.read_bytes()
    assert not RecordFile(path).view().flags.writeable
    assert isinstance(RecordFile(path).view(), np.ndarray)
