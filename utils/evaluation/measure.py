"""One model on one set: embeddings, the set's protocol, and all that is measured beside it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.evaluation.all_pairs import AllPairsResult, all_pairs
from utils.evaluation.bootstrap import Interval, Intervals, bootstrap_identities, bootstrap_pairs, connected_groups
from utils.evaluation.breakdown import Breakdown, breakdown_all_pairs, breakdown_pairs
from utils.evaluation.columns import Tables
from utils.evaluation.comparison import Comparison, compare_identities, compare_pairs
from utils.evaluation.curves import Roc, TarAtFar, roc_of_pairs, tar_at_far, working_point
from utils.evaluation.folds import FoldResult, ten_fold
from utils.evaluation.hardest import HardPairs, hardest_of_all, hardest_of_pairs
from utils.evaluation.identification import Identification, identify_people
from utils.evaluation.identity_counts import IdentityCounts, identity_counts
from utils.evaluation.ijb import (
    IjbIdentification,
    IjbVerification,
    ijb_identification,
    ijb_verification,
)
from utils.evaluation.rejection import RejectCurve, error_versus_reject, pair_quality
from utils.evaluation.templates import image_features, pool_templates
from utils.evaluation.test_sets import TestSet
from utils.ranks import Ranks

_BINS = np.linspace(-1, 1, 201)
# Pairs of each kind in an error-versus-reject curve of an all-pairs test, at most: a random sample of them.
_SAMPLED_PAIRS = 500_000
_ROWS_AT_ONCE = 1 << 16


@dataclass(frozen=True)
class Options:
    """How sets are tested.

    mirror: the mirrored image's embedding is added. cache: folder of kept embeddings, or None. draws: of the bootstrap;
    0: no intervals. identify: 1:N as well. hardest: pairs to keep of the hardest of each kind.
    """

    batch_size: int
    workers: int
    mirror: bool
    cache: Path | None
    draws: int
    seed: int
    identify: bool
    hardest: int


@dataclass(frozen=True, eq=False)
class Histogram:
    """genuine, impostor: int64 [B], scores in each bin. edges: float64 [B + 1]."""

    genuine: NDArray[np.int64]
    impostor: NDArray[np.int64]
    edges: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measured:
    """What a model reached on a set.

    features: float32 [N, D], one for each image, of the model's own lengths. auc, eer: 0..1. curve: FAR and TAR,
    rising. counts: what intervals and comparisons of the all-pairs test are made from. What was not asked for, or the
    set has no means for, is None or empty.
    """

    model: str
    features: NDArray[np.floating]
    result: FoldResult | AllPairsResult | IjbVerification
    points: tuple[TarAtFar, ...]
    auc: float
    eer: float
    curve: tuple[NDArray[np.float64], NDArray[np.float64]]
    histogram: Histogram
    intervals: Intervals | None = None
    counts: IdentityCounts | None = None
    identification: Identification | IjbIdentification | None = None
    hardest: tuple[HardPairs, HardPairs] | None = None
    rejects: dict[str, RejectCurve] = field(default_factory=dict)
    breakdowns: dict[str, Breakdown] = field(default_factory=dict)

    @property
    def accuracy_interval(self) -> Interval | None:
        """That of the accuracy; None without folds or intervals."""
        return self.intervals.accuracy if self.intervals else None

    @property
    def tar_intervals(self) -> dict[float, Interval]:
        """Those of the TARs, by FAR; none without intervals."""
        return dict(zip(self.intervals.far, self.intervals.tar, strict=True)) if self.intervals else {}


def unit_rows(features: NDArray[np.floating]) -> NDArray[np.float32]:
    """Rows of length 1, float32."""
    return torch.nn.functional.normalize(torch.from_numpy(np.asarray(features))).numpy()


def measure(
    features: NDArray[np.floating],
    device: torch.device,
    name: str,
    test_set: TestSet,
    tables: Tables,
    options: Options,
    ranks: Ranks,
) -> Measured | None:
    """Test a model, called `name`, on the set by its features [N, D]. All ranks compare; only the first has the result.

    Raises ValueError, naming the image, for features that are not finite or, of single images, zero, and for a set
    that lacks pairs of a kind.
    """
    _check_features(features, name, test_set)
    if test_set.faces is not None:
        return _measure_all_pairs(device, name, test_set, features, tables, options, ranks)
    if not ranks.first:
        return None
    if test_set.pairs is not None:
        return _measure_pairs(name, test_set, features, tables, options)
    return _measure_ijb(name, test_set, features, options)


def _check_features(features: NDArray[np.floating], name: str, test_set: TestSet) -> None:
    for start in range(0, len(features), _ROWS_AT_ONCE):
        norms = np.linalg.norm(np.asarray(features[start : start + _ROWS_AT_ONCE], np.float64), axis=1)
        bad = ~np.isfinite(norms) | ((norms == 0) & (test_set.ijb is None))
        if bad.any():
            i = start + int(bad.argmax())
            raise ValueError(
                f"{test_set.name}: {name} gives {test_set.images.describe(i)} an embedding that is zero or not finite: "
                "the weights are damaged, or --precision is too low for them"
            )


def _measure_pairs(
    name: str, test_set: TestSet, features: NDArray[np.floating], tables: Tables, options: Options
) -> Measured:
    pairs = test_set.pairs
    assert pairs is not None
    try:
        result = ten_fold(unit_rows(features)[pairs.index.reshape(-1)], pairs.same)
        scores, same = result.cosines, result.same
        curve = roc_of_pairs(scores, same)
    except ValueError as error:
        raise ValueError(f"{test_set.name}: {error}") from None
    points = tar_at_far(scores[same], scores[~same])
    point = working_point(points)
    intervals = None
    if options.draws:
        intervals = bootstrap_pairs(result, connected_groups(pairs.index), replicates=options.draws, seed=options.seed)
    return Measured(
        name,
        features,
        result,
        points,
        auc=curve.auc,
        eer=curve.eer,
        curve=(curve.far, curve.tar),
        histogram=_histogram(scores, same),
        intervals=intervals,
        hardest=hardest_of_pairs(scores, same, pairs.index, options.hardest),
        rejects=_reject_curves(scores, same, pairs.index, _qualities(features, tables), point),
        breakdowns={
            title: breakdown_pairs(scores, same, pairs.index, groups, [point])
            for title, groups in tables.groups.items()
        },
    )


def _measure_all_pairs(
    device: torch.device,
    name: str,
    test_set: TestSet,
    features: NDArray[np.floating],
    tables: Tables,
    options: Options,
    ranks: Ranks,
) -> Measured | None:
    faces = test_set.faces
    assert faces is not None
    unit = torch.from_numpy(unit_rows(features)).to(device)
    labels = torch.from_numpy(faces.labels)
    try:
        result = all_pairs(unit, labels, progress=ranks.first, ranks=ranks)
    except ValueError as error:
        raise ValueError(f"{test_set.name}: {error}") from None
    point = working_point(result.points)
    counts = identity_counts(unit, labels, result, progress=ranks.first, ranks=ranks) if options.draws else None
    breakdowns = {
        title: breakdown_all_pairs(unit, labels, groups, [point], progress=ranks.first, ranks=ranks)
        for title, groups in tables.groups.items()
    }
    hardest = hardest_of_all(unit, labels, options.hardest, progress=ranks.first, ranks=ranks)
    if not ranks.first:
        return None
    return Measured(
        name,
        features,
        result,
        result.points,
        auc=result.auc,
        eer=result.eer,
        curve=result.roc(),
        histogram=Histogram(result.genuine_counts, result.impostor_counts, result.edges),
        intervals=bootstrap_identities(counts, result, options.draws, seed=options.seed) if counts else None,
        counts=counts,
        identification=identify_people(unit.cpu().numpy(), faces.labels, progress=True) if options.identify else None,
        hardest=hardest,
        rejects=_rejects_of_all(unit, faces.labels, _qualities(features, tables), point, options.seed),
        breakdowns=breakdowns,
    )


def _rejects_of_all(
    unit: Tensor, labels: NDArray[np.int64], qualities: Mapping[str, NDArray[np.float64]], point: TarAtFar, seed: int
) -> dict[str, RejectCurve]:
    """Curves of a random sample of the pairs, where there are many."""
    if not qualities:
        return {}
    index = _sampled_pairs(labels, seed)
    same = labels[index[:, 0]] == labels[index[:, 1]]
    first, second = torch.from_numpy(index).to(unit.device).T
    parts = [(unit[a] * unit[b]).sum(1) for a, b in zip(first.split(1 << 16), second.split(1 << 16), strict=True)]
    scores = torch.cat(parts).double().cpu().numpy()
    return _reject_curves(scores, same, index, qualities, point)


def _reject_curves(
    scores: NDArray[np.float64],
    same: NDArray[np.bool_],
    index: NDArray[np.int64],
    qualities: Mapping[str, NDArray[np.float64]],
    point: TarAtFar,
) -> dict[str, RejectCurve]:
    """For each quality the curve of the pairs where it is known; none where these are of one kind, or of one value."""
    curves = {}
    for name, values in qualities.items():
        quality = pair_quality(values, index)
        known = np.isfinite(quality)
        genuine, quality = same[known], quality[known]
        if genuine.any() and not genuine.all() and np.ptp(quality) > 1e-6 * np.abs(quality).max():
            curves[name] = error_versus_reject(scores[known], genuine, quality, point)
    return curves


def _sampled_pairs(labels: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Distinct images, int64 [P, 2]: genuine and impostor pairs, `_SAMPLED_PAIRS` of each at most, drawn at random
    where there are more of both together."""
    generator = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    starts = np.flatnonzero(np.diff(labels[order], prepend=-1))
    sizes = np.diff(starts, append=len(labels))
    ends = np.cumsum(sizes * (sizes - 1) // 2)  # of each person's genuine pairs, numbered through
    total = int(ends[-1])
    chosen = np.arange(total)
    if total > _SAMPLED_PAIRS:
        chosen = np.sort(generator.choice(total, _SAMPLED_PAIRS, replace=False))
    person = np.searchsorted(ends, chosen, side="right")
    number = chosen - np.append(0, ends)[person]
    # Of a person pair number b (b - 1) / 2 + a is that of the images a < b.
    larger = ((1 + np.sqrt(8 * number + 1)) / 2).astype(np.int64)
    smaller = number - larger * (larger - 1) // 2
    pairs = order[starts[person, None] + np.stack([smaller, larger], 1)]
    images = len(labels)
    if images * (images - 1) // 2 <= _SAMPLED_PAIRS:
        others = np.stack(np.triu_indices(images, 1), 1)
    else:
        others = generator.integers(0, images, (_SAMPLED_PAIRS, 2))
    return np.concatenate([pairs, others[labels[others[:, 0]] != labels[others[:, 1]]]])


def _measure_ijb(name: str, test_set: TestSet, features: NDArray[np.floating], options: Options) -> Measured:
    ijb = test_set.ijb
    assert ijb is not None
    pooled = pool_templates(image_features(features, ijb.scores), ijb.templates, ijb.media)
    result = ijb_verification(pooled, ijb.pairs, ijb.same)
    identification = ijb_identification(pooled, ijb) if ijb.galleries and ijb.probes is not None else None
    return Measured(
        name,
        features,
        result,
        result.ranked,
        auc=result.auc,
        eer=result.eer,
        curve=(result.roc.far, result.roc.tar),
        histogram=_histogram_of_roc(result.roc),
        identification=identification,
    )


def _qualities(features: NDArray[np.floating], tables: Tables) -> dict[str, NDArray[np.float64]]:
    """The qualities of the tables, with the lengths of the features where `norm` asks for them."""
    if "norm" not in tables.qualities:
        return dict(tables.qualities)
    starts = range(0, len(features), _ROWS_AT_ONCE)
    parts = (np.asarray(features[start : start + _ROWS_AT_ONCE], np.float64) for start in starts)
    norms = np.concatenate([np.linalg.norm(part, axis=1) for part in parts])
    return {name: norms if name == "norm" else values for name, values in tables.qualities.items()}


def _histogram(scores: NDArray[np.float64], same: NDArray[np.bool_]) -> Histogram:
    inside = scores.clip(-1, 1)
    return Histogram(np.histogram(inside[same], _BINS)[0], np.histogram(inside[~same], _BINS)[0], _BINS)


def _histogram_of_roc(roc: Roc) -> Histogram:
    """The scores' histogram from the steps of their ROC."""
    places = roc.thresholds[1:].clip(-1, 1)
    genuine = np.histogram(places, _BINS, weights=np.diff(roc.tar) * roc.genuine)[0]
    impostor = np.histogram(places, _BINS, weights=np.diff(roc.far) * roc.impostor)[0]
    return Histogram(np.rint(genuine).astype(np.int64), np.rint(impostor).astype(np.int64), _BINS)


def compare(first: Measured, other: Measured, test_set: TestSet, options: Options) -> tuple[Comparison, ...]:
    """What speaks for either model on the set they were both tested on, at the FARs that it can tell about.

    Nothing for IJB, and without draws.
    """
    if not options.draws:
        return ()
    a, b = first.result, other.result
    if isinstance(a, FoldResult) and isinstance(b, FoldResult):
        assert test_set.pairs is not None
        groups = connected_groups(test_set.pairs.index)
        far = [point.far for point in first.points if point.supported]
        return compare_pairs(a, b, groups, far, replicates=options.draws, seed=options.seed)
    if isinstance(a, AllPairsResult) and isinstance(b, AllPairsResult):
        assert first.counts is not None
        assert other.counts is not None
        found = compare_identities(first.counts, other.counts, a, b, replicates=options.draws, seed=options.seed)
        unknown = {f"TAR at FAR {point.far:.0e}" for point in first.points if not point.supported}
        return tuple(comparison for comparison in found if comparison.measure not in unknown)
    return ()
