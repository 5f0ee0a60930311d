"""What opening a large `.rec` finds out, kept in a binary file beside it, so that the next opening takes a moment.

The file, `.NAME.rec.index.npz`, is believed only while the sizes and times of the `.rec` and `.idx` are those that it
notes, and while a sample of records says the same as it does. Otherwise it is made anew.
"""

import json
import struct
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.recordio import RecordError, RecordFile, unpack_image
from utils.files import atomic_write

# Records from which on the file is worth its place: smaller sets open in well under a second anyway.
CACHED_FROM = 200_000
VERSION = 2
SAMPLE = 64


class ImageIndex(NamedTuple):
    """The images of a set: `keys`, `offsets`, `labels` (classes 0..C-1), int64 [images]; `identities`, the label of
    each class in the file, int64 [C].
    """

    keys: np.ndarray
    offsets: np.ndarray
    labels: np.ndarray
    identities: np.ndarray


def cache_path(rec_path: Path) -> Path:
    """Where the index of `rec_path` is kept."""
    return rec_path.with_name(f".{rec_path.name}.index.npz")


def save_index(file: RecordFile, images: ImageIndex) -> None:
    """Keep `images` for the next opening; where the folder cannot be written to, a warning says so."""
    path = cache_path(file.path)
    try:
        with atomic_write(path) as out:
            np.savez(out, fingerprint=_fingerprint(file), **images._asdict())
    except OSError as error:
        warnings.warn(f"{path} cannot be written ({error}): the set is read through at each start", stacklevel=4)


def load_index(file: RecordFile) -> ImageIndex | None:
    """What `save_index` kept, if it still holds."""
    path = cache_path(file.path)
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            if not np.array_equal(kept["fingerprint"], _fingerprint(file)):
                return None
            images = ImageIndex(*(kept[name] for name in ImageIndex._fields))
    # RuntimeError: a compression that there is not, a password; what one changed bit makes of an archive.
    # MemoryError: more images than there are.
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        RuntimeError,
        MemoryError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        warnings.warn(f"{path} is damaged ({error}): made anew", stacklevel=4)
        return None
    return images if _sample_agrees(file, images) else None


def _fingerprint(file: RecordFile) -> np.ndarray:
    """Sizes and times of the `.rec` and its `.idx`, and the version of this format, as bytes."""
    facts: list[int | None] = [VERSION]
    for path in (file.path, file.path.with_suffix(".idx")):
        facts += [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [None, None]
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def _sample_agrees(file: RecordFile, images: ImageIndex) -> bool:
    """Whether some records, the last one among them, are images with the labels that the index has for them."""
    chosen = np.linspace(0, len(images.keys) - 1, SAMPLE).astype(np.int64)
    try:
        for i in chosen:
            record = unpack_image(file.read(int(images.offsets[i])), "")
            if not record.image or int(record.labels[0]) != images.identities[images.labels[i]]:
                return False
    except (RecordError, IndexError, struct.error):
        return False
    return True
