"""Whether the images of a set have the size that they are wanted in, as far as a sample of them tells."""

from collections import Counter

from data.face_sets import FaceSet, FaceSetError
from data.images import ImageError, decode_rgb
from data.images_fingerprint import sample_positions
from data.recordio import RecordError


def require_size(faces: FaceSet, size: int, most: int, resize: bool) -> None:
    """Raise FaceSetError when more than `most` of the images, or all, seem to be of another size than size x size.

    With `resize` square images of any size will do. Images that do not decode tell nothing.
    """
    shapes: Counter[tuple[int, int]] = Counter()
    for i in sample_positions(len(faces)):
        try:
            height, width = decode_rgb(faces.encoded(i), "").shape[:2]
        except (ImageError, RecordError, OSError):
            continue
        shapes[width, height] += 1
    seen = shapes.total()
    square = [shape for shape in shapes if shape[0] == shape[1]]
    fitting = sum(shapes.pop(shape, 0) for shape in (square if resize else [(size, size)]))
    if shapes and (not fitting or (seen - fitting) * len(faces) > most * seen):
        (width, height), count = shapes.most_common(1)[0]
        wanted = "are not square" if resize else f"do not have {size}x{size} pixels"
        square_too = ", set data.image_size, or let data.resize scale its images" if width == height else ""
        raise FaceSetError(
            f"{faces.path}: {seen - fitting} of {seen} images that were looked at {wanted}; {count} have "
            f"{width}x{height}: align the set{square_too or ' (data/pack_set.py)'}"
        )
