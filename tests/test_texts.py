"""Names of millions of files, kept without an object each."""

import os

import numpy as np

from utils.texts import Texts


def test_texts_come_back_as_they_were() -> None:
    """Also empty ones, those of several bytes a letter, and file names that are no UTF-8."""
    names = ["a.jpg", "", "Zoë.jpg", "李娜/1.jpg", os.fsdecode(b"\xff\xfe.jpg"), "z"]
    texts = Texts(names)
    assert [texts[i] for i in range(len(names))] == names
    part = texts.part(np.array([4, 2, 2, 0]))
    assert [part[i] for i in range(4)] == [names[i] for i in (4, 2, 2, 0)]
