"""A pass over all records of a set: what their heads say, which images do not decode, and which come twice."""

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np

from data.images import decode_rgb
from data.tolerant_records import NO_LABEL, Records
from utils.processes import map_unordered
from utils.progress import progress_bar

HEADS_AT_ONCE = 1 << 16
BLOCK = 1000


@dataclass
class Survey:
    """What is known about all records of a set; the arrays, as in Heads, take 18 bytes a record."""

    labels: np.ndarray
    image_bytes: np.ndarray
    kinds: np.ndarray
    #: bool [records], grows with every image that does not decode.
    broken: np.ndarray
    #: uint64, of the bytes of the images that were decoded.
    digests: np.ndarray
    #: (width, height) of those.
    shapes: Counter[tuple[int, int]] = field(default_factory=Counter)

    @property
    def good(self) -> np.ndarray:
        """bool [records]: an image, and not known to be broken."""
        return (self.labels != NO_LABEL) & ~self.broken

    def per_identity(self) -> tuple[np.ndarray, np.ndarray]:
        """(label, number of good images) of every identity that has any."""
        labels, counts = np.unique(self.labels[self.good], return_counts=True)
        return labels, counts

    def copies(self) -> tuple[np.ndarray, np.ndarray]:
        """The good images, ascending, whose bytes an image before them has, and the first that has them; all images
        have to have been decoded."""
        good = np.flatnonzero(self.good)
        _, first, which = np.unique(self.digests[good], return_index=True, return_inverse=True)
        later = first[which] != np.arange(good.size)
        return good[later], good[first[which[later]]]


def survey_heads(records: Records) -> Survey:
    """One pass over the heads of all records."""
    count = len(records)
    survey = Survey(
        labels=np.zeros(count, np.int32),
        image_bytes=np.zeros(count, np.uint32),
        kinds=np.zeros(count, np.uint8),
        broken=np.zeros(count, bool),
        digests=np.zeros(count, np.uint64),
    )
    with progress_bar(count, "record", "heads") as bar:
        for start in range(0, count, HEADS_AT_ONCE):
            stop = min(start + HEADS_AT_ONCE, count)
            heads = records.heads(start, stop)
            survey.labels[start:stop], survey.image_bytes[start:stop] = heads.labels, heads.image_bytes
            survey.kinds[start:stop], survey.broken[start:stop] = heads.kinds, heads.broken
            bar.update(stop - start)
    return survey


def decode(records: Records, i: int) -> np.ndarray:
    """The pixels of image `i` as `decode_rgb` gives them; ValueError or OSError says what is wrong with it."""
    return decode_rgb(records.encoded(i), records.place(i))


def why_broken(records: Records, i: int) -> str:
    """What is wrong with record `i`, without its place; empty when nothing is."""
    try:
        decode(records, i)
    except (ValueError, OSError) as error:
        place = records.place(i)
        return str(error).removeprefix(f"{place}: ").removeprefix(f"{place.file}: ")
    return ""


class _Decoded(NamedTuple):
    images: int
    #: Positions in the set.
    broken: list[int]
    #: Of the others, by position.
    digests: dict[int, int]
    #: (width, height) of those.
    shapes: Counter[tuple[int, int]]


def _decode_block(block: tuple[int, Records, np.ndarray]) -> _Decoded:
    start, records, wanted = block
    decoded = _Decoded(int(wanted.sum()), [], {}, Counter())
    for i in np.flatnonzero(wanted).tolist():
        try:
            encoded = records.encoded(i)
            height, width = decode_rgb(encoded, records.place(i)).shape[:2]
        except (ValueError, OSError):
            decoded.broken.append(start + i)
            continue
        decoded.digests[start + i] = int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest())
        decoded.shapes[width, height] += 1
    return decoded


def decode_images(records: Records, survey: Survey, wanted: np.ndarray, workers: int, title: str) -> None:
    """Decode the images that `wanted` (bool [records]) marks, and note in `survey` their shapes and digests, and which
    are broken.

    `workers` processes do it; 0 means this one.
    """
    starts = [start for start in range(0, len(records), BLOCK) if wanted[start : start + BLOCK].any()]
    blocks = ((start, records.part(start, start + BLOCK), wanted[start : start + BLOCK]) for start in starts)
    with progress_bar(int(wanted.sum()), "image", title) as bar:
        for decoded in map_unordered(_decode_block, blocks, workers, cv2.setNumThreads, 1):
            survey.broken[decoded.broken] = True
            survey.digests[list(decoded.digests)] = list(decoded.digests.values())
            survey.shapes += decoded.shapes
            bar.update(decoded.images)


def choose_sample(survey: Survey, count: int, seed: int) -> np.ndarray:
    """bool [records]: `count` random images, or all when there are fewer."""
    images = np.flatnonzero(survey.good)
    wanted = np.zeros(len(survey.broken), bool)
    wanted[np.random.default_rng(seed).choice(images, min(count, images.size), replace=False)] = True
    return wanted
