"""Rates by group and error-versus-reject curves against plain selections of pairs; pairs read from a list."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.pair_lists import PairsError
from data.verification_bin import write_bin
from ranks import run_on_ranks
from test_all_pairs import clustered
from tiny_faces import tiny_face
from utils.evaluation import breakdown
from utils.evaluation.all_pairs import all_pairs
from utils.evaluation.breakdown import breakdown_all_pairs, breakdown_pairs, clustered_interval
from utils.evaluation.columns import ColumnsError, group_by, groups_of, read_columns
from utils.evaluation.curves import TarAtFar, tar_at_far
from utils.evaluation.folds import ten_fold
from utils.evaluation.pair_blocks import Block, PairBlocks
from utils.evaluation.pair_sets import open_pair_set
from utils.evaluation.rejection import error_versus_reject, pair_quality
from utils.evaluation.test_sets import keys_of, open_test_set
from utils.ranks import Ranks

NAMES = ("young", "old", "")


def grouped_faces(images: int = 300, people: int = 40) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Images in two groups, some in none; a person has images in several."""
    embeddings, labels = clustered(images, people)
    texts = [NAMES[i] for i in np.random.default_rng(0).choice(3, images, p=(0.5, 0.4, 0.1))]
    return embeddings, labels, texts


def slow_rates(
    scores: NDArray, same: NDArray, texts: tuple[NDArray, NDArray], couple: tuple[str, str], threshold: float
) -> tuple[int, int, float, float]:
    """Pairs of either kind of two groups, and the shares of them above the threshold."""
    a, b = texts
    here = ((a == couple[0]) & (b == couple[1])) | ((a == couple[1]) & (b == couple[0]))
    genuine, impostor = scores[here & same], scores[here & ~same]
    return len(genuine), len(impostor), float((genuine > threshold).mean()), float((impostor > threshold).mean())


@pytest.mark.parametrize("block", [50, 0])
def test_all_pairs_by_group(block: int) -> None:
    """Protects counts and rates within each group and across, by picking the pairs of a full matrix."""
    embeddings, labels, texts = grouped_faces()
    result = all_pairs(embeddings, labels, (0.1, 0.01))
    found = breakdown_all_pairs(embeddings, labels, groups_of("age", texts), result.points, block=block)
    first, second = np.triu_indices(300, 1)
    unit = torch.nn.functional.normalize(embeddings.double()).float()
    scores = (unit @ unit.T).numpy()[first, second]
    same = (labels[first] == labels[second]).numpy()
    pair_texts = np.array(texts)[first], np.array(texts)[second]
    assert [rate.groups for rate in found.rates[:3]] == [("old", "old"), ("old", "young"), ("young", "young")]
    assert len(found.rates) == 6
    for rate in found.rates:
        genuine, impostor, tar, far = slow_rates(scores, same, pair_texts, rate.groups, rate.threshold)
        assert (rate.genuine, rate.impostor) == (genuine, impostor)
        assert rate.tar is not None
        assert rate.far is not None
        assert (rate.tar.estimate, rate.far.estimate) == pytest.approx((tar, far), abs=1e-12)
        assert rate.tar.low < tar <= rate.tar.high
        assert rate.far.low < far < rate.far.high
        people = set(labels[[text in rate.groups for text in texts]].tolist())
        assert rate.members == len(people)
    assert found.left_out == texts.count("")


def test_scores_are_those_of_the_threshold_to_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images without a group are in the products all the same: without them float32 products may end in another bit,
    and the very pair that the threshold is of counts as accepted, once in a few hundred sets."""
    seen: list[np.ndarray] = []

    class Watched(PairBlocks):
        def each(self, work: Callable[[Block, int], None], title: str) -> None:
            super().each(lambda pairs, thread: (seen.append(pairs.scores.numpy().copy()), work(pairs, thread)), title)

    embeddings, labels, texts = grouped_faces()
    assert "" in texts
    point = TarAtFar(0.1, 0.9, 0.3, 1000)
    monkeypatch.setattr(breakdown, "PairBlocks", Watched)
    breakdown_all_pairs(embeddings, labels, groups_of("age", texts), (point,), block=64)
    ours = seen.copy()
    Watched(embeddings, labels, 64).each(lambda pairs, thread: None, "")
    assert len(ours) == len(seen) / 2 > 9
    assert all(map(np.array_equal, ours, seen[len(ours) :]))


def test_a_block_counts_its_own_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block costs does not grow with the people of the set, of whom it has few: else a set of a million images
    would take days."""
    embeddings, labels, texts = grouped_faces(300, 100)
    counted = []
    bincount = torch.bincount

    def note(values: torch.Tensor, minlength: int = 0) -> torch.Tensor:
        counted.append(minlength)
        return bincount(values, minlength=minlength)

    monkeypatch.setattr(torch, "bincount", note)
    breakdown_all_pairs(embeddings, labels, groups_of("age", texts), (TarAtFar(0.1, 0.9, 0.3, 1000),), block=20)
    assert counted
    assert max(counted) <= 20 * 3  # three couples of groups


def rates_of_a_rank() -> torch.Tensor:
    """Rates by group of one of several processes."""
    embeddings, labels, texts = grouped_faces()
    points = (TarAtFar(0.1, 0.9, 0.3, 1000),)
    found = breakdown_all_pairs(
        embeddings, labels, groups_of("age", texts), points, block=64, ranks=Ranks(torch.distributed.group.WORLD)
    )
    return torch.tensor([[r.tar.estimate, r.far.estimate] for r in found.rates if r.tar and r.far])


def test_ranks_share_the_groups() -> None:
    """Protects breakdowns under torchrun: any rank has the rates of a process alone."""
    embeddings, labels, texts = grouped_faces()
    points = (TarAtFar(0.1, 0.9, 0.3, 1000),)
    alone = breakdown_all_pairs(embeddings, labels, groups_of("age", texts), points, block=64)
    expected = torch.tensor([[r.tar.estimate, r.far.estimate] for r in alone.rates if r.tar and r.far])
    for found in run_on_ranks(2, rates_of_a_rank):
        assert torch.equal(found, expected)


def test_pairs_by_group() -> None:
    """Protects the same for a list of pairs: those of images in no group are left out, kinds without pairs are None."""
    random = np.random.default_rng(0)
    texts = [NAMES[i] for i in random.choice(3, 120, p=(0.45, 0.45, 0.1))]
    index = random.integers(0, 120, (500, 2))
    same = random.random(500) < 0.5
    scores = random.normal(np.where(same, 0.6, 0.2), 0.2)
    points = tar_at_far(scores[same], scores[~same], (0.1, 0.02))
    found = breakdown_pairs(scores, same, index, groups_of("age", texts), points)
    pair_texts = np.array(texts)[index[:, 0]], np.array(texts)[index[:, 1]]
    assert len(found.rates) == 6
    for rate in found.rates:
        genuine, impostor, tar, far = slow_rates(scores, same, pair_texts, rate.groups, rate.threshold)
        assert (rate.genuine, rate.impostor) == (genuine, impostor)
        assert rate.tar is not None
        assert rate.far is not None
        assert (rate.tar.estimate, rate.far.estimate) == pytest.approx((tar, far))
    only = breakdown_pairs(scores[same], same[same], index[same], groups_of("age", texts), points)
    assert only.rates[0].far is None
    header, rows = found.as_table()
    assert all(len(row) == len(header) for row in rows)
    assert rows[1][0] == "old / young"
    assert only.as_table()[1][0][-1] == ""
    assert json.loads(json.dumps(asdict(found)))["rates"][0]["groups"] == ["old", "old"]


def test_intervals_of_units_that_err_together() -> None:
    """Protects the interval's width: units that fail as a whole count as one trial each, independent trials as many."""
    random = np.random.default_rng(0)
    trials = np.full(400, 20.0)
    whole, single = (random.random(400) < 0.3) * trials, random.binomial(20, 0.3, 400)
    found, narrow = clustered_interval(whole, trials, 1), clustered_interval(single, trials, 1)
    assert found is not None
    assert narrow is not None
    assert found.high - found.low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 400), rel=0.1)
    assert narrow.high - narrow.low == pytest.approx(2 * 1.96 * np.sqrt(0.3 * 0.7 / 8000), rel=0.1)
    none = clustered_interval(np.zeros(400), trials, 1)
    assert none is not None
    assert (none.estimate, none.low) == (0.0, 0.0)
    assert none.high == pytest.approx(3.84 / 404, rel=0.01)  # Wilson's bound for no hit in 400
    assert clustered_interval(np.zeros(3), np.zeros(3), 2) is None


def test_intervals_by_group_cover_the_truth() -> None:
    """Protects the interval of a false accept rate: people who are like many others make it wide, and 90 % of them
    hold the truth.
    """
    threshold, inside = 1.5, 0
    first, second = np.triu_indices(80, 1)
    large = np.random.default_rng(1).normal(size=(2, 4_000_000))
    truth = float((0.7 * large.sum(0) + 0.5 * np.random.default_rng(2).normal(size=4_000_000) > threshold).mean())
    for seed in range(100):
        random = np.random.default_rng(100 + seed)
        wolves = 0.7 * random.normal(size=80)
        accepted = wolves[first] + wolves[second] + 0.5 * random.normal(size=len(first)) > threshold
        ends = np.concatenate([first, second])
        hits, trials = np.bincount(ends, np.tile(accepted, 2), 80), np.bincount(ends, minlength=80)
        found = clustered_interval(hits, trials, 2, 0.9)
        assert found is not None
        inside += found.low <= truth <= found.high
    assert 82 <= inside <= 98


def test_columns_of_a_csv(tmp_path: Path) -> None:
    """Protects the reader: by identity or image, by path or file name, numbers cut at quartiles, gaps left out, cells
    parted as by any spreadsheet."""
    path = tmp_path / "columns.csv"
    path.write_text("identity;a,b\nAnn;1,5\n")
    assert read_columns(path).values == {"a,b": {"Ann": "1,5"}}
    path.write_text("identity\ta,b\r\nAnn\t1,5\r\n\t\r\n", encoding="utf-16", newline="")
    assert read_columns(path).values == {"a,b": {"Ann": "1,5"}}
    path.write_text("\ufeffimage,pose,age\nAnn/1.jpg,front,20\n2.jpg,side,30\n3.jpg,,40\n", encoding="utf-8")
    columns = read_columns(path)
    assert (columns.key, list(columns.values)) == ("image", ["pose", "age"])
    groups = group_by(columns, "pose", ["Ann/1.jpg", "Bob/2.jpg", "Bob/3.jpg", "Bob/4.jpg"])
    assert (groups.names, groups.of.tolist()) == (("front", "side"), [0, 1, -1, -1])
    ages = [str(age) for age in range(1, 41)] + [""]
    cut = groups_of("age", ages)
    assert cut.names == ("below 10.75", "10.75 to 20.5", "20.5 to 30.25", "30.25 and above")
    assert np.bincount(cut.of + 1).tolist() == [1, 10, 10, 10, 10]


def test_keys_of_listed_images_whose_names_have_colons(tmp_path: Path) -> None:
    """Protects people and images called `A: B` from being looked for in a table by what follows the colon."""
    for name in ("Dr: A", "B"):
        (tmp_path / name).mkdir()
        for image in range(6):
            (tmp_path / name / f"{image}: x.png").touch()
    sides = [(f"{name}/{image}: x.png", same) for name, same in (("Dr: A", 1), ("B", 0)) for image in range(1, 6)]
    rows = "".join(f"Dr: A/0: x.png,{other},{same}\n" for other, same in sides)
    (tmp_path / "pairs.csv").write_text(f"path1,path2,same\n{rows}")
    listed = open_test_set(tmp_path / "pairs.csv", "pairs")
    assert keys_of(listed, "identity")[:2] == ["Dr: A", "Dr: A"]
    assert keys_of(listed, "image")[:2] == ["Dr: A/0: x.png", "Dr: A/1: x.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,pose\nAnn,front\n", "line 1: 'name,pose'"),
        ("image\n1.jpg\n", "line 1: 'image'"),
        ("image,pose,pose\n", "line 1: "),
        ("", "line 1: ''"),
        ("image,pose\n1.jpg,front\n1.jpg,side\n", "line 3: '1.jpg' comes twice"),
        ("image,pose\n1.jpg\n", "line 2: 1 columns, the header has 2"),
        ('image,pose\n"1.jpg"x,front\n', "line 2: .* does something follow it"),
        ('image,pose\n1.jpg,front\n"2.jpg,front\n3.jpg,side\n', "line 3: unexpected end of data: is a quote"),
        ("image,pose\n1.jpg,front\n", "none of its image names is in the set, such as 'other.jpg'"),
        ("image,age\n1.jpg,2\n", "no column 'pose', only age"),
        ("image,pose\n" + "".join(f"{i}.jpg,p{i}\n" for i in range(13)), "13 different values, which are no numbers"),
    ],
)
def test_damaged_columns_are_named(text: str, message: str, tmp_path: Path) -> None:
    """Protects users with a CSV that does not fit: file, line and what is wrong."""
    path = tmp_path / "columns.csv"
    path.write_text(text)
    keys = [f"{i}.jpg" for i in range(13)] if text.count("\n") > 5 else ["other.jpg"]
    with pytest.raises(ColumnsError, match=message) as caught:
        group_by(read_columns(path), "pose", keys)
    assert str(path) in str(caught.value)


def test_names_that_are_no_utf8_are_found(tmp_path: Path) -> None:
    """Protects tables of older programs: their bytes are those of the files, whatever the encoding."""
    (tmp_path / "columns.csv").write_bytes(b"image,pose\nAndr\xe9/1.jpg,front\nBob/2.jpg,side\n")
    groups = group_by(read_columns(tmp_path / "columns.csv"), "pose", [os.fsdecode(b"Andr\xe9/1.jpg"), "Bob/2.jpg"])
    assert (groups.names, groups.of.tolist()) == (("front", "side"), [0, 1])


def test_no_image_in_any_group() -> None:
    """Protects from an empty table that looks like a result."""
    with pytest.raises(ValueError, match="no image has a group of column 'age'"):
        breakdown_all_pairs(*clustered(20, 4), groups_of("age", [""] * 20), (TarAtFar(0.1, 0.9, 0.3, 1000),))


def test_error_versus_reject_equals_a_loop() -> None:
    """Protects every point of the curve, with ties in quality: pairs below a quality go, the threshold stays."""
    random = np.random.default_rng(0)
    same = random.random(2000) < 0.5
    images = random.integers(0, 30, 500) / 10
    index = random.integers(0, 500, (2000, 2))
    quality = pair_quality(images, index)
    assert quality.tolist() == [min(images[a], images[b]) for a, b in index]
    scores = random.normal(np.where(same, 0.4 + 0.1 * quality, 0.1), 0.15)
    shares = (0.0, 0.1, 0.25, 0.5, 0.9)
    point = tar_at_far(scores[same], scores[~same], (0.01,))[0]
    threshold = point.threshold
    curve = error_versus_reject(scores, same, quality, point, shares)
    assert curve.point == point
    for place, share in enumerate(shares):
        kept = quality >= sorted(quality)[int(share * 2000)]
        assert curve.rejected[place] == (~kept).mean() <= share
        assert (curve.genuine[place], curve.impostor[place]) == ((kept & same).sum(), (kept & ~same).sum())
        assert curve.fnmr[place] == pytest.approx((scores[kept & same] <= threshold).mean())
        assert curve.fmr[place] == pytest.approx((scores[kept & ~same] > threshold).mean())
    assert curve.area < 0.9
    assert error_versus_reject(scores, same, -quality, point, shares).area > 1.1
    assert np.isnan(error_versus_reject(np.where(same, 9.0, 0.0), same, quality, point, shares).area)


@pytest.mark.parametrize(
    ("quality", "shares", "message"),
    [
        (np.ones(9), (0.0,), "10 pairs need as many qualities"),
        (np.full(10, np.nan), (0.0,), "all finite"),
        (np.ones(10), (0.0, 1.0), "must rise within"),
        (np.ones(10), (0.2, 0.1), "must rise within"),
        (np.ones(10), (), "must rise within"),
    ],
)
def test_refuses_curves_without_meaning(quality: NDArray, shares: tuple[float, ...], message: str) -> None:
    """Protects callers from misaligned qualities and shares that cannot be."""
    with pytest.raises(ValueError, match=message):
        error_versus_reject(np.arange(10.0), np.arange(10) % 2 == 0, quality, TarAtFar(0.1, 0.5, 5.0, 5), shares)


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Images of two people in folders, and `pairs.txt`."""
    for person in range(2):
        folder = tmp_path / "images" / f"P{person}"
        folder.mkdir(parents=True)
        for shot in (1, 2):
            (folder / f"P{person}_{shot:04d}.jpg").write_bytes(tiny_face(person, shot))
    (tmp_path / "pairs.txt").write_text("P0\t1\t2\nP0\t1\tP1\t1\nP1\t1\t2\nP1\t2\tP0\t2\n")
    return tmp_path


def test_pairs_of_a_list_equal_those_of_a_bin(listed: Path) -> None:
    """Protects testing without a `.bin`: the same pairs of the same bytes in the same order, and who is who."""
    pairs = open_pair_set(listed / "pairs.txt", listed / "images")
    encoded = [pairs.images.encoded(i) for i in pairs.index.reshape(-1)]
    write_bin(listed / "pairs.bin", encoded, pairs.same.tolist())
    packed = open_pair_set(listed / "pairs.bin")
    assert packed.people is None
    assert [packed.images.encoded(i) for i in packed.index.reshape(-1)] == encoded
    np.testing.assert_array_equal(packed.same, pairs.same)
    assert pairs.same.tolist() == [True, False, True, False]
    assert pairs.people is not None
    assert [(pairs.people[a] == pairs.people[b]) for a, b in pairs.index] == pairs.same.tolist()
    assert len(pairs.images) == 4
    random = np.random.default_rng(0).normal(size=(4, 5))
    assert ten_fold(random[pairs.index.reshape(-1)], pairs.same, 2).accuracy <= 1


def test_lists_in_which_folders_are_not_people(listed: Path) -> None:
    """Protects from taking folders for people where the list says otherwise."""
    (listed / "list.csv").write_text("path1,path2,same\nP0/P0_0001.jpg,P1/P1_0001.jpg,1\n")
    assert open_pair_set(listed / "list.csv", listed / "images").people is None


def test_lists_that_cannot_be_opened(listed: Path) -> None:
    """Protects users from a late failure: a missing image or folder is named at once, with its line."""
    (listed / "images" / "P1" / "P1_0002.jpg").unlink()
    with pytest.raises(PairsError, match=r"pairs.txt, line 3: .*P1_0002.jpg does not exist"):
        open_pair_set(listed / "pairs.txt", listed / "images")
    with pytest.raises(PairsError, match="needs the folder of its images"):
        open_pair_set(listed / "pairs.txt")


def test_an_impostor_pair_counts_for_both_its_people() -> None:
    """Protects the intervals of false accepts: one person whom many resemble widens them, on either side of a pair."""
    random = np.random.default_rng(0)
    labels = np.arange(30) // 2
    vectors = random.normal(size=(30, 4))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    groups = groups_of("one", ["all"] * 30)
    point = TarAtFar(1e-1, 0.0, 0.3, 100)
    (rate,) = breakdown_all_pairs(torch.from_numpy(vectors), torch.from_numpy(labels), groups, [point]).rates
    scores, impostor = vectors @ vectors.T, labels[:, None] != labels
    hits = np.array([(impostor & (scores > 0.3))[labels == person].sum() for person in range(15)])
    trials = np.array([impostor[labels == person].sum() for person in range(15)])
    assert rate.far == clustered_interval(hits, trials, 2)
