"""What a step of the blockwise head holds in memory: its formula, which the number of classes is not part of."""

import pytest
import torch

from head_cases import SGD
from live_memory import LiveMemory
from models.heads import BlockwiseHead, DenseHead, Head
from models.losses import LOSSES, create_loss

FACES, SIZE, BLOCK = 32, 64, 512
#: Floats: what is as long as the batch, and the temporaries of a block. (The measure of O(B x D + block x (B + D)).)
BOUND = 4 * (8 * FACES * SIZE + 8 * BLOCK * (FACES + SIZE))


def step(head: Head, device: str = "cpu") -> None:
    """One step, as training makes it."""
    embeddings = torch.randn(FACES, SIZE, device=device, requires_grad=True)
    head.lr = 0.1
    head(embeddings, torch.arange(FACES, device=device) * 7, 0).loss.backward()
    head.update(0)


def blockwise(classes: int, name: str = "arcface", sample_rate: float = 1.0) -> BlockwiseHead:
    return BlockwiseHead(create_loss(name), classes, SIZE, SGD, FACES, block=BLOCK, sample_rate=sample_rate)


def measure(head: Head) -> LiveMemory:
    with LiveMemory() as memory:
        step(head)
    return memory


@pytest.mark.parametrize("name", LOSSES)
def test_memory_does_not_grow_with_the_classes(name: str) -> None:
    """Neither logits nor the centres' gradient exist in whole: four times the classes, the same peak, within the
    stated bound, for every loss."""
    small, large = measure(blockwise(5_000, name)), measure(blockwise(20_000, name))
    assert large.peak <= small.peak * 1.01 < BOUND
    assert large.largest <= 4 * BLOCK * max(FACES, SIZE)


def test_the_gradient_of_one_block_at_a_time() -> None:
    """A block's gradient is gone when the next one's is computed: beside few faces it is what takes most."""
    block = 8 * BLOCK
    head = BlockwiseHead(create_loss("arcface"), 5 * block, SIZE, SGD, FACES, block=block)
    assert measure(head).peak < 3.2 * (4 * block * SIZE)


def test_sampling_needs_memory_for_choosing_only() -> None:
    """A sampled step holds a few numbers a class to draw the sample with, not rows."""
    classes = 20_000
    assert measure(blockwise(classes, sample_rate=0.1)).peak < BOUND + 40 * classes


def test_the_measure_sees_logits_and_gradients() -> None:
    """The dense head, measured the same way, holds its logits and several copies of its centres."""
    classes = 20_000
    memory = measure(DenseHead(create_loss("arcface"), classes, SIZE, SGD))
    assert memory.largest == 4 * classes * SIZE
    assert memory.peak > 4 * classes * (2 * SIZE + FACES)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_memory_on_a_card() -> None:
    """The same bound, by what the card's allocator counts (plus the workspace of its matrix products)."""
    head = blockwise(200_000).to("cuda")
    step(head, "cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step(head, "cuda")
    assert torch.cuda.max_memory_allocated() - before < BOUND + 2**20
