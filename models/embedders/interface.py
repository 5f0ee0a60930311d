"""The interface of whatever turns faces into embeddings, and what its implementations share."""

import hashlib
import json
from abc import abstractmethod
from collections.abc import Sequence
from os import PathLike
from typing import Any, Protocol, cast, overload

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Faces per forward pass when an array of any length is embedded.
ARRAY_BATCH = 64

#: Part of every fingerprint: raised when the numbers change for the same file and settings.
VERSION = 1


class Embedder(Protocol):
    """`name`, `runs_on`: the model and what computes it, for people; `image_size`: of the faces it takes; `device`:
    that of its embeddings.
    """

    name: str
    runs_on: str
    image_size: int
    device: torch.device

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """A digest of all that decides the embeddings, up to rounding: weights, network, input, precision."""

    def features(self, faces: Tensor, mirror: bool) -> Tensor:
        """uint8 [B, image_size, image_size, 3] RGB to float32 [B, D] on `device`, of the lengths that the model gives.

        With `mirror` the embedding of the mirrored face is added, as published numbers have it.
        """

    @overload
    def embed(self, faces: Tensor, mirror: bool = True) -> Tensor: ...
    @overload
    def embed(self, faces: np.ndarray | Sequence[np.ndarray], mirror: bool = True) -> np.ndarray: ...


class FaceEmbedder(Embedder):
    """An Embedder that lacks nothing but `fingerprint` and the forward pass."""

    @abstractmethod
    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        """uint8 [B, image_size, image_size, 3] RGB, mirrored or not, to float32 [B, D] on `device`."""

    @torch.no_grad()  # not inference_mode, whose tensors can be neither changed in place nor learned from
    def features(self, faces: Tensor, mirror: bool) -> Tensor:
        """Embeddings as they leave the model; see Embedder. Raises ValueError for faces of another shape or dtype."""
        self._check(faces)
        features = self._forward(faces, False)
        return features + self._forward(faces, True) if mirror else features

    @overload
    def embed(self, faces: Tensor, mirror: bool = True) -> Tensor: ...
    @overload
    def embed(self, faces: np.ndarray | Sequence[np.ndarray], mirror: bool = True) -> np.ndarray: ...
    def embed(self, faces: Tensor | np.ndarray | Sequence[np.ndarray], mirror: bool = True) -> Tensor | np.ndarray:
        """Aligned faces, uint8 [B, image_size, image_size, 3] RGB, to float32 unit vectors [B, D].

        A tensor gives a tensor on `device`, in one forward pass; an array, or a list of arrays of one face each, gives
        an array, in passes of `ARRAY_BATCH` faces. One face without the first dimension gives one vector [D]. With
        `mirror` the embedding of the mirrored face is added before normalising. Raises ValueError for any other shape
        or dtype.
        """
        if isinstance(faces, Tensor):
            single = faces.dim() == 3
            unit = F.normalize(self.features(faces[None] if single else faces, mirror))
            return unit[0] if single else unit
        array = _as_array(faces, self.image_size)
        return self._embed_array(array[None], mirror)[0] if array.ndim == 3 else self._embed_array(array, mirror)

    def _embed_array(self, faces: np.ndarray, mirror: bool) -> np.ndarray:
        self._check(faces)
        batches = [faces[start : start + ARRAY_BATCH] for start in range(0, max(1, len(faces)), ARRAY_BATCH)]
        tensors = (torch.from_numpy(np.require(batch, requirements=("C", "W"))) for batch in batches)
        return np.concatenate([self.embed(batch, mirror).cpu().numpy() for batch in tensors])

    def _check(self, faces: Tensor | np.ndarray) -> None:
        size, dtype, shape = self.image_size, str(faces.dtype).removeprefix("torch."), list(faces.shape)
        if dtype == "uint8" and len(shape) == 4 and shape[1:] == [size, size, 3]:
            return
        hint = ""
        if dtype != "uint8":
            hint = ": give the pixels as they are in the picture, 0..255, not scaled or normalised"
        elif len(shape) == 4 and shape[1] == 3:
            hint = ": the colours come last, x.permute(0, 2, 3, 1) or x.transpose(0, 2, 3, 1)"
        elif len(shape) == 4 and shape[3] == 3:
            hint = ": align the faces to this size (docs/embedders.md)"
        raise ValueError(
            f"{self.name} takes aligned faces as uint8 [B, {size}, {size}, 3], RGB; got {dtype} {shape}{hint}"
        )


def _as_array(faces: Any, size: int) -> np.ndarray:
    """An array, a picture of Pillow, or a sequence of either or of tensors, as one array."""
    if isinstance(faces, np.ndarray):
        array = faces
    elif isinstance(faces, str | bytes | PathLike) or (isinstance(faces, Sequence) and _has_names(faces)):
        raise ValueError("embed takes pictures, not their names: read them (RGB) and align them, see docs/embedders.md")
    elif isinstance(faces, Sequence):
        shapes = {np.shape(face) for face in faces}
        if len(shapes) > 1:
            raise ValueError(f"faces of one call must be of one size, [{size}, {size}, 3]; got {sorted(shapes)}")
        array = np.stack([np.asarray(face) for face in faces]) if faces else np.empty((0, size, size, 3), np.uint8)
    else:
        array = np.asarray(faces)
    if array.dtype.kind not in "buif":
        raise ValueError(
            f"embed takes an array, a tensor or a list of faces, got {type(faces).__name__} of {array.dtype}"
        )
    return array


def _has_names(faces: Sequence[Any]) -> bool:
    return any(isinstance(face, str | bytes | PathLike) for face in faces)


def digest(*parts: Any) -> str:
    """SHA-256, as hex, of bytes, tensors (dtype, shape and values) and values that JSON holds."""
    total = hashlib.sha256(f"embedder {VERSION}".encode())
    for part in parts:
        if isinstance(part, Tensor):
            values = part.detach().cpu().contiguous()
            total.update(f"{values.dtype} {list(values.shape)}".encode())
            total.update(cast(Any, values.reshape(-1).view(torch.uint8).numpy()))
        else:
            data = part if isinstance(part, bytes) else json.dumps(part, sort_keys=True).encode()
            total.update(f"{type(part).__name__} {len(data)} ".encode() + data)
    return total.hexdigest()
