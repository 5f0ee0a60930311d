"""Cleaning finds wrong images and second people, leaves good identities alone, and what it makes is a face set."""

from pathlib import Path

import numpy as np
import pytest
import torch

from data.images import decode_rgb
from dataset_merge.cleaning import MIN_CLUSTER, CleanedFaceSet, find_wrong, table
from models.embedders import load_embedder

OUTLIER, MIXED = 0.25, 0.35


def person(number: int, images: int, spread: float = 0.12) -> np.ndarray:
    """Unit vectors around the `number`th axis of 64 dimensions."""
    rng = np.random.default_rng([number, images])
    vectors = np.eye(64)[number] + rng.normal(0, spread, (images, 64))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_good_identities_are_left_alone() -> None:
    """Nothing is found where nothing is wrong, in large and small identities."""
    embeddings = np.concatenate([person(number, images) for number, images in enumerate((12, 5, 2, 1))])
    labels = np.repeat([0, 1, 2, 3], (12, 5, 2, 1))
    findings = find_wrong(torch.from_numpy(embeddings), labels, 4, OUTLIER, MIXED)
    assert findings.found == []
    assert (findings.labels == labels).all()


def test_a_wrong_image_is_an_outlier() -> None:
    """One image of somebody else among eight goes; its cosine is the one to the others."""
    embeddings = np.concatenate([person(0, 8), person(1, 1)])
    findings = find_wrong(torch.from_numpy(embeddings), np.zeros(9, np.int64), 1, OUTLIER, MIXED)
    assert [(found.image, found.finding) for found in findings.found] == [(8, "outlier")]
    centre = embeddings[:8].mean(0)
    assert findings.found[0].cosine == pytest.approx(embeddings[8] @ centre / np.linalg.norm(centre), abs=1e-5)
    assert findings.labels.tolist() == [0] * 8 + [-1]


def test_two_people_in_one_identity_are_parted() -> None:
    """The fewer images become the second person; the order of the images does not matter."""
    embeddings = np.concatenate([person(0, 7), person(1, 4)])
    order = np.random.default_rng(0).permutation(11)
    findings = find_wrong(torch.from_numpy(embeddings[order]), np.zeros(11, np.int64), 1, OUTLIER, MIXED)
    assert findings.seconds == [0]
    assert findings.labels[np.argsort(order)].tolist() == [0] * 7 + [1] * 4
    assert {found.finding for found in findings.found} == {"mixed"}


def test_fewer_images_than_a_cluster_are_outliers() -> None:
    """Two strangers' images are not yet a second person."""
    embeddings = np.concatenate([person(0, 9), person(1, MIN_CLUSTER - 1)])
    findings = find_wrong(torch.from_numpy(embeddings), np.zeros(8 + MIN_CLUSTER, np.int64), 1, OUTLIER, MIXED)
    assert findings.seconds == []
    assert [found.finding for found in findings.found] == ["outlier"] * (MIN_CLUSTER - 1)


@pytest.mark.parametrize("seed", [17, 21, 41, 42, 46])
def test_each_image_has_one_finding(seed: int) -> None:
    """That which says what becomes of it: an outlier of the second person is left out, and no person of its own."""
    rng = np.random.default_rng(seed)
    size, images = int(rng.integers(4, 12)), int(rng.integers(8, 30))
    vectors = rng.normal(size=(images, size)).astype(np.float32)
    vectors[: images // 2, 0] += 2.0
    vectors[images // 2 :, 1] += 1.5
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    wrong = find_wrong(torch.from_numpy(vectors), np.zeros(images, np.int64), 1, 0.35, 0.6)
    kinds = {finding.image: finding.finding for finding in wrong.found}
    assert len(kinds) == len(wrong.found)
    assert {image for image, kind in kinds.items() if kind == "outlier"} == set(np.flatnonzero(wrong.labels == -1))
    assert {image for image, kind in kinds.items() if kind == "mixed"} == set(np.flatnonzero(wrong.labels == 1))


AXES = np.eye(64, dtype=np.float32)
# The last two of eight have a cosine of 0.26 with the sixth, and of 0.07 with each other.
ALIKE = np.zeros((8, 64), np.float32)
ALIKE[6:] = 0.26 * AXES[1] + (np.sqrt(1 - 0.26**2) - 1) * AXES[[2, 3]]


@pytest.mark.parametrize(
    ("vectors", "kinds"),
    [
        (AXES[[0, 0, 1]], []),
        (AXES[[0, 0, 0, 1]], ["outlier"]),
        (np.concatenate([AXES[[0, 0]], 0.8 * AXES[[1, 2]] - 0.6 * AXES[[0, 0]]]), ["scattered"] * 2),
        (AXES[[0] * 5 + [1, 2]], ["outlier"] * 2),
        (AXES[[0] * 5 + [1, 2, 3]] + ALIKE, ["outlier"] * 3),
    ],
    ids=["of three", "of four", "half", "less than half", "strangers that are a little alike"],
)
def test_what_is_judged_and_how(vectors: np.ndarray, kinds: list[str]) -> None:
    """Of three images no one is called wrong; where half of them are, nobody can tell who it is; and people who are
    no more alike than strangers are no second person."""
    findings = find_wrong(torch.from_numpy(vectors), np.zeros(len(vectors), np.int64), 1, OUTLIER, MIXED)
    assert [found.finding for found in findings.found] == kinds
    assert findings.seconds == []
    assert (findings.labels < 0).sum() == kinds.count("outlier")


def test_an_identity_of_strangers_is_only_listed() -> None:
    """When most images would go, nobody can tell who the identity is: all of them stay."""
    embeddings = np.concatenate([person(number, 1) for number in range(16)])
    findings = find_wrong(torch.from_numpy(embeddings), np.zeros(16, np.int64), 1, 0.5, MIXED)
    assert {found.finding for found in findings.found} == {"scattered"}
    assert (findings.labels == 0).all()


class Lettered:
    """A face set whose images are letters."""

    def __init__(self, path: Path, text: str, labels: list[int], identities: list[str]) -> None:
        self.path, self._text, self.labels, self.identities = path, text, np.array(labels), identities

    def __len__(self) -> int:
        return len(self._text)

    def encoded(self, i: int) -> bytes:
        return self._text[i].encode()

    def describe(self, i: int) -> str:
        return f"letter {i}"

    def part(self, positions: np.ndarray) -> "Lettered":
        return Lettered(self.path, "".join(self._text[i] for i in positions), [], [])


def test_a_cleaned_set_is_a_face_set(tmp_path: Path) -> None:
    """Without the outliers, second people behind the others under names that nobody has, bytes as they were."""
    embeddings = np.concatenate([person(0, 6), person(1, 3), person(2, 8), person(3, 1)])
    labels = [0] * 9 + [1] * 9
    faces = Lettered(tmp_path, "abcdefghijklmnopqr", labels, ["anna", "anna#2"])
    findings = find_wrong(torch.from_numpy(embeddings), faces.labels, 2, OUTLIER, MIXED)
    clean = CleanedFaceSet(faces, findings)
    assert clean.identities == ["anna", "anna#2", "anna#2'"]
    by_name = dict.fromkeys(clean.identities, "")
    for i in range(len(clean)):
        by_name[clean.identities[clean.labels[i]]] += clean.encoded(i).decode()
    assert by_name == {"anna": "abcdef", "anna#2": "jklmnopq", "anna#2'": "ghi"}
    assert clean.describe(9) == "letter 9"
    assert [clean.part(np.array([9, 2])).encoded(i) for i in range(2)] == [clean.encoded(9), clean.encoded(2)]
    assert (
        clean.fingerprint()
        != CleanedFaceSet(faces, find_wrong(torch.from_numpy(embeddings), faces.labels, 2, -1, -1)).fingerprint()
    )
    rows = list(table([faces], [findings], applied=True))
    assert rows[-1][:4] == (0, "anna#2", "letter 17", "outlier")
    assert {row[5] for row in rows} == {"left out", "identity of its own"}
    assert {row[5] for row in table([faces], [findings], applied=False)} == {"kept"}


def test_noise_among_real_people_is_found(face_data: Path) -> None:
    """Images that were given to the wrong people of LFW, one in ten: most are found, hardly a right one with them."""
    folders = sorted((face_data / "lfw" / "images").iterdir())
    albums = [files for folder in folders[::3] if 6 <= len(files := sorted(folder.iterdir())) <= 12][:20]
    faces = np.stack([decode_rgb(file.read_bytes(), file) for album in albums for file in album])
    true = np.repeat(np.arange(len(albums)), [len(album) for album in albums])
    embedder = load_embedder(face_data / "models" / "mobilefacenet_y1_128d.onnx", torch.device("cpu"))
    embeddings = embedder.embed(torch.from_numpy(faces), False).numpy()
    assert find_wrong(torch.from_numpy(embeddings), true, len(albums), OUTLIER, MIXED).found == []
    rng = np.random.default_rng(0)
    labels = np.where(rng.random(len(true)) < 0.1, rng.integers(0, len(albums), len(true)), true)
    wrong = np.flatnonzero(labels != true)
    found = {
        finding.image for finding in find_wrong(torch.from_numpy(embeddings), labels, len(albums), OUTLIER, MIXED).found
    }
    assert len(found & set(wrong.tolist())) >= 0.8 * len(wrong) > 5
    assert len(found - set(wrong.tolist())) <= 0.02 * len(true)
