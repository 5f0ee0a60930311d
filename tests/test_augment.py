"""Augmentation: each against OpenCV or numpy one face at a time, and what seed, epoch and batch decide."""

import math

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from data.augment import (
    CUBIC,
    LINEAR,
    NEAREST,
    SHRINK_BY_AREA,
    Chances,
    Draws,
    apply,
    augment,
    draw,
)
from data.loading import flips
from data.synthetic_faces import draw_face

ALL = Chances(1, 1, 1, 1, 1)
ADAFACE = Chances(crop=0.2, low_resolution=0.2, colour=0.2)
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
OPENCV = {
    LINEAR: cv2.INTER_LINEAR,
    CUBIC: cv2.INTER_CUBIC,
    SHRINK_BY_AREA: cv2.INTER_AREA,
}


@pytest.fixture(scope="module")
def faces() -> Tensor:
    """24 drawn faces and noise, which shows every error at a border: uint8 [32, 112, 112, 3]."""
    drawn = np.stack([draw_face(person, 0) for person in range(24)])
    noise = np.random.default_rng(0).integers(0, 256, (8, 112, 112, 3), np.uint8)
    return torch.from_numpy(np.concatenate([drawn, noise]))


def neutral(count: int, height: int = 112, width: int = 112, **changes: Tensor | float) -> Draws:
    """Draws that leave faces as they are, but for the changes."""
    draws = draw(Chances(), (count, height, width), 0, 0, 0)
    return draws._replace(**{name: torch.as_tensor(value).float().expand(count) for name, value in changes.items()})


def off_by(actual: Tensor, expected: np.ndarray) -> float:
    """The largest difference of a value."""
    assert actual.dtype == torch.uint8
    assert actual.shape == expected.shape
    return float(np.abs(actual.numpy() - expected.astype(np.float64)).max())


# --- nothing ----------------------------------------------------------------------------------------------------------


def test_off_does_nothing(faces: Tensor) -> None:
    """Without any chance the faces go through as they are, not even copied."""
    assert augment(faces, Chances(), 0, 0, 0) is faces


@pytest.mark.parametrize("device", DEVICES)
def test_faces_that_are_not_drawn_keep_every_byte(faces: Tensor, device: str) -> None:
    """Going through every augmentation with the numbers that leave a face as it is leaves it to the byte."""
    draws = Draws(*(numbers.to(device) for numbers in neutral(len(faces))))
    assert torch.equal(apply(faces.to(device), draws, ALL).cpu(), faces)


@pytest.mark.parametrize("name", Chances._fields)
def test_only_drawn_faces_change(faces: Tensor, name: str) -> None:
    """With a chance of one half some faces change and the others keep every byte; the faces given are left alone."""
    kept = faces.clone()
    half, always = (augment(faces, Chances(**{name: chance}), 5, 6, 7) for chance in (0.5, 1.0))
    changed = (half != faces).flatten(1).any(1)
    assert 6 < changed.sum() < 26
    assert torch.equal(half[changed], always[changed])
    assert torch.equal(faces, kept)


# --- each against a reference -----------------------------------------------------------------------------------------


def test_crop(faces: Tensor) -> None:
    """Black outside the box, every byte inside it."""
    draws = draw(Chances(crop=1), faces.shape[:3], 1, 2, 3)
    cropped = apply(faces, draws, Chances(crop=1))
    for i in range(len(faces)):
        top, left, bottom, right = (int(side[i]) for side in draws[:4])
        expected = np.zeros((112, 112, 3))
        expected[top:bottom, left:right] = faces[i, top:bottom, left:right]
        assert off_by(cropped[i], expected) == 0


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_blur(faces: Tensor, sigma: float) -> None:
    """OpenCV's Gaussian, over the weight that falls inside the picture."""
    blurred = apply(faces, neutral(len(faces), sigma=sigma), Chances(blur=1))
    size, outside = (41, 41), cv2.BORDER_CONSTANT
    inside = cv2.GaussianBlur(np.ones((112, 112, 1)), size, sigma, borderType=outside)
    for actual, face in zip(blurred, faces.numpy(), strict=True):
        expected = cv2.GaussianBlur(face.astype(np.float64), size, sigma, borderType=outside) / inside[..., None]
        assert off_by(actual, expected) < 0.51


def resize(image: np.ndarray, size: int, method: int) -> np.ndarray:
    """A square image to size x size; nearest by hand, for OpenCV's is off centre."""
    if method == NEAREST:
        nearest = [(2 * i + 1) * len(image) // (2 * size) for i in range(size)]
        return image[nearest][:, nearest]
    return cv2.resize(image, (size, size), interpolation=OPENCV[method])


@pytest.mark.parametrize("shrink", [NEAREST, *OPENCV])
@pytest.mark.parametrize("enlarge", [NEAREST, LINEAR, CUBIC])
def test_low_resolution(faces: Tensor, shrink: int, enlarge: int) -> None:
    """Each interpolation to the small size and back, over all sizes from 22 to 112 pixels."""
    sizes = torch.linspace(22, 112, len(faces)).long()
    draws = neutral(len(faces), scale=(sizes + 0.5) / 112, shrink=shrink, enlarge=enlarge)
    draws.scale[-1] = 1
    reduced = apply(faces, draws, Chances(low_resolution=1))
    for actual, face, size in zip(reduced, faces.numpy(), sizes.tolist(), strict=True):
        small = resize(face.astype(np.float32), size, shrink)
        expected = resize(small, 112, enlarge).clip(0, 255)
        assert off_by(actual, expected) < 0.52


def test_blur_and_low_resolution_remove_detail(faces: Tensor) -> None:
    """Neighbouring pixels become more alike: the stronger the effect, the more."""

    def detail(**changes: float) -> float:
        pixels = apply(faces, neutral(len(faces), **changes), ALL).float()  # type: ignore[arg-type]
        return float(pixels.diff(dim=1).square().mean() + pixels.diff(dim=2).square().mean())

    for name, strengths in (("scale", (1.0, 0.6, 0.2)), ("sigma", (0.0, 0.7, 2.0))):
        details = [detail(shrink=SHRINK_BY_AREA, enlarge=LINEAR, **{name: value}) for value in strengths]
        assert details[0] > 1.5 * details[1] > 2 * details[2]


def test_colour(faces: Tensor) -> None:
    """Brightness, contrast and saturation of one face after the other; a saturation of 0 makes the channels equal."""
    draws = draw(Chances(colour=1), faces.shape[:3], 1, 2, 3)
    draws.saturation[::4] = 0
    changed = apply(faces, draws, Chances(colour=1))
    luma = np.array([0.299, 0.587, 0.114])
    for i, face in enumerate(faces.numpy().astype(np.float64)):
        brightness, contrast, saturation = (float(factor[i]) for factor in draws[-3:])
        face = (face * brightness).clip(0, 255)
        face = (face * contrast + (face @ luma).mean() * (1 - contrast)).clip(0, 255)
        face = (face * saturation + (face @ luma)[..., None] * (1 - saturation)).clip(0, 255)
        assert off_by(changed[i], face) < 0.51


def test_grey(faces: Tensor) -> None:
    """OpenCV's grey in every channel, red weighed as red, even of faces whose colours change."""
    grey = augment(faces, Chances(grey=1), 0, 0, 0)
    for actual, face in zip(grey, faces.numpy(), strict=True):
        expected = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
        assert off_by(actual, np.dstack([expected] * 3)) <= 1
    both = augment(faces, Chances(grey=1, colour=1), 0, 0, 0)
    assert torch.equal(both[..., :1].expand(-1, -1, -1, 3), both)
    assert not torch.equal(both, grey)


def test_other_shapes() -> None:
    """Height and width are not mistaken for each other."""
    faces = torch.randint(0, 256, (16, 40, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    draws = draw(ALL, faces.shape[:3], 0, 0, 0)
    assert (draws.top < draws.bottom).all()
    assert (draws.left < draws.right).all()
    assert 24 < draws.bottom.max() <= 40
    assert draws.right.max() <= 24
    turned = draws._replace(top=draws.left, left=draws.top, bottom=draws.right, right=draws.bottom)
    augmented = apply(faces, draws, ALL)
    assert augmented.shape == faces.shape
    assert augmented.is_contiguous()
    difference = augmented.int() - apply(faces.transpose(1, 2), turned, ALL).transpose(1, 2)
    assert difference.abs().max() <= 1  # the order of sums


# --- chance -----------------------------------------------------------------------------------------------------------


def test_chances_and_ranges() -> None:
    """Over many draws each augmentation is as frequent as asked, and its numbers fill their ranges."""
    chances = Chances(0.1, 0.3, 0.5, 0.7, 0.9)
    count = 20_000
    d = draw(chances, (count, 112, 112), 0, 0, 0)
    area = (d.bottom - d.top) * (d.right - d.left) / 112**2
    happened = [area < 1, d.sigma > 0, d.scale < 1, d.brightness != 1, d.saturation == 0]
    for chance, drawn in zip(chances, happened, strict=True):
        assert abs(float(drawn.float().mean()) - chance) < 4 * math.sqrt(chance * (1 - chance) / count)
    aspect = ((d.right - d.left) / (d.bottom - d.top))[happened[0]]
    changed = happened[3] & ~happened[4]
    for values, low, high in (
        (area[happened[0]], 0.2, 1.0),
        (aspect, 3 / 4, 4 / 3),
        (d.sigma[happened[1]], 0.1, 2.0),
        (d.scale[happened[2]], 0.2, 1.0),
        *((factor[changed], 0.5, 1.5) for factor in (d.brightness, d.contrast, d.saturation)),
    ):
        assert 0.97 * low < values.min() < low + 0.05
        assert high - 0.05 < values.max() < 1.03 * high
    assert d.shrink.unique().tolist() == [NEAREST, LINEAR, CUBIC, SHRINK_BY_AREA]
    assert d.enlarge.unique().tolist() == [NEAREST, LINEAR, CUBIC]


def test_ranks_get_what_one_process_would(faces: Tensor) -> None:
    """Each its own part of the batch, in order."""
    count = len(faces) // 2
    parts = [augment(faces[rank * count :][:count], ALL, 1, 2, 3, rank, 2) for rank in (0, 1)]
    assert torch.equal(torch.cat(parts), augment(faces[: 2 * count], ALL, 1, 2, 3))


def test_crops_reach_every_edge_and_are_as_often_wide_as_tall() -> None:
    """Any place is as likely as another, the last one too; the ratio of the sides is drawn by its logarithm."""
    d = draw(Chances(crop=1), (20_000, 112, 112), 0, 0, 0)
    height, width = d.bottom - d.top, d.right - d.left
    wide, tall = (width > height).sum().item(), (width < height).sum().item()
    assert wide / (wide + tall) == pytest.approx(0.5, abs=0.02)
    for start, end in ((d.top, d.bottom), (d.left, d.right)):
        assert ((start > 0) & (end == 112)).any()
        assert ((start == 0) & (end < 112)).any()


def test_what_is_drawn_has_nothing_to_do_with_flips() -> None:
    """Each kind of random number has a stream of its own: otherwise crops would be of mirrored faces alone."""
    cropped = (
        draw(Chances(crop=0.5), (2000, 112, 112), 1, 2, 3).bottom - draw(Chances(), (2000, 112, 112), 1, 2, 3).bottom
    )
    mirrored = flips(1, 2, 3, 2000)
    assert ((cropped < 0) == mirrored).float().mean().item() == pytest.approx(0.5, abs=0.1)


def test_seed_epoch_and_batch_decide(faces: Tensor) -> None:
    """The same arguments, the same pictures, whatever was drawn elsewhere; another seed, epoch or batch, others."""
    augmented = augment(faces, ALL, 1, 2, 3)
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert torch.equal(augmented, augment(faces, ALL, 1, 2, 3))
    for other in ((2, 2, 3), (1, 3, 3), (1, 2, 4), (3, 2, 1)):
        assert not torch.equal(augmented, augment(faces, ALL, *other))


@pytest.mark.parametrize("name", ADAFACE._fields)
def test_augmentations_do_not_depend_on_each_other(name: str) -> None:
    """Turning one on leaves the others' numbers as they were."""
    alone = draw(ADAFACE, (50, 112, 112), 1, 2, 3)
    others = draw(ADAFACE._replace(**{name: 1.0}), (50, 112, 112), 1, 2, 3)
    same = sum(torch.equal(a, b) for a, b in zip(alone, others, strict=True))
    assert same >= len(alone) - 4


def test_pictures_are_not_rounded_as_networks_are(faces: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """Matrix products of pictures are IEEE float32's in a run that has TF32 for the network's."""
    seen: list[str] = []

    def resample(pictures: Tensor, draws: Draws) -> Tensor:
        seen.append(torch.backends.cuda.matmul.fp32_precision)
        return pictures

    monkeypatch.setattr("data.augment._resample", resample)
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        augment(faces, ALL, 1, 2, 3)
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before
    assert seen == ["ieee"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_cuda_agrees_with_the_cpu(faces: Tensor) -> None:
    """The same pictures on a card, but for rounding, and without waiting for it."""
    on_card = faces.cuda()
    draws = Draws(*(numbers.cuda() for numbers in draw(ALL, faces.shape[:3], 1, 2, 3)))
    apply(on_card, draws, ALL)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmented = apply(on_card, draws, ALL)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert augmented.is_cuda
    assert (augmented.cpu().int() - augment(faces, ALL, 1, 2, 3).int()).abs().max() <= 1
