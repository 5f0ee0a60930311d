"""Verification sets (`lfw.bin`, `cfp_fp.bin`, ...): pairs of encoded images with a same-person flag each.

The file is a pickle of `(bins, issame_list)`. A plain unpickler runs whatever a pickle asks for, so this one knows
just the few globals that the four spellings in the wild need, and refuses the rest.
"""

import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from utils.files import atomic_write

_NUMPY_GLOBALS = {
    ("multiarray", "_reconstruct"),
    ("multiarray", "scalar"),
    ("numeric", "_frombuffer"),
}


class VerificationFileError(ValueError):
    """A `.bin` file is no verification set, or asks for code that no verification set needs."""


class _PairsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return _encode_latin1
        if (module, name) == ("numpy", "dtype"):
            return _plain_dtype
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        for prefix in ("numpy.core.", "numpy._core."):
            if module.startswith(prefix) and (module.removeprefix(prefix), name) in _NUMPY_GLOBALS:
                return super().find_class("numpy._core." + module.removeprefix(prefix), name)
        raise VerificationFileError(f"it asks for {module}.{name}, which no verification set needs: not loaded")


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding not in ("latin1", "latin-1"):
        raise VerificationFileError(f"it asks for the codec {encoding!r}, which no verification set needs: not loaded")
    return text.encode("latin1")


def _plain_dtype(*arguments: Any) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.hasobject:
        raise VerificationFileError("it holds an array of Python objects, which no verification set needs: not loaded")
    return dtype


@dataclass(frozen=True)
class VerificationPairs:
    """`images`: the distinct encoded images; `index`: int64 [pairs, 2] into them; `same`: bool [pairs]."""

    name: str
    images: list[bytes]
    index: np.ndarray
    same: np.ndarray


def read_bin(path: Path | str) -> VerificationPairs:
    """Read a verification set, every image once however many pairs use it.

    Raises VerificationFileError, naming the file, for anything but `(2 n encoded images, n flags)`.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            bins, same = _PairsUnpickler(file, encoding="bytes").load()
        encoded = [_image_bytes(item) for item in bins]
        flags = np.array([_flag(value) for value in same], bool)
    except VerificationFileError as error:
        raise VerificationFileError(f"{path}: {error}") from None
    except (
        pickle.UnpicklingError,
        EOFError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        KeyError,
    ) as error:
        raise VerificationFileError(f"{path} is no verification set (a pickle of images and flags): {error}") from error
    if len(encoded) != 2 * len(flags) or not encoded:
        raise VerificationFileError(f"{path}: {len(encoded)} images for {len(flags)} pairs, expected two a pair")
    position: dict[bytes, int] = {}
    index = [position.setdefault(image, len(position)) for image in encoded]
    return VerificationPairs(path.stem, list(position), np.array(index, np.int64).reshape(-1, 2), flags)


def _image_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, np.ndarray) and item.dtype == np.uint8:
        return item.tobytes()
    kind = f"an array of {item.dtype}" if isinstance(item, np.ndarray) else type(item).__name__
    raise VerificationFileError(f"an image must be bytes or a uint8 array, found {kind}")


def _flag(value: object) -> bool:
    if isinstance(value, bool | np.bool_ | int | np.integer) and value in (0, 1):
        return bool(value)
    raise VerificationFileError(f"a same-person flag must be true or false, found {value!r}")


def write_bin(path: Path | str, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a verification set: `images` has the two encoded images of each pair in order, `same` a flag a pair."""
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(images)} images for {len(same)} pairs, expected two a pair")
    with atomic_write(path) as file:
        # Protocol 4 stores bytes as BINBYTES, which insightface's own reader loads too.
        pickle.dump((list(images), [bool(value) for value in same]), file, protocol=4)
