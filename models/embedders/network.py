"""A torch network as an embedder."""

from contextlib import AbstractContextManager
from typing import Literal

import torch
from torch import Tensor, nn

from models.embedders.interface import FaceEmbedder, digest
from models.inputs import InputSpec
from utils.devices import describe_device, full_precision

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class NetworkEmbedder(FaceEmbedder):
    """A torch network, in its present mode (train or eval).

    `precision`: float32 (no TF32) is what accuracies are quoted in; other dtypes are faster. `inputs`: what the
    network expects of a face; the default is what this project trains with.
    """

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        device: torch.device,
        name: str,
        precision: torch.dtype = torch.float32,
        inputs: InputSpec | None = None,
    ) -> None:
        self.network, self._precision = network.to(device), precision
        self.image_size, self.device, self.name = image_size, device, name
        self.inputs = inputs or InputSpec()
        self.runs_on = describe_device(device)

    @property
    def fingerprint(self) -> str:
        """Of the weights that the network has now: it may be training. A second per gigabyte."""
        # Buffers that are not saved decide the numbers as well: the mean and deviation of timm's networks.
        state = {**dict(self.network.named_buffers()), **self.network.state_dict()}
        names = [*state, repr(self.network), self.image_size, self.inputs.as_json(), str(self._precision)]
        return digest(names, *(value for value in state.values() if isinstance(value, Tensor)))

    def features(self, faces: Tensor, mirror: bool) -> Tensor:
        """As FaceEmbedder; the faces go to the device once, also with `mirror`."""
        return super().features(faces.to(self.device, non_blocking=True), mirror)

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        if self._precision == torch.float32:
            context: AbstractContextManager = full_precision(self.device)
        else:
            context = torch.autocast(self.device.type, self._precision)
        with context:
            features = self.network(self.inputs.to_input(faces, mirror))
        if isinstance(features, Tensor) and (features.is_complex() or features.layout != torch.strided):
            raise ValueError(f"{self.name} gives a tensor of {features.dtype} and {features.layout}, not real numbers")
        return features.float()
