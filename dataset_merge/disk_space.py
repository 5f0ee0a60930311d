"""The room on the disk that a merged set takes, and whether it is there."""

import shutil
from pathlib import Path

import numpy as np

from data.face_sets import FaceSet, FaceSetError, FolderFaceSet, InRecords
from utils.files import nearest_existing, partial_folder

# Bytes around an image in a record, and at most of its line in the index; bytes of an identity's record with its line.
_AROUND_IMAGE, _INDEX_LINE, _IDENTITY = 35, 24, 64


def stored_sizes(faces: FaceSet) -> np.ndarray:
    """Bytes that each image takes in a `.rec` file, int64 [images], at most by some bytes too many."""
    if isinstance(faces, InRecords):
        spans = list(faces.spans(np.arange(len(faces))))
        return np.concatenate([span.ends - span.starts for span in spans]) + _INDEX_LINE
    if isinstance(faces, FolderFaceSet):
        sizes = (faces.file(i).stat().st_size for i in range(len(faces)))
    else:
        sizes = (len(faces.encoded(i)) for i in range(len(faces)))
    return np.fromiter(sizes, np.int64, len(faces)) + _AROUND_IMAGE + _INDEX_LINE


def needed(sizes: np.ndarray, identities: int) -> int:
    """Bytes of a set with images of these `sizes`, at most, see `stored_sizes`."""
    return int(sizes.sum()) + identities * _IDENTITY + _IDENTITY


def available(output: Path) -> int:
    """Bytes that a set at `output` can take: what the disk has free, and what an interrupted run wrote of it."""
    written = partial_folder(output.resolve()) / output.resolve().name
    begun = sum(file.stat().st_size for file in written.iterdir() if file.is_file()) if written.is_dir() else 0
    return shutil.disk_usage(nearest_existing(output.resolve().parent)).free + begun


def require_space(output: Path, size: int, embeddings: int = 0) -> None:
    """Raise FaceSetError unless the disk of `output` has `size` bytes for it, and `embeddings` more."""
    free = available(output)
    if size + embeddings > free:
        beside = f" beside {as_size(embeddings)} of embeddings" if embeddings else ""
        raise FaceSetError(
            f"{output} needs {as_size(size)}{beside}, but its disk has {as_size(free)} for it: free "
            f"{as_size(size + embeddings - free)}, or name an output on another disk (embeddings are kept with --cache "
            "FOLDER)"
        )


def as_size(number: int) -> str:
    """Bytes for people."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"
