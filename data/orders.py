"""The order in which an epoch shows its images: functions of (seed, epoch) alone, whatever reads them.

Each function returns positions, int64 [images]. Resuming, ranks and workers cut slices out of the same array.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np

OrderName = Literal["exact", "blocks", "balanced"]

# Images that "blocks" mixes at a time, and in one sequential read: 4 x 8192 images of 6 kB are 200 MB of cache.
BLOCK = 8192
BLOCKS_MIXED = 4


@dataclass(frozen=True)
class Order:
    """`positions(epoch)`: what an epoch shows. `stretch`: images that follow each other and lie in few runs of the
    file; 0 when any image may follow any other.
    """

    positions: Callable[[int], np.ndarray]
    stretch: int = 0

    def __call__(self, epoch: int) -> np.ndarray:
        return self.positions(epoch)


def create_order(name: OrderName, labels: np.ndarray, seed: int) -> Order:
    """The order called `name` in the config (`data.order`), as a function of the epoch; ValueError for another name."""
    if name == "balanced":
        return Order(partial(balanced_order, labels, seed))
    if name == "blocks":
        return Order(partial(block_order, len(labels), seed), BLOCK * BLOCKS_MIXED)
    if name == "exact":
        return Order(partial(exact_order, len(labels), seed))
    raise ValueError(f"data.order: must be one of {', '.join(get_args(OrderName))}, got {name!r}")


def exact_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """A uniformly random permutation: every order is equally likely."""
    return np.random.default_rng([seed, epoch]).permutation(images)


def block_order(images: int, seed: int, epoch: int, block: int = BLOCK, blocks_mixed: int = BLOCKS_MIXED) -> np.ndarray:
    """A permutation for disks that read runs faster than single images: blocks of neighbours are taken in random
    order, and the images of each `blocks_mixed` of them in succession are shuffled together.
    """
    generator = np.random.default_rng([seed, epoch])
    starts = generator.permutation(np.arange(0, images, block))
    order = np.concatenate([np.arange(start, min(start + block, images)) for start in starts])
    for start in range(0, images, block * blocks_mixed):
        generator.shuffle(order[start : start + block * blocks_mixed])
    return order


def balanced_order(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """As many draws as there are images, in which every identity is (nearly) equally frequent.

    Identities go round in random order; each one's images go round in a random order of its own, so that none is seen
    twice before all of them were. `labels`: int64 [images], 0..identities-1, each of which occurs.
    """
    generator = np.random.default_rng([seed, epoch])
    images, counts = len(labels), np.bincount(labels)
    shuffled = generator.permutation(images)
    # Sorted by label, and the images of each as they were shuffled: numbers are sorted ten times as fast as by a key.
    places = labels[shuffled] * np.int64(images) + np.arange(images)
    places.sort()
    places %= images
    by_identity = shuffled[places]
    first = np.cumsum(counts) - counts
    order = places  # which is not needed any more: the set is large
    for turn, start in enumerate(range(0, images, len(counts))):
        identities = generator.permutation(len(counts))[: images - start]
        order[start : start + len(counts)] = by_identity[first[identities] + turn % counts[identities]]
    return order
