"""Many short texts, such as the names of millions of files, without an object each."""

import os
from array import array
from collections.abc import Iterable

import numpy as np


class Texts:
    """A list of texts, surrogates as in file names allowed. Memory: their bytes and eight each."""

    def __init__(self, texts: Iterable[str] = ()) -> None:
        self._bytes, self._ends = bytearray(), array("q", [0])
        for text in texts:
            self.append(text)

    def append(self, text: str) -> None:
        """Add a text behind the others."""
        self._bytes += os.fsencode(text)
        self._ends.append(len(self._bytes))

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(bytes(self._bytes[self._ends[i] : self._ends[i + 1]]))

    def part(self, positions: np.ndarray) -> "Texts":
        """The texts at `positions`, int64, alone."""
        return Texts(self[i] for i in positions.tolist())
