"""Orders of an epoch: every image where it should be, decided by seed and epoch."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.orders import BLOCK, BLOCKS_MIXED, balanced_order, block_order, create_order, exact_order


@given(st.integers(1, 300), st.integers(1, 40), st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_block_order_is_a_permutation_in_runs(images: int, block: int, mixed: int, seed: int, epoch: int) -> None:
    """No image twice and none lost; each stretch of the epoch reads `mixed` blocks of the file and no more."""
    order = block_order(images, seed, epoch, block, mixed)
    assert sorted(order) == list(range(images))
    assert np.array_equal(order, block_order(images, seed, epoch, block, mixed))
    for start in range(0, images, block * mixed):
        # The short block at the end of the file may stand anywhere and shift what follows into one block more.
        assert len({i // block for i in order[start : start + block * mixed].tolist()}) <= mixed + 1


def test_block_order_mixes_the_blocks() -> None:
    """Within a stretch, neighbours in the file are no neighbours in the epoch; stretches are in random order."""
    order = block_order(100_000, 0, 0, 1000, 4)
    assert (np.abs(np.diff(order)) == 1).mean() < 0.01
    firsts = [order[start : start + 4000].min() for start in range(0, 100_000, 4000)]
    assert firsts != sorted(firsts)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(0, 9), st.integers(0, 9))
def test_balanced_order_shows_identities_equally_often(counts: list[int], seed: int, epoch: int) -> None:
    """As many draws as images; identities differ by one at most, and so do the images of an identity."""
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    order = balanced_order(labels, seed, epoch)
    assert len(order) == len(labels)
    assert np.array_equal(order, balanced_order(labels, seed, epoch))
    draws = np.bincount(labels[order], minlength=len(counts))
    assert draws.max() - draws.min() <= 1
    for identity in range(len(counts)):
        images = np.bincount(order, minlength=len(labels))[labels == identity]
        assert images.max() - images.min() <= 1


def test_balanced_order_is_random_in_both_ways() -> None:
    """An identity's images come in an order of their own, and identities in another order each time round."""
    assert balanced_order(np.zeros(50, np.int64), 0, 0).tolist() != list(range(50))
    labels = np.arange(200) % 50
    rounds = labels[balanced_order(labels, 0, 0)].reshape(4, 50)
    assert len({tuple(identities) for identities in rounds.tolist()}) == 4


def test_balanced_order_stays_what_it_was() -> None:
    """A run that another version of the program began goes on with the images that are left."""
    labels = np.array([2, 0, 1, 0, 2, 0, 1, 3])
    assert balanced_order(labels, 5, 1).tolist() == [7, 2, 4, 5, 3, 6, 0, 7]


def test_balanced_order_takes_few_copies_of_the_set() -> None:
    """Of 42 million images each one is a third of a GiB, for every rank; it once took nine."""
    labels = np.repeat(np.arange(5000), 20)
    tracemalloc.start()
    try:
        balanced_order(labels, 0, 0)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 32 * len(labels)


@pytest.mark.parametrize("name", ["exact", "blocks", "balanced"])
def test_each_order_by_name(name: str) -> None:
    """The names of the config; another seed or epoch is another order."""
    labels = np.arange(200) % 7
    orders = {tuple(create_order(name, labels, seed)(epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert all(len(order) == 200 for order in orders)


def test_a_misspelt_order_is_refused() -> None:
    """And is not taken for the exact one."""
    with pytest.raises(ValueError, match=r"data\.order: must be one of exact, blocks, balanced, got 'block'"):
        create_order("block", np.zeros(3, np.int64), 0)  # type: ignore[arg-type]


def test_exact_order_is_uniform_enough() -> None:
    """Over many epochs every image comes first about equally often."""
    firsts = np.bincount([exact_order(8, 0, epoch)[0] for epoch in range(4000)], minlength=8)
    assert (np.abs(firsts - 500) < 100).all()
    assert BLOCK * BLOCKS_MIXED >= 10_000, "too few images mixed would follow the order of the file"
