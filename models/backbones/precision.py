"""The end of a network computes in float32."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision_of(x: Tensor) -> AbstractContextManager:
    """A context without autocast, for the last layers of a network on the device of `x`.

    Half precision does not suffice for the scale of embeddings: give these layers float32 inputs.
    """
    # Tensors without values, of which operations are counted, know no autocast.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)
