"""Batches on the device: all of them, in order, unharmed by what copies them."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from data.batch_memory import BatchMemory
from data.face_sets import RecFaceSet
from data.images import encode_png
from data.loading import Batch, DecodedFaces, EpochBatches, training_loader
from data.orders import exact_order
from data.prefetch import Copy, on_device, one_ahead
from data.recordio import pack_image, write_records


def batches(number: int, pinned: bool, taken: list[int]) -> Iterator[Batch]:
    """Batch i has i in every pixel and label, and names itself."""
    for i in range(number):
        taken.append(i)
        faces = torch.full((64, 32, 32, 3), i, dtype=torch.uint8)
        labels = torch.full((64,), i)
        if pinned:
            faces, labels = faces.pin_memory(), labels.pin_memory()
        yield Batch(faces, labels, [str(i)])


@pytest.mark.parametrize("number", [0, 1, 5])
def test_on_the_cpu_batches_pass_through(number: int) -> None:
    """One at a time, as they come."""
    taken: list[int] = []
    for i, batch in enumerate(on_device(batches(number, False, taken), torch.device("cpu"))):
        assert taken == list(range(i + 1))
        assert (batch.faces == i).all()
        assert batch.broken == [str(i)]
    assert len(taken) == number


class LateCopy:
    """A copy of rows of 3 that the device makes only when `ready` says so, or when it is waited for."""

    def __init__(self, source: np.ndarray, ready: Callable[[], bool]) -> None:
        self.source, self.ready = source, ready
        self.target = torch.full((2, 3), 255, dtype=torch.uint8)

    def query(self) -> bool:
        if self.ready():
            self.synchronize()
        return self.ready()

    def synchronize(self) -> None:
        self.target.numpy()[:] = self.source


class LentBatches:
    """Batches that say their number, made in the places of `memory`; where those are taken, in others."""

    def __init__(self, memory: BatchMemory, number: int) -> None:
        self.memory, self.number = memory, number
        self.lent: list[int | None] = []

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.number):
            slot = self.memory.lend()
            self.lent.append(slot)
            rows = np.empty((2, 3), np.uint8) if slot is None else self.memory.place(slot, 2)
            rows[:] = i
            faces = torch.from_numpy(rows) if slot is None else self.memory.take(slot, 2)
            yield Batch(faces, torch.full((2,), i), [])

    def copy(self, batch: Batch, late: int) -> Copy:
        """Done when `late` more batches have been made."""
        slot, made = self.lent[-1], len(self.lent)
        source = batch.faces.numpy().copy() if slot is None else self.memory.place(slot, 2)
        event = LateCopy(source, lambda: len(self.lent) >= made + late)
        return Copy(Batch(event.target, batch.labels, []), event)


@pytest.mark.parametrize("late", [0, 1, 2, 5])
def test_memory_is_not_used_again_while_it_is_copied(late: int) -> None:
    """A device that reads a batch's memory only when `late` more batches have been made still gets that batch, those of
    the end included.
    """
    loader = LentBatches(BatchMemory(4, (2, 3)), 30)
    copies = [copied for copied, _ in one_ahead(loader, partial(loader.copy, late=late))]
    assert [batch.labels[0] for batch in copies] == list(range(30))
    assert [batch.faces.tolist() for batch in copies] == [[[i] * 3] * 2 for i in range(30)]
    assert (None in loader.lent) == (late > 2)  # the places suffice for less


def test_copies_are_done_before_an_iteration_that_is_given_up_lets_go_of_their_memory() -> None:
    """After an error in a step, the next pass fills the same memory: what was still copied from it must be done."""
    memory = BatchMemory(4, (2, 3))
    loader = LentBatches(memory, 30)
    copies = one_ahead(loader, partial(loader.copy, late=9))
    first = next(copies)
    copies.close()
    assert first.batch.faces.tolist() == [[0] * 3] * 2
    assert sorted(slot for _ in range(5) if (slot := memory.lend()) is not None) == [0, 1, 2, 3]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
@pytest.mark.parametrize("number", [0, 1, 40])
def test_on_cuda_batches_are_copied_one_ahead(number: int) -> None:
    """Every batch arrives whole, in order, while the device is kept busy and memory is used again and again."""
    device = torch.device("cuda")
    left, right = torch.randn(2, 2048, 2048, device=device).unbind()
    taken: list[int] = []
    sums = []
    for i, batch in enumerate(on_device(batches(number, True, taken), device)):
        assert taken == list(range(min(number, i + 2)))
        assert batch.faces.is_cuda
        assert batch.labels.is_cuda
        for _ in range(3):
            left @ right
        sums.append(torch.stack((batch.faces.sum(), batch.labels.sum())))
        assert batch.broken == [str(i)]
        del batch
    assert [total.tolist() for total in sums] == [[i * 64 * 32 * 32 * 3, i * 64] for i in range(number)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_on_cuda_workers_fill_memory_that_is_being_copied(tmp_path: Path) -> None:
    """Copies that are held up read what the workers decoded for them, not what they decode meanwhile."""
    images, size, device = 64, 32, torch.device("cuda")
    with write_records(tmp_path / "train.rec") as writer:
        for key in range(1, images + 1):
            writer.write(key, pack_image(float(key), key, encode_png(np.full((size, size, 3), key, np.uint8))))
    faces = RecFaceSet(tmp_path / "train.rec")
    batches = EpochBatches(partial(exact_order, images, 0), images, 4)
    loader = training_loader(DecodedFaces(faces, faces.labels, size), batches, 2, device)
    stream = torch.cuda.Stream(device)
    pinned: list[bool] = []

    def copy(batch: Batch) -> Copy:
        pinned.append(batch.faces.is_pinned())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(20_000_000)
            copied = batch.faces.to(device, non_blocking=True)
            return Copy(Batch(copied, batch.labels, []), stream.record_event())

    for epoch in range(3):
        batches.start_at(epoch, 0)
        pinned.clear()
        copies = [copied for copied, _ in one_ahead(loader, copy)]
        # The host runs ahead of the copies, and batches that find every place taken come in memory that is not pinned.
        assert pinned[:3] == [True] * 3
        for number, batch in enumerate(copies):
            keys = exact_order(images, 0, epoch)[4 * number : 4 * number + 4] + 1
            assert (batch.faces.cpu().numpy() == keys[:, None, None, None]).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA card")
def test_on_cuda_a_failed_pinning_does_no_harm() -> None:
    """Memory that is pinned already cannot be pinned once more: there is a warning, and CUDA works on."""
    memory = BatchMemory(2, (4, 1 << 20))
    assert memory.pin()
    memory._pinned = False
    with pytest.warns(UserWarning, match=r"cannot be pinned \(.*already mapped"):
        assert not memory.pin()
    assert torch.ones(3, device="cuda").sum().item() == 3
