"""A set with every kind of damage, and what a report says of it."""

import csv
from pathlib import Path

import numpy as np

from config import ReportConfig
from data.face_sets import FaceSet
from data.images import encode_jpeg
from data.recordio import MAGIC_BYTES, pack_image, write_records
from data.report import Report, make_report
from tiny_faces import tiny_face

PNG = tiny_face(0, 0)
JPEG = encode_jpeg(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
SPLIT = JPEG + bytes(-len(JPEG) % 4) + MAGIC_BYTES * 2  # good, and cut twice within its record

# key: (label, image, what broken.csv must say; empty for a good one)
FACES: dict[int, tuple[float | list[float], bytes, str]] = {
    1: (0.0, JPEG, ""),
    2: (0.0, PNG, ""),
    3: (0.0, b"garbage", "its 7 bytes are no image"),
    4: ([1.0, 1.0], SPLIT, ""),
    5: (1.0, b"", "its image is empty"),
    6: ([1.0, 1.0], b"", "its image is empty"),
    7: (0.5, PNG, "label 0.5 is no identity number"),
    8: (float("nan"), PNG, "label nan is no identity number"),
    9: (2.0, JPEG[: len(JPEG) // 2], "it was cut off"),  # the only image of identity 2
    10: (3.0, JPEG[:-2], "it was cut off"),
    11: (3.0, PNG[:-30], "are no image"),
    12: (3.0, PNG, ""),
    13: (-1.0, PNG, "label -1.0 is no identity number"),
    14: (3.0, PNG, "no record begins at byte"),  # its magic is destroyed
    15: (3.0, PNG, "announces 4294967295 labels"),  # its flag is
    16: (3.0, PNG, "expected the start of a record"),  # its cflag is
    17: (3.0, PNG, "record 12 has the same offset"),  # by the .idx
    18: (3.0, PNG, "no record can begin at byte"),  # by the .idx
    19: (3.0, PNG, "no record begins at byte"),  # by the .idx
    20: (0.0, PNG, "but the file ends at"),  # the file is cut within
}
HEADERS = {0: [21.0, 25.0], 21: [1.0, 4.0], 22: [4.0, 7.0], 23: [9.0, 10.0], 24: [10.0, 21.0]}
BROKEN = {key: face for key, face in FACES.items() if face[2]}
# Those that only decoding shows.
HIDDEN = {3, 9, 10, 11}


def write_damaged(folder: Path) -> Path:
    """Write the set of FACES and HEADERS, headers first, and a `property` that is wrong."""
    folder.mkdir(parents=True)
    rec = folder / "train.rec"
    with write_records(rec) as writer:
        for key, label in HEADERS.items():
            writer.write(key, pack_image(label, key, b""))
        for key, (label, image, _) in FACES.items():
            writer.write(key, pack_image(label, key, image))
    lines = [line.split("\t") for line in rec.with_suffix(".idx").read_text().splitlines()]
    offsets = {int(key): int(offset) for key, offset in lines}
    content = bytearray(rec.read_bytes())
    content[offsets[14]] ^= 1
    content[offsets[15] + 8 : offsets[15] + 12] = b"\xff" * 4
    content[offsets[16] + 7] |= 2 << 5
    rec.write_bytes(content[:-8])
    offsets |= {17: offsets[12], 18: 10**12, 19: offsets[19] + 4}
    rec.with_suffix(".idx").write_text("".join(f"{key}\t{offset}\n" for key, offset in offsets.items()))
    (folder / "property").write_text("4,112,112\nmade by hand")
    return folder


def report_on(path: Path, output: Path, **options) -> Report:
    return make_report(path, output, ReportConfig(**options), workers=0)[0]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def people(faces: FaceSet) -> list[tuple[int, bytes]]:
    """(label, image) of all images of a set."""
    return [(int(label), faces.encoded(i)) for i, label in enumerate(faces.labels)]
