"""The report for people: one HTML page with its pictures inside."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from utils.evaluation.checks import Finding
from utils.evaluation.comparison import Comparison
from utils.evaluation.folds import FoldResult
from utils.evaluation.ijb import IjbVerification
from utils.evaluation.report_text import interval_text, padded, percent, published, quoted
from utils.evaluation.tested import Picture, TestedModel, TestedSet, galleries
from utils.html_report import HtmlReport
from utils.texts import as_text


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
    page.table(("setting", "value"), [(name, as_text(value)) for name, value in settings.items()])
    page.write(path)


def _summary(sets: Sequence[TestedSet]) -> Iterable[tuple[str, ...]]:
    for tested in sets:
        for one in tested.measured:
            result = one.result
            if isinstance(result, FoldResult):
                text = f"accuracy {percent(result.accuracy)} ± {percent(result.std)}"
                between = interval_text(one.accuracy_interval)
            else:
                best = next((point for point in reversed(one.points) if point.support == "good"), one.points[0])
                text = f"TAR {percent(best.tar)} at FAR {best.far:.0e}"
                between = interval_text(one.tar_intervals.get(best.far))
            yield tested.test_set.name, one.model, tested.test_set.protocol, text, between, percent(one.eer)


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
            padded(one.result.accuracy),
            padded(one.result.std),
            interval_text(one.accuracy_interval),
            f"{one.result.cosine_threshold:.4f}",
        )
        for one in tested.measured
        if isinstance(one.result, FoldResult)
    ]
    if folds:
        page.table(("model", "accuracy", "std of folds", "interval", "threshold (cosine)"), folds)
    page.table(("model", "FAR", "TAR", "interval", "threshold (cosine)", "note"), list(_point_rows(tested)))
    nearest = [
        (one.model, *(padded(point.tar) for point in one.result.nearest))
        for one in tested.measured
        if isinstance(one.result, IjbVerification)
    ]
    if nearest:
        rates = [f"FAR {point.far:.0e}" for point in tested.measured[0].points]
        page.text("TAR at the nearest point of the ROC, the rule behind published IJB numbers:")
        page.table(("model", *rates), nearest)
    page.table(("model", "EER", "AUC"), [(one.model, padded(one.eer), padded(one.auc)) for one in tested.measured])
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
        for point in one.points:
            between = interval_text(one.tar_intervals.get(point.far)) if point.supported else ""
            tar = padded(point.tar) if point.supported else f"({percent(point.tar)})"
            yield one.model, f"{point.far:.0e}", tar, between, f"{point.threshold:.6f}", point.note


def _identification_table(page: HtmlReport, tested: TestedSet) -> None:
    rows: list[tuple[str, ...]] = []
    for one in tested.measured:
        for name, found in galleries(one).items():
            rates = "; ".join(
                f"{percent(point.dir)} at {point.fpir:g}{f' ({point.note})' if point.note else ''}"
                for point in found.open_set
            )
            ranks = [padded(found.rank(k)) for k in (1, 5, 10)]
            if found.over_scores:
                rates = f"TPIR over scores, as published for IJB: {published(found)}"
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
        f"{percent(found.a)}, {percent(found.b)}",
        f"{100 * gap.estimate:+.3f} ({100 * gap.low:+.3f} .. {100 * gap.high:+.3f})",
        f"{found.p_value:.2g}",
        {"A": a, "B": b, None: "not sure"}[found.better],
    )
