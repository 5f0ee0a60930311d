"""Sets of small noisy pictures to load."""

import os
from pathlib import Path

import numpy as np

from data.face_sets import RecFaceSet
from data.images import encode_png
from data.recordio import pack_image, write_records

SIZE = 16
IMAGES = 23


def picture(key: int) -> np.ndarray:
    """An RGB image of its own for each key."""
    return np.random.default_rng(key).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def write_set(folder: Path, broken: dict[int, bytes] | None = None) -> RecFaceSet:
    images = {key: encode_png(picture(key)) for key in range(1, IMAGES + 1)} | (broken or {})
    with write_records(folder / "train.rec") as writer:
        for key, image in images.items():
            writer.write(key, pack_image(float(key % 5), key, image))
    return RecFaceSet(folder / "train.rec")


def large_set(folder: Path, images: int = 60) -> RecFaceSet:
    """Faces of 10 identities in records of 5 to 20 kB."""
    folder.mkdir(exist_ok=True)
    with write_records(folder / "train.rec") as writer:
        for key in range(1, images + 1):
            writer.write(key, pack_image(float(key % 10), key, os.urandom(5000 + key * 250)))
    return RecFaceSet(folder / "train.rec")
