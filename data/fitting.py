"""Images made to fit a set: checked, their faces found, aligned or resized where asked, in parallel and in order.

An image that fits already keeps its bytes.
"""

from collections.abc import Generator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

from config import PackBinConfig, PackConfig
from data.align import align, check_landmarks
from data.detect import Detection, FaceChoice, FaceDetector, choose_face, open_detector
from data.face_sets import Divisible, EncodedImages
from data.images import ImageError, decode_rgb, encode_jpeg
from data.set_sources import ListedFaceSet
from utils.processes import map_ordered
from utils.regular_files import UNREADABLE

# What a worker takes at a time. Of photos whose faces have to be found fewer: with a large net each takes a second.
IMAGES_PER_BLOCK = 64
PHOTOS_PER_BLOCK = 4


@dataclass(frozen=True)
class Fit:
    """What images have to be: `size` pixels high and wide; others are refused or resized; JPEG quality of new bytes.

    With `detection`, images without landmarks are photos whose faces have to be found. Images that do not decode or fit
    are an error, or left out when `bad_images` says skip.
    """

    size: int
    other_sizes: Literal["refuse", "resize"]
    quality: int
    detection: Detection | None = None
    bad_images: Literal["refuse", "skip"] = "refuse"


class Fitted(NamedTuple):
    """An encoded image that fits, and whether its bytes are new."""

    encoded: bytes
    changed: bool


class UnfitError(ImageError):
    """An image that does not fit: `reason` says why; the message, also where it lies and what to do about it."""

    def __init__(self, where: str, reason: str, advice: str) -> None:
        super().__init__(where, reason, advice)  # all three: an error of a worker process is made anew from them
        self.where, self.reason, self.advice = where, reason, advice

    def __str__(self) -> str:
        return f"{self.where} {self.reason}{self.advice}"


class LeftOut(NamedTuple):
    """An image that is left out, having no face or being bad: where it lies, and why."""

    where: str
    reason: str


def fit_image(encoded: bytes, where: str, fit: Fit, landmarks: np.ndarray | None = None) -> Fitted:
    """The image as `fit` asks for it, aligned when there are `landmarks` [5, 2].

    Raises ImageError, with `where`, for bytes that are no image and for images that cannot be made to fit.
    """
    image = decode_rgb(encoded, where)
    height, width = image.shape[:2]
    if landmarks is not None:
        try:
            check_landmarks(landmarks)
            return _fit_photo(image, landmarks, fit)
        except ValueError as error:
            raise ImageError(f"{where}: {error}") from None
    if height == width == fit.size:
        return Fitted(encoded, False)
    if fit.other_sizes == "refuse":
        raise UnfitError(
            where,
            f"has {width}x{height} pixels, expected {fit.size}x{fit.size}",
            ": resize such images with --other-sizes resize if they are aligned crops, or make a set of their size "
            "with --image-size; photos need landmarks to be aligned by, from a list or found with --detector",
        )
    if height != width:
        reason = f"has {width}x{height} pixels: resizing it to a square would distort the face"
        raise UnfitError(where, reason, "; crop it")
    method = cv2.INTER_AREA if height > fit.size else cv2.INTER_LINEAR
    return Fitted(encode_jpeg(cv2.resize(image, (fit.size, fit.size), interpolation=method), fit.quality), True)


def find_and_fit(encoded: bytes, where: str, fit: Fit, detector: FaceDetector, face: FaceChoice) -> Fitted | LeftOut:
    """The `face` that `detector` finds in the image, aligned. Raises ImageError for bytes that are no image."""
    image = decode_rgb(encoded, where)
    height, width = image.shape[:2]
    faces = detector.detect(image)
    if not faces:
        return LeftOut(where, f"no face found in its {width}x{height} pixels")
    try:
        return _fit_photo(image, choose_face(faces, height, width, face).landmarks, fit)
    except ValueError as error:
        return LeftOut(where, str(error))


def _fit_photo(image: np.ndarray, landmarks: np.ndarray, fit: Fit) -> Fitted:
    height, width = image.shape[:2]
    x, y = landmarks.mean(axis=0)
    if not (0 <= x < width and 0 <= y < height):
        raise ValueError(f"the landmarks, around ({x:.0f}, {y:.0f}), lie outside of its {width}x{height}")
    return Fitted(encode_jpeg(align(image, landmarks, fit.size), fit.quality), True)


def fit_images(images: Divisible, order: np.ndarray, fit: Fit, workers: int) -> Generator[Fitted | LeftOut, None, None]:
    """The images at the positions `order` as `fit` asks for them, in that order.

    Landmarks are those of a ListedFaceSet; with `fit.detection`, faces of images that have none are found. LeftOut
    comes for images without a face, and for bad ones where `fit` leaves them out. `workers` processes read, decode,
    find and encode; 0 means this one. A few blocks of images are held at a time.
    """
    size = PHOTOS_PER_BLOCK if fit.detection is not None else IMAGES_PER_BLOCK
    blocks = (images.part(order[start : start + size]) for start in range(0, len(order), size))
    for block in map_ordered(_fit_block, blocks, workers, _open, fit):
        yield from block


_worker: dict[str, Any] = {}


def _open(fit: Fit) -> None:
    cv2.setNumThreads(0)  # the processes are the parallelism
    _silence_opencv()
    _worker.update(fit=fit, detector=None)


def _silence_opencv() -> None:
    """Let OpenCV tell errors alone: its warnings name no file; errors here do."""
    opencv: Any = cv2  # its functions differ with its version
    logging = getattr(opencv.utils, "logging", None)
    if logging is not None:
        logging.setLogLevel(logging.LOG_LEVEL_ERROR)
    else:  # before 4.13
        opencv.setLogLevel(2)


def _fit_block(images: EncodedImages) -> list[Fitted | LeftOut]:
    fit: Fit = _worker["fit"]
    fitted: list[Fitted | LeftOut] = []
    for i in range(len(images)):
        where = images.describe(i)
        landmarks, aligned = None, False
        if isinstance(images, ListedFaceSet):
            landmarks, aligned = images.landmarks(i), images.is_aligned(i)
        try:
            encoded = _read(images, i, where)
            if fit.detection is None or landmarks is not None or aligned:
                fitted.append(fit_image(encoded, where, fit, landmarks))
            else:
                fitted.append(find_and_fit(encoded, where, fit, _detector(fit.detection), fit.detection.face))
        except ImageError as error:
            if fit.bad_images == "refuse":
                raise
            reason = error.reason if isinstance(error, UnfitError) else str(error).removeprefix(f"{where}: ")
            fitted.append(LeftOut(where, reason))
    return fitted


def _read(images: EncodedImages, i: int, where: str) -> bytes:
    """The bytes of image `i`. Raises ImageError for a file that is there, and cannot be read."""
    try:
        return images.encoded(i)
    except OSError as error:
        if error.errno not in UNREADABLE:
            raise
        raise ImageError(f"{where}: {error.strerror}") from None


def chosen_detection(chosen: PackConfig | PackBinConfig) -> Detection | None:
    """How faces are found, by the settings of a packer; None without a detector."""
    if not chosen.detector:
        return None
    path, threshold, size = Path(chosen.detector), chosen.detector_threshold, chosen.detector_size
    return Detection(path, threshold, size, chosen.face, chosen.smallest_face)


def check_detector(fit: Fit) -> None:
    """Raise DetectorError for a detector that cannot be run: now, not after hours of images that do not need it."""
    if fit.detection is not None:
        open_detector(fit.detection)


def _detector(detection: Detection) -> FaceDetector:
    """This process's detector. It is opened here, not in `_open`, so that what is wrong with it can be told."""
    if _worker["detector"] is None:
        _worker["detector"] = open_detector(detection)
    return _worker["detector"]
