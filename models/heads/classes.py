"""The class centres that training starts from."""

import numpy as np
import torch
from torch import Tensor

#: Classes drawn from one generator. Part of what a seed means: changing it changes every initial centre.
CLASSES_PER_DRAW = 1024


def initial_centres(classes: range, rows_per_class: int, embedding_size: int, seed: int) -> Tensor:
    """The first centres of `classes`: float32 [len(classes) * rows_per_class, embedding_size], class after class.

    Normal with deviation 0.01, as insightface draws them. They depend on seed and class alone, so that a run starts
    from the same centres on any number of ranks, and no two ranks from equal ones.
    """
    centres = torch.empty(len(classes), rows_per_class, embedding_size)
    for first in range(classes.start - classes.start % CLASSES_PER_DRAW, classes.stop, CLASSES_PER_DRAW):
        generator = np.random.default_rng([seed, first])
        drawn = generator.standard_normal((CLASSES_PER_DRAW, rows_per_class, embedding_size), np.float32)
        start, stop = max(first, classes.start), min(first + CLASSES_PER_DRAW, classes.stop)
        centres[start - classes.start : stop - classes.start] = torch.from_numpy(drawn[start - first : stop - first])
    return centres.mul_(0.01).flatten(0, 1)
