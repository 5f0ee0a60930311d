"""The warnings of all_pair_test.py: each is provoked, and each is silent where nothing is wrong."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from data.face_sets import images_by_identity, open_face_set
from data.images import decode_rgb, encode_jpeg
from data.synthetic_faces import draw_face
from models.embedders import load_embedder
from ranks import run_on_ranks
from utils.evaluation.alignment import eye_contrast
from utils.evaluation.check_sets import _shared_people
from utils.evaluation.checks import (
    centres,
    check_alignment,
    check_channels,
    check_folds,
    check_precision,
    same_bytes,
    same_pictures,
    sample_pairs,
    sample_people,
    separation_gain,
    shared_names,
    shared_people,
)
from utils.evaluation.hardest import hardest_of_all, hardest_of_pairs
from utils.ranks import Ranks


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def people_vectors(people: int, each: int, noise: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit vectors around a centre for each person, and who is who."""
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(people), each)
    return unit(random.normal(size=(people, 64))[labels] + noise * random.normal(size=(len(labels), 64))), labels


class Images:
    """Encoded images in a list."""

    def __init__(self, images: list[bytes]) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def encoded(self, i: int) -> bytes:
        return self.images[i]

    def describe(self, i: int) -> str:
        return f"image {i}"


def real_faces(folder: Path, count: int) -> np.ndarray:
    """Random faces of a set, uint8 [count, 112, 112, 3] RGB, scaled where they are of another size."""
    faces = open_face_set(folder)
    chosen = np.random.default_rng(0).permutation(len(faces))[:count]
    return np.stack([cv2.resize(decode_rgb(faces.encoded(int(i)), i), (112, 112)) for i in chosen])


def moved(faces: np.ndarray, zoom: float, down: float = 0.0) -> np.ndarray:
    """Faces enlarged around the middle and moved, pixels."""
    matrix = np.float32([[zoom, 0, 56 - 56 * zoom], [0, zoom, 56 - 56 * zoom + down]])
    return np.stack([cv2.warpAffine(face, matrix, (112, 112), borderMode=cv2.BORDER_REPLICATE) for face in faces])


@pytest.mark.parametrize("name", ["lfw/images", "faces_celeba5k", "faces_glint24"])
def test_aligned_faces_are_not_complained_about(face_data: Path, name: str) -> None:
    """Protects real sets, in colour and in grey, from a false alarm; a single kind of light would be one."""
    faces = real_faces(face_data / name, 120)
    for shown in (faces, faces // 3, faces.mean(axis=3, keepdims=True).repeat(3, 3).astype(np.uint8)):
        finding = check_alignment(shown, name)
        assert finding.level == "note", finding
        assert "is aligned" in finding.text


def test_folds_of_one_kind_are_noticed() -> None:
    """Protects from the accuracy of a list that has all pairs of one person first; mixed ones, and LFW's, are fine."""
    turns, first = np.arange(40) % 2 == 0, np.arange(40) < 20
    finding = check_folds(first, "mine")
    assert finding is not None
    assert finding.level == "warning"
    assert "10 of the 10 folds of mine have pairs of one kind only" in finding.text
    assert check_folds(turns, "mine") is None
    assert check_folds(np.tile(np.repeat([True, False], 300), 10), "lfw") is None


@pytest.mark.parametrize(("zoom", "down"), [(0.75, 0), (0.6, 0), (1.0, -8), (1.0, 14)])
def test_another_crop_is_noticed(face_data: Path, zoom: float, down: float) -> None:
    """Protects from accuracies of loose crops and of another template: the crop that is wrong is told."""
    faces = moved(real_faces(face_data / "lfw/images", 120), zoom, down)
    finding = check_alignment(faces, "set")
    assert finding.level == "warning", finding
    found = eye_contrast(faces)
    assert found.zoom > 1.2 if zoom < 1 else found.down * down < 0


def test_real_loose_crops_and_whole_photos_are_noticed(face_data: Path) -> None:
    """Protects users of sets from elsewhere: loose crops, and LFW's originals merely scaled to 112 pixels."""
    assert check_alignment(real_faces(face_data / "kazakh25", 150), "kazakh25").level == "warning"
    photos = [cv2.imread(str(path)) for path in sorted((face_data / "lfw_raw").glob("*.jpg"))]
    scaled = np.stack([cv2.resize(photo[..., ::-1], (112, 112)) for photo in photos if photo is not None])
    assert check_alignment(scaled, "photos").level == "warning"


def test_what_is_no_photo_of_a_face_is_no_warning() -> None:
    """Protects the demo set of drawn faces, and sets too small to judge, from an alarm that means nothing."""
    drawn = np.stack([draw_face(person, shot) for person in range(15) for shot in range(2)])
    noise = np.random.default_rng(0).integers(0, 256, (30, 112, 112, 3)).astype(np.uint8)
    for faces in (drawn, noise, drawn[:5]):
        assert check_alignment(faces, "set").level == "unclear"


def test_swapped_channels_of_real_faces_are_noticed(face_data: Path) -> None:
    """Protects from BGR pixels or weights: the same faces warn when they are swapped, and only then."""
    faces = open_face_set(face_data / "faces_celeba5k")
    people = [positions[:2] for positions in images_by_identity(faces) if len(positions) > 1][:60]
    pixels = np.stack([decode_rgb(faces.encoded(int(i)), i) for pair in people for i in pair])
    embedder = load_embedder(face_data / "models" / "mobilefacenet_y1_128d.onnx", torch.device("cpu"))
    right, wrong = (
        embedder.embed(torch.from_numpy(np.ascontiguousarray(shown)), mirror=False).numpy()
        for shown in (pixels, pixels[..., ::-1])
    )
    sample = sample_people(np.arange(len(pixels)) // 2, len(pixels), 0)
    right, wrong = right[sample.positions], wrong[sample.positions]
    assert check_channels(right, wrong, sample, "set", "model").level == "note"
    assert check_channels(wrong, right, sample, "set", "model").level == "warning"


def test_channels_need_more_than_chance() -> None:
    """Protects from a warning over noise: equally good embeddings of few people hardly ever warn."""
    warned = 0
    for seed in range(20):
        plain, labels = people_vectors(12, 4, 2.0, seed)
        other, _ = people_vectors(12, 4, 2.0, seed + 1000)
        sample = sample_people(labels, 48, 0)
        finding = check_channels(plain[sample.positions], other[sample.positions], sample, "set", "model")
        warned += finding.level == "warning"
    assert warned <= 2
    better, labels = people_vectors(60, 4, 1.0)
    worse, _ = people_vectors(60, 4, 3.0)
    sample = sample_people(labels, 240, 0)
    chosen = sample.positions
    assert check_channels(worse[chosen], better[chosen], sample, "set", "model").level == "warning"
    assert check_channels(better[chosen], worse[chosen], sample, "set", "model").level == "note"
    assert check_channels(better[chosen], better[chosen], sample, "set", "model").level == "note"


def test_separation_by_hand() -> None:
    """Protects the measure: means of the two kinds of scores, in units of the impostors' spread."""
    vectors, labels = people_vectors(10, 3, 1.5)
    sample = sample_people(labels, 30, 0)
    gain = separation_gain(vectors[sample.positions], vectors[sample.positions], sample)
    chosen = vectors[sample.positions].astype(np.float64)
    upper = np.triu_indices(30, 1)
    scores = (chosen @ chosen.T)[upper]
    same = (labels[sample.positions][:, None] == labels[sample.positions])[upper]
    expected = (scores[same].mean() - scores[~same].mean()) / scores[~same].std()
    assert gain.plain == pytest.approx(expected)
    assert gain.low == gain.high == 0
    constant = np.ones_like(vectors[sample.positions])  # a broken model is no reason to stop
    assert separation_gain(constant, constant, sample).high == 0


def test_samples_have_pairs_of_both_kinds() -> None:
    """Protects the checks from a sample that says nothing: every pair is what it is called, people are whole."""
    labels = np.random.default_rng(0).integers(0, 40, 200)
    sample = sample_people(labels, 60, 0)
    assert 60 <= len(sample.positions) < 64
    who = labels[sample.positions]
    np.testing.assert_array_equal(sample.same, who[sample.index[:, 0]] == who[sample.index[:, 1]])
    assert np.bincount(sample.groups).min() >= 2
    index = np.random.default_rng(1).integers(0, 500, (300, 2))
    same = np.arange(300) % 3 == 0
    pairs = sample_pairs(index, same, np.arange(300), 100, 0)
    assert len(pairs.positions) == 100
    assert pairs.same.sum() == 25
    chosen = {(int(a), int(b)): flag for (a, b), flag in zip(index, same, strict=True)}
    for (a, b), flag in zip(pairs.positions[pairs.index], pairs.same, strict=True):
        assert chosen[int(a), int(b)] == flag


def test_precision_matters_from_half_a_step_of_the_thresholds() -> None:
    """Protects quoted accuracies: float16's rounding passes, a deviation that moves thresholds does not."""
    exact, labels = people_vectors(20, 3, 1.0)
    sample = sample_people(labels, 60, 0)
    exact = exact[sample.positions]
    rounded = unit(exact.astype(np.float16).astype(np.float32))
    shaken = unit(exact + 0.01 * np.random.default_rng(0).normal(size=exact.shape))
    assert check_precision(exact, rounded, sample, "fp16", "model").level == "note"
    assert check_precision(exact, shaken, sample, "bf16", "model").level == "warning"


def test_copies_are_found_whatever_their_encoding() -> None:
    """Protects from testing on training images: equal bytes, another JPEG quality, another size, mirrored."""
    faces = [draw_face(person, shot) for person in range(4) for shot in range(2)]
    test = Images([encode_jpeg(face, 95) for face in faces])
    other = [draw_face(person, 0) for person in range(50, 54)]
    copies = [
        test.images[1],
        encode_jpeg(faces[3], 40),
        encode_jpeg(cv2.resize(cv2.resize(faces[5], (56, 56)), (112, 112)), 80),
        encode_jpeg(np.ascontiguousarray(faces[6][:, ::-1]), 90),
    ]
    training = Images(copies + [encode_jpeg(face) for face in other])
    every = np.arange(len(training))
    assert same_bytes(test, training, every) == [(1, 0)]
    # A model to whom mirrored faces are alike, and everybody else is not.
    vectors = unit(np.random.default_rng(0).normal(size=(8, 64)))
    theirs = unit(np.random.default_rng(1).normal(size=(8, 64)))
    theirs[:4] = vectors[[1, 3, 5, 6]]
    theirs[4] = vectors[0]  # alike to the model, but another picture
    decode: list[Callable[[int], np.ndarray]] = [
        lambda i, images=images: decode_rgb(images.encoded(i), i) for images in (test, training)
    ]
    assert same_pictures(vectors, theirs, every, *decode) == [(1, 0), (3, 1), (5, 2), (6, 3)]
    assert same_pictures(vectors, unit(theirs - 5), every, *decode) == []


def test_people_of_both_sets_are_found_by_their_centres() -> None:
    """Protects from testing on trained people: those in both are found, in any order, and nobody else."""
    vectors, labels = people_vectors(400, 3, 0.6)
    mine, theirs = labels < 250, labels >= 240  # ten people are in both, in the same images or not
    random = np.random.default_rng(5)
    again = unit(vectors[theirs] + 0.05 * random.normal(size=(theirs.sum(), 64)))
    a, b = centres(vectors[mine], labels[mine]), centres(again, labels[theirs] - 240)
    found, threshold = shared_people(a, b)
    assert sorted((test, training) for test, training, _ in found) == [(240 + i, i) for i in range(10)]
    assert all(cosine >= threshold for _, _, cosine in found)
    apart, _ = shared_people(centres(vectors[labels < 200], labels[labels < 200]), b[10:])
    assert apart == []


def test_names_mean_the_same_only_where_they_are_names() -> None:
    """Protects from calling label 17 of one set and label 17 of another the same person."""
    assert shared_names(["Ann Lee", "Bo_Ek", "17"], ["ann_lee", "17", "000001"]) == ["Ann Lee"]
    assert shared_names(["1", "2"], ["1", "2"]) == []


def hardest_of_a_rank() -> list[Tensor]:
    vectors, labels = shuffled_people()
    ranks = Ranks(torch.distributed.group.WORLD)
    found = hardest_of_all(torch.from_numpy(vectors), torch.from_numpy(labels), 7, 16, ranks=ranks)
    return [torch.from_numpy(part) for one in found for part in (one.pairs, one.scores)]


def shuffled_people() -> tuple[np.ndarray, np.ndarray]:
    vectors, labels = people_vectors(15, 4, 1.5)
    order = np.random.default_rng(1).permutation(len(labels))
    return vectors[order], labels[order]


def test_hardest_pairs_of_several_ranks() -> None:
    """Protects long tests on several cards: each has its share of the pairs, and all get the same as one alone."""
    vectors, labels = shuffled_people()
    alone = hardest_of_all(torch.from_numpy(vectors), torch.from_numpy(labels), 7, 16)
    for found in run_on_ranks(2, hardest_of_a_rank):
        for ours, expected in zip(found, (part for one in alone for part in (one.pairs, one.scores)), strict=True):
            np.testing.assert_array_equal(ours.numpy(), expected)
    assert [len(one.pairs) for one in hardest_of_all(torch.from_numpy(vectors), torch.from_numpy(labels), 0)] == [0, 0]


def test_hardest_pairs_are_those_of_a_full_sort() -> None:
    """Protects the contact sheets: the hardest pairs of all, whatever the blocks, and none with itself."""
    vectors, labels = shuffled_people()
    upper = np.stack(np.triu_indices(60, 1), 1)
    scores = (vectors @ vectors.T)[upper[:, 0], upper[:, 1]]
    same = labels[upper[:, 0]] == labels[upper[:, 1]]
    expected = hardest_of_pairs(scores, same, upper, 7)
    for block in (7, 16, 100):
        for mine, theirs in zip(
            hardest_of_all(torch.from_numpy(vectors), torch.from_numpy(labels), 7, block), expected, strict=True
        ):
            np.testing.assert_allclose(mine.scores, theirs.scores, atol=1e-6)
            assert {tuple(sorted(pair)) for pair in mine.pairs.tolist()} == {tuple(p) for p in theirs.pairs.tolist()}
    impostors = np.sort(scores[~same])[::-1][:7]
    np.testing.assert_allclose(expected[0].scores, impostors)
    np.testing.assert_allclose(expected[1].scores, np.sort(scores[same])[:7])


def test_a_model_to_which_all_are_alike_gives_no_all_clear() -> None:
    """Protects from "shares no person" by a model that cannot tell: the same people are in both sets here."""
    random = np.random.default_rng(0)
    people = random.normal(size=(40, 2)).astype(np.float32)
    vectors = people / np.linalg.norm(people, axis=1, keepdims=True)
    test_set: Any = SimpleNamespace(name="more", people=np.arange(40), identities=None, describe=str)
    faces: Any = SimpleNamespace(identities=[str(i) for i in range(40)])
    sample: Any = SimpleNamespace(people=np.arange(40), vectors=vectors, faces=faces)
    finding = _shared_people(test_set, sample, vectors)
    assert finding.level == "unclear"
    assert "the model cannot tell" in finding.text
