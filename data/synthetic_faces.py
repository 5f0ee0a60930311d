"""Procedural faces for the demo set: aligned 112x112 portraits of people who do not exist.

The demo needs a face set that can be made anywhere in seconds, has no licence questions, and still asks
of a trainer what real sets ask: find what stays the same about a person while light, pose, expression,
background and occlusion change. What a person looks like follows from (seed, person) alone; what one
photograph of that person does to the looks follows from (seed, person, shot). Nothing else enters, so
the same arguments give the same pixels in any process and in any call order.

Coordinates: a face is drawn in "face units", one unit being one pixel of the 112x112 aligned template,
with the origin between the eyes and the mouth, x to the right, y down and z towards the viewer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from data.images import encode_jpeg

Array = NDArray[Any]
Rng = np.random.Generator

TEMPLATE = 112  # pixels across the aligned template; face units are its pixels
OVERSAMPLING = 2  # shapes are drawn this much larger and averaged down, for smooth edges
SUBPIXEL_BITS = 4  # OpenCV takes polygon corners as fixed-point numbers
HEAD_RADII = (46.0, 62.0, 40.0)  # of the ellipsoid whose front carries the features, in face units

SKIN_RAMP = np.array(
    [(240, 208, 184), (232, 186, 150), (222, 168, 124), (193, 133, 92), (142, 90, 60), (96, 62, 46)], float
)
HAIR_COLOURS = np.array(
    [
        (30, 26, 28),  # black
        (62, 43, 32),  # dark brown
        (104, 70, 44),  # brown
        (134, 62, 38),  # auburn
        (188, 102, 50),  # ginger
        (206, 168, 102),  # blond
        (152, 150, 150),  # grey
        (222, 219, 214),  # white
    ],
    float,
)
IRIS_COLOURS = np.array(
    [(66, 40, 26), (110, 70, 36), (126, 112, 54), (82, 124, 84), (88, 134, 176), (132, 146, 156)], float
)
BLACK = np.array((24.0, 18.0, 20.0))
WHITE = np.array((246.0, 243.0, 240.0))


@dataclass(frozen=True)
class HairStyle:
    """A haircut: heights of the hairline from the left to the right temple, and the mass around it."""

    hairline: tuple[float, ...]  # offsets in face units, positive is lower on the forehead
    volume: float  # thickness over the skull
    length: float  # how far the hair falls beside the face; 0 means no hair behind the head
    curl: float  # amplitude of the waves along the outline


HAIR_STYLES = (
    HairStyle((0, 0, 0, 0, 0), 0, 0, 0),  # bald
    HairStyle((4, 0, -1, 0, 4), 4, 0, 0),  # cropped
    HairStyle((8, -6, 3, -6, 8), 4, 0, 0),  # receding
    HairStyle((10, 5, -3, -7, 2), 9, 0, 0.6),  # parted on one side
    HairStyle((16, 15, 14, 15, 16), 8, 0, 0),  # fringe
    HairStyle((10, 2, -4, 2, 10), 8, 46, 0.5),  # long, parted in the middle
    HairStyle((18, 14, 13, 14, 18), 9, 30, 0),  # bob with a fringe
    HairStyle((10, 3, 1, 3, 10), 12, 14, 2.0),  # curly
    HairStyle((14, 10, 2, -5, 5), 10, 50, 1.0),  # long and wavy
)


def _range(low: float, high: float) -> Any:
    """A dataclass field that `_sample` draws uniformly from an interval."""
    return field(metadata={"range": (low, high)})


def _sample(kind: type, rng: Rng) -> dict[str, float]:
    """Values for all the fields of a dataclass that `_range` made."""
    ranges = {f.name: f.metadata["range"] for f in fields(kind) if f.metadata}
    values = rng.uniform(*np.transpose(list(ranges.values()))).tolist()
    return dict(zip(ranges, values, strict=True))


@dataclass(frozen=True)
class Person:
    """What stays the same about someone; lengths are in face units, colours are RGB in [0, 255]."""

    skin: Array
    hair: Array
    iris: Array
    lips: Array
    style: HairStyle
    freckles: Array  # [n, 2] positions
    moles: Array  # [n, 2] positions
    cheeks: float = _range(33, 42)  # half the width of the face
    forehead: float = _range(0.86, 1.0)  # widths relative to the cheeks
    jaw: float = _range(0.74, 0.95)
    chin: float = _range(0.3, 0.6)
    chin_y: float = _range(43, 54)
    eye_x: float = _range(14.5, 21)
    eye_y: float = _range(-15, -8)
    eye_width: float = _range(6, 9)
    eye_height: float = _range(3, 5.6)
    eye_tilt: float = _range(-1.8, 2.4)
    iris_size: float = _range(2.8, 3.9)
    brow_gap: float = _range(6.5, 11)
    brow_arch: float = _range(0, 4.5)
    brow_tilt: float = _range(-3, 1.5)
    brow_width: float = _range(1.2, 4.6)
    nose_y: float = _range(5, 14)
    nose_width: float = _range(4.5, 11)
    nose_bridge: float = _range(2.2, 4.5)
    mouth_y: float = _range(23, 31)
    mouth_width: float = _range(8.5, 17)
    upper_lip: float = _range(1.2, 4.2)
    lower_lip: float = _range(2, 6)
    cupid_bow: float = _range(0, 1.6)
    ear_size: float = _range(6, 11)
    ear_y: float = _range(-8, 2)
    hairline_y: float = _range(-45, -37)
    hair_side: float = _range(-1, 1)  # the sign says which side an uneven haircut leans to
    moustache: float = _range(-14, 4.5)  # its thickness, none where negative
    beard: float = _range(-2, 1)  # its density, none where negative
    age: float = _range(0, 1)  # the last third has wrinkles


def _person(seed: int, person: int) -> Person:
    rng = np.random.default_rng([1, seed, person])  # the leading 1 keeps this stream apart from the shots'
    skin = _ramp(SKIN_RAMP, rng.uniform()) + rng.normal(0, 5, 3)
    return Person(
        skin=skin,
        hair=rng.choice(HAIR_COLOURS) * rng.uniform(0.85, 1.15),
        iris=rng.choice(IRIS_COLOURS),
        lips=skin * (0.86, 0.62, 0.62) + np.array((1.0, 0.1, 0.2)) * rng.uniform(-5, 45),
        style=HAIR_STYLES[rng.integers(len(HAIR_STYLES))],
        freckles=rng.normal((0, 2), (13, 5), (rng.choice((0, 0, 0, 26)), 2)),
        moles=rng.uniform((-28, -34), (28, 38), (rng.integers(0, 3), 2)),
        **_sample(Person, rng),
    )


@dataclass(frozen=True)
class Shot:
    """What one photograph changes in a face: pose (radians, face units) and expression."""

    yaw: float = _range(-0.32, 0.32)
    pitch: float = _range(-0.18, 0.18)
    roll: float = _range(-0.12, 0.12)
    scale: float = _range(0.85, 0.99)
    shift_x: float = _range(-3.5, 3.5)
    shift_y: float = _range(-3.5, 3.5)
    smile: float = _range(-0.5, 1)
    opening: float = _range(-7, 7)  # of the mouth, closed where negative
    lids: float = _range(0.55, 1)  # 1 is wide open
    brows: float = _range(-2, 2)  # how far they are raised
    gaze_x: float = _range(-2, 2)
    gaze_y: float = _range(-0.8, 0.8)


class Canvas:
    """An RGB picture that takes shapes in face units and shows them in the pose of the shot."""

    def __init__(self, size: int, shot: Shot) -> None:
        self.image = np.empty((size, size, 3), np.uint8)
        self._unit = shot.scale * size / TEMPLATE  # pixels
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


def _ramp(colours: Array, position: float) -> Array:
    """The colour at `position` in [0, 1] along a row of colours."""
    steps = np.linspace(0, 1, len(colours))
    return np.array([np.interp(position, steps, channel) for channel in colours.T])


@lru_cache(maxsize=16)
def _spline_basis(corners: int, steps: int = 6) -> Array:
    """[corners * steps, corners]: turns the corners of a loop into points on a Catmull-Rom curve."""
    t = np.arange(steps)[:, None] / steps
    weights = np.hstack((-t + 2 * t**2 - t**3, 2 - 5 * t**2 + 3 * t**3, t + 4 * t**2 - 3 * t**3, t**3 - t**2))
    basis = np.zeros((corners, steps, corners))
    for corner in range(corners):
        for neighbour in range(4):
            basis[corner, :, (corner + neighbour - 1) % corners] += weights[:, neighbour] / 2
    return basis.reshape(corners * steps, corners)


def _symmetric_loop(*right_side: tuple[float, float]) -> Array:
    """A smooth closed shape from the corners of its right side, top to bottom, the ends on the axis."""
    right = np.array(right_side, float)
    corners = np.vstack((right, right[-2:0:-1] * (-1, 1)))
    return _spline_basis(len(corners)) @ corners


ARC = np.linspace(-1, 1, 11)  # runs along a lid, a brow or a lip
BULGE = 1 - ARC**2  # 0 at the ends of ARC, 1 in the middle
ANGLES = np.linspace(0, 2 * np.pi, 20, endpoint=False)
CIRCLE = np.column_stack((np.cos(ANGLES), np.sin(ANGLES)))


def _ellipse(x: float, y: float, rx: float, ry: float) -> Array:
    return CIRCLE * (rx, ry) + (x, y)


def _curve(x: Array, y: Array) -> Array:
    return np.column_stack((x, y))


def _between(x: Array, upper: Array, lower: Array) -> Array:
    """The closed shape between two curves over the same x."""
    return np.vstack((_curve(x, upper), _curve(x, lower)[::-1]))


def _lighter(colour: Array) -> Array:
    return np.minimum(colour * 1.1 + 8, 255)


def _any_colour(rng: Rng) -> Array:
    """Of any brightness and hue, but seldom garish."""
    colour = rng.uniform(0, 255, 3)
    return colour.mean() + rng.uniform(0.1, 1) * (colour - colour.mean())


def _background(canvas: Canvas, rng: Rng) -> None:
    """A gradient and boxes, drawn tiny and enlarged: cheap, and out of focus."""
    corners = np.array([[_any_colour(rng), _any_colour(rng)], [_any_colour(rng), _any_colour(rng)]])
    small = cv2.resize(corners.astype(np.uint8), (28, 28), interpolation=cv2.INTER_LINEAR)
    for _ in range(rng.integers(0, 6)):
        x, y, width, height = rng.integers((-6, -6, 3, 3), (28, 28, 20, 20)).tolist()
        cv2.rectangle(small, (x, y), (x + width, y + height), _any_colour(rng).tolist(), -1)
    canvas.image[:] = cv2.resize(small, canvas.image.shape[:2], interpolation=cv2.INTER_CUBIC)


def _behind(canvas: Canvas, p: Person, rng: Rng) -> None:
    """Hair that falls behind the head, then neck and ears."""
    if p.style.length:
        wide, bottom = p.cheeks + p.style.volume, p.style.length + rng.normal(0, 3)
        sides = ((0.75 * wide, -56), (wide, -30), (wide + 2, 0), (wide + 1, bottom))
        canvas.fill(_symmetric_loop((0, -62), *sides, (0, bottom)), p.hair * 0.72, flat=True)
    neck = p.cheeks * p.jaw * 0.64
    canvas.fill(_between(ARC * neck, np.full(11, 20), 62 + 10 * BULGE), p.skin * 0.72, flat=True)
    for side in (-1, 1):
        x = side * (p.cheeks + 1)
        canvas.fill(_ellipse(x, p.ear_y, 5, p.ear_size), p.skin * 0.9, flat=True)
        canvas.fill(_ellipse(x + side, p.ear_y, 2.4, 0.6 * p.ear_size), p.skin * 0.7, flat=True)


def _skin(canvas: Canvas, p: Person) -> None:
    """The face without its features; the shades of its relief are blurred into each other."""
    outline = _symmetric_loop(
        (0, -54),
        (0.62 * p.forehead * p.cheeks, -50),
        (p.forehead * p.cheeks, -28),
        (p.cheeks, -2),
        (p.jaw * p.cheeks, 22),
        (p.chin * p.cheeks, p.chin_y - 6),
        (0, p.chin_y),
    )
    for size, shade in ((1.0, 0.78), (0.94, 0.9), (0.86, 1.0)):
        canvas.fill(outline * size, p.skin * shade, flat=True)
    for side in (-1, 1):
        canvas.fill(_ellipse(side * (p.eye_x + 3), p.eye_y + 23, 8, 7), p.skin * (1.0, 0.88, 0.86))
        canvas.fill(_ellipse(side * p.eye_x, p.eye_y - 2, p.eye_width + 3, p.eye_height + 3), p.skin * 0.88)
        flank_x = side * np.array((p.nose_bridge, p.nose_bridge + 3, p.nose_width, 2))
        flank_y = np.array((p.eye_y - 6, p.eye_y, p.nose_y, p.nose_y))
        canvas.fill(_curve(flank_x, flank_y), p.skin * 0.84)
    canvas.fill(_ellipse(0, p.nose_y + 6, p.nose_width, 3), p.skin * 0.82)
    canvas.fill(_ellipse(0, p.mouth_y + p.lower_lip + 4, 0.6 * p.mouth_width, 2), p.skin * 0.82)
    canvas.fill(_ellipse(0, p.chin_y - 8, 6, 4), _lighter(p.skin))
    canvas.fill(_ellipse(0, -30, 16, 7), _lighter(p.skin))
    canvas.soften(1.5)


def _marks(canvas: Canvas, p: Person) -> None:
    """Freckles, moles and wrinkles."""
    for x, y in p.freckles:
        canvas.fill(_ellipse(x, y, 0.8, 0.8), p.skin * (0.8, 0.7, 0.66))
    for x, y in p.moles:
        canvas.fill(_ellipse(x, y, 1.5, 1.5), p.skin * (0.42, 0.34, 0.32))
    if p.age > 0.67:
        for side in (-1, 1):
            fold = (side * (p.nose_width + 2), p.nose_y + 1), (side * (p.mouth_width + 3), p.mouth_y - 2)
            canvas.line(np.array(fold), p.skin * 0.78, 0.8)
            bag = _curve(side * (p.eye_x + ARC * p.eye_width), p.eye_y + 2 + 4 * BULGE)
            canvas.line(bag, p.skin * 0.78, 0.6)


def _beard(canvas: Canvas, p: Person) -> None:
    """The beard follows the jaw and leaves the mouth free."""
    if p.beard > 0:
        jaw, above = p.jaw * p.cheeks, p.mouth_y - 8
        cheek = np.array(((0, above - 1), (0.45 * jaw, above), (0.8 * jaw, 12), (jaw, 4)))
        chin = np.array(((0.92 * jaw, 24), (p.chin * p.cheeks + 1, p.chin_y - 4), (0, p.chin_y + 1)))
        right = np.vstack((cheek, chin))
        canvas.tint(np.vstack((right, right[-2:0:-1] * (-1, 1))), p.hair * 0.9, p.beard)
    if p.moustache > 0:
        bottom = p.mouth_y - p.upper_lip - 0.5 + 2.5 * ARC**2
        shape = _between(ARC * (p.mouth_width + 1), bottom - 1 - p.moustache * BULGE, bottom)
        canvas.fill(shape, p.hair * 0.9, lift=2)


def _eyes(canvas: Canvas, p: Person, s: Shot) -> None:
    opening = p.eye_height * s.lids
    for side in (-1, 1):
        x = side * (p.eye_x + ARC * p.eye_width)
        axis = p.eye_y - p.eye_tilt * ARC
        upper, lower = axis - opening * BULGE**0.8, axis + 0.55 * opening * BULGE
        canvas.fill(_between(x, upper, lower), WHITE * 0.95)
        centre = side * p.eye_x + s.gaze_x, p.eye_y + s.gaze_y - 0.5
        order = np.argsort(x)
        for radius, colour in ((p.iris_size, p.iris), (0.5 * p.iris_size, BLACK)):
            disc = _ellipse(*centre, radius, radius)
            low, high = (np.interp(disc[:, 0], x[order], lid[order]) for lid in (upper, lower))
            disc[:, 1] = np.clip(disc[:, 1], low, high)
            canvas.fill(disc, colour)
        canvas.fill(_ellipse(centre[0] + 1, centre[1] - 1, 0.7, 0.7), WHITE)
        canvas.line(_curve(x, upper), BLACK, 1.1)
        canvas.line(_curve(x, lower), p.skin * 0.62, 0.5)
        canvas.line(_curve(x, upper - 2.2 * BULGE - 0.6), p.skin * 0.7, 0.6)


def _brows(canvas: Canvas, p: Person, s: Shot) -> None:
    taper = p.brow_width * (0.75 - 0.35 * ARC)
    top = p.eye_y - p.brow_gap - s.brows - p.brow_arch * (1 - (ARC - 0.3) ** 2) - p.brow_tilt * ARC
    for side in (-1, 1):
        canvas.fill(_between(side * (p.eye_x + ARC * (p.eye_width + 2.5)), top, top + taper), p.hair * 0.75)


def _nose(canvas: Canvas, p: Person) -> None:
    width, tip = p.nose_width, p.nose_y
    canvas.line(np.array(((0, p.eye_y + 2), (0, tip - 4))), _lighter(p.skin), 0.7 * p.nose_bridge, lift=4)
    canvas.fill(_ellipse(0, tip, 0.62 * width, 3.6), p.skin * 0.97, lift=6)
    canvas.fill(_ellipse(0, tip - 1.5, 2, 1.5), _lighter(p.skin), lift=8)
    for side in (-1, 1):
        wing = _ellipse(side * 0.75 * width, tip + 1, 0.32 * width, 3)
        canvas.fill(wing, p.skin * 0.93, lift=3)
        outer = wing[wing[:, 0] * side > 0.75 * width]
        canvas.line(outer[np.argsort(outer[:, 1])], p.skin * 0.72, 0.7, lift=3)
        canvas.fill(_ellipse(side * 0.42 * width, tip + 3, 0.2 * width, 1.2), p.skin * 0.35, lift=4)


def _mouth(canvas: Canvas, p: Person, s: Shot) -> None:
    x = ARC * (p.mouth_width + 1.5 * s.smile)
    rest = p.mouth_y - 3.2 * s.smile * (ARC**2 - 0.4)
    opening = max(0, s.opening) * BULGE
    upper, lower = rest - 0.3 * opening, rest + 0.7 * opening
    canvas.fill(_between(x, upper, lower), p.lips * (0.3, 0.2, 0.2))
    canvas.fill(_between(x * 0.85, upper, upper + 0.4 * opening), WHITE * 0.93)  # teeth
    bow = p.cupid_bow * np.exp(-((ARC / 0.22) ** 2))
    canvas.fill(_between(x, upper - p.upper_lip * BULGE**0.7 + bow, upper + 0.3), p.lips * 0.88)
    canvas.fill(_between(x, lower - 0.3, lower + p.lower_lip * BULGE), p.lips)
    canvas.line(_curve(x, upper), p.lips * 0.5, 0.6)
    canvas.line(_curve(x, lower + 0.45 * p.lower_lip * BULGE)[4:7], _lighter(p.lips), 0.8)


def _hair(canvas: Canvas, p: Person, rng: Rng) -> None:
    """The hair in front: from the outline over the skull down to the hairline."""
    if not p.style.volume:
        return
    width = p.forehead * p.cheeks
    around = np.linspace(np.pi, 2 * np.pi, 25)
    mass = p.style.volume + p.style.curl * np.sin(around * 15 + rng.uniform(0, 6))
    outer = np.column_stack(((width + 2 + mass) * np.cos(around), -22 + (34 + mass) * np.sin(around)))
    heights = np.array(p.style.hairline) + p.hairline_y + rng.normal(0, 0.7, 5)
    x = np.linspace(0.92, -0.92, 25)
    inner = np.interp(x * np.sign(p.hair_side), np.linspace(-1, 1, 5), heights)
    front = np.vstack(((width + 0.5, -14), _curve(x * width, inner), (-width - 0.5, -14)))
    canvas.fill(np.vstack((outer, front)), p.hair, flat=True)
    for lock in range(2, 23, 2):
        root, end = outer[lock], front[25 - lock]
        bend = (root + end) / 2 + rng.normal(0, 1.5, 2)
        canvas.line(np.array((0.97 * root, bend, end)), p.hair * rng.uniform(0.75, 1.2), 0.8, flat=True)


def _glasses(canvas: Canvas, p: Person, rng: Rng) -> None:
    frame = _any_colour(rng) * rng.uniform(0.1, 0.8)
    glass, opacity = (frame * 0.5, 0.85) if rng.uniform() < 0.15 else (WHITE, 0.12)
    roundness = rng.uniform(0.5, 1)
    rim = np.sign(CIRCLE) * np.abs(CIRCLE) ** roundness * rng.uniform((9.5, 7), (13.5, 10.5))
    inner, outer = 17.5 - rim[:, 0].max(), 17.5 + rim[:, 0].max()
    for side in (-1, 1):
        lens = rim + np.array((side * 17.5, -10))
        canvas.tint(lens, glass, opacity)
        canvas.line(np.vstack((lens, lens[:1])), frame, 1.4)
        canvas.line(np.array(((side * outer, -11), (side * 42, -12))), frame, 1.4)
    canvas.line(np.array(((-inner, -11), (0, -12.5), (inner, -11))), frame, 1.4)


def _hat(canvas: Canvas, p: Person, rng: Rng) -> None:
    brim, colour = rng.uniform(-46, -36) + 3 * BULGE, _any_colour(rng)
    x = ARC * (p.cheeks + 9)
    canvas.fill(_between(x, np.full(11, -90), brim), colour, lift=4, flat=True)
    canvas.fill(_between(x, brim - 7, brim), colour * 0.7, lift=8, flat=True)


def _patch(canvas: Canvas, p: Person, rng: Rng) -> None:
    """Something between the camera and the face."""
    shape = CIRCLE[:: rng.integers(1, 7)] * rng.uniform(6, 14, 2) + rng.uniform(-34, 34, 2)
    canvas.fill(shape, _any_colour(rng), lift=30, flat=True)


def _hand(canvas: Canvas, p: Person, rng: Rng) -> None:
    side = rng.choice((-1, 1))
    wrist = np.array((side * rng.uniform(28, 44), rng.uniform(40, 60)))
    for finger, reach in enumerate((30, 36, 38, 34)):
        knuckle = wrist + np.array((side * (finger * 6 - 12), -6))
        tip = wrist + np.array((side * (finger * 7 - 22), -reach))
        shade = p.skin * (0.82 + 0.06 * (finger % 2))
        canvas.line(np.array((wrist, knuckle, tip)), shade, 6.5, lift=30, flat=True)


def _scarf(canvas: Canvas, p: Person, rng: Rng) -> None:
    top, colour = rng.uniform(20, 42), _any_colour(rng)
    for fold in range(4):
        y = top + 9 * fold + 5 * BULGE
        canvas.fill(_between(ARC * 52, y, y + 40), colour * (1 - 0.12 * (fold % 2)), lift=12, flat=True)


OCCLUSIONS: tuple[tuple[float, Callable[[Canvas, Person, Rng], None]], ...] = (
    (0.25, _glasses),
    (0.06, _hat),
    (0.08, _patch),
    (0.08, _hand),
    (0.05, _scarf),
)


def _light(image: Array, rng: Rng) -> Array:
    """Light from one side, exposure, gamma and colour cast; to float32 in about [0, 1]."""
    angle, depth = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.55)
    ramp = np.linspace(-1, 1, len(image), dtype=np.float32)
    slope = ramp * np.cos(angle) + ramp[:, None] * np.sin(angle)
    side_light = 1 + depth * np.clip(1.6 * slope, -1, 1)
    gain = np.exp(rng.normal(-0.1, 0.2) + rng.normal(0, 0.11, 3)) / 255
    picture = image * side_light.astype(np.float32)[:, :, None] * gain.astype(np.float32)
    grey = picture.mean(axis=2, keepdims=True)
    picture = grey + (picture - grey) * np.float32(rng.uniform(0.35, 1.2))
    picture = np.clip(picture, 0, 1) ** np.float32(np.exp(rng.normal(0, 0.22)))
    return picture * np.float32(rng.uniform(0.75, 1)) + np.float32(rng.uniform(0, 0.12))


def _lens(picture: Array, rng: Rng) -> Array:
    """Blur and sensor noise; float32 in [0, 1] to uint8."""
    sigma = rng.uniform(-1, 1.2) * len(picture) / TEMPLATE
    if sigma > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    noise = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0, 0.03))
    return np.rint(np.clip(picture + noise, 0, 1) * 255).astype(np.uint8)


def _photograph(person: int, shot: int, seed: int, size: int) -> tuple[Array, int]:
    """The picture, and the JPEG quality it is to be kept at."""
    p = _person(seed, person)
    rng = np.random.default_rng([2, seed, person, shot])
    s = Shot(**_sample(Shot, rng))
    canvas = Canvas(OVERSAMPLING * size, s)
    _background(canvas, rng)
    _behind(canvas, p, rng)
    _skin(canvas, p)
    _marks(canvas, p)
    _beard(canvas, p)
    _eyes(canvas, p, s)
    _brows(canvas, p, s)
    _mouth(canvas, p, s)
    _nose(canvas, p)
    _hair(canvas, p, rng)
    for chance, draw in OCCLUSIONS:
        if rng.uniform() < chance:
            draw(canvas, p, rng)
    image = cv2.resize(canvas.image, (size, size), interpolation=cv2.INTER_AREA)
    return _lens(_light(image, rng), rng), int(rng.integers(45, 96))


def draw_face(person: int, shot: int, seed: int = 0, size: int = TEMPLATE) -> Array:
    """One photograph of one person: uint8 [size, size, 3], RGB.

    `seed`, `person` and `shot` are non-negative; people of different seeds have nothing in common.
    """
    return _photograph(person, shot, seed, size)[0]


def draw_jpeg(person: int, shot: int, seed: int = 0, size: int = TEMPLATE) -> bytes:
    """The picture of `draw_face` as a JPEG file, of a quality between 45 and 95 that varies by shot."""
    picture, quality = _photograph(person, shot, seed, size)
    return encode_jpeg(picture, quality)
