"""What was measured, for machines (JSON), for the screen, and as one HTML page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from utils.evaluation.all_pairs import AllPairsResult
from utils.evaluation.bootstrap import Interval, Intervals
from utils.evaluation.checks import Finding
from utils.evaluation.comparison import Comparison
from utils.evaluation.curves import TarAtFar
from utils.evaluation.folds import FoldResult, tar_of_folds
from utils.evaluation.identification import Identification
from utils.evaluation.ijb import IjbVerification
from utils.evaluation.measure import Measured, pooling_of
from utils.evaluation.test_sets import TestSet
from utils.html_report import HtmlReport

VERSION = 1


@dataclass(frozen=True)
class TestedModel:
    """A model under its name in the report."""

    __test__ = False

    name: str
    path: Path
    runs_on: str
    fingerprint: str


@dataclass(frozen=True)
class Picture:
    """A picture of the report, beside it, with its caption."""

    file: Path
    caption: str


@dataclass(frozen=True, eq=False)
class TestedSet:
    """A set with what each model reached on it, in the models' order."""

    __test__ = False

    test_set: TestSet
    measured: Sequence[Measured]
    comparisons: Sequence[tuple[str, str, Comparison]]
    findings: Sequence[Finding]
    pictures: Sequence[Picture] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        """How many images, people and pairs there are."""
        return {"images": len(self.test_set.images), **_pair_counts(self.test_set, self.measured[0])}


def _pair_counts(test_set: TestSet, measured: Measured) -> dict[str, int]:
    result = measured.result
    if isinstance(result, FoldResult):
        return {
            "pairs": len(result.same),
            "genuine_pairs": int(result.same.sum()),
            "impostor_pairs": int((~result.same).sum()),
        }
    people = {"identities": len(test_set.identities)} if test_set.identities is not None else {}
    return {**people, "genuine_pairs": result.genuine, "impostor_pairs": result.impostor}


# For machines.


def numbers(test_set: TestSet, measured: Measured, mirror: bool) -> dict[str, Any]:
    """The numbers of one model on one set. `supported` is false where the set has fewer than 1 / FAR impostor pairs."""
    result, intervals = measured.result, measured.intervals
    found: dict[str, Any] = {
        "protocol": test_set.protocol,
        "images": len(test_set.images),
        **_pair_counts(test_set, measured),
    }
    if isinstance(result, FoldResult):
        found |= {
            "accuracy": result.accuracy,
            "std": result.std,
            "fold_accuracies": result.fold_accuracies.tolist(),
            "cosine_threshold": result.cosine_threshold,
            "tar_of_folds": _tar_of_folds(result),
        }
    found |= {"eer": measured.eer, "auc": measured.auc, "points": _points(measured.points, intervals)}
    if isinstance(result, AllPairsResult):
        found["auc_bound"] = result.auc_bound
    if isinstance(result, IjbVerification):
        found["nearest_points"] = _points(result.nearest, None)
        found["pooling"] = pooling_of(mirror).describe()
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
    if (galleries := _galleries(measured)) != {}:
        found["identification"] = {name: _identification(one) for name, one in galleries.items()}
    if measured.rejects:
        found["error_versus_reject"] = {
            name: {
                "far": curve.far,
                "threshold": curve.threshold,
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


def _tar_of_folds(result: FoldResult) -> dict[str, float] | None:
    """insightface's "val"; None where a fold lacks pairs of one kind."""
    kinds = [np.bincount(result.fold, result.same == kind, len(result.thresholds)) for kind in (True, False)]
    return asdict(tar_of_folds(result)) if np.all(kinds) else None


def _finite(values: list[float]) -> list[float | None]:
    """JSON has no NaN."""
    return [value if isfinite(value) else None for value in values]


def _points(points: Sequence[TarAtFar], intervals: Intervals | None) -> list[dict[str, Any]]:
    bounds = dict(zip(intervals.far, intervals.tar, strict=True)) if intervals else {}
    return [
        {
            "far": point.far,
            "tar": point.tar,
            "interval": _bounds(bounds.get(point.far)),
            # Infinite where no pair at all is accepted: at the point of the ROC nearest to a FAR that the set is too
            # small for, if two people have its highest score.
            "threshold": _finite([point.threshold])[0],
            "supported": point.supported,
            "support": point.support,
        }
        for point in points
    ]


def _bounds(interval: Interval | None) -> list[float] | None:
    return None if interval is None else [interval.low, interval.high]


def _galleries(measured: Measured) -> dict[str, Identification]:
    found = measured.identification
    if found is None:
        return {}
    return {"": found} if isinstance(found, Identification) else {**found.per_gallery, "joined": found.joined}


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


def as_json(
    models: Sequence[TestedModel], sets: Sequence[TestedSet], settings: Mapping[str, Any], notes: Sequence[Finding]
) -> dict[str, Any]:
    """All of the report. settings: those of the test, which has `mirror` among them."""
    return {
        "version": VERSION,
        "settings": dict(settings),
        "models": {
            model.name: {"path": str(model.path), "runs_on": model.runs_on, "fingerprint": model.fingerprint}
            for model in models
        },
        "findings": [_finding(finding) for finding in notes],
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


def _finding(finding: Finding) -> dict[str, Any]:
    return {"check": finding.check, "level": finding.level, "text": finding.text}


def _comparison(a: str, b: str, found: Comparison) -> dict[str, Any]:
    better = {"A": a, "B": b, None: None}[found.better]
    return {
        "measure": found.measure,
        "a": a,
        "b": b,
        "value_a": found.a,
        "value_b": found.b,
        "difference": found.difference.estimate,
        "interval": _bounds(found.difference),
        "p_value": found.p_value,
        "test": found.test,
        "better": better,
        "sentence": found.sentence(a, b),
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


# For the screen.


def percent(share: float) -> str:
    """A share of 0..1 in percent with three decimals."""
    return f"{100 * share:>7.3f} %"


def _between(interval: Interval | None) -> str:
    if interval is None:
        return ""
    return f"({interval.level:.0%}: {100 * interval.low:.3f} .. {100 * interval.high:.3f})"


def table(sets: Sequence[TestedSet]) -> str:
    """The results for the screen: percent with three decimals, thresholds as cosines."""
    return "\n".join(line for tested in sets for line in _set_lines(tested))


def _set_lines(tested: TestedSet) -> Iterable[str]:
    counts = tested.counts
    people = f", {counts['identities']:,} identities" if "identities" in counts else ""
    pairs = counts["genuine_pairs"] + counts["impostor_pairs"]
    yield (
        f"{tested.test_set.name:<20} {pairs:>12,} pairs   of {counts['images']:,} images{people}: "
        f"{counts['genuine_pairs']:,} genuine, {counts['impostor_pairs']:,} impostor"
    )
    for one in tested.measured:
        yield f"  {one.model}"
        yield from (f"{'':<20} {line}" for line in _model_lines(one))
    if tested.comparisons:
        yield "  which is better"
        yield from (f"{'':<4}{found.sentence(a, b)}" for a, b, found in quoted(tested.comparisons))
    quiet = []
    for finding in tested.findings:
        if finding.level == "warning":
            yield f"  WARNING: {finding.text}"
        elif finding.check == "precision":
            yield f"  note: {finding.text}"
        elif finding.check not in quiet:
            quiet.append(finding.check)
    if quiet:
        yield f"  checked, no warning: {', '.join(quiet)}"


def _model_lines(one: Measured) -> Iterable[str]:
    result, intervals = one.result, one.intervals
    if isinstance(result, FoldResult):
        bounds = f"   {_between(intervals.accuracy)}" if intervals else ""
        yield (
            f"accuracy {percent(result.accuracy)} +- {percent(result.std).strip()}{bounds}"
            f"   threshold {result.cosine_threshold:.4f}"
        )
    bounds_by_far = dict(zip(intervals.far, intervals.tar, strict=True)) if intervals else {}
    for point in one.points:
        if isinstance(result, FoldResult) and not point.supported:
            continue  # the report marks them; a .bin has a few thousand impostor pairs
        between = f"   {_between(bounds_by_far.get(point.far))}" if intervals and point.supported else ""
        note = f"   {point.note}" if point.note else ""
        yield f"TAR at FAR {point.far:<7.0e} {percent(point.tar)}{between}   threshold {point.threshold:.6f}{note}"
    if isinstance(result, IjbVerification):
        nearest = ", ".join(f"{point.far:.0e} {percent(point.tar).strip()}" for point in result.nearest)
        yield f"TAR at the nearest point of the ROC, as published for IJB: {nearest}"
    yield f"EER {percent(one.eer)}   AUC {percent(one.auc)}"
    for name, found in _galleries(one).items():
        ranks = "   ".join(f"rank-{k} {percent(found.rank(k)).strip()}" for k in (1, 5, 10))
        yield f"identification{f', {name}' if name else ''}: {found.mated:,} probes among {found.gallery:,}: {ranks}"
        for entry in found.open_set:
            note = f"   {entry.note}" if entry.note else ""
            yield f"DIR at FPIR {entry.fpir:g} {percent(entry.dir)}   threshold {entry.threshold:.6f}{note}"
        if found.over_scores:
            yield f"TPIR over scores, as published for IJB: {_published(found)}"


def _published(found: Identification) -> str:
    return ", ".join(f"{percent(point.dir).strip()} at FPIR {point.fpir:g}" for point in found.over_scores)


def quoted(comparisons: Sequence[tuple[str, str, Comparison]]) -> list[tuple[str, str, Comparison]]:
    """The comparisons worth a line on the screen: accuracies where there are any, else the AUC and the lowest FAR."""
    accuracies = [one for one in comparisons if one[2].measure == "accuracy"]
    if accuracies:
        return accuracies
    found = []
    for model in dict.fromkeys(b for _, b, _ in comparisons):
        own = [one for one in comparisons if one[1] == model]
        found += [one for one in own if one[2].measure == "AUC"]
        found += [one for one in own if one[2].measure.startswith("TAR")][-1:]
    return found


# For people.


def write_html(
    path: Path,
    title: str,
    models: Sequence[TestedModel],
    sets: Sequence[TestedSet],
    settings: Mapping[str, Any],
    notes: Sequence[Finding],
    overview: Sequence[Picture],
) -> None:
    """The whole report as one page with its pictures inside. overview: pictures of all sets together."""
    page = HtmlReport(title)
    page.section("Summary")
    page.table(("model", "file", "computed on"), [(model.name, str(model.path), model.runs_on) for model in models])
    page.table(("set", "model", "protocol", "result", "95 % interval", "EER"), list(_summary(sets)))
    mirrored = "Mirrored image added" if settings["mirror"] else "Without mirrored image"
    page.text(f"{mirrored}, {settings['precision']}. How the numbers are made: docs/numbers.md of the project.")
    for finding in [*notes, *(finding for tested in sets for finding in tested.findings)]:
        if finding.level == "warning":
            page.warning(finding.text)
    for picture in overview:
        page.picture(picture.file, picture.caption)
    for tested in sets:
        _set_section(page, tested)
    page.section("Settings")
    page.table(("setting", "value"), [(name, _as_text(value)) for name, value in settings.items()])
    page.write(path)


def _as_text(value: Any) -> str:
    return ", ".join(map(str, value)) or "none" if isinstance(value, tuple | list) else str(value)


def _summary(sets: Sequence[TestedSet]) -> Iterable[tuple[str, ...]]:
    for tested in sets:
        for one in tested.measured:
            result, intervals = one.result, one.intervals
            if isinstance(result, FoldResult):
                text = f"accuracy {percent(result.accuracy).strip()} ± {percent(result.std).strip()}"
                between = _between(intervals.accuracy) if intervals else ""
            else:
                best = next((point for point in reversed(one.points) if point.support == "good"), one.points[0])
                text = f"TAR {percent(best.tar).strip()} at FAR {best.far:.0e}"
                rates = dict(zip(intervals.far, intervals.tar, strict=True)) if intervals else {}
                between = _between(rates.get(best.far))
            yield tested.test_set.name, one.model, tested.test_set.protocol, text, between, percent(one.eer).strip()


def _set_section(page: HtmlReport, tested: TestedSet) -> None:
    name = tested.test_set.name
    page.section(name)
    counts = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in tested.counts.items())
    page.text(f"{tested.test_set.path}: {counts}. Protocol: {tested.test_set.protocol}.")
    for finding in tested.findings:
        (page.warning if finding.level == "warning" else page.text)(finding.text)
    folds = [
        (
            one.model,
            percent(one.result.accuracy),
            percent(one.result.std),
            _between(one.intervals.accuracy) if one.intervals else "",
            f"{one.result.cosine_threshold:.4f}",
        )
        for one in tested.measured
        if isinstance(one.result, FoldResult)
    ]
    if folds:
        page.table(("model", "accuracy", "std of folds", "interval", "threshold (cosine)"), folds)
    page.table(("model", "FAR", "TAR", "interval", "threshold (cosine)", "note"), list(_point_rows(tested)))
    nearest = [
        (one.model, *(percent(point.tar) for point in one.result.nearest))
        for one in tested.measured
        if isinstance(one.result, IjbVerification)
    ]
    if nearest:
        rates = [f"FAR {point.far:.0e}" for point in tested.measured[0].points]
        page.text("TAR at the nearest point of the ROC, the rule behind published IJB numbers:")
        page.table(("model", *rates), nearest)
    page.table(("model", "EER", "AUC"), [(one.model, percent(one.eer), percent(one.auc)) for one in tested.measured])
    intervals = tested.measured[0].intervals
    if intervals is not None:
        page.text(f"Intervals: {intervals.replicates:,} bootstrap draws of {intervals.unit}, seed {intervals.seed}.")
    _identification_table(page, tested)
    if tested.comparisons:
        page.text("Which model is better, on the same pairs:")
        page.table(
            ("measure", "models", "values", "difference, points", "p", "better"),
            [_comparison_row(*comparison) for comparison in tested.comparisons],
        )
        for a, b, found in quoted(tested.comparisons):
            page.text(found.sentence(a, b))
    for one in tested.measured:
        for title, breakdown in one.breakdowns.items():
            page.text(
                f"{one.model} by {title}, at the threshold of all pairs. {breakdown.unit} are counted; "
                f"{breakdown.left_out:,} images have no group."
            )
            page.table(*breakdown.as_table())
    for picture in tested.pictures:
        page.picture(picture.file, picture.caption)


def _point_rows(tested: TestedSet) -> Iterable[tuple[str, ...]]:
    for one in tested.measured:
        bounds = dict(zip(one.intervals.far, one.intervals.tar, strict=True)) if one.intervals else {}
        for point in one.points:
            between = _between(bounds.get(point.far)) if point.supported else ""
            tar = percent(point.tar) if point.supported else f"({percent(point.tar).strip()})"
            yield one.model, f"{point.far:.0e}", tar, between, f"{point.threshold:.6f}", point.note


def _identification_table(page: HtmlReport, tested: TestedSet) -> None:
    rows: list[tuple[str, ...]] = []
    for one in tested.measured:
        for name, found in _galleries(one).items():
            rates = "; ".join(
                f"{percent(point.dir).strip()} at {point.fpir:g}{f' ({point.note})' if point.note else ''}"
                for point in found.open_set
            )
            ranks = [percent(found.rank(k)) for k in (1, 5, 10)]
            if found.over_scores:
                rates = f"TPIR over scores, as published for IJB: {_published(found)}"
            rows.append((one.model, name, f"{found.gallery:,}", f"{found.mated:,}", *ranks, rates))
    if rows:
        page.text("Identification (1:N):")
        columns = ("model", "gallery", "enrolled", "probes", "rank-1", "rank-5", "rank-10", "DIR at FPIR")
        page.table(columns, rows)


def _comparison_row(a: str, b: str, found: Comparison) -> tuple[str, ...]:
    gap = found.difference
    return (
        found.measure,
        f"{a}, {b}",
        f"{percent(found.a).strip()}, {percent(found.b).strip()}",
        f"{100 * gap.estimate:+.3f} ({100 * gap.low:+.3f} .. {100 * gap.high:+.3f})",
        f"{found.p_value:.2g}",
        {"A": a, "B": b, None: "not sure"}[found.better],
    )
