"""TAR at FAR, ROC, AUC and EER against scikit-learn, plain sorts and the programs that published numbers come from."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.interpolate import interp1d
from scipy.optimize import brentq
from sklearn.metrics import auc, roc_auc_score, roc_curve
from sklearn.model_selection import KFold

from test_folds import make_pairs
from utils.evaluation.curves import (
    FAR_POINTS,
    roc,
    roc_of_pairs,
    support_note,
    support_of,
    tar_at_far,
    tar_at_nearest_roc_point,
)
from utils.evaluation.folds import tar_of_folds, ten_fold, ten_fold_of_distances

Scores = tuple[NDArray[np.floating], NDArray[np.floating]]


def smooth(seed: int, genuine: int = 400, impostor: int = 3000) -> Scores:
    """No two scores are equal."""
    random = np.random.default_rng(seed)
    return random.normal(0.6, 0.15, genuine), random.normal(0.1, 0.15, impostor)


def tied(seed: int) -> Scores:
    """Scores in steps of 0.05, hundreds at each; the kinds overlap."""
    return tuple(np.round(scores * 20) / 20 for scores in smooth(seed))  # type: ignore[return-value]


def single(seed: int) -> Scores:
    """float32, as blocks of products have them."""
    return tuple(scores.astype(np.float32) for scores in smooth(seed))  # type: ignore[return-value]


KINDS = pytest.mark.parametrize("make", [smooth, tied, single])


def sklearn_curve(genuine: NDArray, impostor: NDArray, drop: bool) -> tuple[NDArray, NDArray, NDArray]:
    truth = np.repeat([1, 0], [len(genuine), len(impostor)])
    return roc_curve(truth, np.concatenate([genuine, impostor]), drop_intermediate=drop)


@KINDS
@pytest.mark.parametrize("drop", [False, True])
def test_roc_equals_scikit_learn(make: Callable[[int], Scores], drop: bool) -> None:
    """Protects the curve in plots and reports: the same points, to the last bit, and the same area."""
    for seed in range(3):
        genuine, impostor = make(seed)
        curve = roc(genuine, impostor)
        if drop:
            curve = curve.corners()
        far, tar, thresholds = sklearn_curve(genuine, impostor, drop)
        np.testing.assert_array_equal(curve.far, far)
        np.testing.assert_array_equal(curve.tar, tar)
        np.testing.assert_array_equal(curve.thresholds, thresholds)
        truth = np.repeat([1, 0], [len(genuine), len(impostor)])
        assert curve.auc == pytest.approx(roc_auc_score(truth, np.concatenate([genuine, impostor])), abs=1e-13)
        expected = brentq(lambda rate: 1 - rate - np.interp(rate, far, tar), 0, 1, xtol=1e-14)  # noqa: B023
        assert curve.eer == pytest.approx(expected, abs=1e-9)


def test_the_smallest_curves() -> None:
    """Protects sets of two pairs: apart, equal, and the wrong way round."""
    for genuine, impostor, area, eer in ((1.0, 0.0, 1.0, 0.0), (0.5, 0.5, 0.5, 0.5), (0.0, 1.0, 0.0, 1.0)):
        curve = roc(np.array([genuine]), np.array([impostor]))
        assert (curve.auc, curve.eer) == (area, eer)
        assert len(curve.corners().far) == len(sklearn_curve(np.array([genuine]), np.array([impostor]), True)[0])


@KINDS
def test_rank_rule(make: Callable[[int], Scores]) -> None:
    """Protects the project's one rule for TAR at FAR, word by word, ties included."""
    genuine, impostor = make(1)
    for point in tar_at_far(genuine, impostor, (*FAR_POINTS, 0.29, 0.5, 0.999)):
        threshold = sorted(impostor, reverse=True)[int(np.floor(round(point.far * len(impostor), 9)))]
        assert point.threshold == threshold
        assert point.tar == sum(score > threshold for score in genuine) / len(genuine)
        assert (impostor > threshold).mean() <= point.far


def test_rank_is_that_of_the_decimal() -> None:
    """Protects from binary fractions: 0.29 x 100 impostors is rank 29, though 0.29 * 100 is 28.999... in floats."""
    impostor = np.arange(100.0)
    assert tar_at_far(np.array([71.0]), impostor, (0.29,))[0].threshold == 70.0


@pytest.mark.parametrize(
    ("far", "impostors", "support"),
    [(1e-3, 999, "none"), (1e-3, 1000, "weak"), (1e-3, 9999, "weak"), (1e-3, 10_000, "good"), (0.29, 100, "good")],
)
def test_support(far: float, impostors: int, support: str) -> None:
    """Protects readers from rates that a set is too small for: 1 / FAR pairs say little, fewer nothing."""
    assert support_of(far, impostors) == support
    point = tar_at_far(np.ones(3), np.zeros(impostors), (far,))[0]
    assert (point.support, point.supported) == (support, support != "none")
    assert bool(point.note) == (support != "good")
    assert support_note("none") != support_note("weak")


def ijb_reference(genuine: NDArray, impostor: NDArray, rates: tuple[float, ...]) -> list[float]:
    """The rule of insightface's IJB tools: the ROC from its far end, the first of the points nearest in FAR."""
    far, tar, _ = (values[::-1] for values in sklearn_curve(genuine, impostor, True))
    return [float(tar[min(zip(np.abs(far - rate), range(len(far)), strict=True))[1]]) for rate in rates]


@KINDS
def test_nearest_point_equals_the_ijb_tools(make: Callable[[int], Scores]) -> None:
    """Protects comparisons with published IJB numbers; and it is another rule than ours, so the two must differ."""
    rates = (*FAR_POINTS, 3e-4, 7e-3)
    differing = 0
    for seed in range(5):
        genuine, impostor = make(seed)
        found = [point.tar for point in tar_at_nearest_roc_point(genuine, impostor, rates)]
        assert found == ijb_reference(genuine, impostor, rates)
        differing += found != [point.tar for point in tar_at_far(genuine, impostor, rates)]
    assert differing


def insightface_verification(distances: NDArray, same: NDArray, target: float) -> dict[str, float]:
    """`verification.evaluate` as it is printed: accuracy, TAR at FAR by folds, area under the averaged curve.

    One defect is mended, as it makes the original fail on every set with today's SciPy: the grid of FARs that the
    threshold is interpolated on has each value many times, and interp1d takes no duplicates. So it gets the two grid
    points between which the FAR passes the target.
    """
    grid, fine = np.arange(0, 4, 0.01), np.arange(0, 4, 0.001)
    accuracies, tars, fars, tar_curves, far_curves = [], [], [], [], []
    for train, test in KFold(10, shuffle=False).split(distances):

        def rates(threshold: float, where: NDArray) -> tuple[float, float]:
            accepted = distances[where] < threshold
            return accepted[same[where]].mean(), accepted[~same[where]].mean()

        scores = [((distances[train] < threshold) == same[train]).mean() for threshold in grid]
        accuracies.append(((distances[test] < grid[np.argmax(scores)]) == same[test]).mean())
        curve = np.array([rates(threshold, test) for threshold in grid])
        tar_curves.append(curve[:, 0])
        far_curves.append(curve[:, 1])
        far = np.array([rates(threshold, train)[1] for threshold in fine])
        step = slice(int(np.argmax(far > target)) - 1, int(np.argmax(far > target)) + 1)
        threshold = interp1d(far[step], fine[step], kind="slinear")(target) if far.max() >= target else 0.0
        of_fold = rates(float(threshold), test)
        tars.append(of_fold[0])
        fars.append(of_fold[1])
    area = auc(np.mean(far_curves, axis=0), np.mean(tar_curves, axis=0))
    return {
        "accuracy": float(np.mean(accuracies)),
        "std": float(np.std(accuracies)),
        "tar": float(np.mean(tars)),
        "tar_std": float(np.std(tars)),
        "far": float(np.mean(fars)),
        "auc": float(area),
    }


@pytest.mark.parametrize("target", [1e-3, 1e-2, 0.2])
def test_the_numbers_of_insightface(target: float) -> None:
    """Protects "the same number as others" on equal embeddings. Its area is of a curve on a grid of distances 0.01
    apart: ours is exact, and the two differ by the grid only.
    """
    embeddings, same = make_pairs(1000, dim=16, spread=0.7)
    result = ten_fold(embeddings, same)
    expected = insightface_verification(result.distances, same, target)
    assert result.accuracy == pytest.approx(expected["accuracy"], abs=1e-12)
    assert result.std == pytest.approx(expected["std"], abs=1e-12)
    found = tar_of_folds(result, target)
    assert found.tar == pytest.approx(expected["tar"], abs=1e-12)
    assert found.std == pytest.approx(expected["tar_std"], abs=1e-12)
    assert found.measured_far == pytest.approx(expected["far"], abs=1e-12)
    assert roc_of_pairs(result.cosines, result.same).auc == pytest.approx(expected["auc"], abs=2e-3)


def test_tar_of_folds_without_enough_impostors() -> None:
    """Protects the odd end of that protocol: a FAR that no threshold reaches gives threshold 0 and TAR 0; and a fold
    with one kind of pair has no rate.
    """
    same = np.arange(40) % 2 == 0
    result = ten_fold_of_distances(np.where(same, 0.1, 4.0), same)
    assert tar_of_folds(result, 0.5).tar == 0.0
    with pytest.raises(ValueError, match="fold 5 has no genuine pairs"):
        tar_of_folds(ten_fold_of_distances(np.ones(40), np.arange(40) < 20), 0.1)


def test_what_folds_tell_of_pairs() -> None:
    """Protects what comparisons build on: which pairs are right, by the thresholds of their own folds."""
    embeddings, same = make_pairs(607)
    result = ten_fold(embeddings, same)
    by_fold = [result.correct[result.fold == fold].mean() for fold in range(10)]
    np.testing.assert_allclose(by_fold, result.fold_accuracies, atol=1e-15)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    np.testing.assert_allclose(result.cosines, (unit[::2] * unit[1::2]).sum(1), atol=1e-12)
    with pytest.raises(ValueError, match="607 pairs need as many distances"):
        ten_fold_of_distances(result.distances[:-1], same)


@pytest.mark.parametrize(
    ("genuine", "impostor", "far", "message"),
    [
        ([], [0.0], (0.1,), "no genuine scores"),
        ([1.0], [], (0.1,), "no impostor scores"),
        ([1.0, np.nan], [0.0], (0.1,), "genuine score 1 is not finite"),
        ([1.0], [[0.0]], (0.1,), "in a row"),
        ([1.0], [0.0], (0.0,), "not at 0.0"),
        ([1.0], [0.0], (1.0,), "not at 1.0"),
    ],
)
def test_refuses(genuine: list, impostor: list, far: tuple[float, ...], message: str) -> None:
    """Protects callers from a number without meaning."""
    with pytest.raises(ValueError, match=message):
        tar_at_far(np.array(genuine), np.array(impostor), far)
    with pytest.raises(ValueError, match=message):
        tar_at_nearest_roc_point(np.array(genuine), np.array(impostor), far)


def test_pairs_need_a_flag_each() -> None:
    """Protects against a curve of misaligned scores and flags."""
    with pytest.raises(ValueError, match="a score and a flag each"):
        roc_of_pairs(np.ones(4), np.ones(5, bool))
