"""Payloads, image records and people to compare on: every position of a magic, and thousands by chance (seeded)."""

import math
from random import Random

from golden.records import M_ID, M_LABEL, Image, M

_LABELS = (0.0, -0.0, 1.0, M_LABEL, 2.0**-149, 2.0**-126, 3.4028234663852886e38, 16_777_217.0, math.inf, math.nan)
_IDS = (0, 1, 2**31, 2**32, 2**63, 2**64 - 1, M_ID, M_ID >> 32, M_ID & ~0xFFFFFFFF)


def magics_everywhere() -> list[bytes]:
    """One magic, and two, at every distance modulo 4 from the start, from each other and from the end."""
    one = [bytes(before) + M + bytes(after) for before in range(10) for after in range(10)]
    two = [
        b"\xff" * before + M + b"\xff" * between + M + b"\xff" * after
        for before in range(5)
        for between in range(6)
        for after in range(5)
    ]
    return one + two + [M * count for count in range(1, 65)]


def payload(random: Random) -> bytes:
    """Up to 9 bytes, words that are or look like magics, or noise."""
    kind = random.randrange(4)
    if kind == 0:
        return random.randbytes(random.randrange(10))
    if kind == 1:
        words = [M, M[:3], M[1:], b"\0", b"word", random.randbytes(random.randrange(5))]
        return b"".join(random.choices(words, k=random.randrange(16)))
    if kind == 2:
        return M.join(random.randbytes(random.randrange(12)) for _ in range(random.randrange(2, 6)))
    return random.randbytes(random.randrange(600))


def payloads(count: int, random: Random) -> dict[int, bytes]:
    """The exhaustive ones, `count` by chance and some of a megabyte, under keys in no order, one of 62 bits."""
    found = magics_everywhere()
    found += [payload(random) for _ in range(count)]
    found += [M.join(random.randbytes(random.randrange(3 << 16)) for _ in range(12)) for _ in range(4)]
    keys = [2**62, *range(len(found) - 1)]
    random.shuffle(keys)
    return dict(zip(keys, found, strict=True))


def label(random: Random) -> float:
    if random.random() < 0.3:
        return random.choice(_LABELS)
    if random.random() < 0.5:
        return float(random.randrange(1 << 25))  # the odd ones above 2**24 are rounded
    return random.uniform(-1, 1) * 10.0 ** random.uniform(-46, 38)  # the smallest become denormal or zero


def images(count: int, random: Random) -> dict[int, Image]:
    """Image records with a label or 0 to 600 of them, ids of 64 bits, and any payload as image."""
    found = {}
    for key in range(count):
        labels: float | list[float] = label(random)
        if random.random() < 0.6:
            size = random.choice((0, 1, 2, 2, 2, 3, 4, 12, random.randrange(600)))
            labels = [label(random) for _ in range(size)]
        id, id2 = (random.choice(_IDS) if random.random() < 0.5 else random.getrandbits(64) for _ in range(2))
        found[key] = Image(labels, id, id2, payload(random))
    return found


def people(count: int, random: Random) -> list[list[bytes]]:
    """Identities with 1 to 20 images, none of them empty."""
    return [[b"\xff" + payload(random) for _ in range(random.randrange(1, 21))] for _ in range(count)]
