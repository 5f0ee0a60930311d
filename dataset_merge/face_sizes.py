"""Whether the faces of all sets of a merge are of one size, and whole, as far as a sample of them tells."""

from collections.abc import Sequence
from pathlib import Path
from shlex import quote

from data.face_sets import EncodedImages, FaceSet, FaceSetError
from data.images import ImageError, decode_rgb
from data.images_fingerprint import sample_positions


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
    for i in sample_positions(len(images)):
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
