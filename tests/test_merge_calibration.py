"""--t auto on drawn people, where the truth is known: the share of wrong joins, the tail's fit, and what is refused."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset_merge import calibration as calibration_module
from dataset_merge import centres as centres_module
from dataset_merge import matching, reference_scores
from dataset_merge import scores as scores_module
from dataset_merge.calibration import Calibration, CalibrationError
from dataset_merge.centres import identity_centres
from dataset_merge.deciding import Decided, MatchSettings, decide
from dataset_merge.grouping import Rule
from dataset_merge.matching import TopMatches
from dataset_merge.reference_scores import Halves, Impostors, expected_cosine, half_scores, impostor_scores
from dataset_merge.scores import score_pairs
from dataset_merge.tails import fit_tails
from live_memory import LiveMemory
from merge_people import DrawnSet, draw_set

AUTO = MatchSettings(t=None)


def drawn_sets(
    sets: int = 2, each: int = 600, common: int = 200, spread: float = 1.0, images: int = 4
) -> list[DrawnSet]:
    """Sets of `each` identities with the first `common` people in all of them, in other images and another order."""
    result = []
    for number in range(sets):
        own = torch.arange(each - common) + common + number * (each - common)
        person = torch.cat([torch.arange(common), own])
        person = person[torch.randperm(each, generator=torch.Generator().manual_seed(number))]
        result.append(draw_set(person, torch.arange(each) % images + 1, seed=number, size=64, spread=spread))
    return result


def with_wrong_labels(part: DrawnSet, share: float, seed: int) -> DrawnSet:
    """The set with a share of its images under labels drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    labels = part.labels.clone()
    moved = torch.rand(len(labels), generator=generator) < share
    labels[moved] = torch.randint(len(part.person), (int(moved.sum()),), generator=generator)
    return DrawnSet(part.embeddings, labels, part.person)


def run(sets: list[DrawnSet], settings: MatchSettings = AUTO) -> Decided:
    return decide(
        [part.embeddings for part in sets],
        [part.labels for part in sets],
        [len(part.person) for part in sets],
        settings,
        [f"set {number}" for number in range(len(sets))],
        torch.device("cpu"),
    )


def calibrated(found: Decided) -> Calibration:
    assert found.calibration is not None
    return found.calibration


def wrong_share(sets: list[DrawnSet], found: Decided) -> tuple[float, float]:
    """Share of wrong ones among joined pairs of identities, and of found ones among those to find."""
    person = torch.cat([part.person for part in sets])
    group = torch.from_numpy(found.grouping.group)
    other = found.source[:, None] < found.source
    joined, same = (group[:, None] == group) & other, (person[:, None] == person) & other
    return float((joined & ~same).sum() / joined.sum()), float((joined & same).sum() / same.sum())


@pytest.mark.parametrize("settings", [AUTO, replace(AUTO, rule="clusters"), replace(AUTO, wrong_joins=0.05)])
def test_the_share_of_wrong_joins_is_kept(settings: MatchSettings) -> None:
    """People that overlap: of the joins about the target share is wrong, not none, and most people are found."""
    sets = drawn_sets()
    found = run(sets, settings)
    wrong, right = wrong_share(sets, found)
    assert wrong <= 2.5 * settings.wrong_joins
    assert right > 0.5
    told = calibrated(found)
    assert told.expected_wrong / told.expected_joins <= settings.wrong_joins
    assert told.expected_wrong_range[0] <= told.expected_wrong <= told.expected_wrong_range[1]
    said = "\n".join(told.explanation)
    assert ("Identities that have joined" in said) == (settings.rule == "mutual")
    assert ("it rests on the fitted tail" in said) == told.extrapolated


def test_what_is_told_of_halves_and_rivals() -> None:
    """All halves are in the picture; recall is the share of them that reach the threshold; the equivalent cosine is the
    threshold and what the usual rival takes off."""
    sets = drawn_sets()
    told = calibrated(run(sets))
    assert told.genuine.sum() == 2 * 450  # three in four have two images or more
    reach = told.genuine[told.edges[:-1] >= told.threshold].sum() / told.genuine.sum()
    assert 0.3 < told.expected_recall < 0.99
    assert told.expected_recall == pytest.approx(reach, abs=0.03)
    rivals = [
        impostor_scores(identity_centres(part.embeddings, part.labels, 600), 0.5, "mutual", 256).usual_rival
        for part in sets
    ]
    assert told.equivalent_cosine == pytest.approx(told.threshold + max(rivals))
    assert max(rivals) > 0.05


@pytest.mark.parametrize("t", [0.65, None])
def test_memory_beside_the_embeddings(t: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is alive at once while two sets are compared: the vectors of all, those of one set while they are made,
    and what has a bound. Neither all halves nor a second copy of all vectors.
    """
    for module, name, limit in (
        (centres_module, "_CHUNK", 64),
        (scores_module, "_CHUNK", 64),
        (reference_scores, "_HALVED", 100),
    ):
        monkeypatch.setattr(module, name, limit)
    sets = [draw_set(torch.arange(1500) + first, torch.full((1500,), 2), first, 512) for first in (0, 1200)]
    with LiveMemory() as memory:
        run(sets, MatchSettings(t, block=64))
    vectors = 3000 * 512 * 4
    assert memory.peak < 1.75 * vectors


def test_memory_for_scores() -> None:
    """Cosines in float64 need 24 x D bytes for 4,096 pairs at once, not for all."""
    people = [draw_set(torch.arange(200), torch.ones(200, dtype=torch.int64), seed=n, size=512) for n in (1, 2)]
    first, second = (part.embeddings for part in people)
    every = _all(first @ second.T)
    with LiveMemory() as memory:
        score_pairs(first, second, every, 0.5)
    assert memory.peak < 1.1 * 4096 * 512 * 24 + 40_000 * 32


def test_a_sample_of_the_identities_is_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample has whole identities, as if there were no others, and says the same about them."""
    people = draw_set(torch.arange(900), torch.arange(900) % 4 + 1, seed=1)
    centres = identity_centres(people.embeddings, people.labels, 900)
    strangers = impostor_scores(centres, 0.5, "mutual", 256)
    every = half_scores(people.embeddings, people.labels, centres, strangers)
    monkeypatch.setattr(reference_scores, "_HALVED", 300)
    some = half_scores(people.embeddings, people.labels, centres, strangers)
    assert len(every.cosine) == 675
    assert len(some.cosine) == 300
    assert np.isin(some.cosine.round(5), every.cosine.round(5)).all()
    assert np.isin(some.sizes.sum(1), (2, 3, 4)).all()
    assert some.alike == pytest.approx(every.alike, abs=0.03)


@pytest.mark.parametrize("rule", ["mutual", "clusters"])
def test_what_was_compared_is_kept(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next call takes from the folder what each set gave with itself, and the sets with each other."""
    monkeypatch.setattr(matching, "_SAVED_AFTER", 0.0)
    parts = drawn_sets(each=250, common=90)

    def decided() -> Decided:
        rows, labels = [part.embeddings for part in parts], [part.labels for part in parts]
        settings = replace(AUTO, rule=rule)
        return decide(rows, labels, [250, 250], settings, ["a", "b"], torch.device("cpu"), folder=tmp_path)

    before = decided()

    def offer(*_: object) -> None:
        raise AssertionError("compared again")

    monkeypatch.setattr(matching._Kept, "offer", offer)
    assert calibrated(decided()).threshold == calibrated(before).threshold


def test_a_higher_share_lowers_the_threshold() -> None:
    """More wrong joins allowed, more people found."""
    sets = drawn_sets()
    strict, easy = (run(sets, replace(AUTO, wrong_joins=share)) for share in (0.003, 0.1))
    assert calibrated(strict).threshold < 1
    assert calibrated(easy).threshold < calibrated(strict).threshold - 0.01
    assert wrong_share(sets, easy)[1] > wrong_share(sets, strict)[1]


def test_the_order_of_the_sets_does_not_show() -> None:
    """Three sets in every order: the same people are together, by exactly the same threshold."""
    sets = drawn_sets(sets=3, each=300, common=100)
    results = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 0, 2]):
        found = run([sets[i] for i in order], replace(AUTO, block=128))
        offsets = np.cumsum([0] + [len(sets[i].person) for i in order])
        group: dict[int, set[tuple[int, int]]] = {}
        for place, number in enumerate(order):
            for identity in range(len(sets[number].person)):
                group.setdefault(int(found.grouping.group[offsets[place] + identity]), set()).add((number, identity))
        told = calibrated(found)
        results.append((told.threshold, told.equivalent_cosine, {frozenset(members) for members in group.values()}))
    assert results[0] == results[1] == results[2]
    assert len(results[0][2]) < 900


def test_the_order_of_two_sets_does_not_show_with_wrong_labels() -> None:
    """Numbers of images differ and people are in a set twice, so what genuine pairs score has a say in the threshold:
    in many drawn cuts, all of the calibration is the same both ways.
    """
    for seed in range(12):
        sets = [
            with_wrong_labels(part, 0.08, 10 * seed + number)
            for number, part in enumerate(drawn_sets(each=260 - 20 * (seed % 2), common=120, images=2 + seed % 4))
        ]
        sets[0] = draw_set(sets[0].person, torch.ones(len(sets[0].person), dtype=torch.int64), seed=seed, spread=1.0)
        told = [calibrated(run(order, replace(AUTO, wrong_joins=0.05))) for order in (sets, sets[::-1])]
        assert told[0].threshold == told[1].threshold
        assert told[0].expected_recall == told[1].expected_recall
        assert told[0].equivalent_cosine == told[1].equivalent_cosine
        assert (told[0].genuine == told[1].genuine).all()


def test_people_who_are_in_a_set_twice_do_not_move_the_threshold_much() -> None:
    """Every twentieth identity of each set is one more of somebody there: without the mixture they would be taken for
    strangers, and nearly nothing would be joined.
    """
    clean = drawn_sets(spread=1.0)
    twice = []
    for number, part in enumerate(clean):
        person = part.person.clone()
        person[:30] = person[30:60]
        twice.append(draw_set(person, torch.arange(600) % 4 + 1, seed=number, spread=1.0))
    before, after = (calibrated(run(sets)).threshold for sets in (clean, twice))
    assert abs(after - before) < 0.05


def test_fixed_threshold_is_the_plain_cosine() -> None:
    """--t 0.65 compares cosines of centres as they are, and tells no calibration."""
    sets = drawn_sets(each=60, common=30, spread=0.7)
    found = run(sets, MatchSettings(t=0.65))
    assert found.calibration is None
    assert found.grouping.threshold == 0.65
    centres = [identity_centres(part.embeddings, part.labels, 60).vectors for part in sets]
    cosines = (centres[0] @ centres[1].T).numpy()
    best = cosines.argmax(1)
    mutual = cosines.argmax(0)[best] == np.arange(60)
    for i in range(60):
        together = found.grouping.group[i] == found.grouping.group[60 + best[i]]
        assert together == (mutual[i] and cosines[i, best[i]] >= 0.65)
        assert found.grouping.cosine[i] == pytest.approx(max(cosines[i]), abs=1e-6)


def test_within_one_set() -> None:
    """One set alone, with people in it twice: they are found; next to nobody else is joined."""
    person = torch.cat([torch.arange(800), torch.arange(60)])
    part = draw_set(person, torch.full((860,), 3), seed=0)
    found = run([part], replace(AUTO, within=True))
    group = found.grouping.group
    assert (group[800:] == group[:60]).mean() > 0.9
    assert np.isnan(calibrated(found).counted_wrong)  # those who are there twice are the right joins
    assert "with all that score so" not in calibrated(found).explanation[0]
    assert not calibrated(found).warning
    assert len(np.unique(group)) >= 790


def test_too_many_people_who_are_there_twice_are_refused() -> None:
    """A third of a set's identities is another's second one: what they score hides how strangers do, and the message
    says that, not that the answer is too far out.
    """
    part = draw_set(torch.cat([torch.arange(600), torch.arange(200)]), torch.full((800,), 3), seed=0)
    with pytest.raises(
        CalibrationError, match=r"1.00%.*a set holds too many people twice.*take --rule clusters, or give a t"
    ):
        run([part], replace(AUTO, within=True))


def test_single_images_have_no_halves() -> None:
    """Sets of single images are calibrated from strangers alone; how many are missed is said to be unknown."""
    found = run(drawn_sets(images=1))
    told = calibrated(found)
    assert not told.genuine.any()
    assert np.isnan(told.expected_recall)
    assert any("No identity has two images" in text for text in told.explanation)


def test_too_few_identities_are_refused() -> None:
    """A tail cannot be known from a few people: the message says how many there are, and what to do."""
    with pytest.raises(CalibrationError, match=r"needs 200 identities.*has 60: give a threshold \(--t 0.65"):
        run(drawn_sets(each=60, common=30))


def test_what_lies_too_far_out_is_refused() -> None:
    """One wrong join in a million among a hundred: no tail of a few hundred thousand pairs reaches that far."""
    with pytest.raises(CalibrationError, match="too far beyond what they show: allow more wrong joins"):
        run(drawn_sets(spread=0.5), replace(AUTO, wrong_joins=1e-7))


def test_nothing_joined_where_nobody_is_in_common() -> None:
    """Sets of other people: a threshold that next to nobody reaches, and no refusal."""
    sets = drawn_sets(common=0)
    assert calibrated(run(sets)).expected_joins <= 2


def test_an_overlap_that_wrong_labels_hide_is_refused() -> None:
    """A third of the images under labels at random: joining nobody in silence would hide the people in common."""
    sets = [with_wrong_labels(part, 0.33, number) for number, part in enumerate(drawn_sets(spread=0.7))]
    with pytest.raises(CalibrationError, match=r"seem to be in common.*allow as many with --wrong-joins"):
        run(sets)


def test_wrong_labels_are_warned_of() -> None:
    """Medoids of identities of which a tenth of the images is of others: the tail takes what they score for people
    under two names and promises 1 %, so the sets' scores as they are have to be told beside it; right labels give no
    warning.
    """
    clean = drawn_sets(each=800, common=300, spread=0.6)
    told = calibrated(run(clean))
    assert not told.warning
    assert told.counted_wrong <= 0.02 * told.expected_joins
    wrong = [with_wrong_labels(part, 0.1, number) for number, part in enumerate(clean)]
    found = run(wrong, replace(AUTO, method="medoid"))
    told = calibrated(found)
    truly = wrong_share(wrong, found)[0]
    assert told.expected_wrong_range[1] < 0.03 * told.expected_joins
    assert truly > 0.05
    assert truly / 2 < told.counted_wrong / told.expected_joins < 2 * truly
    assert "pairs of identities inside the sets reach the threshold" in told.warning
    assert f"or {told.counted_wrong:.1f} with all that score so in a set" in told.explanation[0]


def test_a_share_that_can_be_kept_is_not_refused() -> None:
    """Where the very highest pairs are few, one expected wrong is a high share of them; further down it is kept."""
    sets = [with_wrong_labels(part, 0.05, n) for n, part in enumerate(drawn_sets(each=800, common=300, spread=0.9))]
    found = run(sets, replace(AUTO, method="medoid"))
    assert wrong_share(sets, found)[0] < 0.03
    assert wrong_share(sets, found)[1] > 0.5


def test_tail_of_known_scores() -> None:
    """Maxima of a Gumbel distribution: the fitted tail has their survival far out, and one in ten pairs of people who
    are there twice change it little.
    """
    generator = np.random.default_rng(0)
    scores = generator.gumbel(0.2, 0.03, 3000)
    genuine = generator.normal(0.6, 0.1, 2000).clip(max=1)
    true = 3000 * (1 - np.exp(-np.exp(-(0.4 - 0.2) / 0.03)))
    clean = float(fit_tails(scores, scores, genuine, 0, 20)[0].above(0.4))
    mixed_scores = np.concatenate([scores, genuine[:300]])
    mixed = float(fit_tails(mixed_scores, mixed_scores, genuine, 0, 20)[0].above(0.4))
    assert true / 2 < clean < true * 2
    assert true / 5 < mixed < true * 5


def test_expected_cosine_equals_simulation() -> None:
    """The cosine of means of n and m images, by the formula, against many drawn people."""
    alike = 1 / (1 + 0.9**2)
    sizes = torch.tensor([1, 2, 8])
    people = draw_set(torch.arange(500).repeat_interleave(3), sizes.repeat(500), seed=0, size=512, spread=0.9)
    vectors = identity_centres(people.embeddings, people.labels, 1500).vectors.view(500, 3, -1)
    for i in range(3):
        for j in range(i):
            simulated = float((vectors[:, i] * vectors[:, j]).sum(1).mean())
            formula = expected_cosine(alike, *(sizes[[k]].numpy() for k in (i, j)))
            assert formula[0] == pytest.approx(simulated, abs=0.01)


def test_halves_tell_how_alike_images_of_a_person_are() -> None:
    """The mean cosine of two images of a person comes out of halves of any size, and halves have all the images."""
    for images in (torch.full((400,), 2), torch.full((400,), 9)):
        people = draw_set(torch.arange(400), images, seed=1, size=256, spread=0.9)
        centres = identity_centres(people.embeddings, people.labels, 400)
        strangers = impostor_scores(centres, 0.5, "mutual", 256)
        halves = half_scores(people.embeddings, people.labels, centres, strangers)
        assert halves.alike == pytest.approx(1 / (1 + 0.9**2), abs=0.03)
        assert halves.sizes.sum(1).tolist() == images.tolist()


def _all(cosines: Tensor) -> tuple[TopMatches, TopMatches]:
    return tuple(TopMatches(*m.topk(m.shape[1], dim=1)) for m in (cosines, cosines.T))  # type: ignore[return-value]


def test_scores_are_of_float64() -> None:
    """Cosines that float32 cannot tell apart decide who is whose best: products of the float32 vectors, in float64."""
    people = [draw_set(torch.arange(n), torch.ones(n, dtype=torch.int64), seed=n, size=64) for n in (40, 30)]
    first, second = (part.embeddings for part in people)
    pairs = score_pairs(first, second, _all(first @ second.T), 0.5)
    exact = first.double() @ second.double().T
    assert abs(pairs.cosine - exact[pairs.first, pairs.second].numpy()).max() < 1e-14
    assert np.unique(pairs.cosine).size == 1200
    within = score_pairs(first, None, (_within := TopMatches(*(first @ first.T).topk(40, dim=1)), _within), 0.0)
    assert len(within) == 40 * 39 // 2 + 40
    assert (within.first <= within.second).all()
    assert abs(within.cosine - (first.double() @ first.double().T)[within.first, within.second].numpy()).max() < 1e-14


def test_pairs_come_from_either_side_once() -> None:
    """What only the rows or only the columns have kept is a pair, what both have is one pair, and gaps are none."""
    vectors = torch.eye(4)
    none = torch.full((3, 1), -1)
    rows = TopMatches(torch.zeros(3, 2), torch.cat([torch.tensor([[1], [0], [3]]), none], 1))
    columns = TopMatches(torch.zeros(4, 1), torch.tensor([[1], [2], [-1], [-1]]))
    pairs = score_pairs(vectors[:3], vectors, (rows, columns), 0.0)
    assert list(zip(pairs.first.tolist(), pairs.second.tolist(), strict=True)) == [(0, 1), (1, 0), (2, 1), (2, 3)]
    nobody = TopMatches(torch.zeros(3, 1), none)
    assert len(score_pairs(vectors[:3], None, (nobody, nobody), 0.5)) == 0


def test_scores_take_off_the_nearest_rival() -> None:
    """Against a loop over the whole matrix: cosine - 0.5 x the highest other cosine of either one, 0 at least."""
    people = [draw_set(torch.arange(n), torch.ones(n, dtype=torch.int64), seed=n, size=8) for n in (7, 5)]
    first, second = (part.embeddings for part in people)
    cosines = first @ second.T
    pairs = score_pairs(first, second, _all(cosines), 0.5)
    assert len(pairs) == 35
    for i, j, score in zip(pairs.first, pairs.second, pairs.score, strict=True):
        others = cosines.clone()
        others[i, j] = -1
        rival = max(0.0, float(others[i].max()), float(others[:, j].max()))
        assert score == pytest.approx(float(cosines[i, j]) - 0.5 * rival, abs=1e-6)
    turned = score_pairs(second, first, _all(cosines.T), 0.5)
    back = np.lexsort((turned.first, turned.second))
    assert np.array_equal(turned.score[back], pairs.score)


def test_halves_are_halves() -> None:
    """Of every identity with two images or more; of an odd number one has one more."""
    labels = torch.arange(23) % 4
    embeddings = F.normalize(torch.randn(23, 8, generator=torch.Generator().manual_seed(0)))
    nothing = Impostors(np.empty(0), 0.0, np.empty(0))
    halves = half_scores(embeddings, labels, identity_centres(embeddings, labels, 4), nothing)
    assert halves.sizes.tolist() == [[3, 3], [3, 3], [3, 3], [3, 2]]


def test_scores_of_halves_are_brought_to_whole_identities() -> None:
    """A half against a half says too little of two whole identities: by the formula the cosine grows with the images
    of both, to 1 at most, and the rival is taken off; identities without images are no partners."""
    sizes = np.array([[1, 1], [1, 1]])
    halves = Halves(np.array([0.5, 0.9]), sizes, 0.5, usual_rival=0.1)
    centres: Any = SimpleNamespace(images=torch.tensor([4, *[0] * 20]))
    # Mean lengths of 2 and 4 images whose cosine is 0.5: sqrt(0.75) and sqrt(0.625), of one image 1.
    expected = [0.5 / np.sqrt(0.75 * 0.625) - 0.1, 1 - 0.1]
    assert reference_scores.genuine_scores([halves], [centres]) == pytest.approx(expected)


def test_pairs_that_are_left_to_join_wrongly() -> None:
    """Who has joined is no one else's: 10 x 8 pairs of two sets become 7 x 5 after three joins, 45 within one of ten
    become 6 of the four that are left; none are left where more have joined than there are. By clusters all stay."""
    scores, thresholds = np.array([0.9, 0.7, 0.8]), np.array([0.0, 0.75, 1.0])
    left = calibration_module._open_pairs
    assert left([(0, 1, scores)], [10, 8], "mutual", thresholds).tolist() == [35, 48, 80]
    assert left([(0, 0, scores)], [10], "mutual", thresholds).tolist() == [6, 15, 45]
    assert left([(0, 1, scores)], [10, 8], "clusters", thresholds).tolist() == [80, 80, 80]
    assert left([(0, 1, scores), (0, 0, scores)], [2, 1], "mutual", thresholds).tolist() == [0, 0, 3]


def test_the_range_is_that_of_nine_fits_in_ten(monkeypatch: pytest.MonkeyPatch) -> None:
    """`expected_wrong_range`, 90 % in the report's words: a twentieth of the fits to resampled scores lies on each side
    of it."""
    fitted = []

    def fit(*arguments: Any) -> Any:
        fitted.extend(fit_tails(*arguments))
        return fitted

    monkeypatch.setattr(calibration_module, "fit_tails", fit)
    told = calibrated(run(drawn_sets()))
    above = np.array([float(tail.above(told.threshold)) for tail in fitted])
    wrong = above * told.expected_wrong / above[0]
    low, high = told.expected_wrong_range
    assert (wrong[1:] < low).mean() == pytest.approx(0.05, abs=0.02)
    assert (wrong[1:] > high).mean() == pytest.approx(0.05, abs=0.02)
