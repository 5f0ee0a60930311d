"""Images: decoded to RGB, told by their bytes, refused when they are none."""

import struct
import zlib
from unittest.mock import patch

import cv2
import numpy as np
import pytest

from data.images import JPEG_END, ImageError, decode_plain_jpegs, decode_rgb, encode_jpeg, encode_png, image_extension


def test_colours_are_rgb() -> None:
    """Red is the first channel on the way in and out; PNG keeps every value, JPEG nearly."""
    image = np.full((16, 16, 3), (200, 30, 60), np.uint8)
    assert np.array_equal(decode_rgb(encode_png(image), "x"), image)
    assert np.abs(decode_rgb(encode_jpeg(image, quality=95), "x").astype(int) - image).max() <= 4
    # A PNG by hand, one pixel of pure red, so that encoder and decoder cannot be wrong together.
    red = _png(1, 1, b"\0\xff\0\0")
    assert decode_rgb(red, "x").tolist() == [[[255, 0, 0]]]


def test_grey_is_repeated_over_the_channels() -> None:
    """A grey image (PNG colour type 0) still gives three channels."""
    assert decode_rgb(_png(1, 1, b"\0\x80", colour_type=0), "x").tolist() == [[[128, 128, 128]]]


def test_extension_follows_the_bytes() -> None:
    """PNG is told from JPEG by its signature, not by where it came from."""
    image = np.zeros((8, 8, 3), np.uint8)
    assert image_extension(encode_png(image)) == ".png"
    assert image_extension(encode_jpeg(image)) == ".jpg"


@pytest.mark.parametrize("encoded", [b"", b"no image", b"\xff\xd8\xff", encode_png(np.zeros((8, 8, 3), np.uint8))[:20]])
def test_what_is_no_image(encoded: bytes) -> None:
    """Undecodable bytes are an error with the image's name and their number."""
    with pytest.raises(ImageError, match=rf"set\.rec, record 7: its {len(encoded)} bytes are no image"):
        decode_rgb(encoded, "set.rec, record 7")


@pytest.mark.parametrize("side", [17_000, 100_000])
def test_image_whose_header_claims_a_gigantic_size(side: int) -> None:
    """A few bytes can claim to be gigabytes of pixels: refused by the header, before memory is taken for them."""
    with pytest.raises(ImageError, match=r"record 7: its \d+ bytes claim to be a gigantic image"):
        decode_rgb(_png(side, side, b"\0"), "record 7")
    jpeg = bytearray(encode_jpeg(np.zeros((8, 8, 3), np.uint8)))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", *[min(side, 65_000)] * 2)
    assert decode_plain_jpegs([np.frombuffer(jpeg, np.uint8)], np.zeros((1, 8, 8, 3), np.uint8)) == [0]
    with pytest.raises(ImageError, match="claim to be a gigantic image"):
        decode_rgb(bytes(jpeg), "record 7")


@pytest.mark.parametrize("bits", [0x20, 0x80, 0xFF])
def test_a_png_with_a_damaged_length(bits: int) -> None:
    """OpenCV takes gigabytes of memory, and seconds, for what one damaged byte says of a chunk: it does not get such an
    image, nor one that ends as JPEGs do."""
    png = bytearray(encode_png(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)))
    assert len(png) > 8192, "several chunks"
    decode_rgb(bytes(png) + b"behind its end\xff\xff\xff\xff", "png")
    for chunk in (33, 33 + 12 + int.from_bytes(png[33:37], "big")):
        damaged = png.copy()
        damaged[chunk] |= bits
        damaged += JPEG_END
        with patch.object(cv2, "imdecode", side_effect=AssertionError("OpenCV got it")):
            with pytest.raises(ImageError, match=rf"record 7: its {len(damaged)} bytes are no image .* a chunk of its"):
                decode_rgb(bytes(damaged), "record 7")
            assert decode_plain_jpegs([np.frombuffer(damaged, np.uint8)], np.zeros((1, 64, 64, 3), np.uint8)) == [0]


def test_photos_of_large_cameras_are_decoded() -> None:
    """Those of 100 million pixels are below the limit: the header is not what is wrong with this one."""
    with pytest.raises(ImageError, match="are no image that OpenCV can decode"):
        decode_rgb(_png(11_648, 8_736, b""), "photo")


def _png(width: int, height: int, pixels: bytes, colour_type: int = 2) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")
