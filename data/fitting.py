"""Images made to fit a set: checked, aligned or resized where asked, in parallel, and handed on in order.

An image that fits already keeps its bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from data.align import align
from data.face_sets import EncodedImages
from data.images import ImageError, decode_rgb, encode_jpeg
from data.set_sources import ListedFaceSet
from utils.processes import map_ordered

IMAGES_PER_BLOCK = 64


@dataclass(frozen=True)
class Fit:
    """What images have to be: `size` pixels high and wide; others are refused or resized; JPEG quality of new bytes."""

    size: int
    other_sizes: Literal["refuse", "resize"]
    quality: int


class Fitted(NamedTuple):
    """An encoded image that fits, and whether its bytes are new."""

    encoded: bytes
    changed: bool


def fit_image(encoded: bytes, where: str, fit: Fit, landmarks: np.ndarray | None = None) -> Fitted:
    """The image as `fit` asks for it, aligned when there are `landmarks` [5, 2].

    Raises ImageError, with `where`, for bytes that are no image and for images that cannot be made to fit.
    """
    image = decode_rgb(encoded, where)
    height, width = image.shape[:2]
    if landmarks is not None:
        x, y = landmarks.mean(axis=0)
        if not (0 <= x < width and 0 <= y < height):
            raise ImageError(f"{where}: the landmarks, around ({x:.0f}, {y:.0f}), lie outside of its {width}x{height}")
        try:
            return Fitted(encode_jpeg(align(image, landmarks, fit.size), fit.quality), True)
        except ValueError as error:
            raise ImageError(f"{where}: {error}") from None
    if height == width == fit.size:
        return Fitted(encoded, False)
    if fit.other_sizes == "refuse":
        raise ImageError(
            f"{where} has {width}x{height} pixels, expected {fit.size}x{fit.size}: resize such images with "
            "--other-sizes resize if they are aligned crops, or make a set of their size with --image-size; "
            "photos need landmarks to be aligned by"
        )
    if height != width:
        raise ImageError(
            f"{where} has {width}x{height} pixels: resizing it to a square would distort the face; crop it"
        )
    method = cv2.INTER_AREA if height > fit.size else cv2.INTER_LINEAR
    return Fitted(encode_jpeg(cv2.resize(image, (fit.size, fit.size), interpolation=method), fit.quality), True)


def fit_images(images: EncodedImages, order: np.ndarray, fit: Fit, workers: int) -> Iterator[Fitted]:
    """`fit_image` of the images at the positions `order`, in that order; landmarks are those of a ListedFaceSet.

    `workers` processes read, decode and encode; 0 means this one. A few blocks of images are held at a time.
    """
    blocks = [order[start : start + IMAGES_PER_BLOCK] for start in range(0, len(order), IMAGES_PER_BLOCK)]
    for block in map_ordered(_fit_block, blocks, workers, _open, images, fit):
        yield from block


_worker: dict[str, Any] = {}


def _open(images: EncodedImages, fit: Fit) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    _worker.update(images=images, fit=fit)


def _fit_block(block: np.ndarray) -> list[Fitted]:
    images: EncodedImages = _worker["images"]
    fitted = []
    for i in block.tolist():
        landmarks = images.landmarks(i) if isinstance(images, ListedFaceSet) else None
        fitted.append(fit_image(images.encoded(i), images.describe(i), _worker["fit"], landmarks))
    return fitted
