"""The demo set's faces and the net that learns them."""

import hashlib
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.synthetic_faces import draw_face, draw_jpeg
from models.backbones.demonet import DemoNet

REPOSITORY = Path(__file__).resolve().parent.parent


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a.astype(float) - b.astype(float)).mean())


def test_same_arguments_give_the_same_pixels_in_any_order() -> None:
    """A set is drawn by several workers, so a picture must not depend on what was drawn before it."""
    wanted = [(0, 0), (0, 1), (7, 3), (12345, 2)]
    forwards = {key: draw_face(*key) for key in wanted}
    backwards = {key: draw_face(*key) for key in reversed(wanted)}
    assert all(np.array_equal(forwards[key], backwards[key]) for key in wanted)


def test_a_fresh_process_draws_the_same_file() -> None:
    """A demo set made tomorrow is the one made today, to the byte."""
    program = (
        "import hashlib; from data.synthetic_faces import draw_jpeg; "
        "print(hashlib.sha256(draw_jpeg(3, 5, seed=2)).hexdigest())"
    )
    fresh = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert fresh.stdout.strip() == hashlib.sha256(draw_jpeg(3, 5, seed=2)).hexdigest()


@pytest.mark.parametrize("size", [64, 112, 160])
def test_shape_and_dtype(size: int) -> None:
    """What reads the set relies on uint8 [size, size, 3], and on a picture that is not blank."""
    face = draw_face(1, 1, size=size)
    assert face.shape == (size, size, 3)
    assert face.dtype == np.uint8
    assert face.std() > 5


def test_size_changes_the_resolution_and_not_the_picture() -> None:
    """A face of another size is the same person in the same pose."""
    large = cv2.resize(draw_face(4, 2, size=224), (56, 56), interpolation=cv2.INTER_AREA)
    small = cv2.resize(draw_face(4, 2), (56, 56), interpolation=cv2.INTER_AREA)
    assert _distance(large, small) < 5


def test_shots_people_and_seeds_all_differ() -> None:
    """No two pictures of a set repeat each other; `shot` 0 of a person must not equal the person's stream."""
    pictures = [draw_face(p, s, seed) for p in range(4) for s in range(4) for seed in range(2)]
    gaps = [_distance(a, b) for i, a in enumerate(pictures) for b in pictures[:i]]
    assert min(gaps) > 5


def test_a_mirrored_face_is_another_picture() -> None:
    """Mirroring, in training and in testing, has an effect: faces are not drawn symmetric."""
    face = draw_face(2, 0)
    assert _distance(face, face[:, ::-1]) > 5


def test_jpeg_is_the_drawn_face() -> None:
    """The file holds RGB colours the right way round, with no more than JPEG's own loss."""
    for shot in range(6):
        bgr = cv2.imdecode(np.frombuffer(draw_jpeg(9, shot), np.uint8), cv2.IMREAD_COLOR)
        assert bgr is not None
        assert _distance(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), draw_face(9, shot)) < 8


def test_jpeg_quality_varies() -> None:
    """Compression is part of what a net has to see through."""
    sizes = [len(draw_jpeg(9, shot)) for shot in range(12)]
    assert max(sizes) > 1.5 * min(sizes)


@pytest.mark.parametrize(("size", "features"), [(112, 128), (64, 32), (128, 512)])
def test_net_embeds_faces_of_several_sizes(size: int, features: int) -> None:
    """Any side that is a multiple of 16 gives [batch, embedding_size]."""
    net = DemoNet(features, size).eval()
    assert net(torch.zeros(2, 3, size, size)).shape == (2, features)


def test_net_is_small_and_learns_everywhere() -> None:
    """The demo is a matter of minutes only while the net is small; a parameter without gradient is dead."""
    torch.manual_seed(0)
    net = DemoNet()
    assert sum(parameter.numel() for parameter in net.parameters()) < 1_000_000
    faces = np.stack([draw_face(person, 0) for person in range(4)])
    embeddings = net(torch.from_numpy(faces).permute(0, 3, 1, 2).float() / 127.5 - 1)
    (embeddings * torch.randn(embeddings.shape)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in net.parameters())
