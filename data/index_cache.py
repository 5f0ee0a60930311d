"""What opening a large `.rec` finds out, kept in a binary file beside it, so that the next opening takes a moment.

The file, `.NAME.rec.index.npz`, is believed only while the sizes and times of the `.rec` and `.idx` are those that it
notes, while it can be the index of such a file at all, and while a sample of records says the same as it does.
Otherwise it is made anew.
"""

import json
import warnings
import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.images_fingerprint import sample_positions
from data.recordio import IMAGE_HEADER_SIZE, RECORD_HEAD, RecordError, RecordFile, unpack_image
from utils.files import atomic_write

# Records from which on the file is worth its place: smaller sets open in well under a second anyway.
CACHED_FROM = 200_000
VERSION = 2


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
    if not path.is_file():
        return None
    most = file.size // (RECORD_HEAD.size + IMAGE_HEADER_SIZE)
    try:
        with zipfile.ZipFile(path) as kept:
            if not np.array_equal(_read_array(kept, "fingerprint", np.uint8, 1000), _fingerprint(file)):
                return None
            images = ImageIndex(*(_read_array(kept, name, np.int64, most) for name in ImageIndex._fields))
        _require_sound(images, file.size)
    # RuntimeError: a compression that there is not, a password; what one changed bit makes of an archive.
    except (OSError, ValueError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        warnings.warn(f"{path} is damaged ({error}): made anew", stacklevel=4)
        return None
    return images if _sample_agrees(file, images) else None


def _read_array(kept: zipfile.ZipFile, name: str, dtype: type, most: int) -> np.ndarray:
    """An array of one dimension. Raises ValueError for another type, and for more than `most` values, before they take
    memory.
    """
    entry = kept.getinfo(f"{name}.npy")
    if entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"{name} is compressed")
    with kept.open(entry) as array:
        version = np.lib.format.read_magic(array)
        if version != (1, 0):
            raise ValueError(f"{name} has the format {version}")
        shape, _, found = np.lib.format.read_array_header_1_0(array)
        if found != dtype or len(shape) != 1 or not 0 <= shape[0] <= most:
            raise ValueError(f"{name} has {found} of shape {shape}, expected {most:,} of {np.dtype(dtype)} at most")
        array.seek(0)
        return np.lib.format.read_array(array, allow_pickle=False)


def _require_sound(images: ImageIndex, size: int) -> None:
    """Raise ValueError for what cannot be the index of a `.rec` of so many bytes."""
    keys, offsets, labels, identities = images
    if not len(keys) == len(offsets) == len(labels) > 0:
        raise ValueError(f"it has {len(keys):,} keys, {len(offsets):,} offsets and {len(labels):,} labels")
    if offsets[0] < 0 or offsets[-1] >= size or not _ascending(offsets):
        raise ValueError("its offsets are not within the file, one behind the other")
    if labels.min() < 0 or labels.max() >= len(identities) or not np.bincount(labels, minlength=len(identities)).all():
        raise ValueError(f"its labels are not those of {len(identities):,} identities")
    if identities[0] < 0 or not _ascending(identities):
        raise ValueError("its identities are not in order")


def _ascending(values: np.ndarray) -> bool:
    return bool((values[1:] > values[:-1]).all())


def _fingerprint(file: RecordFile) -> np.ndarray:
    """Sizes and times of the `.rec` and its `.idx`, and the version of this format, as bytes."""
    facts: list[int | None] = [VERSION]
    for path in (file.path, file.path.with_suffix(".idx")):
        facts += [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else [None, None]
    return np.frombuffer(json.dumps(facts).encode(), np.uint8)


def _sample_agrees(file: RecordFile, images: ImageIndex) -> bool:
    """Whether some records, the last one among them, are images with the labels that the index has for them, and have
    no other image within them.
    """
    last = len(images.keys) - 1
    chosen = np.array(sample_positions(len(images.keys)))
    ends = images.offsets[chosen] + file.extents(images.offsets[chosen])
    if ((chosen < last) & (ends > images.offsets[np.minimum(chosen + 1, last)])).any():
        return False
    try:
        for i in chosen:
            record = unpack_image(file.read(int(images.offsets[i])), "")
            if not record.image or record.labels[0] != images.identities[images.labels[i]]:
                return False
    except RecordError:
        return False
    return True
