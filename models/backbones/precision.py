"""Where half precision ends in a network."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision_of(x: Tensor) -> AbstractContextManager:
    """What follows is computed in the type of its inputs, under whatever autocast the network runs.

    The scale of embeddings decides how far half precision carries, so the last layers of a network compute in float32.
    """
    # Tensors without values, of which operations are counted, know no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
