"""Encoded images to pixels and back, always RGB.

OpenCV is BGR unless told otherwise; this is the one place that tells it.
"""

import re
from collections.abc import Sequence

import cv2
import numpy as np

JPEG_START, JPEG_END = b"\xff\xd8", b"\xff\xd9"
_PNG_START, _PNG_END = b"\x89PNG\r\n\x1a\n", b"IEND"
# Not within what is compressed, where no others occur: 0xff itself, as ff 00, and those of restarts, ff d0 to ff d7.
_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")
# What follows ff: markers of a frame's header, which has its size; what comes after all headers.
_FRAMES = frozenset(bytes([kind]) for kind in range(0xC0, 0xD0) if kind not in (0xC4, 0xC8, 0xCC))
_SCAN_OR_END = frozenset((b"\xda", b"\xd9"))
EXTENSIONS = (".jpg", ".png", ".bmp", ".webp")


class ImageError(ValueError):
    """An image cannot be decoded or has the wrong size; the message says which."""


def decode_rgb(encoded: bytes, where: object) -> np.ndarray:
    """Decode JPEG, PNG or whatever OpenCV reads.

    Returns uint8 [height, width, 3], RGB (grey images are repeated over the channels).
    `where`, as text, names the image in the ImageError that undecodable bytes raise, and a JPEG that was cut off.
    """
    # Some versions of OpenCV fill up a cut JPEG with grey. Its end marker follows the start of its last scan.
    is_jpeg = encoded.startswith(JPEG_START)
    if is_jpeg and encoded.rfind(JPEG_END) < encoded.rfind(b"\xff\xda") and not _has_end(encoded):
        raise ImageError(f"{where}: its JPEG of {len(encoded)} bytes has no end: it was cut off")
    if encoded.startswith(_PNG_START) and _has_overlong_chunk(encoded):
        raise ImageError(
            f"{where}: its {len(encoded)} bytes are no image that OpenCV can decode: a chunk of its PNG is "
            "longer than what is left of them"
        )
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error as error:
        if "MAX_IMAGE" in str(error):
            raise ImageError(
                f"{where}: its {len(encoded)} bytes claim to be a gigantic image: not decoded "
                "(OPENCV_IO_MAX_IMAGE_PIXELS in the environment says how many pixels are allowed)"
            ) from None
        image = None  # there are no bytes at all
    if image is None:
        raise ImageError(f"{where}: its {len(encoded)} bytes are no image that OpenCV can decode")
    return image


def _has_overlong_chunk(png: bytes) -> bool:
    """Whether the length of a chunk is beyond the end: decoders take memory for it, gigabytes for one damaged bit."""
    place = len(_PNG_START)
    while place + 8 <= len(png):
        length = int.from_bytes(png[place : place + 4], "big")
        if place + 8 + length > len(png):
            return True
        if png[place + 4 : place + 8] == _PNG_END:
            break
        place += length + 12  # with its kind and checksum
    return False


def _has_end(jpeg: bytes) -> bool:
    """Whether a JPEG has its end marker, whatever follows it: phones append a film, with any bytes in it."""
    place = 2
    while marker := _MARKER.search(jpeg, place):
        if marker[0] == JPEG_END:
            return True
        place = marker.end() + int.from_bytes(jpeg[marker.end() : marker.end() + 2], "big")  # of a segment
    return False


def plain_jpeg_size(encoded: bytes) -> tuple[int, int] | None:
    """Width and height that a JPEG claims in its header.

    None for other formats, for one that does not end with its end marker, and for one with EXIF, which may say that it
    is to be turned.
    """
    if not encoded.startswith(b"\xff\xd8\xff") or not encoded.endswith(JPEG_END):
        return None
    place, size = 2, None
    while encoded[place : place + 1] == b"\xff":
        kind, length = encoded[place + 1 : place + 2], int.from_bytes(encoded[place + 2 : place + 4], "big")
        if kind in _SCAN_OR_END:
            return size
        if encoded[place + 4 : place + 8] == b"Exif":
            return None
        if kind in _FRAMES:
            height, width = (int.from_bytes(encoded[at : at + 2], "big") for at in (place + 5, place + 7))
            size = width, height
        place += 2 + length
    return None


def decode_plain_jpegs(jpegs: Sequence[np.ndarray | None], faces: np.ndarray) -> list[int]:
    """Decode images (uint8 [bytes], not copied) into the rows of `faces`, uint8 [images, height, width, 3], RGB.

    The pixels are those of `decode_rgb`. Returns the rows that are not filled: of None, and of all that is no sound
    JPEG of that size which ends with its end marker. `decode_face` takes these, or says what is wrong with them.
    """
    left, shape, image = [], faces.shape[1:], None
    for row, jpeg in enumerate(jpegs):  # this runs for every image of every epoch: no call more than it needs
        image = None  # its memory, warm in the cache, is the next one's
        if jpeg is not None and jpeg[-2:].tobytes() == JPEG_END and jpeg[:2].tobytes() == JPEG_START:
            try:
                image = cv2.imdecode(jpeg, cv2.IMREAD_COLOR_RGB)
            except cv2.error:  # its header claims a gigantic size
                image = None
        if image is not None and image.shape == shape:
            faces[row] = image
        else:
            left.append(row)
    return left


def decode_face(encoded: bytes, size: int, resize: bool, where: object) -> np.ndarray:
    """Decode a face: uint8 [size, size, 3], RGB.

    A square one of another size is scaled with `resize`; others raise ImageError, as undecodable bytes do.
    """
    image = decode_rgb(encoded, where)
    height, width = image.shape[:2]
    if height == width == size:
        return image
    if resize and height == width:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    if resize:
        raise ImageError(
            f"{where} is {width}x{height} pixels: resizing it to a square would distort the face: align the set, or "
            "crop its images (data/pack_set.py)"
        )
    raise ImageError(
        f"{where} is {width}x{height} pixels, expected {size}x{size}: "
        f"align the set, or write it anew with data/pack_set.py --image-size {size} --other-sizes resize (a .bin: "
        "data/pack_bin.py); training may have another data.image_size; data.resize scales training images only"
    )


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """Encode uint8 [height, width, 3] RGB as JPEG of `quality` 1..100."""
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3] RGB as PNG, little compressed: more makes photos a tenth smaller, and takes three
    times as long."""
    strategy = [cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_DEFAULT]
    return _encode(".png", image, [cv2.IMWRITE_PNG_COMPRESSION, 1, *strategy])


def _encode(extension: str, image: np.ndarray, options: list[int]) -> bytes:
    done, encoded = cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ImageError(f"OpenCV could not encode an image of shape {image.shape}, {image.dtype}")
    return encoded.tobytes()


def image_extension(encoded: bytes) -> str:
    """The file name's ending that fits the bytes: one of EXTENSIONS, `.jpg` when they say nothing else."""
    if encoded.startswith(b"\x89PNG"):
        return ".png"
    if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
        return ".webp"
    return ".bmp" if encoded.startswith(b"BM") else ".jpg"
