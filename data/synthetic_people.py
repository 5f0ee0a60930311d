"""Who is on a drawn face, and what a photograph changes: shapes, colours, pose and expression, drawn at random."""

from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rng = np.random.Generator

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


def looks_of(seed: int, person: int) -> Person:
    """The looks of a person, which depend on nothing else."""
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


def _ramp(colours: Array, position: float) -> Array:
    """The colour at `position` in [0, 1] along a row of colours."""
    steps = np.linspace(0, 1, len(colours))
    return np.array([np.interp(position, steps, channel) for channel in colours.T])


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


def random_shot(rng: Rng) -> Shot:
    """A photograph's pose and expression."""
    return Shot(**_sample(Shot, rng))
