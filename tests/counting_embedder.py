"""An embedder whose features follow from the grey of an image, and that counts the images that it was shown."""

import numpy as np
import torch

from data.images import encode_png


class CountingEmbedder:
    """Features [g + 1, 2 g, 3] of an image of grey g (0..255), with `mirror` twice that; `seen`: images so far."""

    name, runs_on, image_size, device = "counting", "paper", 8, torch.device("cpu")

    def __init__(self, fingerprint: str = "counting") -> None:
        self.fingerprint = fingerprint
        self.seen = 0

    def features(self, faces: torch.Tensor, mirror: bool) -> torch.Tensor:
        self.seen += len(faces)
        grey = faces[:, 0, 0, 0].float()
        return torch.stack((grey + 1, 2 * grey, torch.full_like(grey, 3)), 1) * (2 if mirror else 1)


def wanted(count: int, start: int = 0) -> np.ndarray:
    """The features of `Greys(count, start)`."""
    grey = np.arange(start, start + count, dtype=np.float32)
    return np.stack((grey + 1, 2 * grey, np.full(count, 3, np.float32)), 1)


class Greys:
    """Images of the greys start, start + 1, ..."""

    def __init__(self, count: int, start: int = 0) -> None:
        self._encoded = [encode_png(np.full((8, 8, 3), start + i, np.uint8)) for i in range(count)]

    def __len__(self) -> int:
        return len(self._encoded)

    def encoded(self, i: int) -> bytes:
        return self._encoded[i]

    def describe(self, i: int) -> str:
        return f"grey {i}"
