"""Reading ahead: what the system is told, what it fetches, and nothing else."""

import ctypes
import mmap
import os
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.face_sets import FaceSet
from data.joined_sets import FrequentIdentities, JoinedFaceSet
from data.loading import DecodedFaces, EpochBatches, training_loader
from data.orders import Order, block_order, create_order, exact_order
from data.recordio import MAGIC_BYTES, RecordFile, encode_record
from loading_sets import IMAGES, SIZE, large_set, picture, write_set

CPU = torch.device("cpu")


def mapping_flags(path: Path) -> list[str]:
    """How the system was told that the mapping of a file is read (VmFlags)."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    mine = next(line for line in lines if line.endswith(str(path)))
    assert mine
    return next(line for line in lines if line.startswith("VmFlags")).split()


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs Linux's smaps")
@pytest.mark.parametrize(("name", "random"), [("exact", True), ("balanced", True), ("blocks", False)])
@pytest.mark.parametrize("joined", [False, True])
def test_random_orders_are_announced(tmp_path: Path, name: str, random: bool, joined: bool) -> None:
    """Training in a random order tells the system so, for every file of a set; opening a set and `blocks` do not."""
    sets = [large_set(tmp_path / part) for part in "ab"[: 1 + joined]]
    faces: FaceSet = FrequentIdentities(JoinedFaceSet(sets), 2) if joined else sets[0]
    assert all("rr" not in mapping_flags(part.path) for part in sets)
    batches = EpochBatches(create_order(name, faces.labels, 0), len(faces), 4)
    training_loader(DecodedFaces(faces, faces.labels, SIZE, tolerant=True), batches, 0, CPU)
    assert all(("rr" in mapping_flags(part.path)) == random for part in sets)


def test_a_part_of_sets_made_of_others_has_its_images(tmp_path: Path) -> None:
    """Those at the positions asked for, in their order; one that a part cannot have is refused, not changed."""
    joined = JoinedFaceSet([large_set(tmp_path / part) for part in "ab"])
    positions = np.array([3, 1, len(joined) - 1, len(joined) - 4])
    for faces in (joined, FrequentIdentities(joined, 2)):
        part = faces.part(positions)
        assert [part.encoded(i) for i in range(4)] == [faces.encoded(i) for i in positions.tolist()]
        with pytest.raises(ValueError, match="order of the sets"):
            faces.part(positions[::-1])


@pytest.mark.parametrize("kind", ["plain", "joined", "frequent"])
@pytest.mark.parametrize(("stretch", "first"), [(0, 0), (0, 3), (24, 0), (24, 7)])
def test_images_are_announced_before_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, stretch: int, first: int
) -> None:
    """The system is told of every record's bytes before it is read; of `blocks`, in long runs and a stretch ahead."""
    sets = [large_set(tmp_path / part) for part in "ab"]
    faces: FaceSet = {
        "plain": lambda: sets[0],
        "joined": lambda: JoinedFaceSet(sets),
        "frequent": lambda: FrequentIdentities(JoinedFaceSet(sets), 2),
    }[kind]()
    told: list[tuple[RecordFile, int, int]] = []
    read = []
    monkeypatch.setattr(RecordFile, "read_soon", lambda file, start, end: told.append((file, start, end)))
    plain_read = RecordFile.read

    def checked_read(file: RecordFile, offset: int) -> bytes:
        payload = plain_read(file, offset)
        end = offset + 8 + len(payload)
        assert any(f is file and start <= offset and end <= stop for f, start, stop in told), "read before it was told"
        read.append(end - offset)
        return payload

    images = len(faces)
    seed_order = (
        partial(block_order, images, 1, block=8, blocks_mixed=3) if stretch else partial(exact_order, images, 1)
    )
    batches = EpochBatches(Order(seed_order, stretch), images, 6)
    batches.start_at(0, first)
    monkeypatch.setattr(RecordFile, "read", checked_read)
    loader = training_loader(DecodedFaces(faces, faces.labels, SIZE, tolerant=True), batches, 0, CPU)
    assert sum(len(batch.labels) for batch in loader) == len(read) == images - 6 * first
    told_bytes = sum(end - start for _, start, end in told)
    if stretch:
        assert len(told) < len(read) / 1.5, "runs of neighbours are read in one piece"
    assert told_bytes < sum(read) + len(read) * (1 << 14)


def resident(file: RecordFile) -> np.ndarray:
    """Which pages of a mapped file are in memory: bool [pages]."""
    pages = np.zeros(-(-file.size // mmap.PAGESIZE), np.uint8)
    address = file.view().ctypes.data
    libc = ctypes.CDLL(None, use_errno=True)
    done = libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(file.size), ctypes.c_void_p(pages.ctypes.data))
    assert done == 0, os.strerror(ctypes.get_errno())
    return (pages & 1).astype(bool)


@pytest.fixture
def cold_file(tmp_path: Path) -> RecordFile:
    """A file of 4 MB of which nothing is in memory; skipped where the file system cannot forget."""
    path = tmp_path / "cold.rec"
    path.write_bytes(os.urandom(1 << 22))
    if not hasattr(os, "posix_fadvise") or sys.platform != "linux":
        pytest.skip("needs Linux's posix_fadvise and mincore")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    cold = RecordFile(path)
    if resident(cold).any():
        pytest.skip("files stay in memory here")
    return cold


def test_a_random_read_brings_nothing_else(cold_file: RecordFile) -> None:
    """One byte of a cold file costs one page; without the announcement it costs many."""
    middle = cold_file.size // 2
    cold_file.expect_random_reads()
    cold_file.view()[middle].item()
    assert resident(cold_file).sum() == 1
    undeclared = RecordFile(cold_file.path)
    undeclared.view()[cold_file.size // 4].item()
    assert resident(cold_file).sum() > 4


def test_read_soon_reads_what_it_says(cold_file: RecordFile) -> None:
    """The pages of the bytes come into memory unasked, and no others; bytes beyond the file are nobody's."""
    page = mmap.PAGESIZE
    cold_file.read_soon(100 * page + 5, 110 * page + 1)
    cold_file.read_soon(cold_file.size, cold_file.size + page)
    cold_file.read_soon(-page, page)
    for _ in range(100):
        if resident(cold_file).sum() == 11:
            break
        time.sleep(0.02)
    assert np.flatnonzero(resident(cold_file)).tolist() == list(range(100, 111))


def test_reading_where_the_system_takes_no_hints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the system's calls (not every system has them) the same faces are loaded."""
    for advice in ("MADV_RANDOM", "MADV_WILLNEED"):
        monkeypatch.delattr(mmap, advice, raising=False)
    records = write_set(tmp_path)
    batches = EpochBatches(create_order("exact", records.labels, 0), IMAGES, IMAGES)
    (batch,) = training_loader(DecodedFaces(records, records.labels, SIZE), batches, 0, CPU)
    expected = np.stack([picture(int(i) + 1) for i in exact_order(IMAGES, 0, 0)])
    assert np.array_equal(batch.faces, expected)


def test_a_cut_record_of_a_large_file(tmp_path: Path) -> None:
    """A record in parts is joined in a file of over 2**29 bytes too, where its flag could be taken for a length."""
    payload = b"face" + MAGIC_BYTES + b"more"
    path = tmp_path / "large.rec"
    path.write_bytes(encode_record(payload))
    os.truncate(path, (1 << 29) + 4096)
    assert RecordFile(path).read(0) == payload
