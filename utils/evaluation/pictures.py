"""The pictures of a report, as PNG files in its folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.check_sets import TrainingSample, decode_some
from utils.evaluation.checks import Finding
from utils.evaluation.curves import support_note
from utils.evaluation.folds import FoldResult
from utils.evaluation.hardest import HardPairs
from utils.evaluation.measure import Measured
from utils.evaluation.test_sets import TestSet, short_name
from utils.evaluation.tested import Picture
from utils.face_sheets import draw_pair_sheet
from utils.plots import draw_bars, draw_det, draw_rejection, draw_roc, draw_score_histogram

_COLUMNS = 4
_PAIRS_OF_A_FINDING = 12


def draw_overview(folder: Path, sets: Mapping[str, Sequence[Measured]]) -> list[Picture]:
    """ROC and DET of every model on every set in one picture each: `roc.png`, `det.png`."""
    curves = {_series(name, one, sets): one.curve for name, measured in sets.items() for one in measured}
    return _rate_curves(folder, "", curves, "all sets" if len(sets) > 1 else next(iter(sets)))


def _series(name: str, one: Measured, sets: Mapping[str, Sequence[Measured]]) -> str:
    if len(sets) == 1:
        return one.model
    return f"{name}, {one.model}" if len(next(iter(sets.values()))) > 1 else name


def _rate_curves(
    folder: Path, prefix: str, curves: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]], title: str
) -> list[Picture]:
    roc, det = folder / f"{prefix}roc.png", folder / f"{prefix}det.png"
    draw_roc(roc, curves, f"{title}: ROC")
    pictures = [Picture(roc, f"{title}: true accept rate over false accept rate")]
    errors = {name: (far, 1 - tar) for name, (far, tar) in curves.items()}
    if any(((far > 0) & (frr > 0)).any() for far, frr in errors.values()):
        draw_det(det, errors, f"{title}: DET")
        pictures.append(
            Picture(det, f"{title}: false reject rate over false accept rate, the nearer to the corner the better")
        )
    return pictures


def draw_set(folder: Path, test_set: TestSet, measured: Sequence[Measured], size: int, alone: bool) -> list[Picture]:
    """The pictures of one set; with `alone`, the only one, without ROC and DET, which the overview has."""
    name, several = test_set.name, len(measured) > 1
    pictures = [] if alone else _rate_curves(folder, f"{name}_", {one.model: one.curve for one in measured}, name)
    pictures += [_draw_histogram(folder, name, one, several) for one in measured]
    pictures += _draw_rejects(folder, name, measured)
    pictures += _draw_breakdowns(folder, name, measured)
    for one in measured:
        if one.hardest is not None:
            pictures += _draw_hardest(folder, test_set, one, size, several)
    return pictures


def _file(folder: Path, name: str, one: Measured, several: bool, what: str) -> Path:
    return folder / (f"{name}_{one.model}_{what}.png" if several else f"{name}_{what}.png")


def _draw_histogram(folder: Path, name: str, one: Measured, several: bool) -> Picture:
    path = _file(folder, name, one, several, "scores")
    if isinstance(one.result, FoldResult):
        marks = {"mean threshold of the folds": one.result.cosine_threshold}
    else:
        marks = {f"FAR {point.far:.0e}": point.threshold for point in one.points if point.supported}
    histogram = one.histogram
    title = f"{name}: scores of {one.model}"
    draw_score_histogram(path, histogram.genuine, histogram.impostor, histogram.edges, title, marks)
    return Picture(path, f"{title}, cosines; below on a logarithmic scale, which shows the tails")


def _draw_rejects(folder: Path, name: str, measured: Sequence[Measured]) -> list[Picture]:
    pictures = []
    for quality in dict.fromkeys(quality for one in measured for quality in one.rejects):
        having = [one for one in measured if quality in one.rejects]
        path = folder / f"{name}_reject_{_plain(quality)}.png"
        what = "the embedding's length" if quality == "norm" else quality
        curve = having[0].rejects[quality]
        curves = {one.model: (one.rejects[quality].rejected, one.rejects[quality].fnmr) for one in having}
        draw_rejection(path, curves, f"{name}: error versus reject by {what}")
        at = _at(curve.point.far, curve.point.note)
        caption = (
            f"{name}: false rejects at the threshold of all pairs for {at} that are left when the pairs of lowest "
            f"quality, {what} of the worse image, are rejected; a quality that tells makes the curve fall. "
            f"{curve.genuine[0]:,} genuine and {curve.impostor[0]:,} impostor pairs are in it."
        )
        pictures.append(Picture(path, caption))
    return pictures


def _draw_breakdowns(folder: Path, name: str, measured: Sequence[Measured]) -> list[Picture]:
    pictures = []
    for title, first in measured[0].breakdowns.items():
        path = folder / f"{name}_by_{_plain(title)}.png"
        shown = [number for number, row in enumerate(first.rates) if row.tar is not None]
        if not shown:
            continue
        rows = [f"{first.rates[i].name} ({first.rates[i].genuine:,} genuine pairs)" for i in shown]
        values, intervals = {}, {}
        for one in measured:
            rates = [rate for i in shown if (rate := one.breakdowns[title].rates[i].tar) is not None]
            values[one.model] = [100 * rate.estimate for rate in rates]
            intervals[one.model] = [(100 * rate.low, 100 * rate.high) for rate in rates]
        at = _at(first.rates[0].far_of_all, support_note(first.rates[0].support))
        label = f"TAR at the whole set's threshold for {at}, %"
        draw_bars(path, rows, values, intervals, f"{name} by {title}", label)
        pictures.append(Picture(path, f"{name} by {title}: {label}, with 95 % intervals"))
    return pictures


def _draw_hardest(folder: Path, test_set: TestSet, one: Measured, size: int, several: bool) -> list[Picture]:
    assert one.hardest is not None
    pictures = []
    kinds = (
        ("false_accepts", "two people, most alike", one.hardest[0]),
        ("false_rejects", "one person, least alike", one.hardest[1]),
    )
    for file, what, hard in kinds:
        if not len(hard.pairs):
            continue
        path = _file(folder, test_set.name, one, several, f"hardest_{file}")
        title = f"{test_set.name}: hardest pairs of {one.model}, {what}"
        _draw_hard_pairs(path, test_set, hard, size, title)
        pictures.append(Picture(path, f"{title}. A wrong label is a likely reason for the first ones."))
    return pictures


def _draw_hard_pairs(path: Path, test_set: TestSet, hard: HardPairs, size: int, title: str) -> None:
    faces = decode_some(test_set.images, hard.pairs.reshape(-1), size)
    pairs = list(zip(faces[0::2], faces[1::2], strict=True))
    numbered = [""] * len(pairs) if hard.numbers is None else [f", pair {number}" for number in hard.numbers]
    captions = [
        (f"cosine {score:.3f}{pair}", test_set.describe(int(a)), test_set.describe(int(b)))
        for (a, b), score, pair in zip(hard.pairs, hard.scores, numbered, strict=True)
    ]
    draw_pair_sheet(path, pairs, captions, _COLUMNS, title)


def draw_finding(
    folder: Path, test_set: TestSet, sample: TrainingSample, finding: Finding, size: int
) -> Picture | None:
    """The images of the test set (left) and of the training set (right) that a finding names, if it names any."""
    pairs = finding.pairs[:_PAIRS_OF_A_FINDING]
    if not pairs:
        return None
    path = folder / f"{test_set.name}_shared_{finding.check}.png"
    left = decode_some(test_set.images, np.array([a for a, _ in pairs]), size)
    right = decode_some(sample.faces, np.array([b for _, b in pairs]), size)
    captions = [(test_set.describe(a), short_name(sample.faces.describe(b))) for a, b in pairs]
    what = "images" if finding.check == "duplicates" else "people"
    title = f"{test_set.name} (left) and training set (right): shared {what}"
    draw_pair_sheet(path, list(zip(left, right, strict=True)), captions, _COLUMNS, title)
    return Picture(path, title)


def _at(far: float, note: str) -> str:
    return f"FAR {far:.0e}{f' ({note})' if note else ''}"


def _plain(name: str) -> str:
    """The name as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name)
