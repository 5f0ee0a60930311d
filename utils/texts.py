"""Texts for people; and many short ones, such as the names of millions of files, without an object each."""

import os
from array import array
from collections.abc import Iterable, Sequence
from unicodedata import combining, east_asian_width

import numpy as np


def columns_of(text: str) -> int:
    """How many columns of a screen the text takes: Chinese, Japanese and Korean letters two, accents none."""
    wide = (2 if east_asian_width(letter) in "WF" else 1 for letter in text if not combining(letter))
    return sum(wide)


def listed(texts: Sequence[str], most: int) -> str:
    """The first `most` of the texts, with commas, and how many more there are."""
    more = f" and {len(texts) - most:,} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


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


def encodable(text: str) -> str:
    """The text as UTF-8 has it, `?` for bytes that are no characters: names of files may hold some."""
    return text.encode(errors="replace").decode()


def as_text(value: object) -> str:
    """A setting's value, for people."""
    return ", ".join(map(str, value)) if isinstance(value, tuple | list) else str(value)
