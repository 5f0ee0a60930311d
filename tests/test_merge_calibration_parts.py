"""What --t auto is made of, each part by itself: samples, strangers of one set, halves, joins, and its words."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from dataset_merge import calibration, reference_scores
from dataset_merge.calibration import CalibrationError, require_identities
from dataset_merge.centres import identity_centres
from dataset_merge.grouping import Pairs, Rule
from dataset_merge.reference_scores import Impostors, half_scores, impostor_scores
from merge_people import draw_set


def test_a_sample_is_drawn_from_all() -> None:
    """Those that are wanted, each once and in their order, from the whole set and by the seed; all, if they are few."""
    wanted = torch.arange(1000) % 2 == 0
    some, others = (reference_scores._sampled(wanted, 50, seed) for seed in (0, 1))
    assert len(some) == 50
    assert wanted[some].all()
    assert (some.diff() > 0).all()
    assert some.max() > 800
    assert not torch.equal(some, others)
    for most in (500, 501):
        assert torch.equal(reference_scores._sampled(wanted, most, 0), wanted.nonzero().flatten())


@pytest.mark.parametrize(("rule", "weight"), [("mutual", 0.5), ("clusters", 0.1)])
def test_strangers_equal_a_loop(rule: Rule, weight: float) -> None:
    """A set with itself, against loops over the matrix: the scores of pairs that would join (mutual: each other's best;
    clusters: what reaches the median of the highest cosines), all pairs counted, those without an image left out."""
    images = torch.ones(40, dtype=torch.int64)
    images[[3, 17]] = 0
    people = draw_set(torch.arange(40), images, seed=0, size=6)
    told = impostor_scores(identity_centres(people.embeddings, people.labels, 40), weight, rule, 16)
    cosines = (people.embeddings.double() @ people.embeddings.double().T).numpy()
    np.fill_diagonal(cosines, -1)
    nearest = cosines.max(1)
    scores = np.full((38, 38), -np.inf)
    for i in range(38):
        for j in {*range(38)} - {i}:
            others = np.concatenate([np.delete(cosines[i], j), np.delete(cosines[j], i)])
            scores[i, j] = cosines[i, j] - weight * max(0.0, others.max())
    best = (scores == scores.max(0)) & (scores == scores.max(1, keepdims=True))
    joins = np.triu(best if rule == "mutual" else scores >= np.median(nearest))
    assert np.sort(told.scores) == pytest.approx(np.sort(scores[joins]), abs=1e-6)
    assert joins.sum() > 2
    assert told.compared == 38 * 37 / 2
    assert told.nearest == pytest.approx(nearest, abs=1e-6)
    assert told.usual_rival == pytest.approx(weight * np.median(nearest), abs=1e-6)


def test_strangers_of_next_to_nobody() -> None:
    """Nothing to compare with one person; and with two that are opposites no rival takes off less than nothing."""
    vectors = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    for people, compared in ((0, 0.0), (1, 0.0), (2, 1.0)):
        told = impostor_scores(identity_centres(vectors[:people], torch.arange(people), people), 0.5, "mutual", 16)
        assert (told.compared, told.usual_rival, len(told.nearest)) == (compared, 0.0, people if people > 1 else 0)


@pytest.mark.parametrize("images", [2, 3])
def test_halves_of_wrong_labels_have_no_say(images: int) -> None:
    """Nearly half of the identities have images of someone else each: how alike those of one person are is seen from
    the others, where halves are single images just as their cosines say."""
    own = torch.arange(400).repeat_interleave(images)
    own[: 180 * images] = torch.randint(400, (180 * images,), generator=torch.Generator().manual_seed(0))
    people = draw_set(own, torch.ones(len(own), dtype=torch.int64), seed=1, size=256, spread=0.9)
    labels = torch.arange(400).repeat_interleave(images)
    centres = identity_centres(people.embeddings, labels, 400)
    strangers = impostor_scores(centres, 0.5, "mutual", 256)
    halves = half_scores(people.embeddings, labels, centres, strangers)
    right = halves.cosine[180:]
    if images == 2:
        assert halves.alike == np.median(halves.cosine[halves.cosine > np.median(strangers.nearest)])
    assert halves.alike == pytest.approx(1 / (1 + 0.9**2), abs=0.02)
    assert np.median(halves.cosine) < np.median(right) - 0.03  # what all of them would say


def test_no_halves_tell_nothing() -> None:
    """Nobody has two images: how alike two of one person are is not known."""
    embeddings = F.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    nothing = Impostors(np.empty(0), 0.0, np.empty(0))
    halves = half_scores(embeddings, torch.arange(5), identity_centres(embeddings, torch.arange(5), 5), nothing)
    assert len(halves.cosine) == 0
    assert np.isnan(halves.alike)


def test_the_largest_set_is_what_counts() -> None:
    """One set with 200 identities will do, and is named if it has fewer."""
    require_identities([3, 200], ["a", "b"])
    with pytest.raises(CalibrationError, match="the largest, b, has 199"):
        require_identities([3, 199], ["a", "b"])


def test_too_few_scores_are_refused() -> None:
    """A tail of a handful of scores is nothing to go by, however many people there are, whom the message does not call
    too few."""
    strangers = Impostors(np.linspace(0, 0.3, 49), 300 * 299 / 2, np.linspace(0, 0.3, 300))
    centres: Any = SimpleNamespace(images=torch.ones(300, dtype=torch.int64))
    with pytest.raises(CalibrationError, match=r"needs 50 matches of different people .* found 49: give a threshold"):
        calibration.calibrate([strangers], [], [centres], [], "mutual", 0.01, ["a"])


def test_scores_of_joins() -> None:
    """A chain 0-1-2-3: within one set its middle link joins nobody, as both have a better one; between two sets each
    link has people of its own; by clusters all count."""
    value = np.array([0.9, 0.7, 0.8])
    pairs = Pairs(np.array([0, 1, 2]), np.array([1, 2, 3]), value, value)
    assert sorted(calibration._join_scores(pairs, True, "mutual")) == [0.8, 0.9]
    assert sorted(calibration._join_scores(pairs, False, "mutual")) == [0.7, 0.8, 0.9]
    assert sorted(calibration._join_scores(pairs, True, "clusters")) == [0.7, 0.8, 0.9]
