"""Augmentations of published recipes, a batch at a time on the device that holds it; off unless settings ask for them.

Crop, low resolution and colour are those of AdaFace (Kim et al., CVPR 2022, arXiv:2204.00964, section 4.1 and its
published code), which uses each with probability 0.2; the blur has the strengths of SimCLR (Chen et al.,
arXiv:2002.05709, appendix A). A face can get several, in the order crop, blur, low resolution, colour, grey.

Where this departs from AdaFace's code: brightness, contrast and saturation come in this order, not a random one; pixels
are rounded once, at the end; nearest neighbours are taken at pixel centres, which shifts nothing; Lanczos is left out
for cubic, and area for nearest when enlarging.

What happens to a face is decided by seed, epoch, batch and place in the batch alone: neither the device nor the number
of workers or ranks, nor which other augmentations are on, changes it.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from utils.devices import full_precision

AREA = (0.2, 1.0)  # what a crop keeps of the picture
ASPECT = (3 / 4, 4 / 3)  # width over height of a crop
SCALE = (0.2, 1.0)  # side of the reduced picture over that of the whole one
SIGMA = (0.1, 2.0)  # of the blur, pixels
COLOUR = (0.5, 1.5)  # factors on brightness, contrast and saturation
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in OpenCV, Pillow and torchvision

NEAREST, LINEAR, CUBIC, SHRINK_BY_AREA = range(4)
_CROP_TRIES = 10  # torchvision's
_STREAM = 2  # of random numbers; loading.py has 1, models/losses/elasticface.py 3


class Chances(NamedTuple):
    """Probability of each augmentation, from 0 to 1."""

    crop: float = 0.0
    blur: float = 0.0
    low_resolution: float = 0.0
    colour: float = 0.0
    grey: float = 0.0


class Draws(NamedTuple):
    """What is done to each face of a batch, float32 [B] each; in brackets what leaves a face as it is.

    `top`, `left`, `bottom`, `right`: pixels that stay, the last two exclusive (all of them); `sigma`: of the blur,
    pixels (0); `scale`: of the reduced picture (1); `shrink`, `enlarge`: the interpolation to it and back, as numbered
    above; `brightness`, `contrast`, `saturation`: factors (1); a saturation of 0 is grey.
    """

    top: Tensor
    left: Tensor
    bottom: Tensor
    right: Tensor
    sigma: Tensor
    scale: Tensor
    shrink: Tensor
    enlarge: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor


def augment(
    faces: Tensor, chances: Chances, seed: int, epoch: int, batch: int, rank: int = 0, ranks: int = 1
) -> Tensor:
    """uint8 [B, H, W, 3] RGB on any device to the same, there; with no chance of anything, `faces` itself.

    Of several `ranks` that share a batch equally, `faces` are those of `rank`: they get what they would in one process.
    """
    if not any(chances):
        return faces
    count, height, width = faces.shape[:3]
    draws = draw(chances, (count * ranks, height, width), seed, epoch, batch)
    own = torch.stack(draws, 1)[rank * count : (rank + 1) * count]
    if faces.is_cuda:
        own = own.pin_memory()  # a large copy from other memory would wait for the steps before
    on_device = own.to(faces.device, non_blocking=True)
    return apply(faces, Draws(*on_device.unbind(1)), chances)


def draw(chances: Chances, shape: tuple[int, ...], seed: int, epoch: int, batch: int) -> Draws:
    """On the CPU, for a batch of `shape` [B, H, W]; every number is drawn, whether an augmentation takes it or not."""
    count, height, width = shape
    generator = np.random.default_rng([seed, epoch, batch, _STREAM])
    crop, blur, low, colour, grey = generator.random((5, count)) < np.array(chances)[:, None]
    boxes = np.where(crop, _crop_boxes(generator, count, height, width), [[0], [0], [height], [width]])
    sigma = np.where(blur, generator.uniform(*SIGMA, count), 0)
    scale = np.where(low, generator.uniform(*SCALE, count), 1)
    shrink = generator.integers(NEAREST, SHRINK_BY_AREA + 1, count)
    enlarge = generator.integers(NEAREST, CUBIC + 1, count)
    colours = np.where(colour, generator.uniform(*COLOUR, (3, count)), 1)
    colours[2, grey] = 0
    drawn = np.vstack([boxes, sigma, scale, shrink, enlarge, colours]).astype(np.float32)
    return Draws(*torch.from_numpy(drawn))


def _crop_boxes(generator: np.random.Generator, count: int, height: int, width: int) -> np.ndarray:
    """Top, left, bottom and right, [4, count], as torchvision's RandomResizedCrop takes them: the first that fits."""
    areas = height * width * generator.uniform(*AREA, (_CROP_TRIES, count))
    aspects = np.exp(generator.uniform(np.log(ASPECT[0]), np.log(ASPECT[1]), (_CROP_TRIES, count)))
    heights, widths = np.round(np.sqrt(areas / aspects)), np.round(np.sqrt(areas * aspects))
    fits = (heights <= height) & (widths <= width)
    first = fits.argmax(0), np.arange(count)
    h = np.where(fits[first], heights[first], height)
    w = np.where(fits[first], widths[first], width)
    top, left = np.floor(generator.random((2, count)) * [height - h + 1, width - w + 1])
    return np.stack([top, left, top + h, left + w])


def apply(faces: Tensor, draws: Draws, chances: Chances) -> Tensor:
    """Does what was drawn, skipping what has no chance: uint8 [B, H, W, 3] RGB to the same, on the device of both."""
    pictures = faces.float()
    if chances.crop:
        pictures = _crop(pictures, draws)
    if chances.blur or chances.low_resolution:
        with full_precision(faces.device):  # whatever the network's products are
            pictures = _resample(pictures, draws)
    if chances.colour or chances.grey:
        pictures = _recolour(pictures, draws)
    return pictures.round_().to(torch.uint8, memory_format=torch.contiguous_format)


def _crop(pictures: Tensor, draws: Draws) -> Tensor:
    """Black outside the box, which stays where it is. float32 [B, H, W, 3]."""
    y, x = (torch.arange(length, device=pictures.device) for length in pictures.shape[1:3])
    rows = (y >= draws.top[:, None]) & (y < draws.bottom[:, None])
    columns = (x >= draws.left[:, None]) & (x < draws.right[:, None])
    return pictures * (rows[:, :, None] & columns[:, None, :])[..., None]


def _resample(pictures: Tensor, draws: Draws) -> Tensor:
    """Blurred, reduced and enlarged again. float32 [B, H, W, 3] in [0, 255].

    All of it is linear and separable: two products with a matrix per face, whatever its sigma, scale and interpolation.
    """
    _, height, width, _ = pictures.shape
    pictures = _product(_low_resolution(draws, height) @ _blur(draws.sigma, height), pictures)
    pictures = pictures.transpose(1, 2)
    pictures = _product(_low_resolution(draws, width) @ _blur(draws.sigma, width), pictures)
    return pictures.transpose(1, 2).clamp_(0, 255)


def _product(matrices: Tensor, pictures: Tensor) -> Tensor:
    """[B, N, N] with the second dimension of [B, N, M, 3]."""
    return (matrices @ pictures.flatten(2)).view(pictures.shape)


def _blur(sigma: Tensor, length: int) -> Tensor:
    """[B, length, length]: a Gaussian about each pixel, of which only what is inside the picture counts."""
    x = torch.arange(length, device=sigma.device)
    distance = (x[:, None] - x) / sigma.clamp(min=1e-3)[:, None, None]
    weights = torch.exp(-0.5 * distance.square())
    return weights / weights.sum(2, keepdim=True)


def _low_resolution(draws: Draws, length: int) -> Tensor:
    """[B, length, length]: reduces and enlarges again."""
    small = (draws.scale * length).long().clamp(min=1)
    whole = torch.full_like(small, length)
    by_area = (draws.shrink == SHRINK_BY_AREA)[:, None, None]
    shrink = torch.where(
        by_area, _area_means(small, length), _interpolation(whole, small, length, draws.shrink.clamp(max=CUBIC))
    )
    return _interpolation(small, whole, length, draws.enlarge) @ shrink


def _area_means(small: Tensor, length: int) -> Tensor:
    """[B, length, length]: `length` pixels to `small` [B] means, as OpenCV's INTER_AREA; more rows mean nothing."""
    x = torch.arange(length, device=small.device)
    ratio = (length / small)[:, None, None]
    start, end = x[:, None] * ratio, (x[:, None] + 1) * ratio
    return (torch.minimum(end, x + 1) - torch.maximum(start, x)).clamp_(min=0) / ratio


def _interpolation(source: Tensor, target: Tensor, length: int, method: Tensor) -> Tensor:
    """[B, length, length]: `source` [B] pixels to `target` [B] by `method` [B]; rows from `target` on mean nothing.

    LINEAR and CUBIC as OpenCV's, NEAREST takes the pixel in which the centre of the new one lies: no smoothing when
    reducing, the outermost pixels repeated beyond the border.
    """
    x = torch.arange(length, device=source.device)
    source, target, method = source[:, None], target[:, None], method[:, None]
    doubled = (2 * x + 1) * source  # twice the place in the source, in 1/target pixels, counted from its border
    nearest = torch.div(doubled, 2 * target, rounding_mode="floor")
    below = torch.div(doubled - target, 2 * target, rounding_mode="floor")
    t = (doubled - target - 2 * target * below) / (2 * target)
    first = torch.where(method == NEAREST, nearest, below)
    matrix = torch.zeros(len(source), length, length, device=source.device)
    for tap in (-1, 0, 1, 2):
        weight = torch.where(method == CUBIC, _cubic((t - tap).abs()), (1 - (t - tap).abs()).clamp(min=0))
        weight = torch.where(method == NEAREST, float(tap == 0), weight)
        place = torch.minimum((first + tap).clamp(min=0), source - 1)
        matrix += torch.where(place[:, :, None] == x, weight[:, :, None], 0.0)
    return matrix


def _cubic(distance: Tensor) -> Tensor:
    """Keys' cubic convolution kernel for distances from 0 to 2, with OpenCV's a = -0.75."""
    a, d = -0.75, distance
    near = ((a + 2) * d - (a + 3)) * d * d + 1
    far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return torch.where(d <= 1, near, far)


def _recolour(pictures: Tensor, draws: Draws) -> Tensor:
    """Brightness, contrast about the mean grey, saturation, as in torchvision. float32 [B, H, W, 3] in [0, 255]."""
    brightness, contrast, saturation = (
        factor[:, None, None, None] for factor in (draws.brightness, draws.contrast, draws.saturation)
    )
    pictures = (pictures * brightness).clamp_(0, 255)
    pictures = _mix(pictures, _grey(pictures).mean((1, 2), keepdim=True), contrast)
    return _mix(pictures, _grey(pictures), saturation)


def _mix(pictures: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """`share` of the pictures and the rest of the other; beyond 1, away from it."""
    return (pictures * share + other * (1 - share)).clamp_(0, 255)


def _grey(pictures: Tensor) -> Tensor:
    """float32 [B, H, W, 1]."""
    red, green, blue = (weight * pictures[..., i] for i, weight in enumerate(LUMA))
    return (red + green + blue)[..., None]
