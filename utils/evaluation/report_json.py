"""The report for programs: `report.json`, and `results.json` of the first model alone."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation.all_pairs import AllPairsResult
from utils.evaluation.bootstrap import Interval
from utils.evaluation.checks import Finding
from utils.evaluation.comparison import Comparison
from utils.evaluation.curves import TarAtFar
from utils.evaluation.folds import FoldResult, tar_of_folds
from utils.evaluation.hardest import HardPairs
from utils.evaluation.identification import Identification
from utils.evaluation.ijb import IjbVerification
from utils.evaluation.measure import Measured
from utils.evaluation.test_sets import TestSet
from utils.evaluation.tested import Picture, TestedModel, TestedSet, galleries, pair_counts

VERSION = 1


def as_json(
    models: Sequence[TestedModel],
    sets: Sequence[TestedSet],
    settings: Mapping[str, Any],
    notes: Sequence[Finding],
    overview: Sequence[Picture],
) -> dict[str, Any]:
    """All of the report. settings: those of the test, which has `mirror` among them; overview: pictures of all sets."""
    return {
        "version": VERSION,
        "settings": dict(settings),
        "models": {
            model.name: {"path": str(model.path), "runs_on": model.runs_on, "fingerprint": model.fingerprint}
            for model in models
        },
        "findings": [_finding(finding) for finding in notes],
        "pictures": [picture.file.name for picture in overview],
        "sets": {
            tested.test_set.name: {
                "path": str(tested.test_set.path),
                "protocol": tested.test_set.protocol,
                **tested.counts,
                "models": {
                    one.model: numbers(tested.test_set, one, bool(settings["mirror"])) for one in tested.measured
                },
                "comparisons": [_comparison(*comparison) for comparison in tested.comparisons],
                "findings": [_finding(finding) for finding in tested.findings],
                "pictures": [picture.file.name for picture in tested.pictures],
            }
            for tested in sets
        },
    }


def first_model_as_json(
    models: Sequence[TestedModel], sets: Sequence[TestedSet], settings: Mapping[str, Any]
) -> dict[str, Any]:
    """The numbers of the first model alone, by set: what exports and model cards quote."""
    return {
        "version": VERSION,
        "model": str(models[0].path),
        "mirror": settings["mirror"],
        "precision": settings["precision"],
        "sets": {
            tested.test_set.name: numbers(tested.test_set, tested.measured[0], bool(settings["mirror"]))
            for tested in sets
        },
    }


def numbers(test_set: TestSet, measured: Measured, mirror: bool) -> dict[str, Any]:
    """The numbers of one model on one set. `supported` is false where the set has fewer than 1 / FAR impostor pairs."""
    result, intervals = measured.result, measured.intervals
    found: dict[str, Any] = {
        "protocol": test_set.protocol,
        "images": len(test_set.images),
        **pair_counts(test_set, measured),
    }
    if isinstance(result, FoldResult):
        found |= {
            "accuracy": result.accuracy,
            "std": result.std,
            "fold_accuracies": result.fold_accuracies.tolist(),
            "cosine_threshold": result.cosine_threshold,
            "tar_of_folds": _tar_of_folds(result),
        }
    found |= {"eer": measured.eer, "auc": measured.auc, "points": _points(measured.points, measured.tar_intervals)}
    if isinstance(result, AllPairsResult):
        found["auc_bound"] = result.auc_bound
    if isinstance(result, IjbVerification):
        found["nearest_points"] = _points(result.nearest, {})
        mirrored = "mirrored image added" if mirror else "no mirrored image"
        found["pooling"] = f"{mirrored}, features as long as they are, times the detector's score"
    if intervals is not None:
        found["intervals"] = {
            "level": intervals.eer.level,
            "draws": intervals.replicates,
            "seed": intervals.seed,
            "drawn": intervals.unit,
            "accuracy": _bounds(intervals.accuracy),
            "eer": _bounds(intervals.eer),
            "auc": _bounds(intervals.auc),
        }
    if measured.identification is not None:
        found["identification"] = {name: _identification(one) for name, one in galleries(measured).items()}
    if measured.hardest is not None:
        kinds = zip(("false_accepts", "false_rejects"), measured.hardest, strict=True)
        found["hardest_pairs"] = {kind: _hard_pairs(test_set, hard) for kind, hard in kinds}
    if measured.rejects:
        found["error_versus_reject"] = {
            name: {
                "far": curve.point.far,
                "threshold": curve.point.threshold,
                "support": curve.point.support,
                "rejected": curve.rejected.tolist(),
                "fnmr": _finite(curve.fnmr.tolist()),
                "genuine_pairs": curve.genuine.tolist(),
                "impostor_pairs": curve.impostor.tolist(),
                "relative_area": _finite([curve.area])[0],
            }
            for name, curve in measured.rejects.items()
        }
    if measured.breakdowns:
        found["breakdowns"] = {name: asdict(breakdown) for name, breakdown in measured.breakdowns.items()}
    return found


def _hard_pairs(test_set: TestSet, hard: HardPairs) -> list[dict[str, Any]]:
    """As the pictures show them; `pair`: its number in a list of pairs, from 0."""
    places = [[test_set.images.describe(int(image)) for image in pair] for pair in hard.pairs]
    numbers = [{}] * len(places) if hard.numbers is None else [{"pair": int(number)} for number in hard.numbers]
    return [
        {"cosine": float(score), **number, "images": images}
        for images, score, number in zip(places, hard.scores, numbers, strict=True)
    ]


def _points(points: Sequence[TarAtFar], intervals: Mapping[float, Interval]) -> list[dict[str, Any]]:
    return [
        {
            "far": point.far,
            "tar": point.tar,
            "interval": _bounds(intervals.get(point.far)),
            # Infinite where no pair at all is accepted: at the point of the ROC nearest to a FAR that the set is too
            # small for, if two people have its highest score.
            "threshold": _finite([point.threshold])[0],
            "supported": point.supported,
            "support": point.support,
        }
        for point in points
    ]


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None or not interval.known else [interval.low, interval.high]


def _tar_of_folds(result: FoldResult) -> dict[str, float] | None:
    """insightface's "val"; None where a fold lacks pairs of one kind."""
    kinds = [np.bincount(result.fold, result.same == kind, len(result.thresholds)) for kind in (True, False)]
    return asdict(tar_of_folds(result)) if np.all(kinds) else None


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [value if isfinite(value) else None for value in values]


def _identification(found: Identification) -> dict[str, Any]:
    return {
        "gallery": found.gallery,
        "mated_probes": found.mated,
        "non_mated_probes": found.non_mated,
        "cmc": found.cmc.tolist(),
        "open_set": [
            {"fpir": point.fpir, "dir": point.dir, "threshold": point.threshold, "supported": point.supported}
            for point in found.open_set
        ],
        "tpir_as_published": [
            {"fpir": point.fpir, "tpir": point.dir, "threshold": point.threshold} for point in found.over_scores
        ],
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {"check": finding.check, "level": finding.level, "text": finding.text}


def _comparison(a: str, b: str, found: Comparison) -> dict[str, Any]:
    return {
        "measure": found.measure,
        "a": a,
        "b": b,
        "value_a": found.a,
        "value_b": found.b,
        "difference": found.difference.estimate,
        "interval": [found.difference.low, found.difference.high],
        "p_value": found.p_value,
        "test": found.test,
        "better": {"A": a, "B": b, None: None}[found.better],
        "sentence": found.sentence(a, b),
    }


def pictures_of(report: Mapping[str, Any]) -> set[str]:
    """The names of all pictures of a `report.json`, of files in its folder. Raises what wrong types raise where it is
    none."""
    named = [*report.get("pictures", ()), *(name for one in report["sets"].values() for name in one["pictures"])]
    return {name for name in named if name.endswith(".png") and Path(name).name == name and name.isprintable()}
