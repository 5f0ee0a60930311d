"""The evaluation on sets that are small, odd or damaged, and on several models at once."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import utils.evaluation.measure as measuring
from data.face_sets import open_face_set
from models.embedders.interface import FaceEmbedder
from utils.evaluation.bootstrap import Interval
from utils.evaluation.check_sets import sample_of
from utils.evaluation.columns import Tables
from utils.evaluation.curves import FAR_POINTS, TarAtFar, working_point
from utils.evaluation.embeddings import embed_by_all
from utils.evaluation.measure import Measured, Options, measure
from utils.evaluation.pair_sets import PairSet
from utils.evaluation.pictures import draw_set
from utils.evaluation.report_json import as_json
from utils.evaluation.report_text import interval_text, table
from utils.evaluation.test_sets import TestSet, distinct_names, open_test_set, short_name
from utils.evaluation.tested import TestedModel, TestedSet
from utils.ranks import Ranks

CPU = torch.device("cpu")


def options(cache: Path | None = None, draws: int = 40, mirror: bool = True) -> Options:
    return Options(16, 0, mirror, cache, draws, 0, False, 2)


class Means(FaceEmbedder):
    """A model whose features are mean colours of parts of the face; it counts the faces that it has seen."""

    def __init__(self, name: str, parts: int) -> None:
        self.name, self.runs_on, self.image_size, self.device = name, "test", 32, CPU
        self._parts, self.seen = parts, 0

    @property
    def fingerprint(self) -> str:
        return self.name

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        self.seen += len(faces) * (not mirror)
        shown = (faces.flip(2) if mirror else faces).float()
        side = self.image_size // self._parts
        squares = shown.unfold(1, side, side).unfold(2, side, side).mean((-1, -2))
        return (squares - 127.5).flatten(1)


@dataclass(frozen=True, eq=False)
class Listed:
    """Images that are never read, by names."""

    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, i: int) -> bytes:
        raise AssertionError(f"image {i} was read")

    def describe(self, i: int) -> str:
        return self.names[i]


def listed_pairs(same: np.ndarray, index: np.ndarray) -> TestSet:
    images = Listed([f"Žluť/{i}.png" for i in range(int(index.max()) + 1)])
    pairs = PairSet(images, index, same, None)
    return TestSet("set", Path("set.bin"), images, None, None, pairs=pairs)


def test_models_share_one_decoding(tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several models cost the images' decoding once; their features, kept or not, are those of each alone."""
    images = open_face_set(tiny_set)
    models = [Means("a", 4), Means("b", 2), Means("c", 1)]
    alone = [embed_by_all([one], images, "alone", options(), Ranks())[0] for one in models]
    assert not np.array_equal(alone[0][:, :12], alone[1])
    decoded: list[int] = []
    encoded = type(images).encoded

    def counted(self: object, i: int) -> bytes:
        decoded.append(i)
        return encoded(images, i)

    monkeypatch.setattr(type(images), "encoded", counted)
    monkeypatch.setattr("data.face_sets.RecFaceSet.views", lambda self, positions: [None] * len(positions))
    for kept in (None, tmp_path):
        decoded.clear()
        together = embed_by_all(models, images, "all", options(kept), Ranks())
        for one, other in zip(alone, together, strict=True):
            np.testing.assert_array_equal(one, other)
        if kept is None:
            assert sorted(decoded) == list(range(len(images)))
    for one in models:
        one.seen = 0
    again = embed_by_all([models[1], models[0], Means("new", 4)], images, "again", options(tmp_path), Ranks())
    assert [one.seen for one in models] == [0, 0, 0], "kept features were made again"
    np.testing.assert_array_equal(again[0], alone[1])
    np.testing.assert_array_equal(again[1], alone[0])


def test_an_embedding_that_is_not_finite_is_named_by_its_image(tiny_set: Path) -> None:
    """Protects from NaN in the report, and from an error about "row 12" of something."""
    test_set = open_test_set(tiny_set, "tiny")
    for bad in (np.nan, np.inf, 0.0):
        features = np.ones((len(test_set.images), 4), np.float32)
        features[5] = bad
        with pytest.raises(ValueError, match=r"tiny: model gives .*record 6.* an embedding that is zero or not finite"):
            measure(features, CPU, "model", test_set, Tables(), options(), Ranks())


@pytest.mark.parametrize("kind", [True, False])
def test_pairs_of_one_kind_are_an_error_that_names_the_set(kind: bool) -> None:
    """A list of genuine pairs alone has an accuracy but no FAR: it is refused by name."""
    index = np.arange(40).reshape(20, 2)
    features = np.random.default_rng(0).normal(size=(40, 8))
    with pytest.raises(ValueError, match=f"set: there are no {'impostor' if kind else 'genuine'} scores"):
        measure(features, CPU, "m", listed_pairs(np.full(20, kind), index), Tables(), options(), Ranks())


def test_ten_pairs_are_enough_for_a_report(tmp_path: Path) -> None:
    """The smallest set that folds can be made of has numbers, intervals and a valid JSON."""
    random = np.random.default_rng(0)
    same = np.arange(10) % 2 == 0
    test_set = listed_pairs(same, np.arange(20).reshape(10, 2))
    found = measure(random.normal(size=(20, 8)), CPU, "m", test_set, Tables(), options(), Ranks())
    assert found is not None
    tested = TestedSet(test_set, [found], [], [])
    report = as_json([TestedModel("m", tmp_path, "cpu", "x")], [tested], {"mirror": True}, [], [])
    json.dumps(report, allow_nan=False)
    points = report["sets"]["set"]["models"]["m"]["points"]
    assert [point["support"] for point in points] == ["none"] * 6
    assert "TAR at" not in table([tested])


def test_a_quality_that_one_model_lacks_is_drawn_for_the_other(tmp_path: Path) -> None:
    """A model whose embeddings leave it at unit length has no `norm` curve; that of the other is drawn all the same."""
    random = np.random.default_rng(0)
    index = np.arange(400).reshape(200, 2)
    same = np.arange(200) % 2 == 0
    features = random.normal(size=(400, 8)).astype(np.float32)
    features[index[same, 1]] += 2 * features[index[same, 0]]
    test_set = listed_pairs(same, index)
    tables = Tables(qualities={"norm": np.full(400, np.nan)})
    measured: list[Measured] = []
    for name, rows in (("unit", measuring.unit_rows(features)), ("free", features)):
        found = measure(rows, CPU, name, test_set, tables, Options(16, 0, True, None, 0, 0, False, 0), Ranks())
        assert found is not None
        measured.append(found)
    assert [list(one.rejects) for one in measured] == [[], ["norm"]]
    pictures = draw_set(tmp_path, test_set, measured, 112, alone=True)
    assert "set_reject_norm.png" in [picture.file.name for picture in pictures]


def test_sampled_pairs_are_all_genuine_ones_where_they_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects error-versus-reject curves: each genuine pair once, no image with itself; of many a random part."""
    labels = np.random.default_rng(0).integers(0, 7, 60)
    every = {(a, b) for a in range(60) for b in range(a + 1, 60) if labels[a] == labels[b]}
    pairs = measuring._sampled_pairs(labels, 0)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    genuine = [(min(pair), max(pair)) for pair in pairs[same].tolist()]
    assert len(genuine) == len(every)
    assert set(genuine) == every
    others = {(min(pair), max(pair)) for pair in pairs[~same].tolist()}
    assert len(others) == (~same).sum() == 60 * 59 // 2 - len(every)
    monkeypatch.setattr(measuring, "_SAMPLED_PAIRS", 50)
    pairs = measuring._sampled_pairs(labels, 0)
    same = labels[pairs[:, 0]] == labels[pairs[:, 1]]
    genuine = [(min(pair), max(pair)) for pair in pairs[same].tolist()]
    assert len(genuine) == len(set(genuine)) == 50
    assert set(genuine) < every
    assert len({labels[a] for a, _ in genuine}) > 4


def test_pairs_that_all_hang_together_are_drawn_one_by_one() -> None:
    """Protects the channels' check: with one group its interval would have no width, and any gain would be `clear`."""
    same = np.arange(300) % 2 == 0
    chain = np.stack([np.arange(300), np.arange(1, 301)], axis=1)
    sample = sample_of(listed_pairs(same, chain), 0)
    assert sample is not None
    assert len(np.unique(sample.groups)) == len(sample.index)


def test_paths_are_distinct_names_by_as_many_folders_as_it_takes(tmp_path: Path) -> None:
    """Protects reports from two models or sets under one name, whose numbers would replace each other."""
    paths = [tmp_path / one / "same" / "net.onnx" for one in ("a", "b")] + [tmp_path / "other.onnx"]
    assert distinct_names(paths, ["net", "net", "other"]) == ["a_same_net.onnx", "b_same_net.onnx", "other"]


def test_the_point_that_curves_and_breakdowns_are_at() -> None:
    """Protects from rates at the threshold of a handful of impostors: 909 pairs tell about 1e-2, not about 1e-3."""

    def at(impostors: int) -> float:
        return working_point([TarAtFar(far, 0.5, 0.3, impostors) for far in FAR_POINTS]).far

    assert [at(pairs) for pairs in (5, 10, 99, 100, 909, 1000, 10**9)] == [1e-1, 1e-1, 1e-1, 1e-2, 1e-2, 1e-3, 1e-3]


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("/sets/a/train.rec, record 1683 at byte 1503756", "record 1683"),
        ("/sets/a/person/001.jpg", "person/001.jpg"),
        ("/p/pairs.txt, line 3: /sets/lfw/An/An_0001.jpg", "An/An_0001.jpg"),
        ("lfw, image B of pair 77", "lfw, image B of pair 77"),
    ],
)
def test_a_caption_tells_an_image_from_others(place: str, name: str) -> None:
    """Protects who looks for the image: what is too long for a picture is cut in its middle."""
    assert short_name(place) == name


def test_draws_that_all_agree_tell_no_interval() -> None:
    """Protects from "100.000 % (95%: 100.000 .. 100.000)", which reads as certainty."""
    assert interval_text(Interval(1.0, 1.0, 1.0, 0.95)) == ""
    assert interval_text(Interval(1.0, 0.99, 1.0, 0.95)) == "(95%: 99.000 .. 100.000)"
