"""Face sets written by hand, and what is in them."""

from pathlib import Path

from data.face_sets import RecFaceSet
from data.recordio import pack_image, write_records

Records = dict[int, bytes]


def write_rec(folder: Path, records: Records, name: str = "train.rec") -> Path:
    with write_records(folder / name) as writer:
        for key, payload in records.items():
            writer.write(key, payload)
    return folder / name


def contents(faces: RecFaceSet) -> dict[int, tuple[str, bytes]]:
    """{key: (identity, image)} of a set, whatever its order."""
    return {
        int(key): (faces.identities[faces.labels[i]], faces.encoded(i)) for i, key in enumerate(faces.keys.tolist())
    }


# The small set that every layout below holds: key, label, encoded image.
FACES = [(1, 0, b"\xff\xd8 Ada 1"), (2, 0, b"\xff\xd8 Ada"), (3, 1, b"\x89PNG Bea"), (4, 1, b"\xff\xd8 Bea 44")]
FACES_BY_KEY = {key: (str(label), image) for key, label, image in FACES}


def scalar_images() -> Records:
    return {key: pack_image(float(label), key, image) for key, label, image in FACES}


def identity_records(*ranges: tuple[float, float]) -> Records:
    return {key: pack_image(images, key, b"") for key, images in enumerate(ranges, 5)}


def header(*label: float) -> Records:
    return {0: pack_image(label, 0, b"")}


RANGES = identity_records((1, 3), (3, 5))
