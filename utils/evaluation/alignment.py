"""Whether faces are aligned to the template, told from the pixels alone: where the eyes of the mean face are.

In the mean of aligned faces the two eyes are darker than the bridge of the nose between them and the cheeks below. A
filter of that shape, laid over the template's places of the eyes, answers with 1.0 to 1.2 on the mean face of LFW,
CelebA and Glint360K crops, in units of the faces' own contrast, and with 0.2 to 0.5 on loose crops, whole photos and
faces that are turned and shifted at random. If another crop of the same mean face answers much better, the eyes are
there, and the faces are cropped otherwise than the template has it.
"""

from dataclasses import dataclass
from itertools import product

import cv2
import numpy as np
from numpy.typing import NDArray

# The template of 112 x 112 pixels: left and right eye (x, y); see data/align.py for all five points.
_SIZE = 112
_EYES = ((38.2946, 51.6963), (73.5318, 51.5014))
_LIGHT = ((56.0, 54.0, 1.0), (38.3, 70.0, 0.5), (73.5, 70.0, 0.5))  # bridge of the nose, cheeks: x, y, weight
_BLOB = 5.0  # standard deviation of the filter's spots, pixels
_CENTRE = (56.0, 66.0)  # of the face in the template
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)

# Below the first the eyes are not where they should be; a best answer below the second is no photo of faces.
_ALIGNED, _SEEN = 0.75, 0.7
# The best crop is reported when the answer at the template's places is less than this share of the answer to it.
_WORSE = 0.75
_ZOOMS = (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.4, 1.7, 2.0, 2.4)
_RIGHT = (-18, -12, -6, 0, 6, 12, 18)
_DOWN = (-18, -12, -6, 0, 6, 12, 18, 24)


@dataclass(frozen=True)
class EyeContrast:
    """at_template: the filter's answer where the template has the eyes. best: its highest answer to another crop, that
    enlarges the mean face `zoom` times and then moves it `right` and `down`, pixels of 112."""

    at_template: float
    best: float
    zoom: float
    right: int
    down: int

    @property
    def verdict(self) -> str:
        """`aligned`, `elsewhere` (another crop shows the eyes much better), or `unclear`: no eyes anywhere."""
        if self.at_template >= _ALIGNED:
            return "aligned"
        found = self.best >= _SEEN and self.at_template < _WORSE * self.best
        return "elsewhere" if found else "unclear"


def eye_contrast(faces: NDArray[np.uint8]) -> EyeContrast:
    """Measure faces, uint8 [N, S, S, 3] RGB. 100 are enough; of fewer than 20 the answer is off by 0.1 and more."""
    mean = _mean_face(faces)
    kernel = _filter()
    answers = [
        (float((kernel * _cropped(mean, zoom, right, down)).sum()), zoom, right, down)
        for zoom, right, down in product(_ZOOMS, _RIGHT, _DOWN)
    ]
    best, zoom, right, down = max(answers)
    return EyeContrast(float((kernel * mean).sum()), best, zoom, right, down)


def _mean_face(faces: NDArray[np.uint8]) -> NDArray[np.float32]:
    """The mean of the faces in grey, each first brought to mean 0 and standard deviation 1 within the face."""
    y, x = np.mgrid[:_SIZE, :_SIZE]
    inside = ((x - _CENTRE[0]) / 42) ** 2 + ((y - _CENTRE[1]) / 50) ** 2 < 1
    total = np.zeros((_SIZE, _SIZE), np.float64)
    for face in faces:
        grey = cv2.resize(face.astype(np.float32) @ _LUMA, (_SIZE, _SIZE), interpolation=cv2.INTER_AREA)
        total += (grey - grey[inside].mean()) / max(1.0, float(grey[inside].std()))
    return (total / len(faces)).astype(np.float32)


def _filter() -> NDArray[np.float64]:
    light = np.sum([weight * _spot(x, y) for x, y, weight in _LIGHT], axis=0)
    dark = np.sum([_spot(x, y) for x, y in _EYES], axis=0)
    return light / light.sum() - dark / dark.sum()


def _spot(x: float, y: float) -> NDArray[np.float64]:
    rows, columns = np.mgrid[:_SIZE, :_SIZE]
    return np.exp(-((columns - x) ** 2 + (rows - y) ** 2) / (2 * _BLOB**2))


def _cropped(face: NDArray[np.float32], zoom: float, right: int, down: int) -> NDArray[np.float32]:
    x, y = _CENTRE
    matrix = np.array([[zoom, 0, x - zoom * x + right], [0, zoom, y - zoom * y + down]], np.float32)
    return np.asarray(cv2.warpAffine(face, matrix, (_SIZE, _SIZE), borderMode=cv2.BORDER_REPLICATE), np.float32)
