"""Error rates by group: any column of a table, of images or of identities (age, pose, quality, ...).

Rates are those at the thresholds of the whole set, as a deployed system has one threshold for everybody, for the pairs
within each group and across each two. Impostors of one's own group are the harder ones: a rate over all pairs hides
that.

Intervals are Wilson's, for as many independent trials as would have the variance that is found when all pairs with an
identity (or image) may err together. Where nothing or everything is accepted there is no variance to be found: then the
trials are the identities of genuine pairs, and half of those of impostor pairs, which is cautious.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from utils.devices import full_precision
from utils.evaluation.bootstrap import Interval
from utils.evaluation.columns import Groups
from utils.evaluation.curves import Support, TarAtFar, support_note
from utils.evaluation.pair_blocks import Block, PairBlocks
from utils.ranks import Ranks


@dataclass(frozen=True)
class GroupRates:
    """What a threshold does to the pairs of two groups (or one, when both are the same).

    groups: their names. members: people in either, or images where people are not known. genuine, impostor: pairs.
    far_of_all: what the threshold, a cosine, lets through of all impostor pairs of the set; support: whether these are
    enough for it. tar, far: the shares of the groups' pairs that it accepts, None without pairs of that kind.
    """

    groups: tuple[str, str]
    members: int
    genuine: int
    impostor: int
    far_of_all: float
    threshold: float
    support: Support
    tar: Interval | None
    far: Interval | None

    @property
    def name(self) -> str:
        """The group, or the two that pairs go across."""
        return " / ".join(dict.fromkeys(self.groups))


@dataclass(frozen=True)
class Breakdown:
    """Rates by one column. unit: what `members` counts, `identities` or `images`. left_out: images without a group."""

    column: str
    unit: str
    left_out: int
    rates: tuple[GroupRates, ...]

    def as_table(self) -> tuple[list[str], list[list[str | int]]]:
        """Header and rows, for people: shares in percent with their intervals."""
        header = [self.column, self.unit, "genuine", "impostor", "FAR of all", "TAR", "interval", "FAR", "interval"]
        rows: list[list[str | int]] = []
        for rate in self.rates:
            cells = [*_cells(rate.tar, ".3f"), *_cells(rate.far, ".5f")]
            rows.append([rate.name, rate.members, rate.genuine, rate.impostor, _rate(rate), *cells])
        return header, rows


def _rate(rate: GroupRates) -> str:
    note = support_note(rate.support)
    return f"{rate.far_of_all:g}{f' ({note})' if note else ''}"


def _cells(share: Interval | None, digits: str) -> tuple[str, str]:
    if share is None:
        return "", ""
    return f"{100 * share.estimate:{digits}} %", f"{100 * share.low:{digits}} .. {100 * share.high:{digits}}"


def clustered_interval(
    hits: NDArray[np.floating | np.integer], trials: NDArray[np.floating | np.integer], ends: int, level: float = 0.95
) -> Interval | None:
    """The share of hits with an interval that allows for units whose trials err together; None without trials.

    hits, trials: [U], for each unit. ends: how many units each trial belongs to, 1 or 2.
    """
    total = float(trials.sum())
    if not total:
        return None
    share = float(hits.sum()) / total
    units = int(np.count_nonzero(trials))
    variance = float(np.square(hits - share * trials).sum()) * (ends / total) ** 2 * units / max(1, units - 1)
    # No fewer than one trial, no more than there are.
    size = float(np.clip(share * (1 - share) / variance, 1, total / ends)) if variance else units / ends
    z = NormalDist().inv_cdf(0.5 + level / 2)
    centre = (share + z * z / (2 * size)) / (1 + z * z / size)
    half = z / (1 + z * z / size) * np.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    return Interval(share, max(0.0, float(centre - half)), min(1.0, float(centre + half)), level)


def _pair_codes(groups: int) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """A number for each two groups whatever their order, int64 [groups, groups], and the groups of each number."""
    couples = [(first, second) for first in range(groups) for second in range(first, groups)]
    codes = np.zeros((groups, groups), np.int64)
    for number, (first, second) in enumerate(couples):
        codes[first, second] = codes[second, first] = number
    return codes, couples


def breakdown_pairs(
    scores: NDArray[np.floating],
    same: NDArray[np.bool_],
    index: NDArray[np.integer],
    groups: Groups,
    points: Sequence[TarAtFar],
) -> Breakdown:
    """Rates of a list of pairs by the groups of its images, for each point and each two groups that have pairs.

    scores [P], accepted strictly above the threshold of a point; same bool [P]; index: integers [P, 2], images, which
    `groups` is of. Pairs of an image without a group are left out.
    """
    of = groups.of[index]
    known = (of >= 0).all(axis=1)
    codes, couples = _pair_codes(len(groups.names))
    code = np.where(known, codes[of[:, 0], of[:, 1]], -1)
    rates = []
    for point in points:
        for number, (first, second) in enumerate(couples):
            here = code == number
            if not here.any():
                continue
            intervals = []
            for kind in (same, ~same):
                ends = index[here & kind].reshape(-1)
                accepted = (scores[here & kind] > point.threshold).repeat(2)
                trials = np.bincount(ends, minlength=len(groups.of)).astype(np.float64)
                hits = np.bincount(ends, accepted, len(groups.of))
                intervals.append(clustered_interval(hits, trials, 2))
            rates.append(
                GroupRates(
                    (groups.names[first], groups.names[second]),
                    len(np.unique(index[here])),
                    int((here & same).sum()),
                    int((here & ~same).sum()),
                    point.far,
                    point.threshold,
                    point.support,
                    *intervals,
                )
            )
    return Breakdown(groups.column, "images", int((groups.of < 0).sum()), tuple(rates))


def breakdown_all_pairs(
    embeddings: Tensor,
    labels: Tensor,
    groups: Groups,
    points: Sequence[TarAtFar],
    block: int = 0,
    progress: bool = False,
    ranks: Ranks | None = None,
) -> Breakdown:
    """Rates of all pairs of a set by the groups of its images, exact; takes a pass over the pairs.

    embeddings [N, D] and labels [N] as for `all_pairs`; groups: of the N images; points: of the `AllPairsResult`.
    Images without a group are left out. Memory: 16 bytes for each identity, each two groups and each point.
    """
    ranks = ranks or Ranks()
    chosen = groups.of >= 0
    if not chosen.any():
        raise ValueError(f"no image has a group of column {groups.column!r}")
    device = embeddings.device
    codes, couples = _pair_codes(len(groups.names))
    with torch.no_grad(), full_precision(device):
        # Of all images, so that the scores are to the last bit those that the points' thresholds are of.
        blocks = PairBlocks(embeddings, labels, block, ranks, progress)
        of = torch.from_numpy(groups.of).to(device)[blocks.order]
        table = torch.from_numpy(codes).to(device)
        people = len(blocks.people)
        thresholds = [point.threshold for point in points]
        hits = torch.zeros(len(points), 2, people, len(couples), dtype=torch.int64, device=device)
        lowest = min(thresholds)
        lock = Lock()

        def add(kind: int, pairs: Block, passed: Tensor) -> None:
            """Count pairs of a block, `passed` bool [rows, columns], for the people on them; kind 0 genuine, 1
            impostor."""
            row, column = passed.nonzero(as_tuple=True)
            grouped = (of[pairs.rows][row] >= 0) & (of[pairs.columns][column] >= 0)
            row, column = row[grouped], column[grouped]
            if not len(row):
                return
            scores = pairs.scores[row, column]
            row, column = row + pairs.rows.start, column + pairs.columns.start
            code = table[of[row], of[column]]
            sides = [(row, pairs.rows), (column, pairs.columns)]
            for own, images in sides if kind else sides[:1]:  # a genuine pair is of one person, and counts once
                # Labels ascend: a block has few people, and only theirs are counted, not all of the set.
                first, last = int(blocks.labels[images.start]), int(blocks.labels[images.stop - 1]) + 1
                cells = (blocks.labels[own] - first) * len(couples) + code
                for place, threshold in enumerate(thresholds):
                    found = torch.bincount(cells[scores > threshold], minlength=(last - first) * len(couples))
                    with lock:
                        hits[place, kind, first:last] += found.view(last - first, len(couples))

        def count(pairs: Block, thread: int) -> None:
            above = pairs.scores > lowest
            if pairs.mixed:
                genuine, impostor = blocks.masks(pairs)
                add(0, pairs, above & genuine)
                add(1, pairs, above & impostor)
            else:
                add(1, pairs, above)

        blocks.each(count, "all pairs, by group")
        accepted = ranks.sum(hits).cpu().numpy()
        sizes = np.zeros((people, len(groups.names)), np.int64)
        own, group = blocks.labels.cpu().numpy(), of.cpu().numpy()
        np.add.at(sizes, (own[group >= 0], group[group >= 0]), 1)
    rates = _group_rates(accepted, sizes, couples, groups.names, points)
    return Breakdown(groups.column, "identities", int((~chosen).sum()), tuple(rates))


def _group_rates(
    accepted: NDArray[np.int64],
    sizes: NDArray[np.int64],
    couples: Sequence[tuple[int, int]],
    names: Sequence[str],
    points: Sequence[TarAtFar],
) -> list[GroupRates]:
    """From accepted pairs, int64 [points, kinds, people, couples], and images, int64 [people, groups]."""
    images = sizes.sum(axis=0)
    rates = []
    for place, point in enumerate(points):
        for number, (first, second) in enumerate(couples):
            ours, theirs = sizes[:, first], sizes[:, second]
            if first == second:
                genuine, impostor = ours * (ours - 1) // 2, ours * (images[first] - ours)
            else:
                genuine = ours * theirs
                impostor = ours * (images[second] - theirs) + theirs * (images[first] - ours)
            if not genuine.any() and not impostor.any():
                continue
            rates.append(
                GroupRates(
                    (names[first], names[second]),
                    int(((ours > 0) | (theirs > 0)).sum()),
                    int(genuine.sum()),
                    int(impostor.sum()) // 2,
                    point.far,
                    point.threshold,
                    point.support,
                    clustered_interval(accepted[place, 0, :, number], genuine, 1),
                    clustered_interval(accepted[place, 1, :, number], impostor, 2),
                )
            )
    return rates
