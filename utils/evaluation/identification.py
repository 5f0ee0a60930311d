"""Identification, one against many: who of a gallery is on a probe image, if anyone.

Measures are those of ISO/IEC 19795-1 and of NIST's FRVT 1:N. Closed set: the share of the probes of enrolled people
whose own entry is among the k most similar (CMC). Open set: the share of them that come first, above a threshold (DIR,
TPIR), at one that lets through a given share of the probes of people who are not enrolled (FPIR). A person's score is
that of his or her most similar gallery entry. An entry that is as similar as the true one counts as ahead of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from utils.evaluation.curves import ErrorRate, check_rates, exact_rate
from utils.progress import progress_bar

_BLOCK = 2048


@dataclass(frozen=True)
class OpenSetPoint(ErrorRate):
    """DIR at FPIR.

    fpir: the rate asked for. dir: the share of the mated probes found first and strictly above the threshold, 0..1.
    threshold: the best score of the non-mated probe at rank floor(FPIR x non-mated), from 0 at the top. non_mated:
    probes of people who are not enrolled.
    """

    fpir: float
    dir: float
    threshold: float
    non_mated: int

    trials = "non-mated probes"

    @property
    def errors(self) -> tuple[float, int]:
        """The rate asked for, and the probes it is a share of."""
        return self.fpir, self.non_mated


@dataclass(frozen=True, eq=False)
class Identification:
    """What was measured.

    gallery: enrolled people. mated, non_mated: probes of people who are enrolled, and who are not.
    cmc: float64 [K], the share of the mated probes whose person is among the k + 1 most similar.
    open_set: DIR at each FPIR; empty without non-mated probes.
    over_scores: the same as insightface's IJB tools count it, if asked for. The threshold is that one of all scores of
        probes with entries of others whose rank, from 1 at the top, is FPIR x probes, rounded up; and a mated probe
        need not come first.
    """

    gallery: int
    mated: int
    non_mated: int
    cmc: NDArray[np.float64]
    open_set: tuple[OpenSetPoint, ...]
    over_scores: tuple[OpenSetPoint, ...] = ()

    def rank(self, k: int) -> float:
        """The share of the mated probes whose person is among the `k` most similar, 0..1. Raises ValueError beyond
        the ranks that were measured."""
        if not 1 <= k <= len(self.cmc):
            raise ValueError(f"rank {k}: only those from 1 to {len(self.cmc)} were measured")
        return float(self.cmc[k - 1])


def identify(
    probes: NDArray[np.floating],
    probe_people: NDArray[np.integer],
    gallery: NDArray[np.floating],
    gallery_people: NDArray[np.integer],
    ranks: int = 20,
    fpir: Sequence[float] = (0.01, 0.1),
    over_scores: bool = False,
    progress: bool = False,
) -> Identification:
    """Search each probe in the gallery, by cosine, in blocks; with `progress` a bar shows how far it is.

    probes [P, D], gallery [G, D]: floats of any norm but zero; probe_people [P], gallery_people [G]: integers, who is
    who. Probes of people who are not in the gallery are the non-mated ones. Memory: 4 D (P + G) + 16 KiB x G bytes.
    Raises ValueError for shapes that do not fit, rows without direction, an empty gallery and no mated probe.
    """
    check_rates(fpir)
    if ranks < 1:
        raise ValueError(f"a CMC has 1 rank or more, not {ranks}")
    queries, entries = _unit(probes, probe_people, "probe"), _unit(gallery, gallery_people, "gallery")
    if not len(entries):
        raise ValueError("the gallery is empty")
    order = np.argsort(gallery_people, kind="stable")
    people, starts = np.unique(np.asarray(gallery_people)[order], return_index=True)
    entries = entries[order]
    column = np.searchsorted(people, probe_people).clip(max=len(people) - 1)
    mated = people[column] == probe_people
    if not mated.any():
        raise ValueError("no probe is of a person in the gallery")
    own = np.full(len(queries), -np.inf, np.float32)
    best_other = np.full(len(queries), -np.inf, np.float32)
    ahead = np.zeros(len(queries), np.int64)
    places = [ceil(exact_rate(rate) * len(queries)) for rate in fpir] if over_scores else []
    highest = np.empty(0, np.float32)  # of the scores with entries of others
    with progress_bar(len(queries), "probe", "identification", disable=not progress) as bar:
        for start in range(0, len(queries), _BLOCK):
            part = slice(start, start + _BLOCK)
            scores = queries[part] @ entries.T
            if len(starts) < len(entries):
                scores = np.maximum.reduceat(scores, starts, axis=1)
            rows = np.flatnonzero(mated[part])
            columns = column[part][rows]
            own[start + rows] = scores[rows, columns]
            scores[rows, columns] = -np.inf
            ahead[part] = (scores >= own[part, None]).sum(axis=1)
            best_other[part] = scores.max(axis=1)
            if places:
                highest = _highest(np.concatenate([highest, scores[np.isfinite(scores)]]), max(places))
            bar.update(len(scores))
    others = np.sort(best_other[~mated])[::-1]
    own, ahead = own[mated], ahead[mated]

    def point(rate: float, threshold: np.float32, found: NDArray[np.float32], trials: int) -> OpenSetPoint:
        return OpenSetPoint(float(rate), float((found > threshold).sum() / len(own)), float(threshold), trials)

    first, count = own[ahead == 0], len(others)
    open_set = [point(rate, others[int(exact_rate(rate) * count)], first, count) for rate in fpir if count]
    published = [
        point(rate, highest[min(place, len(highest)) - 1], own, len(queries))
        for rate, place in zip(fpir, places, strict=False)
        if len(highest)
    ]
    cmc = np.bincount(ahead.clip(max=ranks), minlength=ranks + 1)[:ranks].cumsum() / len(own)
    return Identification(len(people), len(own), count, cmc, tuple(open_set), tuple(published))


def _highest(scores: NDArray[np.float32], count: int) -> NDArray[np.float32]:
    """The `count` highest scores, falling; all of them where there are not so many."""
    if len(scores) > count:
        scores = np.partition(scores, len(scores) - count)[len(scores) - count :]
    return np.sort(scores)[::-1]


def _unit(vectors: NDArray[np.floating], people: NDArray[np.integer], kind: str) -> NDArray[np.float32]:
    vectors = np.asarray(vectors)
    if vectors.ndim != 2 or np.shape(people) != vectors.shape[:1]:
        raise ValueError(f"{kind} vectors must be [n, D] with n people, not {vectors.shape} and {np.shape(people)}")
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64))
    bad = ~np.isfinite(norms) | (norms == 0)
    if bad.any():
        raise ValueError(f"{kind} row {int(bad.argmax())} is not finite or has zero norm ({int(bad.sum())} such rows)")
    unit = np.empty(vectors.shape, np.float32)
    return np.divide(vectors, norms[:, None], out=unit, casting="same_kind")  # without a float64 copy


class Split(NamedTuple):
    """Positions of a set's images, int64: one of each enrolled person, other images of them, images of others."""

    gallery: NDArray[np.int64]
    mated: NDArray[np.int64]
    non_mated: NDArray[np.int64]


def gallery_split(labels: NDArray[np.integer], seed: int | None = None) -> Split:
    """Who is enrolled, of a set of faces: people with two images or more, by one of them; the rest are probes.

    labels: integers [N]. The image enrolled is the first, or with a seed a random one. The images of people with one
    image only are the non-mated probes. Raises ValueError when everyone has one image.
    """
    labels = np.asarray(labels)
    positions = np.arange(len(labels)) if seed is None else np.random.default_rng(seed).permutation(len(labels))
    _, first, numbers, counts = np.unique(labels[positions], return_index=True, return_inverse=True, return_counts=True)
    enrolled = np.sort(positions[first[counts > 1]])
    if not len(enrolled):
        raise ValueError(f"nobody can be identified: each of the {len(labels)} images is of another person")
    alone = np.zeros(len(labels), bool)
    alone[positions] = (counts == 1)[numbers]
    probe = ~alone
    probe[enrolled] = False
    return Split(enrolled, np.flatnonzero(probe), np.flatnonzero(alone))


def identify_people(
    embeddings: NDArray[np.floating],
    labels: NDArray[np.integer],
    seed: int | None = None,
    fpir: Sequence[float] = (0.01, 0.1),
    progress: bool = False,
) -> Identification:
    """Identification on any set of faces, split by `gallery_split`: embeddings [N, D], labels integers [N]."""
    labels = np.asarray(labels)
    split = gallery_split(labels, seed)
    probes = np.concatenate([split.mated, split.non_mated])
    gallery = embeddings[split.gallery], labels[split.gallery]
    return identify(embeddings[probes], labels[probes], *gallery, fpir=fpir, progress=progress)
