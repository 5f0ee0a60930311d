"""Faces in photos, found by an SCRFD net (ONNX) with key points: box, score and five landmarks of each.

J. Guo, J. Deng, A. Lattas, S. Zafeiriou, "Sample and Computation Redistribution for Efficient Face Detection" (2021).
What goes in and what the outputs mean is as in insightface's `model_zoo/scrfd.py`: for each stride, anchors at
(column, row) * stride of the input, row after row, those of one place in turn; outputs are the scores of every stride,
then the distances of the boxes' left, top, right and bottom from the anchor, then the offsets (x, y) of the landmarks,
all in strides.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np

# Strides and anchors a place, by the number of outputs: three for each stride.
LAYOUTS: dict[int, tuple[tuple[int, ...], int]] = {9: ((8, 16, 32), 2), 15: ((8, 16, 32, 64, 128), 1)}
WITHOUT_LANDMARKS = (6, 10)
# Pixels, for a side of the input that the file states: larger ones take gigabytes for any photo.
LARGEST_INPUT = 8192
# Of two faces that overlap more than this (intersection over union), the one with the lower score is dropped.
LARGEST_OVERLAP = 0.4

FaceChoice = Literal["largest", "central"]


class DetectorError(ValueError):
    """A file is no detector of the kind that is expected, or cannot be run; the message names it."""


class Face(NamedTuple):
    """`box`: float32 [4], left, top, right, bottom; `score`: 0..1; `landmarks`: float32 [5, 2], (x, y).

    In pixels of the photo; the landmarks in the order of `data.align.TEMPLATE`.
    """

    box: np.ndarray
    score: float
    landmarks: np.ndarray


@dataclass(frozen=True)
class Detection:
    """How faces are found: the SCRFD file, the lowest score, the input size of a net that takes any, which face.

    `smallest`: how many pixels of the photo a face is wide and high at least.
    """

    path: Path
    threshold: float
    size: int
    face: FaceChoice
    smallest: int = 0


class FaceDetector:
    """An SCRFD net, run by onnxruntime on one thread of the CPU; many processes can have one each.

    `size`: height and width of the input, pixels, where the file leaves them open. `smallest`: of the faces that are
    seen, pixels of the photo. Raises DetectorError.
    """

    def __init__(self, path: Path, threshold: float = 0.5, size: int = 640, smallest: int = 0) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise DetectorError(f"{path}: finding faces needs one more package: pip install onnxruntime") from error
        if not path.is_file():
            raise DetectorError(f"there is no detector at {path}")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3  # files that state the output sizes of one input size warn at every other
        try:
            self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise DetectorError(f"onnxruntime cannot run {path}: {error}") from None
        self._path, self._threshold, self._smallest = path, threshold, smallest
        inputs, outputs = self._session.get_inputs(), len(self._session.get_outputs())
        if outputs in WITHOUT_LANDMARKS:
            raise DetectorError(
                f"{path} finds boxes without landmarks ({outputs} outputs): faces are aligned by landmarks, take an "
                "SCRFD with key points (det_10g, det_500m, scrfd_*_kps, scrfd_*_bnkps)"
            )
        if outputs not in LAYOUTS or len(inputs) != 1:
            raise DetectorError(
                f"{path} has {len(inputs)} inputs and {outputs} outputs: an SCRFD with key points has one input and "
                "9 or 15 outputs"
            )
        self._strides, self._anchors = LAYOUTS[outputs]
        shape = inputs[0].shape
        sides = range(1, LARGEST_INPUT + 1)
        fits = len(shape) == 4 and all(
            extent in allowed
            for extent, allowed in zip(shape, ((1,), (3,), sides, sides), strict=True)
            if isinstance(extent, int)  # else the file leaves it open
        )
        if not fits or inputs[0].type != "tensor(float)":
            raise DetectorError(
                f"{path} takes {inputs[0].type} of shape {shape}: expected float [1, 3, height, width], of 1 to "
                f"{LARGEST_INPUT:,} pixels"
            )
        self._height, self._width = (extent if isinstance(extent, int) else size for extent in shape[2:])

    def detect(self, image: np.ndarray) -> list[Face]:
        """The faces of `image` (uint8 [height, width, 3], RGB) with the threshold's score or more, best first.

        Those that are too small are left out.
        """
        pixels, scale = scale_into(image, self._height, self._width)
        levels = len(self._strides)
        outputs = self._run(pixels)
        parts = []
        for level, stride in enumerate(self._strides):
            centres = anchor_centres(self._height, self._width, stride, self._anchors)
            scores, distances, offsets = (
                self._rows(outputs[level + kind * levels], len(centres), width) for kind, width in enumerate((1, 4, 10))
            )
            kept = np.flatnonzero(scores[:, 0] >= self._threshold)
            centres, distances, offsets = centres[kept], distances[kept] * stride, offsets[kept] * stride
            corners = np.stack([centres - distances[:, :2], centres + distances[:, 2:]], axis=1)
            parts.append((scores[kept, 0], corners / scale, (centres[:, None] + offsets.reshape(-1, 5, 2)) / scale))
        scores, corners, landmarks = (np.concatenate(part) for part in zip(*parts, strict=True))
        boxes = corners.reshape(-1, 4)
        return [
            Face(boxes[i].astype(np.float32), float(scores[i]), landmarks[i].astype(np.float32))
            for i in without_overlaps(boxes, scores)
            if min(boxes[i, 2:] - boxes[i, :2]) >= self._smallest
        ]

    def _run(self, pixels: np.ndarray) -> Sequence[np.ndarray]:
        inputs = (pixels.transpose(2, 0, 1)[None].astype(np.float32) - np.float32(127.5)) / np.float32(128)
        try:
            outputs: Any = self._session.run(None, {self._session.get_inputs()[0].name: inputs})
        except Exception as error:  # as above
            raise DetectorError(
                f"{self._path} cannot run on {self._width}x{self._height} pixels (--detector-size): {error}"
            ) from None
        return outputs

    def _rows(self, output: np.ndarray, count: int, width: int) -> np.ndarray:
        """An output with or without a leading 1 as float64 [count, width]."""
        if output.shape not in ((count, width), (1, count, width)):
            raise DetectorError(
                f"{self._path}: an output for {self._width}x{self._height} pixels has the shape {list(output.shape)}, "
                f"expected {[count, width]}: it is no SCRFD, or not for this size (--detector-size)"
            )
        return output.reshape(count, width).astype(np.float64)


def open_detector(detection: Detection) -> FaceDetector:
    """The detector that finds faces as `detection` says. Raises DetectorError."""
    return FaceDetector(detection.path, detection.threshold, detection.size, detection.smallest)


def scale_into(image: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`image` as large as it fits into `height` x `width`, in its upper left corner, black elsewhere.

    Also returns the scale (x, y), float64 [2]. Sides are cut to whole pixels, so the two differ a little, and each is
    undone by itself; the published code divides x by the scale of y.
    """
    own_height, own_width = image.shape[:2]
    if own_height * width > height * own_width:
        new_height, new_width = height, max(1, height * own_width // own_height)
    else:
        new_height, new_width = max(1, width * own_height // own_width), width
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:new_height, :new_width] = cv2.resize(image, (new_width, new_height), interpolation=cv2.INTER_LINEAR)
    return pixels, np.array([new_width / own_width, new_height / own_height])


def anchor_centres(height: int, width: int, stride: int, anchors: int) -> np.ndarray:
    """Where the anchors of a `stride` lie in an input of `height` x `width`: float64 [places * anchors, 2], (x, y)."""
    rows, columns = -(-height // stride), -(-width // stride)
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.repeat(np.stack([x, y], axis=1) * float(stride), anchors, axis=0)


def without_overlaps(boxes: np.ndarray, scores: np.ndarray) -> list[int]:
    """Positions of the `boxes` [n, 4] that overlap no box of a higher score that is kept, best `scores` first.

    Non-maximum suppression; corners count as whole pixels of the box, as published.
    """
    extents = boxes[:, 2:] - boxes[:, :2] + 1
    areas = extents.prod(axis=1)
    waiting = np.argsort(-scores, kind="stable")
    kept = []
    while len(waiting):
        best, waiting = waiting[0], waiting[1:]
        kept.append(int(best))
        upper_left = np.maximum(boxes[best, :2], boxes[waiting, :2])
        lower_right = np.minimum(boxes[best, 2:], boxes[waiting, 2:])
        common = np.maximum(0, lower_right - upper_left + 1).prod(axis=1)
        waiting = waiting[common <= LARGEST_OVERLAP * (areas[best] + areas[waiting] - common)]
    return kept


def choose_face(faces: Sequence[Face], height: int, width: int, choice: FaceChoice) -> Face:
    """The one of `faces` with the largest box, or whose box's centre is nearest to that of the `height` x `width`."""
    if choice == "largest":
        return max(faces, key=lambda face: float((face.box[2:] - face.box[:2]).prod()))
    centre = np.array([width, height]) / 2
    return min(faces, key=lambda face: float(np.hypot(*((face.box[:2] + face.box[2:]) / 2 - centre))))
