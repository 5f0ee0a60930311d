"""The report for the screen: a few lines for each set and model."""

from collections.abc import Iterable, Sequence

from utils.evaluation.bootstrap import Interval
from utils.evaluation.comparison import Comparison
from utils.evaluation.folds import FoldResult
from utils.evaluation.identification import Identification
from utils.evaluation.ijb import IjbVerification
from utils.evaluation.measure import Measured
from utils.evaluation.tested import TestedSet, galleries


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
        elif finding.level == "unclear" or finding.check == "precision":
            yield f"  note: {finding.text}"
        elif finding.check not in quiet:
            quiet.append(finding.check)
    if quiet:
        yield f"  checked, no warning: {', '.join(quiet)}"


def _model_lines(one: Measured) -> Iterable[str]:
    result = one.result
    if isinstance(result, FoldResult):
        bounds = f"   {interval_text(one.accuracy_interval)}" if one.intervals else ""
        yield (
            f"accuracy {padded(result.accuracy)} +- {percent(result.std)}{bounds}"
            f"   threshold {result.cosine_threshold:.4f}"
        )
    for point in one.points:
        if isinstance(result, FoldResult) and not point.supported:
            continue  # the report marks them; a .bin has a few thousand impostor pairs
        between = f"   {interval_text(one.tar_intervals[point.far])}" if one.intervals and point.supported else ""
        note = f"   {point.note}" if point.note else ""
        yield f"TAR at FAR {point.far:<7.0e} {padded(point.tar)}{between}   threshold {point.threshold:.6f}{note}"
    if isinstance(result, IjbVerification):
        nearest = ", ".join(f"{point.far:.0e} {percent(point.tar)}" for point in result.nearest)
        yield f"TAR at the nearest point of the ROC, as published for IJB: {nearest}"
    yield f"EER {padded(one.eer)}   AUC {padded(one.auc)}"
    for name, found in galleries(one).items():
        ranks = "   ".join(f"rank-{k} {percent(found.rank(k))}" for k in (1, 5, 10))
        yield f"identification{f', {name}' if name else ''}: {found.mated:,} probes among {found.gallery:,}: {ranks}"
        for entry in found.open_set:
            note = f"   {entry.note}" if entry.note else ""
            yield f"DIR at FPIR {entry.fpir:g} {padded(entry.dir)}   threshold {entry.threshold:.6f}{note}"
        if found.over_scores:
            yield f"TPIR over scores, as published for IJB: {published(found)}"


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


def percent(share: float) -> str:
    """A share of 0..1 in percent with three decimals."""
    return f"{100 * share:.3f} %"


def padded(share: float) -> str:
    """The same, as wide as 100.000 %."""
    return f"{percent(share):>9}"


def interval_text(interval: Interval | None) -> str:
    """The ends of an interval in percent; empty without one, or where it is not known."""
    if interval is None or not interval.known:
        return ""
    return f"({interval.level:.0%}: {100 * interval.low:.3f} .. {100 * interval.high:.3f})"


def published(found: Identification) -> str:
    """TPIR over scores, in words."""
    return ", ".join(f"{percent(point.dir)} at FPIR {point.fpir:g}" for point in found.over_scores)
