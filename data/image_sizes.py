"""Whether the images of a set have the size that they are wanted in, as far as a sample of them tells."""

from collections import Counter

from data.face_sets import FaceSet, FaceSetError
from data.images import ImageError, decode_rgb
from data.images_fingerprint import sample_positions
from data.recordio import RecordError


def require_size(faces: FaceSet, size: int, most: int) -> None:
    """Raise FaceSetError when more than `most` of the images, or all, seem to be of another size than size x size.

    Images that do not decode tell nothing.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    for i in sample_positions(len(faces)):
        try:
            height, width = decode_rgb(faces.encoded(i), "").shape[:2]
        except (ImageError, RecordError, OSError):
            continue
        shapes[width, height] += 1
    seen, fitting = shapes.total(), shapes.pop((size, size), 0)
    if shapes and (not fitting or (seen - fitting) * len(faces) > most * seen):
        (width, height), count = shapes.most_common(1)[0]
        raise FaceSetError(
            f"{faces.path}: {seen - fitting} of {seen} images that were looked at do not have {size}x{size} pixels; "
            f"{count} have {width}x{height}: align the set, set data.image_size, or let data.resize scale its images"
        )
