"""Loading: the order of faces, where it can be entered, ranks, the pixels, memory, reading ahead, broken images."""

import ctypes
import errno
import gc
import mmap
import multiprocessing
import multiprocessing.synchronize
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from data.augment import Chances, augment
from data.batch_memory import BatchMemory
from data.face_sets import FaceSet, RecFaceSet, open_face_set
from data.images import ImageError, encode_png
from data.joined_sets import FrequentIdentities, JoinedFaceSet
from data.loading import DecodedFaces, EpochBatches, flips, sequential_loader, to_network_input, training_loader
from data.orders import Order, block_order, create_order, exact_order
from data.recordio import MAGIC_BYTES, RecordFile, encode_record, pack_image, write_records
from utils.processes import WorkerError
from utils.settings import ConfigError

ROOT = Path(__file__).resolve().parents[1]

CPU = torch.device("cpu")
SIZE = 16
IMAGES = 23


def picture(key: int) -> np.ndarray:
    """An RGB image of its own for each key."""
    return np.random.default_rng(key).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def write_set(folder: Path, broken: dict[int, bytes] | None = None) -> RecFaceSet:
    images = {key: encode_png(picture(key)) for key in range(1, IMAGES + 1)} | (broken or {})
    with write_records(folder / "train.rec") as writer:
        for key, image in images.items():
            writer.write(key, pack_image(float(key % 5), key, image))
    return RecFaceSet(folder / "train.rec")


@pytest.fixture
def faces(tmp_path: Path) -> DecodedFaces:
    """23 faces of 5 identities."""
    records = write_set(tmp_path)
    return DecodedFaces(records, records.labels, SIZE)


# --- order ------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200), st.integers(1, 20), st.integers(0, 2**40), st.integers(0, 50))
def test_an_epoch_is_a_permutation(images: int, batch_size: int, seed: int, epoch: int) -> None:
    """Every image at most once, all but the incomplete last batch, in full batches, the same each time."""
    batches = EpochBatches(partial(exact_order, images, seed), images, batch_size)
    batches.start_at(epoch, 0)
    order = list(batches)
    seen = [i for batch in order for i in batch]
    assert len(seen) == len(set(seen)) == images - images % batch_size
    assert set(seen) <= set(range(images))
    assert all(len(batch) == batch_size for batch in order)
    assert len(order) == len(batches) == batches.batches == images // batch_size
    again = EpochBatches(partial(exact_order, images, seed), images, batch_size)
    again.start_at(epoch, 0)
    assert list(again) == order


@given(st.integers(0, 3), st.integers(0, 12))
def test_entering_an_epoch_midway(epoch: int, first: int) -> None:
    """From batch k on, the batches are those that a whole epoch has from k on: resuming repeats and skips nothing."""
    batches = EpochBatches(partial(exact_order, 64, 3), 64, 5)
    batches.start_at(epoch, 0)
    whole = list(batches)
    batches.start_at(epoch, first)
    assert list(batches) == whole[first:]
    assert len(batches) == len(whole) - first


def test_seed_and_epoch_decide_the_order() -> None:
    """Another epoch or seed is another order; seed and epoch do not stand for each other."""

    def order(seed: int, epoch: int) -> tuple[int, ...]:
        batches = EpochBatches(partial(exact_order, 100, seed), 100, 10)
        batches.start_at(epoch, 0)
        return tuple(i for batch in batches for i in batch)

    orders = {order(seed, epoch) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16
    assert tuple(range(100)) not in orders


def test_order_does_not_depend_on_global_generators() -> None:
    """Random numbers drawn elsewhere change nothing."""
    batches = EpochBatches(partial(exact_order, 50, 0), 50, 10)
    first = list(batches)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert list(batches) == first


@given(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9))
def test_flips_are_decided_by_their_arguments(seed: int, epoch: int, batch: int) -> None:
    """The same arguments, the same flips; of many faces about half; no two neighbouring batches alike."""
    flipped = flips(seed, epoch, batch, 400)
    assert flipped.dtype == torch.bool
    assert flipped.shape == (400,)
    assert torch.equal(flipped, flips(seed, epoch, batch, 400))
    assert 120 < flipped.sum() < 280
    for other in ((seed + 1, epoch, batch), (seed, epoch + 1, batch), (seed, epoch, batch + 1)):
        assert not torch.equal(flipped, flips(*other, 400))


# --- ranks ------------------------------------------------------------------------------------------------------------


def all_ranks(ranks: int, epoch: int, first: int) -> list[list[list[int]]]:
    """The batches of every rank, from batch `first` on: 12 rows in all, out of 100 images."""
    seen = []
    for rank in range(ranks):
        batches = EpochBatches(partial(exact_order, 100, 5), 100, 12, rank, ranks)
        batches.start_at(epoch, first)
        assert len(batches) == 8 - first
        assert batches.batches == 8
        seen.append(list(batches))
    return seen


@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 3), st.integers(0, 8))
def test_ranks_share_every_batch(ranks: int, epoch: int, first: int) -> None:
    """Side by side, the ranks' parts are the batches of one process, from any batch on: a run goes on with another
    number of ranks, and no image is seen twice or lost."""
    together = [[*chain(*parts)] for parts in zip(*all_ranks(ranks, epoch, first), strict=True)]
    assert together == all_ranks(1, epoch, 0)[0][first:]
    assert all(len(part) == 12 // ranks for batches in all_ranks(ranks, epoch, first) for part in batches)


@settings(deadline=None, max_examples=30)
@given(st.sampled_from([1, 2, 3, 4, 6, 12]), st.integers(0, 9), st.integers(0, 9))
def test_ranks_do_to_a_face_what_one_process_does(ranks: int, epoch: int, batch: int) -> None:
    """Flips and augmentations of a batch's faces are the same, whichever rank has them."""
    parts = [flips(3, epoch, batch, 12, rank, ranks) for rank in range(ranks)]
    assert torch.equal(torch.cat(parts), flips(3, epoch, batch, 12))
    faces = torch.from_numpy(np.stack([picture(key) for key in range(12)]))
    chances, rows = Chances(0.5, 0.5, 0.5, 0.5, 0.2), 12 // ranks
    augmented = [
        augment(faces[rank * rows : (rank + 1) * rows], chances, 3, epoch, batch, rank, ranks) for rank in range(ranks)
    ]
    # Products of fewer faces may be summed in another order: a value may be rounded the other way.
    whole = augment(faces, chances, 3, epoch, batch)
    assert (torch.cat(augmented).int() - whole.int()).abs().max() <= 1


def test_ranks_must_divide_the_batch() -> None:
    """Unequal parts are refused by the name of the setting; so is a rank that does not exist."""
    order = partial(exact_order, 100, 0)
    with pytest.raises(ConfigError, match=r"train\.batch_size: must be a multiple of the 3 ranks, got 10"):
        EpochBatches(order, 100, 10, 0, 3)
    with pytest.raises(ConfigError, match=r"train\.batch_size"):
        flips(0, 0, 0, 10, 1, 4)
    for rank in (-1, 2):
        with pytest.raises(ValueError, match=f"rank {rank} is none of 2"):
            EpochBatches(order, 100, 10, rank, 2)


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_load_their_parts(faces: DecodedFaces, workers: int) -> None:
    """Through the loader too: the pixels of both ranks are those of one process's batches."""

    def batches(rank: int, ranks: int) -> list[torch.Tensor]:
        order = EpochBatches(partial(exact_order, IMAGES, 7), IMAGES, 4, rank, ranks)
        return [batch.faces for batch in training_loader(faces, order, workers, CPU)]

    halves = [torch.cat(pair) for pair in zip(batches(0, 2), batches(1, 2), strict=True)]
    assert len(halves) == 5
    assert all(torch.equal(half, whole) for half, whole in zip(halves, batches(0, 1), strict=True))


# --- batches ----------------------------------------------------------------------------------------------------------


def test_pixels_are_what_opencv_decodes(faces: DecodedFaces) -> None:
    """uint8, height x width x RGB, with the labels of the same images."""
    pixels, labels, _ = faces.__getitems__([4, 0, 22])
    assert pixels.dtype == torch.uint8
    assert labels.dtype == torch.int64
    for row, key in enumerate((5, 1, 23)):
        bgr = cv2.imdecode(np.frombuffer(faces.images.encoded(key - 1), np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(pixels[row], bgr[:, :, ::-1])
        assert np.array_equal(pixels[row], picture(key))
        assert labels[row] == key % 5


def test_real_faces(face_data: Path) -> None:
    """JPEGs of a real set, by the record keys, as OpenCV decodes them."""
    records = open_face_set(face_data / "faces_glint24")
    pixels, labels, _ = DecodedFaces(records, records.labels, 112).__getitems__([0, 2000, 4193])
    for row, i in enumerate((0, 2000, 4193)):
        bgr = cv2.imdecode(np.frombuffer(records.encoded(i), np.uint8), cv2.IMREAD_COLOR)
        assert np.array_equal(pixels[row], bgr[:, :, ::-1])
    assert labels.tolist() == records.labels[[0, 2000, 4193]].tolist()


def test_workers_make_no_difference(faces: DecodedFaces) -> None:
    """Over two epochs, the second entered midway, no worker and two give the same batches in the same order."""
    seen = []
    for workers in (0, 2):
        batches = EpochBatches(partial(exact_order, len(faces), 7), len(faces), 4)
        loader = training_loader(faces, batches, workers, CPU)
        epochs = []
        for epoch, first in ((0, 0), (1, 2)):
            batches.start_at(epoch, first)
            epochs.append([(pixels.numpy().tobytes(), labels.tolist()) for pixels, labels, _ in loader])
        seen.append(epochs)
    assert seen[0] == seen[1]
    assert [len(epoch) for epoch in seen[0]] == [5, 3]
    batches = EpochBatches(partial(exact_order, len(faces), 7), len(faces), 4)
    assert seen[0][0][0][1] == [(i + 1) % 5 for i in next(iter(batches))]


def test_sequential_batches_are_made_when_they_are_asked_for(faces: DecodedFaces) -> None:
    """Of a set of millions of images no list of all positions, nor of all batches, is made."""
    asked = []

    class Positions(Sequence[int]):
        def __len__(self) -> int:
            return 1 << 20

        def __getitem__(self, part: Any) -> Any:
            asked.append(part)
            return range(part.start, part.stop)

    loader = sequential_loader(faces, 10, 0, CPU, Positions())
    assert asked == []
    assert next(iter(loader)).labels.tolist() == faces.labels[:10].tolist()
    assert len(asked) == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_sequential_loader(faces: DecodedFaces, workers: int) -> None:
    """Testing goes through all faces once, in order, the last batch as large as it is."""
    loaded = list(sequential_loader(faces, 10, workers, CPU))
    assert [len(batch.labels) for batch in loaded] == [10, 10, 3]
    pixels = torch.cat([batch.faces for batch in loaded])
    assert all(np.array_equal(pixels[key - 1], picture(key)) for key in range(1, IMAGES + 1))
    assert torch.cat([batch.labels for batch in loaded]).tolist() == faces.labels.tolist()


# --- memory of batches ------------------------------------------------------------------------------------------------


def test_a_slot_is_free_when_nothing_looks_at_it() -> None:
    """A slot is lent again after the last tensor, view or array of it is gone, and not before."""
    memory = BatchMemory(1, (4, 2))
    slot = memory.lend()
    assert slot == 0
    memory.place(slot, 4)[:] = np.arange(8).reshape(4, 2)
    batch = memory.take(slot, 3)
    assert batch.tolist() == [[0, 1], [2, 3], [4, 5]]
    looking = [batch[1], batch[2:].numpy(), batch.detach().view(-1)]
    del batch
    while looking:
        gc.collect()
        assert memory.lend() is None
        assert looking[0].sum() in (5, 9, 15)
        looking.pop(0)
    assert memory.lend() == 0
    assert memory.lend() is None


def test_the_slot_used_last_is_lent_first() -> None:
    """Its pages are there, and in the caches; those of a slot that is never needed are never taken."""
    memory = BatchMemory(3, (4, 2))
    first, second = memory.lend(), memory.lend()
    for slot in (second, first, first, first):
        assert slot is not None
        memory.take(slot, 1)
        gc.collect()
        assert memory.lend() == slot


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_loaders_reuse_memory(faces: DecodedFaces) -> None:
    """Batches that are let go come in the same few places, also after epochs that were left midway."""
    batches = EpochBatches(partial(exact_order, IMAGES, 7), IMAGES, 1)
    loader = training_loader(faces, batches, 2, CPU)
    places = set()
    for epoch in range(6):
        batches.start_at(epoch, 0)
        for number, batch in enumerate(loader):
            places.add(batch.faces.data_ptr())
            if epoch % 2 and number == 3:
                break
    assert 2 <= len(places) <= 7


def test_batches_that_are_kept_stay_as_they_are(faces: DecodedFaces) -> None:
    """More batches than there are slots, and single faces of batches, keep their pixels while others are loaded."""
    batches = EpochBatches(partial(exact_order, IMAGES, 7), IMAGES, 2)
    loader = training_loader(faces, batches, 2, CPU)
    order = exact_order(IMAGES, 7, 0)
    whole = list(loader)
    single = [batch.faces[1] for batch in loader]
    arrays = [batch.faces[0].numpy() for batch in loader]
    gc.collect()
    for batch in loader:
        assert batch.faces.any()
    assert len(whole) == 11
    for number in range(11):
        first, second = (picture(int(order[2 * number + row]) + 1) for row in range(2))
        assert np.array_equal(whole[number].faces, np.stack([first, second]))
        assert np.array_equal(single[number], second)
        assert np.array_equal(arrays[number], first)


class FakeRuntime:
    """CUDA's runtime as far as pinning goes; `locked`: bytes from each address, `workers` when that was done."""

    class cudaError:  # noqa: N801 - CUDA's name
        success = 0

    def __init__(self, result: int = 0) -> None:
        self.result = result
        self.locked: dict[int, int] = {}
        self.workers: list[int] = []

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:  # noqa: N802
        assert flags == 0
        self.workers.append(len(multiprocessing.active_children()))
        if self.result == 0:
            self.locked[address] = size
        return self.result

    def cudaGetErrorString(self, error: int) -> str:  # noqa: N802
        return {2: "out of memory"}[error]

    def cudaHostUnregister(self, address: int) -> int:  # noqa: N802
        del self.locked[address]
        return 0


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_workers_fill_pinned_memory(faces: DecodedFaces, monkeypatch: pytest.MonkeyPatch) -> None:
    """For CUDA all batches lie in one block that is pinned, once, when the workers run, and let go with the loader."""
    runtime = FakeRuntime()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    batches = EpochBatches(partial(exact_order, IMAGES, 7), IMAGES, 2)
    loader = training_loader(faces, batches, 2, torch.device("cuda"))
    assert not runtime.locked
    for _ in range(2):
        for number, batch in enumerate(loader):
            ((start, size),) = runtime.locked.items()
            assert start <= batch.faces.data_ptr() <= start + size - batch.faces.nbytes
            assert np.array_equal(batch.faces[1], picture(int(exact_order(IMAGES, 7, 0)[2 * number + 1]) + 1))
    assert runtime.workers == [2]
    del loader, batch
    gc.collect()
    assert not runtime.locked


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    faces: DecodedFaces, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is a warning that says why in CUDA's words, and every batch."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: FakeRuntime(2))
    batches = EpochBatches(partial(exact_order, IMAGES, 7), IMAGES, 2)
    with pytest.warns(UserWarning, match=r"0 MiB of memory for batches cannot be pinned \(out of memory\)"):
        assert len(list(training_loader(faces, batches, 2, torch.device("cuda")))) == 11


# --- reading ahead ----------------------------------------------------------------------------------------------------


def large_set(folder: Path, images: int = 60) -> RecFaceSet:
    """Faces of 10 identities in records of 5 to 20 kB."""
    folder.mkdir(exist_ok=True)
    with write_records(folder / "train.rec") as writer:
        for key in range(1, images + 1):
            writer.write(key, pack_image(float(key % 10), key, os.urandom(5000 + key * 250)))
    return RecFaceSet(folder / "train.rec")


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


# --- broken images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"\xff\xd8\xff\xe0 no picture", r"its 15 bytes are no image"),
        (encode_png(np.zeros((SIZE, SIZE + 1, 3), np.uint8)), r"is 17x16 pixels, expected 16x16: .*data\.image_size"),
    ],
    ids=["broken", "wrong size"],
)
def test_unusable_images_are_named(tmp_path: Path, workers: int, image: bytes, message: str) -> None:
    """Through a worker process too, the error says which record of which file, and where."""
    records = write_set(tmp_path, {9: image})
    loader = sequential_loader(DecodedFaces(records, records.labels, SIZE), 5, workers, CPU)
    where = rf"train\.rec, record 9 at byte {records._offsets[8]}:? "
    with pytest.raises(ImageError, match=where + message):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_tolerant_loader_labels_broken_images(tmp_path: Path, workers: int) -> None:
    """In training a broken image is a row of zeros that no loss counts, with a message that names it."""
    records = write_set(tmp_path, {9: b"no picture", 12: encode_png(np.zeros((4, 4, 3), np.uint8))})
    faces = DecodedFaces(records, records.labels, SIZE, tolerant=True)
    batches = list(sequential_loader(faces, 10, workers, CPU))
    labels = torch.cat([batch.labels for batch in batches])
    assert np.flatnonzero(labels == -1).tolist() == [8, 11]
    assert not batches[0].faces[8].any()
    assert ["record 9 at" in message for message in batches[0].broken] == [True]
    assert ["record 12 at" in message for message in batches[1].broken] == [True]
    assert batches[2].broken == []
    assert faces.labels[8] == 9 % 5, "the set's own labels must stay"


def test_other_sizes_are_scaled_when_asked(tmp_path: Path) -> None:
    """`resize` takes images of any size; what has the right size already is not touched."""
    large = np.full((2 * SIZE, 2 * SIZE, 3), (200, 30, 90), np.uint8)
    records = write_set(tmp_path, {9: encode_png(large)})
    faces, _, _ = DecodedFaces(records, records.labels, SIZE, resize=True).__getitems__([8, 9])
    assert (faces[0] == torch.tensor([200, 30, 90])).all()
    assert np.array_equal(faces[1], picture(10))


@pytest.fixture
def quick_looks_at_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers are looked at every 0.3 seconds, not 5."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.3)
    monkeypatch.setattr(_MultiProcessingDataLoaderIter._try_get_data, "__defaults__", (0.3,))


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path, quick_looks_at_workers: None) -> None:
    """A mapped file that cannot be read kills the worker (SIGBUS): the error says so, with record, offset, reason."""
    faces = large_set(tmp_path)
    size = faces.path.stat().st_size
    decoded = DecodedFaces(faces, faces.labels, SIZE, tolerant=True)
    batches = EpochBatches(partial(exact_order, len(faces), 0), len(faces), 4)
    before = signal.getsignal(signal.SIGCHLD)
    loaded = iter(training_loader(decoded, batches, 1, CPU))
    next(loaded)
    assert signal.getsignal(signal.SIGCHLD) == before  # a step is not interrupted by torch's handler
    os.truncate(faces.path, 4096)
    where = rf"{faces.path}, record \d+ at byte \d+: the file has 4,096 bytes, {size:,} when it was opened"
    with pytest.raises(WorkerError, match=f"a worker process died of a bus error.*; {where}"):
        list(loaded)


def test_a_worker_that_dies_between_epochs_is_named(tmp_path: Path, quick_looks_at_workers: None) -> None:
    """Killed for memory while the main process verifies, say: the next epoch, too, says what happened."""
    records = write_set(tmp_path, {})
    batches = EpochBatches(partial(exact_order, len(records), 0), len(records), 4)
    loader = training_loader(DecodedFaces(records, records.labels, SIZE), batches, 1, CPU)
    others = set(multiprocessing.active_children())
    list(loader)
    (worker,) = set(multiprocessing.active_children()) - others
    worker.kill()
    worker.join()
    with pytest.raises(WorkerError, match=r"a worker process died \(out of memory\?\); try fewer with --workers"):
        list(loader)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of torch, which stops half-way
def test_a_loader_whose_workers_cannot_be_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no room for their locks it says so."""
    records = write_set(tmp_path, {})
    loader = sequential_loader(DecodedFaces(records, records.labels, SIZE), 5, 1, CPU)

    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(multiprocessing.synchronize.SemLock, "__init__", full)
    with pytest.raises(WorkerError, match=r"cannot be started \(No space left on device on /dev/shm\)"):
        list(loader)


def test_a_program_ends_with_a_loader_alive(tmp_path: Path) -> None:
    """Workers leave a scheduler's SIGTERM to the main process, but go when that one ends."""
    write_set(tmp_path, {})
    program = f"""
import os, signal, time, torch
from data.face_sets import open_face_set
from data.loading import DecodedFaces, EpochBatches, training_loader
from data.orders import create_order
faces = open_face_set({str(tmp_path)!r})
batches = EpochBatches(create_order("exact", faces.labels, 0), len(faces), 2)
loader = training_loader(DecodedFaces(faces, faces.labels, {SIZE}), batches, 1, torch.device("cpu"))
iterator = iter(loader)
next(iterator)
child = int(open(f"/proc/{{os.getpid()}}/task/{{os.getpid()}}/children").read().split()[0])
os.system(f"kill -TERM {{child}}")
time.sleep(0.2)
print(len([next(iterator) for _ in range(8)]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr


# --- to the network ---------------------------------------------------------------------------------------------------


def test_network_input_values() -> None:
    """(rgb - 127.5) / 127.5 in float32: 0 is -1, 255 is 1, red stays first; the uint8 faces are left alone."""
    faces = torch.arange(256, dtype=torch.uint8).repeat(3).reshape(1, 16, 16, 3)
    kept = faces.clone()
    inputs = to_network_input(faces)
    assert inputs.shape == (1, 3, 16, 16)
    assert inputs.dtype == torch.float32
    expected = (faces.double().permute(0, 3, 1, 2) - 127.5) / 127.5
    torch.testing.assert_close(inputs.double(), expected, rtol=0, atol=1e-7)
    assert (inputs.min(), inputs.max()) == (-1, 1)
    assert torch.equal(faces, kept)
    red = torch.zeros(1, 2, 2, 3, dtype=torch.uint8)
    red[..., 0] = 255
    assert to_network_input(red)[0, :, 0, 0].tolist() == [1, -1, -1]


@pytest.mark.parametrize("mirror", [False, True, torch.tensor([True, False, True])])
def test_network_input_is_channels_last(mirror: torch.Tensor | bool) -> None:
    """Channels lie together in memory, as they were decoded: convolutions need no copy."""
    faces = torch.randint(0, 256, (3, 8, 6, 3), dtype=torch.uint8)
    assert to_network_input(faces, mirror).is_contiguous(memory_format=torch.channels_last)


def test_mirroring() -> None:
    """Left and right change places, up and down do not, and only for the faces that are to be mirrored."""
    faces = torch.randint(0, 256, (4, 8, 6, 3), dtype=torch.uint8)
    plain = to_network_input(faces)
    mirrored = plain.flip(3)
    assert torch.equal(to_network_input(faces, True), mirrored)
    some = to_network_input(faces, torch.tensor([True, False, False, True]))
    assert torch.equal(some, torch.stack([mirrored[0], plain[1], plain[2], mirrored[3]]))


def test_network_input_in_one_kernel() -> None:
    """As a compiler sees it: one graph, the same numbers, the same layout, on which what follows was compiled."""
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph

    faces = torch.randint(0, 256, (4, 6, 6, 3), dtype=torch.uint8)
    mirror = torch.tensor([True, False, False, True])
    found = torch.compile(to_network_input, backend=count)(faces, mirror)
    expected = to_network_input(faces, mirror)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert len(graphs) == 1
    torch.compiler.reset()
