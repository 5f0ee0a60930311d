"""Alignment: the least-squares similarity, and the crops that it makes of real photos."""

import csv
from pathlib import Path

import numpy as np
import pytest

from data.align import TEMPLATE, align, check_landmarks, similarity_transform
from data.images import decode_rgb, encode_jpeg


def moved(points: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return points @ matrix[:, :2].T + matrix[:, 2]


def random_similarity(rng: np.random.Generator) -> np.ndarray:
    angle, scale = rng.uniform(-np.pi, np.pi), rng.uniform(0.1, 5)
    turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return np.column_stack([turn, rng.uniform(-200, 200, 2)])


@pytest.mark.parametrize("seed", range(20))
def test_a_similarity_is_found_again(seed: int) -> None:
    """Points that were turned, scaled and shifted come back exactly, by any angle."""
    matrix = random_similarity(np.random.default_rng(seed))
    found = similarity_transform(TEMPLATE, moved(TEMPLATE, matrix))
    assert found.shape == (2, 3)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, matrix, atol=1e-10)


@pytest.mark.parametrize("seed", range(20))
def test_least_squares(seed: int) -> None:
    """For points that fit no similarity, the result is the solution of the linear system in (a, b, tx, ty).

    A turn with scale is [[a, -b], [b, a]], so least squares over it is linear: an independent way to the same optimum.
    """
    rng = np.random.default_rng(seed)
    source = moved(TEMPLATE, random_similarity(rng)) + rng.normal(0, 8, (5, 2))
    system = np.zeros((10, 4))
    system[0::2] = np.column_stack([source[:, 0], -source[:, 1], np.ones(5), np.zeros(5)])
    system[1::2] = np.column_stack([source[:, 1], source[:, 0], np.zeros(5), np.ones(5)])
    (a, b, tx, ty), *_ = np.linalg.lstsq(system, TEMPLATE.ravel(), rcond=None)
    np.testing.assert_allclose(similarity_transform(source, TEMPLATE), [[a, -b, tx], [b, a, ty]], atol=1e-9)


def test_no_mirroring() -> None:
    """Landmarks of a mirrored face are turned and scaled as well as it goes, never mirrored."""
    mirrored = TEMPLATE * [-1, 1]
    matrix = similarity_transform(mirrored, TEMPLATE)
    assert np.linalg.det(matrix[:, :2]) > 0


@pytest.mark.parametrize("points", [np.ones((5, 2)), np.full((5, 2), np.nan), TEMPLATE * np.inf])
def test_points_without_a_transform(points: np.ndarray) -> None:
    """Five equal points, and points that are none, are an error and not a matrix of NaN."""
    with pytest.raises(ValueError, match="finite and not all the same"):
        similarity_transform(points, TEMPLATE)


def test_landmarks_at_the_template_change_nothing() -> None:
    """A face that is aligned already keeps every pixel; another size scales template and face alike."""
    image = np.random.default_rng(0).integers(0, 256, (112, 112, 3), np.uint8)
    assert np.array_equal(align(image, TEMPLATE), image)
    twice = align(image, TEMPLATE, 224)
    assert twice.shape == (224, 224, 3)
    assert np.array_equal(twice[:222:2, :222:2], image[:111, :111])


def test_large_faces_are_averaged() -> None:
    """Of a face as large photos have it every pixel counts: noise that means nothing leaves no trace."""
    face = np.random.default_rng(0).integers(60, 196, (112, 112, 3), np.uint8)
    noise = np.tile([50, -50, -50, 50, 50, -50, -50, 50], 112)[:, None]
    photo = (face.repeat(8, axis=0).repeat(8, axis=1) + noise).astype(np.uint8)
    points = (TEMPLATE + 0.5) * 8 - 0.5
    assert np.array_equal(align(photo, points), face)
    published = align(photo, points, shrink=False).astype(int)
    assert np.abs(published - face).mean() > 10, "which looks at four pixels of 64"


@pytest.mark.parametrize(("height", "width"), [(2003, 897), (901, 2311)])
def test_large_photos_of_any_size_keep_the_place_of_the_face(height: int, width: int) -> None:
    """Sides that are no multiple of what they are divided by move nothing: smooth photos come out the same."""
    y, x = np.indices((height, width))
    photo = np.stack([x * 255 / width, y * 255 / height, (x + y) * 255 / (width + height)], axis=-1).astype(np.uint8)
    points = (TEMPLATE + 0.5) * 7.6 - 0.5
    difference = align(photo, points).astype(int) - align(photo, points, shrink=False)
    assert np.abs(difference[:-2, :-2]).max() <= 1
    assert np.abs(difference.mean(axis=(0, 1))).max() < 0.6, "the rounding of the photo's means"


def test_faces_less_than_twice_as_large_are_as_published() -> None:
    """Their pixels stay those that networks were trained on."""
    photo = np.random.default_rng(0).integers(0, 256, (300, 300, 3), np.uint8)
    points = TEMPLATE * 1.99
    assert np.array_equal(align(photo, points), align(photo, points, shrink=False))
    assert not np.array_equal(align(photo, points * 1.01), align(photo, points * 1.01, shrink=False))


def test_outside_of_the_photo_is_black() -> None:
    """A face at the photo's edge is filled up with black, as in published sets."""
    face = align(np.full((112, 112, 3), 200, np.uint8), TEMPLATE - [40, 0])
    assert (face[:, :39] == 0).all()
    assert (face[:, 41:] == 200).all()


def test_known_crops_of_real_photos(face_data: Path) -> None:
    """60 LFW photos come out as the crops that an independent aligner made of them and saved at JPEG quality 85.

    Measured mean absolute difference of a pixel, of 255: 1.45 to 2.61 as aligned, 0.82 to 1.37 after the same JPEG
    compression; with landmarks half a pixel off, the latter would be 2.16 to 5.13.
    """
    plain, compressed = [], []
    with (face_data / "lfw_raw" / "landmarks.csv").open() as file:
        for row in csv.DictReader(file):
            points = np.array([(float(row[f"x{k}"]), float(row[f"y{k}"])) for k in range(1, 6)])
            photo = decode_rgb((face_data / "lfw_raw" / row["path"]).read_bytes(), row["path"])
            crop = face_data / "lfw" / "images" / row["name"] / row["path"]
            known = decode_rgb(crop.read_bytes(), row["path"]).astype(int)
            face = align(photo, points)
            plain.append(np.abs(face - known).mean())
            compressed.append(np.abs(decode_rgb(encode_jpeg(face, 85), row["path"]) - known).mean())
            wrong = align(photo, points + 0.5)
            assert np.abs(decode_rgb(encode_jpeg(wrong, 85), row["path"]) - known).mean() > 1.9
    assert len(plain) == 60
    assert max(plain) < 3.0
    assert max(compressed) < 1.7


def test_landmarks_that_are_no_landmarks(face_data: Path) -> None:
    """Fractions of the photo's size, and left and right as the person has them, are refused, in each photo; landmarks
    of faces, turned and upside down too, are not."""
    with (face_data / "lfw_raw" / "landmarks.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 60
    for row in rows:
        points = np.array([(float(row[f"x{i}"]), float(row[f"y{i}"])) for i in range(1, 6)])
        for turn in np.linspace(0, 2 * np.pi, 5):
            matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
            check_landmarks(points @ matrix.T)
        with pytest.raises(ValueError, match=r"the landmarks span 0\.[1-9]\d* pixels: are they fractions"):
            check_landmarks(points / 250)
        with pytest.raises(ValueError, match="left and right of the landmarks are exchanged"):
            check_landmarks(points[[1, 0, 2, 4, 3]])
        check_landmarks(points.tolist())


@pytest.mark.parametrize("yaw", [60, 75, 85, 95, 100])
def test_landmarks_of_profiles(yaw: float) -> None:
    """Of a head that is turned until the far eye is behind the near one, left and right are not judged."""
    turn, depth = np.deg2rad(yaw), np.array([10, 10, 35, 5, 5])
    across = (TEMPLATE[:, 0] - 56) * np.cos(turn) + depth * np.sin(turn)
    check_landmarks(np.column_stack([across, TEMPLATE[:, 1]]))
