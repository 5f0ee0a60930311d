"""The same picture twice under one label: by bytes, or encoded anew, resized, cropped a little.

Near-duplicates are found in two steps. Embeddings choose the candidates: copies of a picture have cosines from 0.8 on
unless they are very poor, and so have few of a person's other pictures. Pixels decide: the middle of one face is looked
for in the other at several sizes and all places within reach, and the highest normalised cross-correlation counts. It
is that of the finer features alone: light and shade of the whole face are alike in other shots of one event, too.
docs/merging.md has the figures on real faces.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import cv2
import numpy as np

from data.face_sets import EncodedImages
from data.images import decode_rgb

# Cosine of the embeddings from which two pictures are compared by their pixels.
CANDIDATE_COSINE = 0.8
# Correlation from which two pictures are one.
SAME_CORRELATION = 0.945

_SIDE = 56  # pixels that faces are compared at
# Widths in pixels of the features compared: finer ones depend on where between two pixels a crop begins.
_FINE, _COARSE = 0.7, 3.0
_PLAIN = 0.5  # standard deviation of a surface without features, in grey levels
_MARGIN = 8  # around the middle that is looked for: how far it may have moved
# Two pictures that are less alike at half the size and three scales are not compared closer, which takes most of the
# time. Those that are one by the close look have 0.78 or more (1,050 copies and other pairs of LFW and faces_glint24).
_HINT = 0.7
_HINT_SCALES = (0.92, 1.0, 1.08)
_SCALES = (0.88, 0.91, 0.94, 0.97, 1.0, 1.03, 1.06, 1.1, 1.14)
_ROWS = 1024  # of cosines at a time


class Duplicate(NamedTuple):
    """`image` is the same picture as `original`, which is kept; by `bytes` or by `near`, with `correlation` 0..1."""

    image: int
    original: int
    kind: str
    correlation: float


def thumbnail(face: np.ndarray) -> np.ndarray:
    """A face, uint8 [H, W, 3] RGB, as pictures are compared: float32 [56, 56], the finer features of its grey."""
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(grey, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA).astype(np.float32)
    return cv2.GaussianBlur(small, (0, 0), _FINE) - cv2.GaussianBlur(small, (0, 0), _COARSE)


def correlation(one: np.ndarray, other: np.ndarray) -> float:
    """How much two thumbnails are one picture: -1..1, the same whichever comes first, 0 for a plain surface."""
    if min(float(one.std()), float(other.std())) < _PLAIN:
        return 0.0
    return max(_best_place(one, other), _best_place(other, one))


def may_be_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether a quick look at two thumbnails leaves it open that they are one picture."""
    half = _SIDE // 2
    small, there = (cv2.resize(face, (half, half), interpolation=cv2.INTER_AREA) for face in (one, other))
    return _best_place(small, there, _HINT_SCALES) >= _HINT


def _best_place(one: np.ndarray, other: np.ndarray, scales: Sequence[float] = _SCALES) -> float:
    """The highest normalised cross-correlation of the middle of `one`, at all scales, with places of `other`."""
    best, full = -1.0, len(one)
    least = _MARGIN * full // _SIDE
    for scale in scales:
        side = round(full * scale)
        scaled = one if side == full else cv2.resize(one, (side, side), interpolation=cv2.INTER_LINEAR)
        margin = max(least, (side - full) // 2 + least)
        middle = scaled[margin : side - margin, margin : side - margin]
        if middle.std() >= _PLAIN:
            best = max(best, float(cv2.matchTemplate(other, middle, cv2.TM_CCOEFF_NORMED).max()))
    return best


def find_duplicates(
    images: EncodedImages, parts: Sequence[np.ndarray], embeddings: np.ndarray | None
) -> Iterator[Duplicate]:
    """The images of one merged identity that are there already.

    `parts`: positions of the images of each of the identities that were joined, in the order they are taken. Only
    images of different parts are compared: what one set holds twice in one identity stays. `embeddings`: float32
    [images, D], unit, of all images; None: by bytes only. Memory: 16 kB an image of the identity.
    """
    digests: dict[bytes, tuple[int, int]] = {}  # of each picture kept: part, position
    kept: list[tuple[int, int]] = []
    thumbnails: dict[int, np.ndarray] = {}

    def seen(image: int) -> np.ndarray:
        if image not in thumbnails:
            thumbnails[image] = thumbnail(decode_rgb(images.encoded(image), images.describe(image)))
        return thumbnails[image]

    for number, part in enumerate(parts):
        before = list(kept)
        known = np.array([image for _, image in before], np.int64)
        for start in range(0, len(part), _ROWS):
            rows = part[start : start + _ROWS]
            cosines = None
            if embeddings is not None and len(known) and number:
                cosines = embeddings[rows] @ embeddings[known].T
            for row, image in enumerate(rows.tolist()):
                digest = hashlib.sha256(images.encoded(image)).digest()
                there = digests.get(digest)
                if there is not None and there[0] != number:
                    yield Duplicate(image, there[1], "bytes", 1.0)
                    continue
                if cosines is not None:
                    found = _nearest(image, known, cosines[row], seen)
                    if found is not None:
                        yield found
                        continue
                digests.setdefault(digest, (number, image))
                kept.append((number, image))


def _nearest(image: int, known: np.ndarray, cosines: np.ndarray, seen: Callable[[int], np.ndarray]) -> Duplicate | None:
    """The first of the candidates, by falling cosine, that is the same picture as `image`."""
    candidates = np.flatnonzero(cosines >= CANDIDATE_COSINE)
    for candidate in candidates[np.argsort(-cosines[candidates], kind="stable")].tolist():
        pair = seen(image), seen(int(known[candidate]))
        if may_be_same(*pair) and (alike := correlation(*pair)) >= SAME_CORRELATION:
            return Duplicate(image, int(known[candidate]), "near", alike)
    return None
