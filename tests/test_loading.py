"""Loading: the order of faces, where it can be entered, ranks, the pixels, the memory of batches."""

import gc
import multiprocessing
import multiprocessing.synchronize
import sys
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

from data.augment import Chances, augment
from data.batch_memory import BatchMemory
from data.face_sets import open_face_set
from data.loading import DecodedFaces, EpochBatches, flips, sequential_loader, to_network_input, training_loader
from data.orders import exact_order
from loading_sets import IMAGES, SIZE, picture, write_set
from utils.settings import ConfigError

CPU = torch.device("cpu")


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
