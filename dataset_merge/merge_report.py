"""`report.html` of a merge: what became of the sets, by which threshold, and faces to judge by eye."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.face_sets import EncodedImages, FaceSet, images_by_identity
from data.images import decode_rgb
from data.joined_sets import JoinedFaceSet
from dataset_merge.calibration import Calibration
from dataset_merge.cleaning import Findings
from dataset_merge.decisions import Decision, Identities, decision_counts
from dataset_merge.decisions_table import Names
from dataset_merge.duplicates import Duplicate
from dataset_merge.exclude import HeldOutSet, Leaks
from dataset_merge.grouping import Grouping
from utils.face_sheets import draw_contact_sheet, in_square
from utils.html_report import HtmlReport
from utils.plots import draw_marked_scores, draw_score_histogram
from utils.texts import as_text

ROWS_DRAWN = 16
IMAGES_DRAWN = 4  # of each side
ROWS_LISTED = 50
# Up to Cyrillic the font of the pictures has all letters; bytes of a name that are no UTF-8 are far beyond.
_LETTERS_END = "\u0530"

ABOVE, BELOW, SCORES = "above_t.png", "below_t.png", "scores.png"
EXCLUDED, NOT_EXCLUDED, DUPLICATES, CLEANING = "excluded.png", "not_excluded.png", "duplicates.png", "cleaning.png"
PICTURES = (ABOVE, BELOW, SCORES, EXCLUDED, NOT_EXCLUDED, DUPLICATES, CLEANING)


@dataclass
class Merge:
    """All that a report tells of a merge. `sets`: as they were merged, cleaned if so; `original`: as they lie there."""

    paths: Sequence[Path]
    original: Sequence[FaceSet]
    sets: Sequence[FaceSet]
    everything: JoinedFaceSet  # those of `sets`
    settings: Mapping[str, object]
    image_size: int
    decisions: Sequence[Decision]
    size: int  # bytes of the merged set, at most
    grouping: Grouping | None = None
    calibration: Calibration | None = None
    leaks: Leaks | None = None
    held_out: Sequence[HeldOutSet] = ()
    findings: Sequence[Findings] = ()
    applied: bool = False  # the findings
    duplicates: Sequence[Duplicate] = ()  # positions in all sets together
    dry_run: bool = False
    notes: list[str] = field(default_factory=list)


class _Pair(NamedTuple):
    first: int
    second: int
    score: float


class _Faces:
    """Faces of identities, decoded for pictures."""

    def __init__(self, sets: Sequence[FaceSet], size: int) -> None:
        self.people = Identities(sets)
        self._sets, self._size = sets, size
        self._images = [images_by_identity(faces) for faces in sets]

    def of(self, identity: int) -> list[np.ndarray]:
        """Four images, spread over those that an identity has; the same one again if it has fewer."""
        source = int(self.people.source[identity])
        own = self._images[source][int(self.people.own[identity])]
        chosen = own[np.linspace(0, len(own) - 1, IMAGES_DRAWN).round().astype(int)]
        return [face(self._sets[source], int(i), self._size) for i in chosen]

    def title(self, identity: int) -> str:
        """Set and name of an identity, for people."""
        return f"{int(self.people.source[identity])}:{self.people.name(identity)}"

    def drawn_title(self, identity: int) -> str:
        """`title` for pictures; where they have no letters for the name, its row in merge.csv, the header being 1."""
        name = self.people.name(identity)
        return self.title(identity) if _drawable(name) else f"{int(self.people.source[identity])}:row {identity + 2}"


def _drawable(name: str) -> bool:
    """Whether pictures have letters for it."""
    return all(" " <= letter < _LETTERS_END for letter in name)


def face(images: EncodedImages, i: int, size: int) -> np.ndarray:
    """An image as pictures show it, uint8 [size, size, 3] RGB."""
    return in_square(decode_rgb(images.encoded(i), images.describe(i)), size)


def write_report(folder: Path, merge: Merge) -> None:
    """Write `report.html` and its pictures into `folder`."""
    report = HtmlReport("Merge of " + " and ".join(path.name for path in merge.paths))
    faces = _Faces(merge.sets, merge.image_size)
    report.section("What became of the sets")
    if merge.dry_run:
        report.warning("This was a dry run: the set was not written.")
    for note in merge.notes:
        report.warning(note)
    columns, rows = decision_counts([str(path) for path in merge.paths], merge.decisions, len(merge.duplicates))
    report.table(columns, rows)
    report.text(
        f"The merged set takes {merge.size:,} bytes at most. merge.csv has a row for every identity of every set."
    )
    if merge.grouping is not None or merge.settings["merge.decisions"]:  # else one set, of which nobody is joined
        _threshold_section(report, folder, merge)
        _pairs_section(report, folder, merge, faces)
    if merge.grouping is not None:
        _conflicts_section(report, merge.grouping, faces)
    if merge.leaks is not None:
        _leaks_section(report, folder, merge, faces)
    if merge.findings:
        _cleaning_section(report, folder, merge)
    if merge.duplicates:
        _duplicates_section(report, folder, merge)
    report.section("Settings")
    report.table(("setting", "value"), [(name, as_text(value)) for name, value in merge.settings.items()])
    report.write(folder / "report.html")


def _threshold_section(report: HtmlReport, folder: Path, merge: Merge) -> None:
    report.section("The threshold")
    calibration, grouping = merge.calibration, merge.grouping
    if calibration is not None:
        report.text(f"Chosen from the sets: {calibration.threshold:.4f}.")
        for paragraph in calibration.explanation:
            report.text(paragraph)
        if calibration.genuine.any():
            draw_score_histogram(
                folder / SCORES,
                calibration.genuine,
                calibration.impostor,
                calibration.edges,
                "Scores of one person in two halves, and of two people",
                {"t": calibration.threshold},
            )
            report.picture(folder / SCORES, "Scores by which the threshold was chosen; below on a logarithmic scale.")
        elif grouping is not None:  # no identity has two images: there are no halves to draw
            _draw_best_scores(
                folder / SCORES, grouping.score[np.isfinite(grouping.score)], calibration.threshold, "score"
            )
            report.picture(folder / SCORES, "Each identity's best score.")
    elif grouping is not None:
        report.text(f"Two identities are the same person from a cosine of {grouping.threshold:g} on, as it was set.")
        scores = grouping.score[np.isfinite(grouping.score)]
        if len(scores):
            _draw_best_scores(folder / SCORES, scores, grouping.threshold, "cosine")
            report.picture(folder / SCORES, "The cosine of every identity with the most similar one it can join.")
    else:
        report.text("The decisions were given in a table: nothing was compared.")


def _draw_best_scores(path: Path, scores: np.ndarray, t: float, what: str) -> None:
    draw_marked_scores(path, scores, t, "identities", f"{what} with the most similar identity")


def _compared_pairs(grouping: Grouping) -> tuple[list[_Pair], list[_Pair]]:
    """Pairs that are one person, the least similar first, and pairs that are two, the most similar first."""
    pairs, decision = grouping.pairs, np.asarray(grouping.decision)
    below = (decision == "below") & ~_in_one_group(grouping)  # others joined them, if they are in one
    rising = np.argsort(pairs.score, kind="stable")
    joined, others = (
        [
            _Pair(int(pairs.first[i]), int(pairs.second[i]), float(pairs.score[i]))
            for i in order[chosen[order]][:ROWS_DRAWN]
        ]
        for order, chosen in ((rising, decision == "joined"), (rising[::-1], below))
    )
    return joined, others


def _listed_pairs(decisions: Sequence[Decision], names: Names) -> tuple[list[_Pair], list[_Pair]]:
    """The same of decisions that were given in a table: the pairs are identities with their matches."""
    kept = [row.new_label is not None for row in decisions]
    seen: set[tuple[int, int]] = set()
    joined: list[_Pair] = []
    others: list[_Pair] = []
    for identity, row in enumerate(decisions):
        match = names.of_match(row)
        if match is None or row.score is None:
            continue
        pair = _Pair(min(identity, match), max(identity, match), row.score)
        if pair[:2] in seen:
            continue
        seen.add(pair[:2])
        if kept[identity] and row.new_label == decisions[match].new_label:
            joined.append(pair)
        elif row.decision == "added" and kept[match]:
            others.append(pair)
    joined.sort(key=lambda pair: pair.score)
    others.sort(key=lambda pair: pair.score)
    return joined[:ROWS_DRAWN], others[::-1][:ROWS_DRAWN]


def _in_one_group(grouping: Grouping) -> np.ndarray:
    """Of each pair, whether its two became one person, be it by links to others: bool [pairs]."""
    return grouping.group[grouping.pairs.first] == grouping.group[grouping.pairs.second]


def _pairs_section(report: HtmlReport, folder: Path, merge: Merge, faces: _Faces) -> None:
    report.section("Judge by eye")
    if merge.grouping is not None:
        joined, others = _compared_pairs(merge.grouping)
    else:
        joined, others = _listed_pairs(merge.decisions, Names(faces.people, merge.sets))
    report.text(
        "Four images of one identity on the left, of the other on the right; fewer are repeated. Wrong joins in the "
        "first picture: raise t. The same person on both sides in the second one: lower it. Single mistakes: edit "
        "decision and new_label in merge.csv, and apply it with --decisions."
    )
    if merge.grouping is None and any(row.decision == "dropped" for row in merge.decisions):
        report.text("Identities that the table drops are in neither: it does not say whom they were dropped for.")
    for name, pairs, caption in (
        (ABOVE, joined, "Joined, the least similar pairs first."),
        (BELOW, others, "Not joined, as too different, the most similar pairs first."),
    ):
        if not pairs:
            report.text(f"{caption} There are none.")
            continue
        gap = [np.full((merge.image_size, merge.image_size, 3), 255, np.uint8)]
        cells = [image for pair in pairs for image in (*faces.of(pair.first), *gap, *faces.of(pair.second))]
        labels = [
            f"{pair.score:.3f} {faces.drawn_title(pair.first)} {faces.drawn_title(pair.second)}" for pair in pairs
        ]
        draw_contact_sheet(folder / name, cells, 2 * IMAGES_DRAWN + 1, None, labels)
        report.picture(folder / name, f"{caption} Left of each row: score, and set:identity of both.")


def _conflicts_section(report: HtmlReport, grouping: Grouping, faces: _Faces) -> None:
    decision = np.asarray(grouping.decision)
    refused = (decision == "not mutual") | (decision == "split")
    conflicts = np.flatnonzero(refused & ~_in_one_group(grouping))
    report.section("Conflicts")
    report.text(
        f"{len(conflicts):,} pairs reach the threshold and were not joined: one of the two has a better match "
        "(not mutual), or they would join identities that a set holds apart (split)."
    )
    order = conflicts[np.argsort(-grouping.pairs.score[conflicts], kind="stable")][:ROWS_LISTED].tolist()
    if order:
        pairs = grouping.pairs
        report.table(
            ("first", "second", "score", "why not"),
            [
                (
                    faces.title(int(pairs.first[i])),
                    faces.title(int(pairs.second[i])),
                    f"{float(pairs.score[i]):.4f}",
                    str(decision[i]),
                )
                for i in order
            ],
        )
    if grouping.splits:
        report.text(
            f"{len(grouping.splits):,} chains were cut at their weakest link, because of identities held apart:"
        )
        report.table(
            ("link", "to", "score", "held apart", "from"),
            [
                (
                    faces.title(split.first),
                    faces.title(split.second),
                    f"{split.score:.4f}",
                    *(faces.title(identity) for identity in split.held_apart),
                )
                for split in grouping.splits[:ROWS_LISTED]
            ],
        )


def _leaks_section(report: HtmlReport, folder: Path, merge: Merge, faces: _Faces) -> None:
    leaks = merge.leaks
    assert leaks is not None
    excluded = leaks.excluded
    by_group = sum(row.decision == "excluded" for row in merge.decisions) - len(excluded)
    report.section("People of test sets")
    report.text(
        f"{len(excluded):,} identities have a cosine of {leaks.t:g} or more with a person or image of "
        + ", ".join(held_out.path for held_out in merge.held_out)
        + f"; {by_group:,} more are one person with them. They are left out; their rows in merge.csv say excluded."
    )
    columns, rows = ("set", "excluded identities", "with images"), []
    for source, path in enumerate(merge.paths):
        own = [row for row in merge.decisions if row.source == source and row.decision == "excluded"]
        rows.append((str(path), len(own), sum(row.images for row in own)))
    report.table(columns, rows)
    scores = leaks.scores
    kept = np.array([row.decision != "excluded" for row in merge.decisions])
    by_path = {held_out.path: held_out for held_out in merge.held_out}
    for name, chosen, caption in (
        (EXCLUDED, np.flatnonzero(scores >= leaks.t), "Excluded, the least similar first."),
        (NOT_EXCLUDED, np.flatnonzero(kept), "Kept, the most similar first."),
    ):
        order = chosen[np.argsort(np.abs(scores[chosen] - leaks.t), kind="stable")][:ROWS_DRAWN].tolist()
        if not order:
            report.text(f"{caption} There are none.")
            continue
        cells, labels = [], []
        for identity in order:
            match = leaks.match[identity]
            held_out = by_path[str(match.source)]
            cells += [*faces.of(identity), face(held_out.images, _example(held_out, match.label), merge.image_size)]
            labels.append(f"{match.score:.3f} {faces.drawn_title(identity)}")
        draw_contact_sheet(folder / name, cells, IMAGES_DRAWN + 1, None, labels)
        report.picture(folder / name, f"{caption} The identity, and in the last column the person of the test set.")


def _example(held_out: HeldOutSet, label: str) -> int:
    """The position of an image of the person called `label`."""
    if held_out.faces is not None:
        return int(np.argmax(held_out.faces.labels == held_out.faces.identities.index(label)))
    return next(i for i in range(len(held_out.images)) if held_out.name(i) == label)


def _cleaning_section(report: HtmlReport, folder: Path, merge: Merge) -> None:
    report.section("Cleaning")
    done = "was done" if merge.applied else "is listed only; --clean apply does it"
    report.text(f"What does not belong, by cleaning.csv. The cleaning {done}.")
    kinds = ("outlier", "mixed", "scattered")
    rows = []
    for path, findings in zip(merge.paths, merge.findings, strict=True):
        counts = [sum(finding.finding == kind for finding in findings.found) for kind in kinds]
        rows.append((str(path), counts[0], len(findings.seconds), counts[1], counts[2]))
    columns = ("set", "outliers", "identities of two people", "images of second people", "scattered images")
    report.table(columns, rows)
    cells, labels = [], []
    for source, findings in enumerate(merge.findings):
        faces = merge.original[source]
        images = images_by_identity(faces)
        wrong = {found.image for found in findings.found}
        for finding in sorted(findings.found, key=lambda found: found.cosine)[:ROWS_DRAWN]:
            own = [i for i in images[int(faces.labels[finding.image])].tolist() if i not in wrong][:IMAGES_DRAWN]
            if own:
                own = [own[i % len(own)] for i in range(IMAGES_DRAWN)]
                cells += [face(faces, i, merge.image_size) for i in (*own, finding.image)]
                label = int(faces.labels[finding.image])
                name = faces.identities[label] if _drawable(faces.identities[label]) else f"identity number {label}"
                labels.append(f"{finding.cosine:.3f} {finding.finding} {source}:{name}")
    if cells:
        draw_contact_sheet(folder / CLEANING, cells, IMAGES_DRAWN + 1, None, labels)
        report.picture(
            folder / CLEANING,
            "Images of the identity, and in the last column the one that does not belong. Left of each row: its cosine "
            "with the identity's centre, what it was found to be, and set:identity.",
        )


def _duplicates_section(report: HtmlReport, folder: Path, merge: Merge) -> None:
    report.section("Duplicates")
    same = sum(duplicate.kind == "bytes" for duplicate in merge.duplicates)
    near = [duplicate for duplicate in merge.duplicates if duplicate.kind == "near"]
    report.text(
        f"{same:,} images were there to the byte, {len(near):,} as another copy of the picture; duplicates.csv names "
        "each, and the image that was kept."
    )
    if near:
        near = sorted(near, key=lambda duplicate: duplicate.correlation)[: 2 * ROWS_DRAWN]
        cells = [face(merge.everything, i, merge.image_size) for pair in near for i in (pair.original, pair.image)]
        labels = [f"{pair.correlation:.4f}" for pair in near]
        draw_contact_sheet(folder / DUPLICATES, cells, 2, None, labels)
        report.picture(
            folder / DUPLICATES, "Kept and dropped, the least alike first, with the correlation of the pixels."
        )
