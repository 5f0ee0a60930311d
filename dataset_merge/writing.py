"""The merged set on the disk: the room it needs, and its images, written as the bytes they were."""

import hashlib
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np

from data.face_set_writer import FaceSetWriter
from data.face_sets import EncodedImages, FaceSet, FaceSetError, FolderFaceSet, InRecords
from data.image_sizes import SAMPLE
from data.images import ImageError, decode_rgb
from data.images_fingerprint import images_fingerprint
from data.joined_sets import JoinedFaceSet
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
    written = partial_folder(output.resolve()) / output.resolve().name
    begun = sum(file.stat().st_size for file in written.iterdir() if file.is_file()) if written.is_dir() else 0
    return shutil.disk_usage(there_already(output.resolve().parent)).free + begun


def there_already(folder: Path) -> Path:
    """The folder, or the one nearest above it that is there."""
    folder = folder.resolve()
    return folder if folder.exists() else there_already(folder.parent)


def as_size(number: int) -> str:
    """Bytes for people."""
    value, unit = float(number), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:,.0f} {unit}" if unit == "B" else f"{value:,.1f} {unit}"


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


def face_size(sets: Sequence[FaceSet]) -> int:
    """Height and width of the faces of all sets. Raises FaceSetError when they differ, as far as a sample tells."""
    height, width = _shape(sets[0], 0, sets[0].path)
    if height != width:
        raise FaceSetError(
            f"{sets[0].path} has faces of {width}x{height} pixels, and a set has faces of one square size: "
            f"{how_to_mend(sets[0].path)}"
        )
    for faces in sets:
        require_faces_of(faces, faces.path, height, sets[0].path)
    return height


def require_faces_of(images: EncodedImages, path: Path | str, size: int, first: Path) -> None:
    """Raise FaceSetError when of a sample of the `images` of the set at `path` one is broken, or not of the `size` of
    the `first` set's.
    """
    for i in np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(np.int64)).tolist():
        height, width = _shape(images, i, path)
        if (height, width) != (size, size):
            raise FaceSetError(
                f"{path} has faces of {width}x{height} pixels ({images.describe(i)}), {first} of {size}x{size}: all "
                f"have to be of one size: {how_to_mend(path)}"
            )


def _shape(images: EncodedImages, i: int, path: Path | str) -> tuple[int, int]:
    try:
        height, width, _ = decode_rgb(images.encoded(i), images.describe(i)).shape
    except ImageError as error:
        raise FaceSetError(f"{error}; {how_to_mend(path)}") from None
    return height, width


def how_to_mend(path: Path | str) -> str:
    """What to do about faces of other sizes, and broken ones, in the set at `path`."""
    if Path(path).suffix == ".bin":
        return "write the pairs anew with data/pack_bin.py --other-sizes resize, or do without the set"
    return (
        f"write a set that can be merged with data/pack_set.py --source {quote(str(path))} --output NAME: "
        "--other-sizes resize --image-size N scales its faces, --bad-images skip leaves broken ones out"
    )


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
