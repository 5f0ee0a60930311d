"""Verification sets (`lfw.bin`, `cfp_fp.bin`, ...): pairs of encoded images with a same-person flag each.

The file is a pickle of `(bins, issame_list)`. A plain unpickler runs whatever a pickle asks for, so this one knows
just the few globals that the four spellings in the wild need, and refuses the rest.
"""

import os
import pickle
import reprlib
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from utils.files import atomic_write
from utils.regular_files import open_regular_file


class VerificationFileError(ValueError):
    """A `.bin` file is no verification set, or asks for code that no verification set needs."""


# numpy itself is not let near the file: its own reconstructors trust what they are told and crash on a damaged one.
class _Dtype:
    """In place of np.dtype: the plain types that images and flags have."""

    def __init__(self, code: str | bytes, *options: object) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        if self.code not in ("u1", "b1", "i4", "i8"):
            found = reprlib.repr(self.code)
            raise VerificationFileError(f"it holds numpy data of type {found}, expected images as uint8")

    def __setstate__(self, state: object) -> None:
        """Byte order and the like, which these types do not need."""


class _Array:
    """In place of np.ndarray: the values, flat."""

    def __init__(self, *empty: object) -> None:
        self.values, self.content = np.empty(0), b""

    def __setstate__(self, state: tuple) -> None:
        _version, _shape, dtype, _fortran, values = state
        self.fill(values, dtype)

    def fill(self, content: bytes | bytearray, dtype: "_Dtype") -> None:
        """Have the values that `content` stands for, and keep its bytes: those of the file, which may name them again
        and again, and no copy."""
        self.values, self.content = _flat(content, dtype), bytes(content)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.values.tolist())


def _flat(values: bytes | bytearray, dtype: _Dtype) -> np.ndarray:
    if not isinstance(dtype, _Dtype):
        raise VerificationFileError("it holds numpy data whose type is none")
    return np.frombuffer(values, np.dtype(dtype.code).newbyteorder("<"))


def _array_from_buffer(values: bytes | bytearray, dtype: _Dtype, *shape_and_order: object) -> _Array:
    array = _Array()
    array.fill(values, dtype)
    return array


def _scalar(dtype: _Dtype, value: bytes) -> bool | int:
    return _flat(value, dtype).item()


_GLOBALS: dict[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
}
for _numpy in ("numpy.core", "numpy._core"):
    _GLOBALS[f"{_numpy}.multiarray", "_reconstruct"] = _Array
    _GLOBALS[f"{_numpy}.multiarray", "scalar"] = _scalar
    _GLOBALS[f"{_numpy}.numeric", "_frombuffer"] = _array_from_buffer


_OPCODES: dict[int, Callable[[Any], None]] = pickle._Unpickler.dispatch
# What a pickle makes dictionaries and sets by.
_KEYED = (
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_SET, pickle.ADDITEMS, pickle.FROZENSET),
)


class _PairsUnpickler(pickle._Unpickler):
    """Python's unpickler that is written in Python: that in C takes memory for whatever number a file states, 64 GB for
    one damaged bit. A `bytearray`, for which this one does, is read as bytes. Dictionaries and sets, which no file of
    pairs has, are refused: the hash of a key that is nested deep enough ends the process.
    """

    stack: list[Any]

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")
        # Texts are not encoded to more bytes than that, however often a file of a few of them asks for it.
        self._room = 2 * os.fstat(file.fileno()).st_size

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) == ("_codecs", "encode"):
            return self._encode_latin1
        if (module, name) not in _GLOBALS:
            raise VerificationFileError(f"it asks for {module}.{name}, which no verification set needs: not loaded")
        return _GLOBALS[module, name]

    def _encode_latin1(self, text: str, encoding: str) -> bytes:
        if encoding not in ("latin1", "latin-1"):
            raise VerificationFileError(f"it asks for the codec {encoding[:20]!r}, which no set needs: not loaded")
        self._room -= len(text)
        if self._room < 0:
            raise VerificationFileError("it encodes one text again and again, which no set needs: not loaded")
        return text.encode("latin1")

    def _build(self) -> None:
        if not isinstance(self.stack[-2], _Array | _Dtype):
            raise VerificationFileError("it changes what is no array, which no verification set needs: not loaded")
        _OPCODES[pickle.BUILD[0]](self)

    def _refuse(self) -> None:
        raise VerificationFileError("it holds a dictionary or set, which no verification set needs: not loaded")

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_OPCODES,
        pickle.BYTEARRAY8[0]: _OPCODES[pickle.BINBYTES8[0]],
        pickle.BUILD[0]: _build,
        **dict.fromkeys((code[0] for code in _KEYED), _refuse),
    }


@dataclass(frozen=True)
class VerificationPairs:
    """`images`: the distinct encoded images; `index`: int64 [pairs, 2] into them; `same`: bool [pairs]."""

    name: str
    images: list[bytes]
    index: np.ndarray
    same: np.ndarray


class PairImages:
    """The distinct images of verification sets, one set after the other, as EncodedImages."""

    def __init__(self, *sets: VerificationPairs) -> None:
        self._sets = sets
        self._images = [image for pairs in sets for image in pairs.images]

    def __len__(self) -> int:
        return len(self._images)

    def encoded(self, i: int) -> bytes:
        return self._images[i]

    def describe(self, i: int) -> str:
        for pairs in self._sets:
            if i < len(pairs.images):
                break
            i -= len(pairs.images)
        pair, side = np.argwhere(pairs.index == i)[0]
        return f"{pairs.name}, image {'AB'[side]} of pair {pair}"


def read_bin(path: Path | str) -> VerificationPairs:
    """Read a verification set, every image once however many pairs use it.

    Raises VerificationFileError, naming the file, for anything but `(2 n encoded images, n flags)`, OSError for what is
    no file.
    """
    path = Path(path)
    if path.is_dir():
        raise VerificationFileError(
            f"{path} is a folder, and no verification set, as files are that end in .bin: move it away, or rename it"
        )
    try:
        with BufferedReader(open_regular_file(path)) as file:
            bins, same = _PairsUnpickler(file).load()
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
        MemoryError,  # a damaged length
        RecursionError,
        OverflowError,
        struct.error,
    ) as error:
        reason = str(error) or type(error).__name__
        raise VerificationFileError(
            f"{path} is no verification set (a pickle of images and flags): {reason}"
        ) from error
    if len(encoded) != 2 * len(flags) or not encoded:
        raise VerificationFileError(f"{path}: {len(encoded)} images for {len(flags)} pairs, expected two a pair")
    position: dict[bytes, int] = {}
    index = [position.setdefault(image, len(position)) for image in encoded]
    return VerificationPairs(path.stem, list(position), np.array(index, np.int64).reshape(-1, 2), flags)


def _image_bytes(item: object) -> bytes:
    if isinstance(item, bytes):
        return item
    if isinstance(item, _Array) and item.values.dtype == np.uint8:
        return item.content
    kind = f"an array of {item.values.dtype}" if isinstance(item, _Array) else type(item).__name__
    raise VerificationFileError(f"an image must be bytes or a uint8 array, found {kind}")


def _flag(value: object) -> bool:
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise VerificationFileError(f"a same-person flag must be true or false, found {reprlib.repr(value)}")


def write_bin(path: Path | str, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a verification set: `images` has the two encoded images of each pair in order, `same` a flag a pair.

    Raises ValueError for another number of images.
    """
    if len(images) != 2 * len(same):
        raise ValueError(f"{len(images)} images for {len(same)} pairs, expected two a pair")
    with atomic_write(path) as file:
        # Protocol 4 stores bytes as BINBYTES, which insightface's own reader loads too.
        pickle.dump((list(images), [bool(value) for value in same]), file, protocol=4)


def find_bins(root: Path | str) -> list[Path]:
    """Every `.bin` in the folder of a set; `root` is that folder or a file in it."""
    root = Path(root)
    folder = root.parent if root.is_file() else root
    return sorted(path for path in folder.glob("*.bin") if path.name[0] != ".")


def chosen_bins(chosen: Sequence[str], roots: Sequence[Path | str]) -> list[Path]:
    """The verification sets of `data.verification`: every `.bin` of the sets `roots` where none is `chosen`; nothing
    for "none"."""
    if list(chosen) == ["none"]:
        return []
    return [Path(path) for path in chosen] or [path for root in roots for path in find_bins(root)]
