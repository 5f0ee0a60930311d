"""The images of the merged set, written as the bytes they were."""

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.face_set_writer import FaceSetWriter
from data.face_sets import FaceSet
from data.images_fingerprint import images_fingerprint
from data.joined_sets import JoinedFaceSet
from data.recordio import RecordAppender
from utils.progress import progress_bar
from utils.resumable import ResumableFolder

# What a break costs at most; each time waits for the disk.
SECONDS_BETWEEN_SAVES = 10.0


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
