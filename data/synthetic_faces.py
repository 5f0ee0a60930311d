"""Procedural faces for the demo set: aligned 112x112 portraits of people who do not exist.

The demo needs a face set that can be made anywhere in seconds, has no licence questions, and still asks
of a trainer what real sets ask: find what stays the same about a person while light, pose, expression,
background and occlusion change. What a person looks like follows from (seed, person) alone; what one
photograph of that person does to the looks follows from (seed, person, shot). Nothing else enters, so
the same arguments give the same pixels in any process and in any call order.

Who people are is drawn in `synthetic_people.py`; `face_canvas.py` has the canvas and its shapes.
"""

from collections.abc import Callable

import cv2
import numpy as np

from data.align import TEMPLATE_SIZE
from data.face_canvas import ARC, BULGE, CIRCLE, Canvas, between, curve, ellipse, symmetric_loop
from data.images import encode_jpeg
from data.synthetic_people import Array, Person, Rng, Shot, looks_of, random_shot

OVERSAMPLING = 2  # shapes are drawn this much larger and averaged down, for smooth edges

BLACK = np.array((24.0, 18.0, 20.0))
WHITE = np.array((246.0, 243.0, 240.0))


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
        canvas.fill(symmetric_loop((0, -62), *sides, (0, bottom)), p.hair * 0.72, flat=True)
    neck = p.cheeks * p.jaw * 0.64
    canvas.fill(between(ARC * neck, np.full(11, 20), 62 + 10 * BULGE), p.skin * 0.72, flat=True)
    for side in (-1, 1):
        x = side * (p.cheeks + 1)
        canvas.fill(ellipse(x, p.ear_y, 5, p.ear_size), p.skin * 0.9, flat=True)
        canvas.fill(ellipse(x + side, p.ear_y, 2.4, 0.6 * p.ear_size), p.skin * 0.7, flat=True)


def _skin(canvas: Canvas, p: Person) -> None:
    """The face without its features; the shades of its relief are blurred into each other."""
    outline = symmetric_loop(
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
        canvas.fill(ellipse(side * (p.eye_x + 3), p.eye_y + 23, 8, 7), p.skin * (1.0, 0.88, 0.86))
        canvas.fill(ellipse(side * p.eye_x, p.eye_y - 2, p.eye_width + 3, p.eye_height + 3), p.skin * 0.88)
        flank_x = side * np.array((p.nose_bridge, p.nose_bridge + 3, p.nose_width, 2))
        flank_y = np.array((p.eye_y - 6, p.eye_y, p.nose_y, p.nose_y))
        canvas.fill(curve(flank_x, flank_y), p.skin * 0.84)
    canvas.fill(ellipse(0, p.nose_y + 6, p.nose_width, 3), p.skin * 0.82)
    canvas.fill(ellipse(0, p.mouth_y + p.lower_lip + 4, 0.6 * p.mouth_width, 2), p.skin * 0.82)
    canvas.fill(ellipse(0, p.chin_y - 8, 6, 4), _lighter(p.skin))
    canvas.fill(ellipse(0, -30, 16, 7), _lighter(p.skin))
    canvas.soften(1.5)


def _marks(canvas: Canvas, p: Person) -> None:
    """Freckles, moles and wrinkles."""
    for x, y in p.freckles:
        canvas.fill(ellipse(x, y, 0.8, 0.8), p.skin * (0.8, 0.7, 0.66))
    for x, y in p.moles:
        canvas.fill(ellipse(x, y, 1.5, 1.5), p.skin * (0.42, 0.34, 0.32))
    if p.age > 0.67:
        for side in (-1, 1):
            fold = (side * (p.nose_width + 2), p.nose_y + 1), (side * (p.mouth_width + 3), p.mouth_y - 2)
            canvas.line(np.array(fold), p.skin * 0.78, 0.8)
            bag = curve(side * (p.eye_x + ARC * p.eye_width), p.eye_y + 2 + 4 * BULGE)
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
        shape = between(ARC * (p.mouth_width + 1), bottom - 1 - p.moustache * BULGE, bottom)
        canvas.fill(shape, p.hair * 0.9, lift=2)


def _eyes(canvas: Canvas, p: Person, s: Shot) -> None:
    opening = p.eye_height * s.lids
    for side in (-1, 1):
        x = side * (p.eye_x + ARC * p.eye_width)
        axis = p.eye_y - p.eye_tilt * ARC
        upper, lower = axis - opening * BULGE**0.8, axis + 0.55 * opening * BULGE
        canvas.fill(between(x, upper, lower), WHITE * 0.95)
        centre = side * p.eye_x + s.gaze_x, p.eye_y + s.gaze_y - 0.5
        order = np.argsort(x)
        for radius, colour in ((p.iris_size, p.iris), (0.5 * p.iris_size, BLACK)):
            disc = ellipse(*centre, radius, radius)
            low, high = (np.interp(disc[:, 0], x[order], lid[order]) for lid in (upper, lower))
            disc[:, 1] = np.clip(disc[:, 1], low, high)
            canvas.fill(disc, colour)
        canvas.fill(ellipse(centre[0] + 1, centre[1] - 1, 0.7, 0.7), WHITE)
        canvas.line(curve(x, upper), BLACK, 1.1)
        canvas.line(curve(x, lower), p.skin * 0.62, 0.5)
        canvas.line(curve(x, upper - 2.2 * BULGE - 0.6), p.skin * 0.7, 0.6)


def _brows(canvas: Canvas, p: Person, s: Shot) -> None:
    taper = p.brow_width * (0.75 - 0.35 * ARC)
    top = p.eye_y - p.brow_gap - s.brows - p.brow_arch * (1 - (ARC - 0.3) ** 2) - p.brow_tilt * ARC
    for side in (-1, 1):
        canvas.fill(between(side * (p.eye_x + ARC * (p.eye_width + 2.5)), top, top + taper), p.hair * 0.75)


def _nose(canvas: Canvas, p: Person) -> None:
    width, tip = p.nose_width, p.nose_y
    canvas.line(np.array(((0, p.eye_y + 2), (0, tip - 4))), _lighter(p.skin), 0.7 * p.nose_bridge, lift=4)
    canvas.fill(ellipse(0, tip, 0.62 * width, 3.6), p.skin * 0.97, lift=6)
    canvas.fill(ellipse(0, tip - 1.5, 2, 1.5), _lighter(p.skin), lift=8)
    for side in (-1, 1):
        wing = ellipse(side * 0.75 * width, tip + 1, 0.32 * width, 3)
        canvas.fill(wing, p.skin * 0.93, lift=3)
        outer = wing[wing[:, 0] * side > 0.75 * width]
        canvas.line(outer[np.argsort(outer[:, 1])], p.skin * 0.72, 0.7, lift=3)
        canvas.fill(ellipse(side * 0.42 * width, tip + 3, 0.2 * width, 1.2), p.skin * 0.35, lift=4)


def _mouth(canvas: Canvas, p: Person, s: Shot) -> None:
    x = ARC * (p.mouth_width + 1.5 * s.smile)
    rest = p.mouth_y - 3.2 * s.smile * (ARC**2 - 0.4)
    opening = max(0, s.opening) * BULGE
    upper, lower = rest - 0.3 * opening, rest + 0.7 * opening
    canvas.fill(between(x, upper, lower), p.lips * (0.3, 0.2, 0.2))
    canvas.fill(between(x * 0.85, upper, upper + 0.4 * opening), WHITE * 0.93)  # teeth
    bow = p.cupid_bow * np.exp(-((ARC / 0.22) ** 2))
    canvas.fill(between(x, upper - p.upper_lip * BULGE**0.7 + bow, upper + 0.3), p.lips * 0.88)
    canvas.fill(between(x, lower - 0.3, lower + p.lower_lip * BULGE), p.lips)
    canvas.line(curve(x, upper), p.lips * 0.5, 0.6)
    canvas.line(curve(x, lower + 0.45 * p.lower_lip * BULGE)[4:7], _lighter(p.lips), 0.8)


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
    front = np.vstack(((width + 0.5, -14), curve(x * width, inner), (-width - 0.5, -14)))
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
    canvas.fill(between(x, np.full(11, -90), brim), colour, lift=4, flat=True)
    canvas.fill(between(x, brim - 7, brim), colour * 0.7, lift=8, flat=True)


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
        canvas.fill(between(ARC * 52, y, y + 40), colour * (1 - 0.12 * (fold % 2)), lift=12, flat=True)


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
    sigma = rng.uniform(-1, 1.2) * len(picture) / TEMPLATE_SIZE
    if sigma > 0.3:
        picture = cv2.GaussianBlur(picture, (0, 0), sigma)
    noise = rng.standard_normal(picture.shape, np.float32) * np.float32(rng.uniform(0, 0.03))
    return np.rint(np.clip(picture + noise, 0, 1) * 255).astype(np.uint8)


def _photograph(person: int, shot: int, seed: int, size: int) -> tuple[Array, int]:
    """The picture, and the JPEG quality it is to be kept at."""
    p = looks_of(seed, person)
    rng = np.random.default_rng([2, seed, person, shot])
    s = random_shot(rng)
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


def draw_face(person: int, shot: int, seed: int = 0, size: int = TEMPLATE_SIZE) -> Array:
    """One photograph of one person: uint8 [size, size, 3], RGB.

    `seed`, `person` and `shot` are non-negative; people of different seeds have nothing in common.
    """
    return _photograph(person, shot, seed, size)[0]


def draw_jpeg(person: int, shot: int, seed: int = 0, size: int = TEMPLATE_SIZE) -> bytes:
    """The picture of `draw_face` as a JPEG file, of a quality between 45 and 95 that varies by shot."""
    picture, quality = _photograph(person, shot, seed, size)
    return encode_jpeg(picture, quality)
