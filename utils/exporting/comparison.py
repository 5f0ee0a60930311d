"""An export against the model it was made from, on faces."""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.face_sets import EncodedImages, FaceSetError, open_face_set
from data.images import ImageError, decode_face
from data.recordio import RecordError
from data.synthetic_faces import draw_face
from data.verification_bin import PairImages, find_bins, read_bin
from models.embedders import Embedder

#: Largest 1 - cosine that an export may show, by its precision.
LIMITS = {"fp32": 1e-5, "fp16": 1e-3, "int8": 0.05}


@dataclass(frozen=True)
class Faces:
    """`pixels`: uint8 [n, size, size, 3], RGB; `source`: where they are from, for people."""

    pixels: Tensor
    source: str


@dataclass(frozen=True)
class Deviation:
    """1 - cosine between embeddings of the same face, over `faces` faces."""

    largest: float
    mean: float
    faces: int


def choose_set(named: str, settings: dict[str, dict[str, Any]]) -> Path | None:
    """The set that is `named`, else the first of the run's (verification, then training) that is there; None: none is.

    `settings`: of the run, by section and field, with the paths that it had.
    """
    if named:
        return Path(named)
    data = settings.get("data", {})
    roots = [Path(root) for root in data.get("root", ())]
    beside = [path for root in roots if _is_there(root) for path in find_bins(root)]
    candidates: Iterable[Path] = [*map(Path, data.get("verification", ())), *beside, *roots]
    return next(filter(_is_there, candidates), None)


def choose_calibration(named: str, settings: dict[str, dict[str, Any]], compared: Path | None) -> Path | None:
    """The set that is `named`, else the run's first training set that is there, else the one that is `compared` on.

    Not the verification sets first: accuracies are measured on them afterwards.
    """
    if named:
        return Path(named)
    roots = map(Path, settings.get("data", {}).get("root", ()))
    return next(filter(_is_there, roots), compared)


def _is_there(path: Path) -> bool:
    """Whether it can be seen here: a run's sets may lie in somebody else's folders."""
    with suppress(OSError):
        return path.exists()
    return False


def load_faces(source: Path | None, size: int, count: int, calibration: bool = False) -> Faces:
    """`count` faces, or as many as there are, of a `.bin` or a face set, chosen by chance, always the same; drawn by a
    program without a `source`. For `calibration` they are others than for comparison, as far as the set goes.

    Square faces of another size are scaled, others and broken ones passed over. Raises FaceSetError when there are
    fewer than two.
    """
    if source is None:
        first = 2_000_000 if calibration else 1_000_000
        drawn = [draw_face(first + i, 0, size=size) for i in range(count)]
        return Faces(torch.from_numpy(np.stack(drawn)), "faces drawn by a program")
    images: EncodedImages = PairImages(read_bin(source)) if source.suffix == ".bin" else open_face_set(source)
    order = np.random.default_rng(0).permutation(len(images)).tolist()
    decoded = _decode(images, order[::-1] if calibration else order, size, count)
    if len(decoded) < 2:
        raise FaceSetError(
            f"{source}: {len(decoded)} of its {len(images)} faces can be decoded and are square, two are needed"
        )
    return Faces(torch.from_numpy(np.stack(decoded)), str(source))


def _decode(images: EncodedImages, order: Sequence[int], size: int, count: int) -> list[np.ndarray]:
    decoded: list[np.ndarray] = []
    for i in order:
        try:
            decoded.append(decode_face(images.encoded(i), size, resize=True, where=images.describe(i)))
        except (ImageError, RecordError, OSError):
            continue
        if len(decoded) == count:
            break
    return decoded


def embed_faces(embedder: Embedder, faces: Tensor, batch_size: int) -> Tensor:
    """Unit vectors float32 [n, D] on the CPU, the first face alone, so that two sizes of batches are seen."""
    starts = [0, *range(1, len(faces), batch_size)]
    ends = [*starts[1:], len(faces)]
    parts = [embedder.embed(faces[start:end], False).cpu() for start, end in zip(starts, ends, strict=True)]
    return torch.cat(parts)


def deviation(model: Tensor, export: Tensor) -> Deviation:
    """Of two float32 [n, D]; NaN where a value is not finite. Computed in float64."""
    cosines = torch.cosine_similarity(model.double(), export.double(), dim=1)
    missed = 1 - cosines
    return Deviation(float(missed.max()), float(missed.mean()), len(missed))
