"""Faces to the template that recognition networks are trained on, from five landmarks.

The transform is the similarity (turn, scale, shift; no mirroring) with the least squared distance between the moved
landmarks and the template: S. Umeyama, "Least-squares estimation of transformation parameters between two point
patterns", IEEE PAMI 13 (1991), equations 38 to 43. The template is insightface's (`face_align.py`, `arcface_dst`).
"""

import cv2
import numpy as np
from numpy.typing import ArrayLike

# (x, y) in a face of 112x112: left eye, right eye, nose, left and right corner of the mouth, as the viewer sees them.
TEMPLATE = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)], np.float64
)
TEMPLATE_SIZE = 112
# The points when left and right are exchanged.
MIRRORED = [1, 0, 2, 4, 3]
# Eyes that are two pixels apart, in a face that is enlarged so much, are no eyes.
MOST_ENLARGED = 16.0


def similarity_transform(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The similarity that takes the points `source` [n, 2] nearest to `target` [n, 2], by least squares.

    Returns float64 [2, 3]: a point p goes to `m[:, :2] @ p + m[:, 2]`. Raises ValueError when the source points are not
    finite or all the same.
    """
    source, target = np.asarray(source, np.float64), np.asarray(target, np.float64)
    if not np.isfinite(source).all() or (source == source[0]).all():
        raise ValueError(f"no transform from the points {source.tolist()}: they must be finite and not all the same")
    source_mean, target_mean = source.mean(axis=0), target.mean(axis=0)
    from_mean = source - source_mean
    variance = np.square(from_mean).sum(axis=1).mean()
    covariance = (target - target_mean).T @ from_mean / len(source)
    u, singular, v_transposed = np.linalg.svd(covariance)
    turned = np.linalg.det(u) * np.linalg.det(v_transposed)
    signs = np.array([1.0, 1.0 if turned > 0 else -1.0])  # a reflection may fit better, but cameras do not mirror
    scale = (singular * signs).sum() / variance
    matrix = scale * (u * signs) @ v_transposed
    return np.column_stack([matrix, target_mean - matrix @ source_mean])


def check_landmarks(landmarks: ArrayLike) -> None:
    """Raise ValueError for five points, [5, 2] in the order of `TEMPLATE`, that cannot be those of a face in pixels:
    fractions of the image's size, and points whose left and right are the person's own.
    """
    landmarks = np.asarray(landmarks)
    matrix = similarity_transform(landmarks, TEMPLATE)
    if np.hypot(*matrix[:, 0]) > MOST_ENLARGED:
        extent = np.ptp(landmarks, axis=0).max()
        raise ValueError(f"the landmarks span {extent:.3g} pixels: are they fractions of the image's size?")
    if _misfit(landmarks) > 2 * _misfit(landmarks[MIRRORED]):
        raise ValueError(
            "left and right of the landmarks are exchanged: the left eye, and corner of the mouth, is the one further "
            "left as the viewer sees it"
        )


def _misfit(landmarks: np.ndarray) -> float:
    """How far from the template's points the moved ones are: root of the mean square, in pixels of the template."""
    matrix = similarity_transform(landmarks, TEMPLATE)
    moved = landmarks @ matrix[:, :2].T + matrix[:, 2]
    return float(np.sqrt(np.square(moved - TEMPLATE).sum(axis=1).mean()))


def align(image: np.ndarray, landmarks: np.ndarray, size: int = TEMPLATE_SIZE, shrink: bool = True) -> np.ndarray:
    """The face of `image` (uint8 [height, width, 3], RGB) at the template's place: uint8 [size, size, 3], RGB.

    `landmarks` [5, 2] are x, y in pixels, in the order of `TEMPLATE`. What lies outside of the image becomes black.
    A face of twice the size or more is made smaller first, by the means of its pixels: without `shrink`, as in the
    published aligner, only a few of them are looked at, with all their noise.
    """
    matrix = similarity_transform(landmarks, TEMPLATE * (size / TEMPLATE_SIZE))
    factor = int(1 / np.hypot(*matrix[:, 0])) if shrink else 1
    if factor > 1:
        height, width = image.shape[:2]
        smaller = max(1, round(width / factor)), max(1, round(height / factor))
        image = cv2.resize(image, smaller, interpolation=cv2.INTER_AREA)
        back = np.divide((width, height), smaller)
        matrix[:, 2] += matrix[:, :2] @ (0.5 * back - 0.5)  # whole numbers are the centres of pixels
        matrix[:, :2] *= back
    return cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR)
