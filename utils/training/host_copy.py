"""Tensors copied to pinned host memory, and written from there as a safetensors file.

The file is the one that safetensors' `save_file` writes, but without its second copy in memory, and with a checksum
computed on the way. Format: https://github.com/huggingface/safetensors (8 bytes length, JSON, data).
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.files import naming

# In the order of the file, the widest first, so that each tensor begins at a multiple of its dtype's size.
DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}

# A power of two: torch rounds pinned memory up to the next one, and one large buffer could take twice the state.
CHUNK_BYTES = 1 << 26


@dataclass(frozen=True)
class FileSum:
    """Size and CRC-32 of a file's bytes."""

    bytes: int
    crc32: int


class HostCopy:
    """One copy of a set of tensors in host memory, pinned if they are on CUDA; each `take` uses the same memory."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []
        self._header = b""
        self._bytes = 0

    def take(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Copy `tensors`, of any strides, over those before. Copies from CUDA are complete after `wait_for_copies`.

        `metadata`: that of the file. Raises ValueError for a dtype that safetensors does not have.
        """
        for name, tensor in tensors.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"{name}: tensors of {tensor.dtype} cannot be saved")
        place_of = {dtype: place for place, dtype in enumerate(DTYPES)}
        ordered = sorted(tensors.items(), key=lambda item: (place_of[item[1].dtype], item[0]))
        entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        end = 0
        for name, tensor in ordered:
            start, end = end, end + tensor.numel() * tensor.element_size()
            entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        header = json.dumps(entries, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        self._header = len(header).to_bytes(8, "little") + header
        self._reserve(end, pinned=any(tensor.is_cuda for tensor in tensors.values()))
        self._bytes = end
        places, room = self._places(), torch.empty(0, dtype=torch.uint8)
        for _, tensor in ordered:
            data = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            while len(data):
                room = room if len(room) else next(places)
                count = min(len(data), len(room))
                room[:count].copy_(data[:count], non_blocking=True)
                data, room = data[count:], room[count:]

    def write(self, path: Path) -> FileSum:
        """Write and sync the file. Raises OSError naming it."""
        size, checksum = 0, 0
        with naming(path), path.open("wb") as file:
            for part in (memoryview(self._header), *(place.numpy().data for place in self._places())):
                checksum = zlib.crc32(part, checksum)
                size += file.write(part)
            file.flush()
            os.fsync(file.fileno())
        return FileSum(size, checksum)

    def _reserve(self, size: int, pinned: bool) -> None:
        missing = size - sum(map(len, self._chunks))
        while missing > 0:
            self._chunks.append(torch.empty(min(missing, CHUNK_BYTES), dtype=torch.uint8, pin_memory=pinned))
            missing -= CHUNK_BYTES

    def _places(self) -> Iterator[Tensor]:
        """The used part of each chunk, in order."""
        left = self._bytes
        for chunk in self._chunks:
            if not left:
                return
            yield chunk[:left]
            left -= min(left, len(chunk))


def wait_for_copies(tensors: Iterable[Tensor]) -> None:
    """Wait until the copies that `HostCopy.take` began are complete."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def file_sum(path: Path) -> FileSum:
    """Size and checksum of a file. Raises OSError."""
    size, checksum = 0, 0
    buffer = memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            checksum = zlib.crc32(buffer[:count], checksum)
            size += count
    return FileSum(size, checksum)
