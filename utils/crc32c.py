"""The checksum of TensorBoard's records, CRC-32C. TensorBoard's own, in plain Python, takes longer for a picture than
drawing it."""

import numpy as np
from numpy.typing import NDArray

_POLYNOMIAL = 0x82F63B78  # reversed
_ROW = 256  # bytes that are gone through one by one, in all rows at once
_SHORT = 4096  # bytes for which plain Python takes no longer
_BITS = np.arange(32, dtype=np.uint32)


def crc32c(data: bytes) -> int:
    """The CRC-32C of `data`.

    In long data, rows of bytes have a remainder each; two neighbours are joined by moving the first past the second, a
    linear map of its 32 bits, until one remainder is left.
    """
    if len(data) < _SHORT:
        remainder = 0xFFFFFFFF
        for byte in data:
            remainder = _NUMBERS[(remainder ^ byte) & 0xFF] ^ (remainder >> 8)
        return remainder ^ 0xFFFFFFFF
    rows = 1 << (-(-len(data) // _ROW) - 1).bit_length()
    padded = np.zeros(rows * _ROW, np.uint8)  # zeros in front leave the remainder at 0
    start = len(padded) - len(data)
    padded[start:] = np.frombuffer(data, np.uint8)
    # All bits set to begin with: the same as the first four bytes inverted.
    padded[start : start + 4] ^= 0xFF
    crc = np.zeros(rows, np.uint32)
    for column in padded.reshape(rows, _ROW).T:
        crc = _TABLE[(crc ^ column) & 0xFF] ^ (crc >> 8)
    move = np.uint32(1) << _BITS
    for _ in range(_ROW):
        move = _TABLE[move & 0xFF] ^ (move >> 8)
    while len(crc) > 1:
        crc = _moved(crc[0::2], move) ^ crc[1::2]
        move = _moved(move, move)
    return int(crc[0]) ^ 0xFFFFFFFF


def _moved(crc: NDArray[np.uint32], move: NDArray[np.uint32]) -> NDArray[np.uint32]:
    """Each remainder after the zero bytes that `move` stands for: what they make of each single bit."""
    set_bits = (crc[:, None] >> _BITS) & 1
    return np.bitwise_xor.reduce(set_bits * move, axis=1)


def _table() -> NDArray[np.uint32]:
    table: NDArray[np.uint32] = np.arange(256, dtype=np.uint32)
    for _ in range(8):
        table = table >> 1 ^ (table & 1) * np.uint32(_POLYNOMIAL)
    return table


_TABLE = _table()
_NUMBERS = tuple(_TABLE.tolist())
