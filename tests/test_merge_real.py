"""Who is who on real people: LFW cut into sets with a known overlap, and joined again. Needs `FACE_DATA`.

The people are those that the rule was not found on. LFW has a few wrong labels and people under two names, so that no
rule reaches 1. benchmarks/merge.py draws the whole curves.
"""

from pathlib import Path

import numpy as np
import pytest

from benchmarks.merge import People, best_fixed, cut, cut_within, embed, judge, merge, part_of
from dataset_merge.calibration import CalibrationError
from dataset_merge.deciding import MatchSettings

SEEDS = range(3)


@pytest.fixture(scope="module")
def lfw(face_data: Path, kept_embeddings: Path) -> People:
    """All of LFW through the real net."""
    return embed(face_data / "lfw" / "images", face_data / "models" / "mobilefacenet_y1_128d.onnx", kept_embeddings)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sets", "most", "precision", "recall"), [(2, 0, 0.98, 0.97), (2, 1, 0.98, 0.94), (3, 0, 0.98, 0.97)]
)
def test_auto_beats_the_best_fixed_threshold(
    lfw: People, sets: int, most: int, precision: float, recall: float
) -> None:
    """Halves, one image a side, three sets: F1 above what the best fixed threshold on plain means gives in hindsight,
    far above that of 0.65, and floors below the measured precision and recall.
    """
    cuts = [cut(lfw, part_of(lfw, "held-out"), sets, seed, most) for seed in SEEDS]
    auto = [judge(parts, merge(lfw, parts, MatchSettings(t=None))) for parts in cuts]
    fixed = [best_fixed(lfw, parts, mutual=False)[0] for parts in cuts]
    usual = [judge(parts, merge(lfw, parts, MatchSettings(t=0.65))) for parts in cuts]
    assert np.mean([q.precision for q in auto]) >= precision
    assert np.mean([q.recall for q in auto]) >= recall
    assert np.mean([q.f1 for q in auto]) > np.mean([q.f1 for q in fixed])
    assert np.mean([q.f1 for q in auto]) > np.mean([q.f1 for q in usual]) + 0.05


@pytest.mark.long
def test_auto_keeps_its_precision_under_wrong_labels(lfw: People) -> None:
    """5 % of the labels at random: people are in a set twice then, and the joins are right all the same."""
    for seed in SEEDS:
        parts = cut(lfw, part_of(lfw, "held-out"), 2, seed, noise=0.05)
        found = judge(parts, merge(lfw, parts, MatchSettings(t=None)))
        assert found.precision >= 0.96
        assert found.recall >= 0.8


@pytest.mark.long
def test_people_who_are_in_one_set_twice(lfw: People) -> None:
    """--within: 5 % of the people under two names are found, next to LFW's own such people, which count as errors.
    Of 15 % mutual best cannot tell strangers from them, and says so; clusters can.
    """
    for seed in SEEDS:
        part = cut_within(lfw, part_of(lfw, "held-out"), 0.05, seed)
        found = judge([part], merge(lfw, [part], MatchSettings(t=None, within=True)))
        assert found.precision >= 0.9
        assert found.recall >= 0.85
    part = cut_within(lfw, part_of(lfw, "held-out"), 0.15, 0)
    with pytest.raises(CalibrationError, match=r"a set holds too many people twice.*take --rule clusters"):
        merge(lfw, [part], MatchSettings(t=None, within=True))
    found = judge([part], merge(lfw, [part], MatchSettings(t=None, within=True, rule="clusters")))
    assert found.precision >= 0.93
    assert found.recall >= 0.93


@pytest.mark.long
def test_the_order_of_the_sets_does_not_show(lfw: People) -> None:
    """Cuts with and without wrong labels, both ways: the same threshold, and as many joins."""
    for seed in range(20):
        parts = cut(lfw, part_of(lfw, "held-out")[:1500], 2, seed, noise=(0.0, 0.05)[seed % 2])
        told = [merge(lfw, order, MatchSettings(None, wrong_joins=0.02)).calibration for order in (parts, parts[::-1])]
        assert told[0] is not None
        assert told[1] is not None
        assert told[0].threshold == told[1].threshold
        assert told[0].expected_joins == told[1].expected_joins
