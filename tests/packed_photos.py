"""Small photos of some people, packed: what tests of broken-off packing have in common."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from config import PackConfig
from data.fitting import Fit
from data.images import encode_png
from data.pack_set import Packed, pack, select
from data.set_sources import open_source
from tiny_faces import tiny_face

SIZE = 32
FIT = Fit(SIZE, "refuse", 95)
SKIP = replace(FIT, bad_images="skip")


def photos(root: Path, people: int, shots: int) -> Path:
    for person in range(people):
        (root / f"{person:02}").mkdir(parents=True)
        for shot in range(shots):
            (root / f"{person:02}" / f"{shot}.png").write_bytes(tiny_face(person, shot))
    return root


def spoil(folder: Path) -> None:
    """Make images of three kinds of badness, the third person's all."""
    (folder / "01" / "2.png").write_bytes(encode_png(np.zeros((20, 24, 3), np.uint8)))
    for shot in range(4):
        (folder / "02" / f"{shot}.png").write_bytes(b"no image"[: 4 * shot])


def pack_all(
    source: Path, output: Path, fit: Fit = FIT, restart: bool = False, pick: PackConfig | None = None
) -> Packed:
    faces = open_source(source)
    return pack(faces, select(faces, pick or PackConfig()), output, fit, 0, restart)


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
