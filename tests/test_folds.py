"""The ten-fold protocol against scikit-learn's folds and a plain loop over thresholds, folds and pairs."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.model_selection import KFold

from utils.evaluation.folds import THRESHOLDS, tar_of_folds, ten_fold, ten_fold_of_distances


def make_pairs(count: int, dim: int = 16, spread: float = 0.7, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Pairs of noisy vectors of any length, about half of them around the same centre."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(count, dim))
    same = random.random(count) < 0.5
    others = np.where(same[:, None], centres, random.normal(size=(count, dim)))
    first, second = (vectors + spread * random.normal(size=(count, dim)) for vectors in (centres, others))
    embeddings = np.stack([first, second], axis=1).reshape(2 * count, dim)
    return embeddings * random.uniform(0.1, 30, size=(2 * count, 1)), same


def slow_ten_fold(embeddings: NDArray, same: NDArray, folds: int) -> tuple[list[float], list[float]]:
    """The protocol word by word: accuracy and threshold of each fold."""
    unit = embeddings / np.sqrt((embeddings.astype(np.float64) ** 2).sum(axis=1, keepdims=True))
    distances = ((unit[0::2] - unit[1::2]) ** 2).sum(axis=1)
    accuracies, chosen = [], []
    for train, test in KFold(folds, shuffle=False).split(distances):
        best_accuracy, best_threshold = -1.0, -1.0
        for threshold in np.arange(0, 4, 0.01):
            accuracy = np.mean((distances[train] < threshold) == same[train])
            if accuracy > best_accuracy:
                best_accuracy, best_threshold = accuracy, threshold
        accuracies.append(float(np.mean((distances[test] < best_threshold) == same[test])))
        chosen.append(best_threshold)
    return accuracies, chosen


@pytest.mark.parametrize(("count", "folds"), [(600, 10), (607, 10), (59, 7), (10, 10), (5, 2)])
def test_equals_the_plain_loop(count: int, folds: int) -> None:
    """Protects the protocol itself, even and uneven folds: every fold's accuracy and threshold, mean and deviation."""
    embeddings, same = make_pairs(count)
    result = ten_fold(embeddings, same, folds)
    accuracies, thresholds = slow_ten_fold(embeddings, same, folds)
    np.testing.assert_array_equal(result.fold_accuracies, accuracies)
    np.testing.assert_array_equal(result.thresholds, thresholds)
    assert result.accuracy == pytest.approx(np.mean(accuracies), abs=1e-15)
    assert result.std == pytest.approx(np.std(accuracies), abs=1e-15)


def test_ties_between_distances_and_with_thresholds() -> None:
    """Protects "distance below threshold" and "first of equals" where many distances are equal and lie on the grid."""
    random = np.random.default_rng(1)
    corners = np.eye(4)[random.integers(0, 4, size=400)] * random.choice([-1.0, 1.0], size=(400, 1))  # d = 0, 2 or 4
    same = random.random(200) < 0.5
    result = ten_fold(corners, same)
    accuracies, thresholds = slow_ten_fold(corners, same, 10)
    assert set(result.distances) == {0.0, 2.0, 4.0}
    np.testing.assert_array_equal(result.fold_accuracies, accuracies)
    np.testing.assert_array_equal(result.thresholds, thresholds)


def test_a_pair_at_the_threshold_is_not_accepted() -> None:
    """Protects "below": by the accuracy of its fold, by the pairs that are told right, and by the TAR of the folds."""
    same = np.arange(40) % 2 == 0
    distances = np.where(same, 0.0, 4.0)
    distances[0] = THRESHOLDS[1]
    result = ten_fold_of_distances(distances, same)
    assert result.thresholds[0] == distances[0]
    assert result.fold_accuracies.tolist() == [0.75] + 9 * [1.0]
    assert result.correct.tolist() == [False] + 39 * [True]
    assert tar_of_folds(result).tar == 0, "with a threshold of 0, for want of impostors"


def test_perfect_separation_takes_the_smallest_threshold() -> None:
    """Protects the choice among equally good thresholds, which decides accuracy on the held-out fold."""
    same = np.arange(40) % 2 == 0
    embeddings = np.tile([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], (20, 1))
    result = ten_fold(embeddings, same)
    assert result.accuracy == 1.0
    assert result.std == 0.0
    np.testing.assert_array_equal(result.thresholds, np.full(10, 0.01))
    assert result.cosine_threshold == pytest.approx(0.995)


def test_distances_do_not_depend_on_length_and_dtype() -> None:
    """Protects the normalisation: distances are those of the directions, in float64, whatever comes in."""
    embeddings, same = make_pairs(50)
    scaled = embeddings * np.random.default_rng(2).uniform(1e-3, 1e3, size=(100, 1))
    np.testing.assert_allclose(ten_fold(scaled, same).distances, ten_fold(embeddings, same).distances, atol=1e-13)
    single = ten_fold(embeddings.astype(np.float32), list(same))
    assert single.distances.dtype == np.float64
    np.testing.assert_allclose(single.distances, ten_fold(embeddings, same).distances, atol=1e-5)
    np.testing.assert_array_equal(single.same, same)


@pytest.mark.parametrize(
    ("shape", "pairs", "folds", "message"),
    [
        ((41, 8), 20, 10, r"20 pairs need embeddings of shape \[40, D\], not \[41, 8\]"),
        ((40,), 20, 10, "need embeddings of shape"),
        ((18, 8), 9, 10, "9 pairs cannot make 10 folds"),
        ((40, 8), 20, 1, "at least 2 folds"),
    ],
)
def test_refuses_what_does_not_fit(shape: tuple[int, ...], pairs: int, folds: int, message: str) -> None:
    """Protects callers from a number that was measured on misaligned input."""
    with pytest.raises(ValueError, match=message):
        ten_fold(np.ones(shape), np.ones(pairs, dtype=bool), folds)


def test_refuses_labels_that_are_not_a_list() -> None:
    """Protects against a column vector of labels, which would broadcast."""
    with pytest.raises(ValueError, match="one-dimensional"):
        ten_fold(np.ones((40, 8)), np.ones((20, 1), dtype=bool))


@pytest.mark.parametrize(("value", "message"), [(np.nan, "not finite"), (np.inf, "not finite"), (0.0, "zero norm")])
def test_names_the_bad_row(value: float, message: str) -> None:
    """Protects against NaN distances, which are silently "different person"; the message says where to look."""
    embeddings, same = make_pairs(20)
    embeddings[13] = value
    with pytest.raises(ValueError, match=f"embedding row 13 .*{message}"):
        ten_fold(embeddings, same)
