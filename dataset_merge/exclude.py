"""People of test sets among the identities of training sets: who has to be left out, so that a test stays one.

Each image of a `.bin` counts by itself, as it says nothing about who is who; of face sets and folders the mean of each
identity counts. An identity whose centre has a cosine of at least the threshold with one of them is that person.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from data.face_sets import EncodedImages, FaceSet, open_face_set
from data.verification_bin import PairImages, read_bin
from dataset_merge.centres import identity_centres
from dataset_merge.decisions import Match
from dataset_merge.matching import top_matches
from dataset_merge.scores import pair_cosines
from dataset_merge.unit_rows import Rows
from utils.ranks import Ranks

# A share of identities left out above which it is said that many of them may be strangers.
_MANY = 0.05


@dataclass(frozen=True)
class HeldOutSet:
    """A set whose people are to be left out: its images, and for one with identities, that set."""

    path: str
    images: EncodedImages
    faces: FaceSet | None

    def name(self, position: int) -> str:
        """What its person or image number `position` is called."""
        return self.faces.identities[position] if self.faces else self.images.describe(position)

    def people(self, embeddings: Rows, device: torch.device) -> Tensor:
        """Unit vectors float32 [people, D], on `device`, from those of the images, float32 [images, D]."""
        if self.faces is None:
            return embeddings[:].to(device)
        labels = torch.from_numpy(self.faces.labels).to(device)
        return identity_centres(embeddings, labels, len(self.faces.identities)).vectors


def open_held_out(path: str) -> HeldOutSet:
    """The test set at `path`: a `.bin`, a rec set or a folder of identities."""
    if Path(path).suffix == ".bin":
        return HeldOutSet(path, PairImages(read_bin(path)), None)
    faces = open_face_set(path)
    return HeldOutSet(path, faces, faces)


@dataclass(frozen=True)
class Leaks:
    """How near each identity is to the test sets: `match`, the nearest person there; `t`, from where it is that one."""

    match: list[Match]
    t: float

    @property
    def excluded(self) -> dict[int, Match]:
        """The identities that are people of the test sets."""
        return {identity: match for identity, match in enumerate(self.match) if match.score >= self.t}

    @property
    def scores(self) -> np.ndarray:
        """The cosine of each identity with the nearest person, float64 [identities]."""
        return np.array([match.score for match in self.match])

    @property
    def warning(self) -> str | None:
        """What to ask when so many are left out that many of them may be strangers; None: nothing."""
        scores = self.scores
        share = float((scores >= self.t).mean()) if len(scores) else 0.0
        if share <= _MANY:
            return None
        higher = [t for t in (0.4, 0.45, 0.5, 0.55, 0.6, 0.7) if t > self.t]
        counts = ", ".join(f"{int((scores >= t).sum()):,} reach {t:g}" for t in higher)
        return (
            f"{int((scores >= self.t).sum()):,} of {len(scores):,} identities ({share:.0%}) reach --exclude-t "
            f"{self.t:g}{f', {counts}' if counts else ''}: are they all people of the test sets? Of sets of one "
            "source they may be. Else they are strangers, of which more reach it the less well a model tells people "
            "apart, and the more images a test set has: look at the faces in the report, and raise --exclude-t if they "
            "are other people."
        )


def find_leaks(centres: Tensor, sets: Sequence[tuple[HeldOutSet, Rows]], t: float, ranks: Ranks | None = None) -> Leaks:
    """Compare centres, unit float32 [identities, D], with the people of test sets, given with their embeddings.

    Cosines with the nearest are computed anew in float64, so that neither blocks nor ranks show in them.
    """
    best = np.full(len(centres), -np.inf)
    where, who = np.zeros(len(centres), np.int64), np.zeros(len(centres), np.int64)
    for number, (test_set, embeddings) in enumerate(sets):
        people = test_set.people(embeddings, centres.device)
        index = top_matches(centres, people, k=1, ranks=ranks)[0].index[:, 0].cpu().numpy()
        cosine = pair_cosines(centres, people, np.arange(len(centres)), index)
        better = cosine > best
        best[better], where[better], who[better] = cosine[better], number, index[better]
    rows = zip(where.tolist(), who.tolist(), best.tolist(), strict=True)
    # Millions of identities are nearest to some thousands of people, and an image of a .bin is long searched for.
    named = cache(lambda number, person: sets[number][0].name(person))
    return Leaks([Match(sets[number][0].path, named(number, person), score) for number, person, score in rows], t)
