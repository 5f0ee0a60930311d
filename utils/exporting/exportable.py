"""The network as an export has it: RGB in, embeddings out, in float32 at both ends whatever lies between."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from models.inputs import Normalisation

#: Names of the input, [N, 3, size, size], and the output, [N, D], of every export.
INPUT, OUTPUT = "input", "embedding"


class ExportError(ValueError):
    """A model cannot be exported as asked; the message says why and what to do."""


class _StayHalf(TorchFunctionMode):
    """Lets half tensors stay half where a network's forward asks for `.float()`, as heads do against autocast."""

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.float and args[0].dtype == torch.float16:
            return args[0]
        return func(*args, **(kwargs or {}))


class Exportable(nn.Module):
    """float32 [B, 3, size, size], RGB, to float32 [B, D], not of unit length.

    `normalisation`: what the network expects of RGB 0..255, as in InputSpec. With `fold` that is done here, else by the
    caller. `half`: a copy of the network computes in float16.
    """

    def __init__(
        self, network: nn.Module, normalisation: Normalisation, fold: bool = False, half: bool = False
    ) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).half() if half else network
        self._normalisation, self._fold, self._half = normalisation, fold, half
        self.eval()

    def forward(self, faces: Tensor) -> Tensor:
        if self._fold:
            mean, scale = mean_and_scale(self._normalisation)
            faces = (faces - mean) * scale
        if not self._half:
            return self.network(faces)
        with _StayHalf():
            embeddings = self.network(faces.half())
        return embeddings.to(torch.float32)


def mean_and_scale(normalisation: Normalisation) -> tuple[float, float]:
    """What to subtract from 0..255, and then to multiply by, for a network that expects this."""
    return (0.0, 1.0) if normalisation == "none" else (127.5, 1 / float(normalisation))


def outer_normalisation(normalisation: Normalisation, fold: bool) -> Normalisation:
    """What is left for the caller of an export to do. Raises ExportError where callers would not do it.

    They feed RGB as (rgb - 127.5) / 127.5 or, where the file normalises itself, as it is.
    """
    if fold:
        return "none"
    if normalisation != "127.5":
        raise ExportError(
            f"this network expects another normalisation ({normalisation}) than (rgb - 127.5) / 127.5, which is what "
            "programs feed: put it into the file with --fold-normalisation"
        )
    return normalisation
