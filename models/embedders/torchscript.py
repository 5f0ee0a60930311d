"""A TorchScript file as an embedder.

`torch.jit.load` reads no pickled objects of arbitrary classes, but what it loads is a program, and runs as one: load
files only from whom you trust.
"""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.embedders.interface import digest
from models.embedders.network import NetworkEmbedder
from models.inputs import InputSpec
from utils.checkpoints import CheckpointError

# A program may do anything.
_OF_PROGRAMS = (RuntimeError, ValueError, AttributeError, IndexError, torch.jit.Error)

#: Extra file of a TorchScript archive in which exports of this project keep {"image_size": ..., "inputs": InputSpec}.
EXTRA_FILE = "face_embedder.json"

_NAMED_ERROR = re.compile(r"[\w.]*Error: ")


class TorchScriptEmbedder(NetworkEmbedder):
    """A file of `torch.jit.save`; `normalisation`, `colour` and `image_size` as for an ONNX file, `auto` being what
    the file says, else 127.5 and RGB.
    """

    def __init__(
        self,
        path: Path,
        normalisation: str,
        device: torch.device,
        colour: str = "auto",
        image_size: int = 112,
        precision: torch.dtype = torch.float32,
    ) -> None:
        extra: dict[str, Any] = {EXTRA_FILE: ""}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", ".*torch.jit.load", FutureWarning)
                network = torch.jit.load(str(path), map_location=device, _extra_files=extra)
            stated = json.loads(extra[EXTRA_FILE] or "{}")
            inputs = InputSpec(**stated.get("inputs", {}))
        except (RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is no TorchScript file that can be used: {error}") from None
        inputs = inputs.chosen(normalisation, colour)
        size = stated.get("image_size", image_size)
        if type(size) is not int or size < 1:
            raise CheckpointError(f"{path} says that it takes faces of {size!r} pixels")
        super().__init__(network.eval(), size, device, path.stem, precision, inputs)
        self._path = path
        self._fingerprint = digest(path.read_bytes(), size, inputs.as_json(), str(precision))

    @property
    def fingerprint(self) -> str:
        """Of the file's bytes, as it was opened."""
        return self._fingerprint

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        try:
            features = super()._forward(faces, mirror)
        except torch.OutOfMemoryError:
            raise
        except _OF_PROGRAMS as error:
            raise CheckpointError(f"{self._path} gives no embeddings of {len(faces)} faces: {_cause(error)}") from error
        if features.dim() < 2 or len(features) != len(faces):
            found = list(features.shape)
            raise CheckpointError(f"{self._path} gives {found} for {len(faces)} faces, not an embedding of each")
        return features.flatten(1)


def _cause(error: Exception) -> str:
    """What went wrong in the program: the last line that names an error, the first says only that one occurred."""
    lines = str(error).splitlines() or [type(error).__name__]
    return next((line for line in reversed(lines) if _NAMED_ERROR.match(line)), lines[0])[:300]
