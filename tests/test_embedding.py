"""Embeddings of whole sets: each in its place, and the pairs of a verification set as they are listed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.images import encode_png
from data.verification_bin import PairImages, VerificationPairs
from models.embedding import embed_images
from utils.evaluation.verification import verify


class Compass:
    """An embedder whose unit vector points where the image's grey says: 0..255 is 0..255 degrees."""

    name, runs_on, image_size, device, fingerprint = "compass", "paper", 8, torch.device("cpu"), "compass"

    def features(self, faces: torch.Tensor, mirror: bool) -> torch.Tensor:
        angle = faces[:, 0, 0, 0].float().deg2rad()
        return torch.stack((angle.cos(), angle.sin()), 1)


GREYS = [0, 200, 90, 10, 30, 180, 45, 60]
IMAGES = [encode_png(np.full((8, 8, 3), grey, np.uint8)) for grey in GREYS]


def test_pairs_are_compared_as_listed() -> None:
    """Pair i is images index[i, 0] and index[i, 1], in whatever order and however often images occur."""
    index = np.random.default_rng(0).integers(0, len(GREYS), (30, 2))
    same = np.arange(30) % 2 == 0
    (result,) = verify(Compass(), [VerificationPairs("v", IMAGES, index, same)], 3, 0, mirror=False)
    degrees = np.array(GREYS)[index]
    expected = 2 - 2 * np.cos(np.deg2rad(degrees[:, 0] - degrees[:, 1]))
    np.testing.assert_allclose(result.distances, expected, atol=1e-6)
    assert np.array_equal(result.same, same)


def test_sets_are_verified_in_one_pass() -> None:
    """Each has the result that it has alone, and workers start once: 12 images of two sets make two batches of six."""
    indices = [np.random.default_rng(number).integers(0, number, (30, 2)) for number in (8, 4)]
    same = np.arange(30) % 2 == 0
    sets = [VerificationPairs("v", IMAGES[-len(np.unique(index)) :], index, same) for index in indices]
    polls: list[None] = []
    together = verify(Compass(), sets, 6, 0, mirror=False, poll=lambda: polls.append(None))
    assert len(polls) == 2
    for pairs, result in zip(sets, together, strict=True):
        (alone,) = verify(Compass(), [pairs], 6, 0, mirror=False)
        assert np.array_equal(result.distances, alone.distances)
    assert not np.array_equal(together[0].distances, together[1].distances)
    assert verify(Compass(), [], 6, 0, mirror=False) == []


def test_embeddings_keep_the_order_of_the_images() -> None:
    """Row i is image i, with a last batch that is not full and with worker processes."""
    pairs = VerificationPairs("v", IMAGES, np.arange(8).reshape(4, 2), np.ones(4, bool))
    for workers in (0, 2):
        embeddings = embed_images(Compass(), PairImages(pairs), 3, workers, False, "v")
        degrees = np.rad2deg(np.arctan2(embeddings[:, 1], embeddings[:, 0])) % 360
        np.testing.assert_allclose(degrees, GREYS, atol=1e-3)


def test_the_bar_ends_when_the_images_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A log file's last line is not "0%" or "96%", though nobody asks again after the last batch."""
    pairs = VerificationPairs("v", IMAGES, np.arange(8).reshape(4, 2), np.ones(4, bool))
    for number, options in enumerate(({"batch_size": 3}, {"batch_size": 99}, {"batch_size": 3, "cache": tmp_path})):
        embed_images(Compass(), PairImages(pairs), workers=0, mirror=False, title=f"bar {number}", **options)
        last = [line for line in capsys.readouterr().err.splitlines() if line.startswith(f"bar {number}")][-1]
        assert "100%" in last
        assert "8/8" in last
