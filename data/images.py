"""Encoded images to pixels and back, always RGB.

OpenCV is BGR unless told otherwise; this is the one place that tells it.
"""

import cv2
import numpy as np


class ImageError(ValueError):
    """An image cannot be decoded or has the wrong size; the message says which."""


def decode_rgb(encoded: bytes, where: object) -> np.ndarray:
    """Decode JPEG, PNG or whatever OpenCV reads.

    Returns uint8 [height, width, 3], RGB (grey images are repeated over the channels).
    `where`, as text, names the image in the ImageError that undecodable bytes raise.
    """
    try:
        image = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR_RGB)
    except cv2.error:  # no bytes at all, or a header that claims a gigantic size
        image = None
    if image is None:
        raise ImageError(f"{where}: its {len(encoded)} bytes are no image that OpenCV can decode")
    return image


def decode_face(encoded: bytes, size: int, resize: bool, where: object) -> np.ndarray:
    """Decode a face: uint8 [size, size, 3], RGB.

    One of another size is scaled with `resize`, else it raises ImageError, as undecodable bytes do.
    """
    image = decode_rgb(encoded, where)
    if image.shape[:2] == (size, size):
        return image
    if resize:
        return cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA)
    raise ImageError(
        f"{where} is {image.shape[1]}x{image.shape[0]} pixels, expected {size}x{size}: "
        "align the set, set data.image_size, or let data.resize scale its images"
    )


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """Encode uint8 [height, width, 3] RGB as JPEG of `quality` 1..100."""
    return _encode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_png(image: np.ndarray) -> bytes:
    """Encode uint8 [height, width, 3] RGB as PNG."""
    return _encode(".png", image, [])


def _encode(extension: str, image: np.ndarray, options: list[int]) -> bytes:
    done, encoded = cv2.imencode(extension, cv2.cvtColor(image, cv2.COLOR_RGB2BGR), options)
    if not done:
        raise ImageError(f"OpenCV could not encode an image of shape {image.shape}, {image.dtype}")
    return encoded.tobytes()


def image_extension(encoded: bytes) -> str:
    """The file name's ending that fits the bytes: `.png` for PNG, else `.jpg`."""
    return ".png" if encoded.startswith(b"\x89PNG") else ".jpg"
