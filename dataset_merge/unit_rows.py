"""Embeddings of a set as unit vectors, made when they are asked for: there is no copy of those on the disk."""

from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from data.face_sets import FaceSetError


class Rows(Protocol):
    """Unit vectors by position: a tensor float32 [images, D], or what gives out parts of one."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice | Tensor, /) -> Tensor: ...


class UnitRows:
    """`features`, float32 [images, D], of any length, at `positions` (None: all), as unit vectors on the CPU.

    `describe`: names the image at a position. Memory: that of the features, which may be mapped from a file, and of
    what is taken at once. Raises FaceSetError for a feature that is no number: compared, it would hide the matches of
    all others in its block.
    """

    device = torch.device("cpu")

    def __init__(
        self, features: np.ndarray, describe: Callable[[int], str], positions: np.ndarray | None = None
    ) -> None:
        self._features, self._describe, self._positions = features, describe, positions
        self.shape = torch.Size((len(features) if positions is None else len(positions), features.shape[1]))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: slice | Tensor | np.ndarray) -> Tensor:
        places = key.cpu().numpy() if isinstance(key, Tensor) else key
        rows = torch.from_numpy(np.array(self._features[self._at(places)], np.float32))
        if not rows.isfinite().all():
            first = int((~rows.isfinite().all(1)).nonzero()[0])
            image = np.arange(len(self._features))[self._at(places)][first]
            raise FaceSetError(
                f"the model gives no finite embedding for {self._describe(int(image))}: is the model damaged, or too "
                "coarse in half precision?"
            )
        return F.normalize(rows, out=rows)

    def _at(self, places: slice | np.ndarray) -> slice | np.ndarray:
        return places if self._positions is None else self._positions[places]

    def part(self, positions: np.ndarray) -> "UnitRows":
        """Those at `positions`, int64, which are of all features."""
        return UnitRows(self._features, self._describe, positions)
