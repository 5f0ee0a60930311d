"""Who is who in several face sets, from the embeddings of their images: centres, matches, threshold, groups."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dataset_merge.calibration import Calibration, calibrate
from dataset_merge.centres import Centres, Method, identity_centres, join_centres
from dataset_merge.grouping import Grouping, Pairs, Rule, group_identities, join_pairs
from dataset_merge.matching import top_matches
from dataset_merge.reference_scores import Impostors, half_scores, impostor_scores
from dataset_merge.scores import RIVAL_WEIGHT, score_pairs
from dataset_merge.unit_rows import Rows, UnitRows
from utils.ranks import Ranks

# Pairs this far below a fixed threshold are kept, to be looked at.
_BELOW_KEPT = 0.15
# The most similar identities of each one in another set that are kept, at most.
_CANDIDATES = 8


@dataclass(frozen=True)
class MatchSettings:
    """`t`: cosine from which two identities are one person; None: calibrated from the sets. `method`: see centres.py;
    `rule`, `within`: see grouping.py. `wrong_joins`: share of joins that may be wrong, for the calibration. `block`:
    identities multiplied at once, 0: as matching.py says.
    """

    t: float | None = 0.65
    method: Method = "mean"
    rule: Rule = "mutual"
    within: bool = False
    wrong_joins: float = 0.01
    block: int = 0


@dataclass(frozen=True)
class Decided:
    """`centres` of all identities, set after set, on the CPU; `source`: int64 [identities], the set of each;
    `grouping`: who is who; `calibration`: None for a given threshold.
    """

    centres: Centres
    source: Tensor
    grouping: Grouping
    calibration: Calibration | None


def decide(
    embeddings: Sequence[UnitRows | Tensor | NDArray[np.float32]],
    labels: Sequence[Tensor | NDArray[np.int64]],
    identities: Sequence[int],
    settings: MatchSettings,
    names: Sequence[str],
    device: torch.device,
    ranks: Ranks | None = None,
    folder: Path | None = None,
) -> Decided:
    """Compare all sets with each other, and decide who is who; all `ranks` get the result. What takes long is kept in
    `folder`, and the next call goes on from there.

    For each set unit embeddings float32 [images, D], labels int64 [images] and the number of `identities`; `names` of
    the sets for messages. Raises CalibrationError where the sets cannot tell their threshold.
    """
    rows: list[Rows] = [part if isinstance(part, UnitRows) else _as_tensor(part) for part in embeddings]
    classes = [_as_tensor(part).to(device) for part in labels]
    made = (
        identity_centres(part, own, count, settings.method)
        for part, own, count in zip(rows, classes, identities, strict=True)
    )
    everyone = join_centres(made, sum(identities))
    centres = everyone.split(identities)
    auto = settings.t is None
    # Without the assumption that an identity has one counterpart in a set at most, no other one speaks against it.
    weight = RIVAL_WEIGHT if auto and settings.rule == "mutual" and not settings.within else 0.0
    impostors = []
    if auto:
        impostors = [impostor_scores(part, weight, settings.rule, settings.block, ranks, folder) for part in centres]
    found = _scored_pairs(centres, settings, weight, impostors, ranks, folder)
    calibration = None
    if auto:
        halves = [half_scores(*parts) for parts in zip(rows, classes, centres, impostors, strict=True)]
        calibration = calibrate(impostors, halves, centres, found, settings.rule, settings.wrong_joins, names)
    threshold = calibration.threshold if calibration else settings.t
    assert threshold is not None
    everyone = Centres(everyone.vectors.cpu(), everyone.images.cpu(), everyone.used.cpu())
    vectors = everyone.vectors.numpy()

    def score(one: int, other: int) -> float:  # within sets it is the plain cosine
        return float(vectors[one].astype(np.float64) @ vectors[other])

    source = np.repeat(np.arange(len(centres)), identities)
    starts = np.cumsum([0, *identities])
    pairs = join_pairs(
        [Pairs(p.first + starts[one], p.second + starts[other], p.cosine, p.score) for one, other, p in found]
    )
    grouping = group_identities(source, pairs, threshold, settings.rule, settings.within, score)
    return Decided(everyone, torch.from_numpy(source), grouping, calibration)


def _scored_pairs(
    centres: Sequence[Centres],
    settings: MatchSettings,
    weight: float,
    impostors: Sequence[Impostors],
    ranks: Ranks | None,
    folder: Path | None,
) -> list[tuple[int, int, Pairs]]:
    """The most similar identities of each two sets (and of each with itself, if people are looked for there), scored:
    the numbers of the two sets, and the pairs, by their numbers in these.
    """
    candidates = _CANDIDATES
    if settings.t is not None:
        floor = settings.t - _BELOW_KEPT
    elif weight:
        floor, candidates = -1.0, 2  # the best one, and the rival that is held against it
    else:  # half of the identities have someone else that near
        floor = float(np.median(np.concatenate([part.nearest for part in impostors])))
    found = []
    for one in range(len(centres)):
        for other in range(one if settings.within else one + 1, len(centres)):
            first, second = centres[one].vectors, None if one == other else centres[other].vectors
            matches = top_matches(first, second, candidates, floor, settings.block, ranks, folder)
            found.append((one, other, score_pairs(first, second, matches, weight)))
    return found


def _as_tensor(values: Tensor | NDArray) -> Tensor:
    """The values without a copy: nothing writes to them, so a file mapped for reading only will do."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.as_tensor(values)
