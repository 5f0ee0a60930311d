"""The plan of a merge: what becomes of every identity of every set."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from data.face_sets import FaceSet
from dataset_merge.matching import best_matches


@dataclass(frozen=True)
class Decision:
    """What became of one identity; a row of `merge.csv`.

    `source`: number of its set, from 0; `label`: its name there; `images`; `new_label`: its label in the merged set;
    `match_source`, `match_label`, `score`: the most similar identity of the sets before, and their cosine (empty for
    the first set); `decision`: joined or added.
    """

    source: int
    label: str
    images: int
    new_label: int
    match_source: int | None
    match_label: str | None
    score: float | None
    decision: str


Member = tuple[int, int]  # (number of the set, class index in it)


def plan_merge(sums: Sequence[torch.Tensor], sets: Sequence[FaceSet], t: float) -> list[Decision]:
    """Decide for every identity, set by set in their order.

    `sums`: for each set float32 [identities, D], see `identity_sums`. `t`: cosine from which two are the same person.
    """
    decisions: list[Decision] = []
    first_members: list[Member] = []  # of each merged identity, in the order of their labels
    merged = sums[0][:0]
    for source, (newcomers, faces) in enumerate(zip(sums, sets, strict=True)):
        images = np.bincount(faces.labels, minlength=len(faces.identities))
        known = len(first_members)
        if known:
            matches = best_matches(newcomers, merged)
            joins = (matches.mutual & (matches.score >= t)).tolist()
            scores, targets = matches.score.tolist(), matches.known.tolist()
        else:
            joins = [False] * len(newcomers)
        for identity, join in enumerate(joins):
            new_label = targets[identity] if join else len(first_members)
            if not join:
                first_members.append((source, identity))
            match_source, match_identity = first_members[targets[identity]] if known else (None, None)
            decisions.append(
                Decision(
                    source,
                    faces.identities[identity],
                    int(images[identity]),
                    new_label,
                    match_source,
                    None if match_source is None else sets[match_source].identities[match_identity],
                    round(scores[identity], 6) if known else None,
                    "joined" if join else "added",
                )
            )
        labels = torch.tensor([decision.new_label for decision in decisions[-len(newcomers) :]], device=merged.device)
        grown = torch.cat([merged, merged.new_zeros(len(first_members) - known, merged.shape[1])])
        merged = grown.index_add_(0, labels, newcomers)
    return decisions
