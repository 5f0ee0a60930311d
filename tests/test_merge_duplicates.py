"""Copies of a picture are known whatever was done to them, other pictures of the person are not taken for copies."""

import itertools
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from data.face_sets import open_face_set
from data.images import decode_rgb, encode_jpeg
from data.joined_sets import JoinedFaceSet
from dataset_merge import joined_duplicates
from dataset_merge.duplicates import (
    CANDIDATE_COSINE,
    SAME_CORRELATION,
    Duplicate,
    correlation,
    find_duplicates,
    may_be_same,
    thumbnail,
)
from dataset_merge.joined_duplicates import search, without
from models.embedders import load_embedder
from tiny_faces import tiny_face


def scaled(face: np.ndarray, side: int) -> np.ndarray:
    small = cv2.resize(face, (side, side), interpolation=cv2.INTER_AREA)
    return cv2.resize(small, face.shape[1::-1], interpolation=cv2.INTER_CUBIC)


def cropped(face: np.ndarray, top: int, bottom: int, left: int, right: int) -> np.ndarray:
    side = len(face)
    return cv2.resize(face[top : side - bottom, left : side - right], (side, side), interpolation=cv2.INTER_AREA)


def encoded(face: np.ndarray, quality: int) -> np.ndarray:
    return decode_rgb(encode_jpeg(face, quality), "a copy")


COPIES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "quality 30": lambda face: encoded(face, 30),
    "half the size": lambda face: scaled(face, 56),
    "cropped by 5 %": lambda face: encoded(cropped(face, 6, 6, 6, 6), 85),
    "cropped off centre": lambda face: encoded(cropped(face, 0, 6, 5, 1), 75),
    "brighter": lambda face: np.clip(face * 1.15 + 8, 0, 255).astype(np.uint8),
}


@pytest.fixture(scope="module")
def people(face_data: Path) -> list[list[np.ndarray]]:
    """The faces of 24 people of LFW with 4 to 8 pictures each."""
    folders = sorted((face_data / "lfw" / "images").iterdir())
    albums = ([decode_rgb(file.read_bytes(), file) for file in sorted(folder.iterdir())] for folder in folders[::5])
    return [album for album in albums if 4 <= len(album) <= 8][:24]


@pytest.mark.parametrize("kind", COPIES)
def test_copies_of_real_faces_are_known(people: list[list[np.ndarray]], kind: str) -> None:
    """Every copy of every face: re-encoded, resized, cropped a little, brightened."""
    alike = [correlation(thumbnail(face), thumbnail(COPIES[kind](face))) for album in people for face in album[:2]]
    assert min(alike) >= SAME_CORRELATION
    assert all(may_be_same(thumbnail(face), thumbnail(COPIES[kind](face))) for album in people for face in album[:2])


def test_other_pictures_of_a_person_are_no_copies(people: list[list[np.ndarray]]) -> None:
    """All pairs of pictures of one person: aligned faces are alike, but not that much."""
    alike, closer = [], []
    for album in people:
        small = [thumbnail(face) for face in album]
        pairs = [(one, other) for i, one in enumerate(small) for other in small[:i]]
        alike += [correlation(*pair) for pair in pairs]
        closer += [may_be_same(*pair) for pair in pairs]
    assert len(alike) > 200
    assert max(alike) < SAME_CORRELATION
    assert np.mean(closer) < 0.1, "a quick look is enough for nearly all"


# Shots of one event, by hand: alike in light, background and pose, other in expression.
SHOTS = (
    ("Jacques_Rogge", 3, 5),
    ("Donald_Rumsfeld", 18, 19),
    ("Ariel_Sharon", 73, 75),
    ("Romano_Prodi", 4, 5),
    ("Paul_Burrell", 4, 10),
    ("Colin_Powell", 94, 190),
    ("Hu_Jintao", 4, 8),
    ("Lleyton_Hewitt", 22, 24),
)
# One picture that LFW has twice, in other crops or colours.
PICTURES = (
    ("George_W_Bush", 109, 461),
    ("Serena_Williams", 2, 16),
    ("Julianne_Moore", 13, 15),
    ("Julie_Gerberding", 4, 6),
    ("Ari_Fleischer", 6, 11),
)


def test_the_order_of_two_pictures_does_not_show() -> None:
    """Which one is looked for in the other, at other sizes, is no question of which comes first."""
    rng = np.random.default_rng(0)
    face = cv2.GaussianBlur(rng.integers(0, 256, (112, 112, 3), np.uint8), (0, 0), 3)
    one, other = thumbnail(face), thumbnail(cropped(face, 6, 9, 3, 12))
    assert correlation(one, other) == correlation(other, one)


def lfw_correlation(face_data: Path, name: str, *numbers: int) -> float:
    """How alike two pictures of a person of LFW are."""
    files = (face_data / "lfw" / "images" / name / f"{name}_{number:04d}.jpg" for number in numbers)
    return correlation(*(thumbnail(decode_rgb(file.read_bytes(), file)) for file in files))


@pytest.mark.parametrize("shots", SHOTS)
def test_other_shots_of_one_event_are_no_copies(face_data: Path, shots: tuple[str, int, int]) -> None:
    """The hardest pairs of all of LFW: the light and shade of the whole face would take them for one picture."""
    assert lfw_correlation(face_data, *shots) < SAME_CORRELATION


@pytest.mark.parametrize("pictures", PICTURES)
def test_one_picture_in_other_crops_is_known(face_data: Path, pictures: tuple[str, int, int]) -> None:
    """Copies that nobody made for a test."""
    assert lfw_correlation(face_data, *pictures) >= SAME_CORRELATION


def test_embeddings_of_copies_reach_the_pixels(people: list[list[np.ndarray]], face_data: Path) -> None:
    """The first step lets nearly all copies through; it is there to spare the pixels of unlike faces."""
    embedder = load_embedder(face_data / "models" / "mobilefacenet_y1_128d.onnx", torch.device("cpu"))
    faces = np.stack([album[0] for album in people])
    originals = embedder.embed(torch.from_numpy(faces), False).numpy()
    for kind, copy in COPIES.items():
        copies = embedder.embed(torch.from_numpy(np.stack([copy(face) for face in faces])), False).numpy()
        assert ((originals * copies).sum(1) >= CANDIDATE_COSINE).mean() >= 0.95, kind


class Encoded:
    """Encoded images by position."""

    def __init__(self, images: list[bytes]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def encoded(self, i: int) -> bytes:
        return self._images[i]

    def describe(self, i: int) -> str:
        return f"image {i}"


def test_the_first_copy_stays(people: list[list[np.ndarray]]) -> None:
    """Of two identities of one person: what the second one has too is dropped, what only it has stays."""
    album = [encode_jpeg(face) for face in people[0][:4]]
    recoded = encode_jpeg(decode_rgb(album[1], ""), 60)
    images = Encoded([album[0], album[1], album[0], recoded, album[2], album[3]])
    unit = np.eye(6, 8, dtype=np.float32)
    unit[3] = unit[1]
    parts = [np.array([0, 1]), np.array([2, 3, 4, 5])]
    found = list(find_duplicates(images, parts, unit))
    assert [(d.image, d.original, d.kind) for d in found] == [(2, 0, "bytes"), (3, 1, "near")]
    assert list(find_duplicates(images, parts, None)) == [Duplicate(2, 0, "bytes", 1.0)]
    alike = np.repeat(unit[:1], 6, 0)  # a model that cannot tell: the pixels decide
    assert [d.image for d in find_duplicates(images, parts, alike)] == [2, 3]


def test_what_one_identity_holds_twice_stays(people: list[list[np.ndarray]]) -> None:
    """Only joining makes duplicates; an identity comes out of a merge as it went in."""
    image = encode_jpeg(people[0][0])
    unit = np.ones((3, 1), np.float32)
    assert list(find_duplicates(Encoded([image] * 3), [np.array([0, 1, 2])], unit)) == []
    found = list(find_duplicates(Encoded([image] * 3), [np.array([0]), np.array([1, 2])], unit))
    assert [d.image for d in found] == [1, 2]


def test_plain_surfaces_are_no_copies_of_each_other() -> None:
    """A correlation of nothing with nothing has no meaning."""
    black, grey = np.zeros((112, 112, 3), np.uint8), np.full((112, 112, 3), 128, np.uint8)
    assert correlation(thumbnail(black), thumbnail(grey)) == 0


def test_dropping_many_is_quick() -> None:
    """The time goes with the images, not with the labels times the duplicates."""
    count = 40_000
    labels = [[np.arange(4 * i, 4 * i + 2), np.arange(4 * i + 2, 4 * i + 4)] for i in range(count)]
    dropped = [Duplicate(4 * i + 2, 4 * i, "bytes", 1.0) for i in range(count)]
    start = time.process_time()
    left = without(dropped, labels)
    assert time.process_time() - start < 3
    assert [images.tolist() for images in left] == [[4 * i, 4 * i + 1, 4 * i + 3] for i in range(count)]


def test_processes_find_what_one_finds(
    people: list[list[np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the same order, and where an interrupted search goes on; each process gets the embeddings of its images."""
    for name, quality in (("one", 95), ("two", 60)):
        for number, album in enumerate(people[:20]):
            (tmp_path / name / f"{number:02d}").mkdir(parents=True)
            for shot, face in enumerate(album[:3]):
                (tmp_path / name / f"{number:02d}" / f"{shot}.jpg").write_bytes(encode_jpeg(face, quality))
    sets = [open_face_set(tmp_path / name) for name in ("one", "two")]
    positions = np.arange(60).reshape(20, 3)
    parts = [[own, 60 + own[::-1]] for own in positions]
    unit = np.tile(np.eye(60, dtype=np.float32), (2, 1))
    unit[60] = unit[1]  # the first copy looks like another picture to the model
    found = search(tmp_path / "alone", sets, JoinedFaceSet(sets), parts, unit, "model", 0)
    assert [(d.image, d.original) for d in found] == [(60 + i, i) for own in positions for i in own[::-1] if i]
    monkeypatch.setattr(joined_duplicates, "_IMAGES_FOR_WORKERS", 0)
    monkeypatch.setattr(joined_duplicates, "_IDENTITIES_BETWEEN_SAVES", 1)
    with monkeypatch.context() as broken:
        broken.setattr(joined_duplicates, "find_duplicates", fail_at(18))
        with pytest.raises(OSError, match="pulled out"):
            search(tmp_path / "many", sets, JoinedFaceSet(sets), parts, unit, "model", 0)
    assert search(tmp_path / "many", sets, JoinedFaceSet(sets), parts, unit, "model", 2) == found


def test_processes_get_their_images_alone(tiny_set: Path) -> None:
    """Not the places of all images, of which 43 million are more than a GiB for each process."""
    faces, sizes = open_face_set(tiny_set), []
    for count in (len(faces), 5000):
        large = faces.part(np.resize(np.arange(len(faces)), count))
        joined = [[np.array([7, 1]), np.array([count, count + 3])]]
        (task,) = next(joined_duplicates._blocks(JoinedFaceSet([large, large]), joined, None))
        assert [task.images.encoded(i) for i in range(4)] == [faces.encoded(i) for i in (7, 1, 0, 3)]
        sizes.append(len(pickle.dumps(task)))
    assert sizes[0] == sizes[1]


def test_what_was_found_is_for_its_model_limits_and_identities(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search again costs nothing; by another model, by bytes, with other limits, or with the same images
    under other identities it is made anew, instead of an answer to another question."""
    for name in ("one", "two"):
        (tmp_path / name / "a").mkdir(parents=True)
        for shot in range(3):
            (tmp_path / name / "a" / f"{shot}.png").write_bytes(tiny_face(0, shot))
    sets = [open_face_set(tmp_path / name) for name in ("one", "two")]
    unit = np.eye(6, dtype=np.float32)
    made, whole = list[Path](), joined_duplicates._search

    def counted(work: Any, *arguments: Any) -> None:
        made.append(work.path)
        whole(work, *arguments)

    monkeypatch.setattr(joined_duplicates, "_search", counted)

    def look(first: int, model: str, embeddings: np.ndarray | None) -> int:
        parts = [[np.arange(first), np.arange(first, 6)]]
        found = search(tmp_path / "cache", sets, JoinedFaceSet(sets), parts, embeddings, model, 0)
        assert first != 3 or [(d.image, d.original) for d in found] == [(3, 0), (4, 1), (5, 2)]
        return len(made)

    assert [look(3, "a", unit), look(3, "a", unit)] == [1, 1]
    assert look(3, "b", unit) == 2
    assert [look(3, "a", None), look(2, "a", None)] == [3, 4]
    for calls, limit in ((5, "SAME_CORRELATION"), (6, "CANDIDATE_COSINE")):
        monkeypatch.setattr(joined_duplicates, limit, 0.999)
        assert look(3, "a", unit) == calls
    assert look(3, "a", None) == 6, "bytes know no limits"


def test_merges_that_share_a_cache_search_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at the same search, with other thresholds, say: the second waits, and takes what the first finds. It ended
    with the advice to name another output, which it had."""
    for name in ("one", "two"):
        (tmp_path / name / "a").mkdir(parents=True)
        (tmp_path / name / "a" / "x.png").write_bytes(tiny_face(0, 0))
    sets = [open_face_set(tmp_path / name) for name in ("one", "two")]
    parts = [[np.array([0]), np.array([1])]]
    begun, go_on = threading.Event(), threading.Event()
    whole = joined_duplicates._search

    def slow(*arguments: Any) -> None:
        assert not begun.is_set(), "searched twice"
        begun.set()
        go_on.wait(20)
        whole(*arguments)

    monkeypatch.setattr(joined_duplicates, "_search", slow)
    with ThreadPoolExecutor(2) as pool:
        merges = [pool.submit(search, tmp_path / "cache", sets, JoinedFaceSet(sets), parts, None, "", 0)]
        assert begun.wait(20)
        merges.append(pool.submit(search, tmp_path / "cache", sets, JoinedFaceSet(sets), parts, None, "", 0))
        with pytest.raises(TimeoutError):
            merges[1].result(0.3)
        go_on.set()
        assert [merge.result(20) for merge in merges] == [[Duplicate(1, 0, "bytes", 1.0)]] * 2


def fail_at(identity: int) -> Callable:
    """`find_duplicates` that fails for the identity of that number, as a disk would."""
    count = itertools.count()

    def failing(*arguments: Any) -> Iterator[Duplicate]:
        if next(count) == identity:
            raise OSError("the disk was pulled out")
        return find_duplicates(*arguments)

    return failing
