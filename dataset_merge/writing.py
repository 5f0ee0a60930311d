"""The merged set on the disk: the room it needs, and its images, written as the bytes they were."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.face_sets import FaceSet, FaceSetError, FaceSetWriter, FolderFaceSet, InRecords, JoinedFaceSet
from data.images import decode_rgb
from data.images_fingerprint import images_fingerprint
from data.recordio import RecordAppender
from utils.files import partial_folder
from utils.progress import progress_bar
from utils.resumable import ResumableFolder

# What a break costs at most; each time waits for the disk.
SECONDS_BETWEEN_SAVES = 10.0

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
    """Bytes of a set with images of these `sizes`, see `stored_sizes`."""
    return int(sizes.sum()) + identities * _IDENTITY + _IDENTITY


def available(output: Path) -> int:
    """Bytes that a set at `output` can take: what the disk has free, and what an interrupted run wrote of it."""
    folder = output.resolve().parent
    while not folder.exists():
        folder = folder.parent
    written = partial_folder(output.resolve()) / output.resolve().name
    begun = sum(file.stat().st_size for file in written.iterdir() if file.is_file()) if written.is_dir() else 0
    return shutil.disk_usage(folder).free + begun


def as_size(number: int) -> str:
    """Bytes for people."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


def require_space(output: Path, size: int) -> None:
    """Raise FaceSetError unless the disk of `output` has `size` bytes for it."""
    free = available(output)
    if size > free:
        raise FaceSetError(
            f"{output} needs {as_size(size)}, but its disk has {as_size(free)} for it: free {as_size(size - free)}, or "
            "name an output on another disk (embeddings are kept with --cache FOLDER)"
        )


def face_size(sets: Sequence[FaceSet]) -> int:
    """Height and width of the faces, by the first of each set. Raises FaceSetError when they differ."""
    shapes = [decode_rgb(faces.encoded(0), faces.describe(0)).shape[:2] for faces in sets]
    for faces, shape in zip(sets, shapes, strict=True):
        if shape != (shapes[0][0], shapes[0][0]):
            raise FaceSetError(
                f"{faces.path} has faces of {shape[1]}x{shape[0]} pixels, {sets[0].path} of "
                f"{shapes[0][1]}x{shapes[0][0]}: a set has faces of one square size; see data/pack_set.py"
            )
    return int(shapes[0][0])


def describe_choice(choice: Sequence[np.ndarray]) -> str:
    """Which images are under which label, int64 positions: how many, and a digest."""
    digest = hashlib.sha256()
    for images in choice:
        digest.update(f"{len(images)}\0".encode())
        digest.update(images.astype("<i8").tobytes())
    return f"{sum(map(len, choice)):,} images of {len(choice):,} identities, {digest.hexdigest()[:16]}"


def made_from(sets: Sequence[FaceSet], choice: Sequence[np.ndarray]) -> dict[str, Any]:
    """All that the bytes of a merged set depend on, by names that users know. `choice`: the positions of the images
    under each new label, int64, in all `sets` together.
    """
    return {
        "sets": [str(faces.path.resolve()) for faces in sets],
        "images of the sets": [images_fingerprint(faces) for faces in sets],
        "decisions": describe_choice(choice),
    }


def write_images(folder: ResumableFolder, faces: JoinedFaceSet, choice: Sequence[np.ndarray], image_size: int) -> int:
    """Write the images at positions `choice` of `faces`, int64, those of each new label, behind what `folder` has.

    Returns how many an interrupted run had written. Nothing but the image at hand is in memory.
    """
    taken_over = int(folder.state.get("images", 0))
    ends = np.cumsum([0, *(len(images) for images in choice)])
    current = int(np.searchsorted(ends, taken_over, side="right")) - 1
    ranges = [
        (1 + first, 1 + last)
        for first, last in zip(ends[:current].tolist(), ends[1 : current + 1].tolist(), strict=True)
    ]
    records = RecordAppender(folder.open("train.rec"), folder.open("train.idx"))
    writer = FaceSetWriter(folder.path, records, ranges, taken_over)
    next_save = time.monotonic() + SECONDS_BETWEEN_SAVES
    with progress_bar(int(ends[-1]), "image", "write", initial=taken_over) as bar:
        for images in choice[current:]:
            for image in images[writer.images_of_identity :].tolist():
                writer.add_image(faces.encoded(image))
                bar.update()
                if time.monotonic() >= next_save:
                    folder.save({"images": writer.images})
                    next_save = time.monotonic() + SECONDS_BETWEEN_SAVES
            writer.end_identity()
    folder.save({"images": writer.images})
    writer.finish(image_size)
    return taken_over
