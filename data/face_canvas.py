"""A picture that is drawn on in face units, and the shapes that faces are made of.

One face unit is one pixel of the 112x112 aligned template; the origin lies between the eyes and the mouth, x points to
the right, y down and z towards the viewer.
"""

from functools import lru_cache

import cv2
import numpy as np

from data.align import TEMPLATE_SIZE
from data.synthetic_people import Array, Shot

SUBPIXEL_BITS = 4  # OpenCV takes polygon corners as fixed-point numbers
HEAD_RADII = (46.0, 62.0, 40.0)  # of the ellipsoid whose front carries the features, in face units

ARC = np.linspace(-1, 1, 11)  # runs along a lid, a brow or a lip
BULGE = 1 - ARC**2  # 0 at the ends of ARC, 1 in the middle
_ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.column_stack((np.cos(_ANGLES), np.sin(_ANGLES)))


class Canvas:
    """An RGB picture that takes shapes in face units and shows them in the pose of the shot."""

    def __init__(self, size: int, shot: Shot) -> None:
        self.image = np.empty((size, size, 3), np.uint8)
        self._unit = shot.scale * size / TEMPLATE_SIZE  # pixels
        turn = _rotation(2, 1, shot.pitch) @ _rotation(0, 2, shot.yaw)
        self._matrix = self._unit * (_rotation(0, 1, shot.roll) @ turn)[:2].T
        # Alignment keeps the features, not the skull, in the middle of the picture.
        features = np.array((0, 4, 0.85 * HEAD_RADII[2])) @ self._matrix
        wanted = size * np.array((0.5, 0.57)) + self._unit * np.array((shot.shift_x, shot.shift_y))
        self._offset = wanted - features

    def fill(self, points: Array, colour: Array, lift: float = 0, flat: bool = False) -> None:
        """Fills the polygon [n, 2], drawn on the front of the head or, if flat, on a plane through it.

        `lift` moves it towards the viewer.
        """
        corners = self._project(points, lift, flat)
        cv2.fillPoly(self.image, [corners], colour.tolist(), cv2.LINE_AA, SUBPIXEL_BITS)

    def tint(self, points: Array, colour: Array, opacity: float) -> None:
        """Fills with a colour that what lies below shines through."""
        below = self.image.copy()
        self.fill(points, colour)
        cv2.addWeighted(self.image, opacity, below, 1 - opacity, 0, self.image)

    def line(self, points: Array, colour: Array, width: float, lift: float = 0, flat: bool = False) -> None:
        """Draws an open line `width` face units thick through the points [n, 2], placed as by `fill`."""
        corners = self._project(points, lift, flat)
        thickness = max(1, round(width * self._unit))
        cv2.polylines(self.image, [corners], False, colour.tolist(), thickness, cv2.LINE_AA, SUBPIXEL_BITS)

    def soften(self, radius: float) -> None:
        """Blurs all that has been drawn so far; twice a box filter is close to a Gaussian, and cheap."""
        width = 2 * round(radius * self._unit) + 1
        for _ in range(2):
            cv2.blur(self.image, (width, width), self.image)

    def _project(self, points: Array, lift: float, flat: bool) -> Array:
        depth = np.full(len(points), lift, float)
        if not flat:
            inside = 1 - ((points / HEAD_RADII[:2]) ** 2).sum(axis=1)
            depth += HEAD_RADII[2] * np.sqrt(np.maximum(inside, 0))
        pixels = np.column_stack((points, depth)) @ self._matrix + self._offset
        return np.rint(pixels * (1 << SUBPIXEL_BITS)).astype(np.int32)


def _rotation(a: int, b: int, angle: float) -> Array:
    """Turns the plane of the axes a and b."""
    matrix = np.eye(3)
    matrix[[a, b], [a, b]] = np.cos(angle)
    matrix[a, b], matrix[b, a] = -np.sin(angle), np.sin(angle)
    return matrix


@lru_cache(maxsize=16)
def _spline_basis(corners: int) -> Array:
    """[corners * 6, corners]: turns the corners of a loop into points on a Catmull-Rom curve."""
    steps = 6
    t = np.arange(steps)[:, None] / steps
    weights = np.hstack((-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2))
    basis = np.zeros((corners, steps, corners))
    for corner in range(corners):
        for neighbour in range(4):
            basis[corner, :, (corner + neighbour - 1) % corners] += weights[:, neighbour] / 2
    return basis.reshape(corners * steps, corners)


def symmetric_loop(*right_side: tuple[float, float]) -> Array:
    """A smooth closed shape from the corners of its right side, top to bottom, the ends on the axis."""
    right = np.array(right_side, float)
    corners = np.vstack((right, right[-2:0:-1] * (-1, 1)))
    return _spline_basis(len(corners)) @ corners


def ellipse(x: float, y: float, rx: float, ry: float) -> Array:
    """An ellipse about (x, y) with these radii."""
    return CIRCLE * (rx, ry) + (x, y)


def curve(x: Array, y: Array) -> Array:
    """The points (x, y), [n, 2]."""
    return np.column_stack((x, y))


def between(x: Array, upper: Array, lower: Array) -> Array:
    """The closed shape between two curves over the same x."""
    return np.vstack((curve(x, upper), curve(x, lower)[::-1]))
