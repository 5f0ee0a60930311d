"""Images that do not belong to their identity, and identities of two people.

An identity in two clusters (2-means on the sphere) whose centres have a cosine below `mixed` is two people, if each has
enough images, and those of the second one are alike (mean cosine of pairs at least `outlier`). Of what is one person
then, an image whose cosine to the trimmed mean is below `outlier` does not belong, unless most images of the identity
were to go: then nobody can tell who it is, and it is only listed. The trimmed mean is that of dataset_merge/centres.py,
which wrong images do not draw towards them. Identities of fewer images than MIN_IMAGES are not judged: of two images
that differ, neither can be called the wrong one.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from data.face_sets import FaceSet, ImageSubset
from data.images_fingerprint import images_fingerprint, joined_digest
from dataset_merge.centres import cosines_with, identity_centres
from dataset_merge.unit_rows import Rows

MIN_IMAGES = 4
# Images that the smaller of two people in one identity has at least.
MIN_CLUSTER = 3
# Identities are looked at for a second cluster when so many images are this much above `mixed` or below.
_SUSPICION = 0.3
_ROUNDS = 10

COLUMNS = ("source", "label", "image", "finding", "cosine", "becomes")


class Finding(NamedTuple):
    """What is wrong with one image: `outlier`, `mixed` (of a second person) or `scattered` (an outlier among too many).

    `cosine`: with its identity's centre, of a mixed one the cosine of the two centres.
    """

    image: int
    finding: str
    cosine: float


@dataclass(frozen=True)
class Findings:
    """Of a set: `labels`, int64 [images], as cleaned, -1 for an outlier, numbers from the count of identities on for
    second people; `seconds`: the identity in which each of them was found; `found`: all that is wrong, an image once.
    """

    labels: np.ndarray
    seconds: list[int]
    found: list[Finding]


def find_wrong(embeddings: Rows, labels: np.ndarray, identities: int, outlier: float, mixed: float) -> Findings:
    """Judge a set by its embeddings, unit float32 [images, D] on the CPU, and labels, int64 [images]."""
    labels = labels.copy()
    found: dict[int, Finding] = {}  # one an image: of a second person, too, some images may be outliers
    seconds: list[int] = []
    cosines = _centre_cosines(embeddings, labels, identities)
    doubtful = np.bincount(labels[cosines < mixed + _SUSPICION], minlength=identities)
    many = np.bincount(labels, minlength=identities) >= max(MIN_IMAGES, 2 * MIN_CLUSTER)
    for identity, images in _of(labels, np.flatnonzero((doubtful >= MIN_CLUSTER) & many)):
        unit = embeddings[torch.from_numpy(images)].numpy()
        second, between = _second_person(unit, outlier, mixed)
        if between < mixed and second.sum() >= MIN_CLUSTER and _mean_pair(unit[second]) >= outlier:
            labels[images[second]] = identities + len(seconds)
            seconds.append(identity)
            found |= {image: Finding(image, "mixed", between) for image in images[second].tolist()}
    total = identities + len(seconds)
    if seconds:
        cosines = _centre_cosines(embeddings, labels, total)
    images_of = np.bincount(labels, minlength=total)
    far = (cosines < outlier) & (images_of[labels] >= MIN_IMAGES)
    scattered = 2 * np.bincount(labels[far], minlength=total) >= images_of
    for image in np.flatnonzero(far).tolist():
        kind = "scattered" if scattered[labels[image]] else "outlier"
        if kind == "outlier" or image not in found:
            found[image] = Finding(image, kind, float(cosines[image]))
    labels[far & ~scattered[labels]] = -1
    return Findings(labels, seconds, list(found.values()))


def _centre_cosines(embeddings: Rows, labels: np.ndarray, identities: int) -> np.ndarray:
    """The cosine of every image with the trimmed mean of its identity, float32 [images]."""
    own = torch.from_numpy(labels)
    return cosines_with(embeddings, own, identity_centres(embeddings, own, identities, "trimmed").vectors).numpy()


def _of(labels: np.ndarray, identities: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The positions of the images of each of `identities`."""
    order = np.argsort(labels, kind="stable")
    sorted_labels = labels[order]
    starts = np.searchsorted(sorted_labels, identities, "left")
    ends = np.searchsorted(sorted_labels, identities, "right")
    for identity, start, end in zip(identities.tolist(), starts.tolist(), ends.tolist(), strict=True):
        yield identity, order[start:end]


def _second_person(unit: np.ndarray, outlier: float, mixed: float) -> tuple[np.ndarray, float]:
    """The smaller of two clusters of unit vectors [n, D], bool [n], and the cosine of their centres.

    The clusters begin with the vector that has most neighbours, and with that of the vectors far from it which has most
    neighbours among them; a neighbour has a cosine of `mixed` or more. Vectors below `outlier` are of neither cluster.
    """
    near = unit @ unit.T >= mixed
    first = int(np.argmax(near.sum(1)))
    far = np.flatnonzero(~near[first])
    if len(far) < MIN_CLUSTER:
        return np.zeros(len(unit), bool), 1.0
    centres = unit[[first, far[int(np.argmax(near[np.ix_(far, far)].sum(1)))]]]
    belongs = np.full(len(unit), -1)
    for _ in range(_ROUNDS):
        cosines = unit @ centres.T
        now = np.where(cosines.max(1) >= outlier, cosines.argmax(1), -1)
        if (now == belongs).all() or not ((now == 0).any() and (now == 1).any()):
            break
        belongs = now
        sums = np.stack([unit[belongs == cluster].sum(0) for cluster in (0, 1)])
        centres = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    sizes = [int((belongs == cluster).sum()) for cluster in (0, 1)]
    return belongs == (1 if sizes[1] <= sizes[0] else 0), float(centres[0] @ centres[1])


def _mean_pair(unit: np.ndarray) -> float:
    """The mean cosine of all pairs of different rows of unit vectors [n, D], n at least 2."""
    total = unit.sum(0, dtype=np.float64)
    return float(total @ total - len(unit)) / (len(unit) * (len(unit) - 1))


class CleanedFaceSet(ImageSubset):
    """A set as it is after cleaning: without its outliers, second people as identities of their own, `NAME#2`.

    `positions`: where its images lie in the set as it was.
    """

    def __init__(self, faces: FaceSet, findings: Findings) -> None:
        self._faces, self.path = faces, faces.path
        names = set(faces.identities)
        self.identities = list(faces.identities)
        for identity in findings.seconds:
            name = f"{faces.identities[identity]}#2"
            while name in names:
                name += "'"
            names.add(name)
            self.identities.append(name)
        super().__init__(faces, np.flatnonzero(findings.labels >= 0))
        self.labels = findings.labels[self.positions]

    def part(self, positions: np.ndarray) -> FaceSet:
        return self._faces.part(self.positions[positions])

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        return joined_digest(images_fingerprint(self._faces), self.positions)


def table(sets: Sequence[FaceSet], findings: Sequence[Findings], applied: bool) -> Iterator[tuple[object, ...]]:
    """Rows of `cleaning.csv`; `sets` as they were."""
    becomes = {"outlier": "left out", "mixed": "identity of its own", "scattered": "kept"}
    for source, (faces, wrong) in enumerate(zip(sets, findings, strict=True)):
        for image, kind, cosine in wrong.found:
            label = faces.identities[int(faces.labels[image])]
            yield source, label, faces.describe(image), kind, f"{cosine:.6f}", becomes[kind] if applied else "kept"
