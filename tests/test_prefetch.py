"""Batches on the device: all of them, in order, unharmed by what copies them."""

from collections.abc import Iterator

import pytest
import torch

from data.loading import Batch
from data.prefetch import on_device


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
