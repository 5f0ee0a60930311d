"""JPEGs decoded by the GPU: the workers hand over the bytes as they are stored, the main process decodes a batch.

For training alone: a GPU's pixels differ a little from OpenCV's, so whatever is tested is decoded by OpenCV. The
decoder is `torchcodec.decoders.decode_jpeg`, with nvJPEG underneath; torchvision's, deprecated since its version 0.29,
names it as its successor. torchcodec is an optional package.
"""

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.images import ImageError, decode_face, plain_jpeg_size
from utils.settings import ConfigError

Decoder = Callable[[list[Tensor]], list[Tensor]]


class EncodedBatch(NamedTuple):
    """`content`: the images one after the other, uint8; image b is `content[offsets[b]:offsets[b + 1]]`, offsets int64
    [B + 1]; `positions`: int64 [B], of the images in their set; `plain`: bool [B], whether it is a JPEG of the wanted
    size, by its header, that is whole and to be taken as it lies; `unreadable`: what is wrong, by b, with images that
    could not be read and are empty here."""

    content: Tensor
    offsets: np.ndarray
    positions: np.ndarray
    plain: np.ndarray
    unreadable: Mapping[int, str]


def join_encoded(
    images: Sequence[bytes],
    positions: Sequence[int],
    size: int,
    unreadable: Mapping[int, str],
    empty: Callable[[tuple[int, ...]], Tensor],
) -> EncodedBatch:
    """Put encoded images, wanted in size x size pixels, into one batch; `empty` makes its uint8 tensor of a shape."""
    offsets = np.cumsum([0, *(len(image) for image in images)])
    content = empty((int(offsets[-1]),))
    content.numpy()[:] = np.frombuffer(b"".join(images), np.uint8)
    plain = np.array([plain_jpeg_size(image) == (size, size) for image in images])
    return EncodedBatch(content, offsets, np.asarray(positions, np.int64), plain, unreadable)


def decode_jpegs(
    batch: EncodedBatch, size: int, device: torch.device, resize: bool, describe: Callable[[int], str]
) -> tuple[Tensor, dict[int, str]]:
    """uint8 [B, size, size, 3] RGB on `device`, and what is wrong with the rows that are broken and zero.

    On CUDA the GPU decodes the plain JPEGs that it can; OpenCV decodes the rest, or says what is wrong with them: other
    formats, what is cut off, claims another size, or has EXIF (OpenCV turns pictures as that says, a GPU does not), and
    what the GPU refuses. On the CPU OpenCV decodes all.
    `describe` names an image by its position.
    """
    count = len(batch.positions)
    jpegs = [batch.content[start:end] for start, end in zip(batch.offsets, batch.offsets[1:], strict=False)]
    faces = torch.zeros((count, size, size, 3), dtype=torch.uint8, device=device)
    decoder = device_decoder(device)
    rows = np.flatnonzero(batch.plain).tolist() if decoder else []
    decoded = decode_what_can_be(decoder, [jpegs[row] for row in rows]) if decoder and rows else []
    fits = {row: face for row, face in zip(rows, decoded, strict=True) if face is not None}
    fits = {row: face for row, face in fits.items() if face.shape == (3, size, size)}
    if fits:
        faces[torch.tensor([*fits], device=device)] = torch.stack([*fits.values()]).permute(0, 2, 3, 1)

    broken = dict(batch.unreadable)
    done = fits.keys() | broken.keys()
    for row in range(count):
        if row not in done:
            try:
                face = decode_face(bytes(jpegs[row].numpy()), size, resize, describe(int(batch.positions[row])))
                faces[row] = torch.from_numpy(face)
            except ImageError as error:
                broken[row] = str(error)
    return faces, dict(sorted(broken.items()))


def decode_what_can_be(decode: Decoder, jpegs: list[Tensor]) -> list[Tensor | None]:
    """`decode(jpegs)`, with None for images that it refuses; it may raise RuntimeError for all because of one."""
    try:
        return [*decode(jpegs)]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        if len(jpegs) == 1:
            return [None]
    half = len(jpegs) // 2
    return decode_what_can_be(decode, jpegs[:half]) + decode_what_can_be(decode, jpegs[half:])


def device_decoder(device: torch.device) -> Decoder | None:
    """What decodes JPEGs, uint8 [bytes] on the CPU, to uint8 [3, H, W] RGB on a CUDA device; None for the CPU.

    Raises ConfigError, saying what to install, when it is not there.
    """
    if device.type != "cuda":
        return None
    try:
        decode_jpeg = importlib.import_module("torchcodec.decoders").decode_jpeg
    except (ImportError, AttributeError, OSError) as error:  # not there, older, or built for another torch
        install = "pip install 'torchcodec>=0.16'"
        raise ConfigError(f"data.decode: gpu needs torchcodec ({install}), or set it to cpu: {error}") from None
    return lambda jpegs: decode_jpeg(jpegs, mode="RGB", device=device)
