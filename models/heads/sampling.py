"""Which classes take part in a step: all of them, or those of the batch and a random share of the others."""

import numpy as np
import torch
from torch import Tensor


def sampled_count(classes: int, share: float, faces: int) -> int:
    """Classes that take part when `share` of them is wanted: enough for every face to find its own among them."""
    return min(classes, max(round(share * classes), faces))


def sample_classes(own: Tensor, classes: int, count: int, key: tuple[int, ...]) -> Tensor:
    """`count` of `classes` classes, ascending int64 [count]: all that occur in `own`, the rest drawn at random.

    `own`: int64 [B], -1 for none; at most `count` different ones. `key`: what the draw depends on (seed, step, rank).
    PartialFC: An et al., arXiv:2203.15565.
    """
    generator = torch.Generator(own.device).manual_seed(
        int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    )
    score = torch.rand(classes + 1, device=own.device, generator=generator)
    score.index_fill_(0, torch.where(own < 0, classes, own), 2.0)  # the last one is spare
    return score[:classes].topk(count, sorted=False).indices.sort().values
