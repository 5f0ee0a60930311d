"""Names of millions of files, kept without an object each."""

import os

import numpy as np

from utils.texts import Texts, columns_of


def test_texts_come_back_as_they_were() -> None:
    """Also empty ones, those of several bytes a letter, and file names that are no UTF-8."""
    names = ["a.jpg", "", "Zoë.jpg", "李娜/1.jpg", os.fsdecode(b"\xff\xfe.jpg"), "z"]
    texts = Texts(names)
    assert [texts[i] for i in range(len(names))] == names
    part = texts.part(np.array([4, 2, 2, 0]))
    assert [part[i] for i in range(4)] == [names[i] for i in (4, 2, 2, 0)]


def test_letters_take_as_many_columns_as_a_screen_gives_them() -> None:
    """Tables with Chinese names stand in line, and with accents that are characters of their own."""
    assert [columns_of(name) for name in ("Zoe", "Zoe\u0301", "Zo\u00eb", "\u738b\u592b", "")] == [3, 3, 3, 4, 0]
