"""What the golden files hold, in the order of the files. Plain Python, so that mxnet's environment reads it too."""

import math
from typing import NamedTuple

M = 0xCED7230A.to_bytes(4, "little")  # the magic
M_LABEL = -1804698880.0  # the float32 whose bytes are the magic
M_ID = int.from_bytes(M + M, "little")

# golden/payloads.rec: key and payload, keys in no order.
PAYLOADS: dict[int, bytes] = (
    dict(
        enumerate((bytes(range(1, 1 + length)) for length in range(10)), 100)  # every padding, and nothing at all
    )
    | {
        2**40: b"a key that 32 bits do not hold",
        7: M,
        3: M + M,
        12: M * 3 + b"xx",
        1: b"abcd" + M,
        5: M + b"abcd",
        2: b"abcd" + M + b"efgh" + M + b"i",
        40: b"a" + M,
        41: b"ab" + M + b"cd",
        42: b"abc" + M + b"d" + M,  # the first is not aligned, the second is
        43: b"abc" + M + b"de" + M,
        44: M[:3],
        45: b"abcd" + M[:3],
        46: M[:3] + M + M[3:] + M,
        47: M + (8).to_bytes(4, "little") + b"a record" + M,  # a record within a record
        0: b"record 0, written last",
    }
)


class Image(NamedTuple):
    """What mxnet's pack is given: a label or several, two ids, the encoded image."""

    label: float | list[float]
    id: int
    id2: int
    image: bytes


# golden/images.rec: key and image record.
IMAGES: dict[int, Image] = {
    1: Image(3.0, 1, 0, b"abc"),
    2: Image([3.0], 2, 0, b"abcd"),
    3: Image([3.0, 1.0], 3, 0, b"label and aligned"),
    4: Image([float(i) / 3 for i in range(12)], 4, 0, b"landmarks"),
    5: Image([], 5, 0, b"no labels"),
    6: Image(1.0, 6, 0, b""),
    9: Image([5.0, 7.0], 9, 0, b""),
    8: Image(2.0, 2**64 - 1, 2**64 - 1, b"ids of 64 bits"),
    7: Image(2.0, 2**63, 2**32, b"ids beyond signed ones"),
    10: Image(M_LABEL, M_ID, M_ID, M + b"magics all over" + M),
    11: Image([1.0, M_LABEL, M_LABEL], M_ID >> 32, M_ID >> 32, b""),
    12: Image([0.5], 12, M_ID, b"abc" + M),
    20: Image(-0.0, 20, 0, b"minus zero"),
    21: Image(2.0**-149, 21, 0, b"smallest"),
    22: Image(2.0**-150, 22, 0, b"too small, becomes zero"),
    23: Image(3.4028234663852886e38, 23, 0, b"largest"),
    24: Image(-math.inf, 24, 0, b"infinite"),
    25: Image(math.nan, 25, 0, b"not a number"),
    26: Image(16_777_217.0, 26, 0, b"rounded to 16777216"),
    27: Image(0.1, 27, 0, b"rounded"),
    28: Image([-0.0, 2.0**-149, 3.4028234663852886e38, math.inf, math.nan, 16_777_219.0, 0.1], 28, 0, b"all of these"),
    0: Image([30.0, 30.0], 0, 0, b""),
}

# golden/faces.rec: insightface's layout, the images of each identity.
PEOPLE: list[list[bytes]] = [
    [b"\xff\xd8 Ada 1", b"\xff\xd8 Ada"],
    [b"\x89PNG Bea", b"\xff\xd8 Bea 22", b"\xff\xd8 Bea 333"],
    [M + b" Cyd, behind a magic" + M],
]
