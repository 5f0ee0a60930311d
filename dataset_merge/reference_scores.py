"""Scores of which it is known whether they are of one person, from each set by itself.

Identities of one set are different people, so what scores highest among them is what wrong joins score: each set is
matched with itself by the rule that the merge goes by. Two halves of one identity's images score as a right join does,
less what the smaller number of images takes off.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from dataset_merge.centres import Centres, sums
from dataset_merge.grouping import Rule, mutual_best
from dataset_merge.matching import top_matches
from dataset_merge.scores import score_pairs
from dataset_merge.unit_rows import Rows
from utils.ranks import Ranks

# Identities of a set that are compared with each other, at most; more are sampled.
_SAMPLE = 200_000
# Identities of a set that are cut in halves, at most; more are sampled.
_HALVED = 50_000
# Of all samples: the same sets have the same threshold.
SEED = 0


@dataclass(frozen=True)
class Impostors:
    """What a set matched with itself gives. `scores`: float64, of the joins that would be wrong ones; `compared`:
    pairs; `nearest`: float64 [identities compared], the highest cosine that each has to another; `usual_rival`: what is
    taken off the cosine of a usual pair.
    """

    scores: NDArray[np.float64]
    compared: float
    nearest: NDArray[np.float64]
    usual_rival: float = 0.0


@dataclass(frozen=True)
class Halves:
    """Of identities cut in halves: `cosine` of their centres, float64 [H]; `sizes` int64 [H, 2], images in each half;
    `alike`, the mean cosine of two images of one identity; and `usual_rival`, as of Impostors.
    """

    cosine: NDArray[np.float64]
    sizes: NDArray[np.int64]
    alike: float
    usual_rival: float


def impostor_scores(
    centres: Centres,
    rival_weight: float,
    rule: Rule,
    block: int,
    ranks: Ranks | None = None,
    folder: Path | None = None,
) -> Impostors:
    """Match a set, or a sample of a large one, with itself by the rule of the merge. `folder`: as of top_matches."""
    vectors = centres.vectors[_sampled(centres.images > 0, _SAMPLE, SEED)]
    count = len(vectors)
    if count < 2:
        return Impostors(np.empty(0), 0.0, np.empty(0))
    matches = top_matches(vectors, None, 2 if rule == "mutual" else 8, -1.0, block, ranks, folder)
    pairs = score_pairs(vectors, None, matches, rival_weight)
    nearest = matches[0].cosine[:, 0].double().cpu().numpy()
    scores = pairs.score
    if rule == "mutual":
        order = np.argsort(-pairs.score, kind="stable")
        scores = scores[mutual_best(np.zeros(count, np.int64), pairs, order)]
    else:  # all pairs above this are among those kept, but for identities with eight neighbours that near
        scores = scores[scores >= np.median(nearest)]
    return Impostors(scores, count * (count - 1) / 2, nearest, rival_weight * max(0.0, float(np.median(nearest))))


def half_scores(embeddings: Rows, labels: Tensor, centres: Centres, impostors: Impostors) -> Halves:
    """Cut each identity with two images or more in two at random, and compare the halves; of many a sample.

    Memory: 6 x D bytes for each half, and 40 bytes an image.
    """
    device = labels.device
    generator = torch.Generator().manual_seed(SEED)
    order = torch.rand(len(labels), generator=generator).to(device).argsort()
    order = order[labels[order].sort(stable=True).indices]
    starts = centres.images.cumsum(0) - centres.images
    place = torch.empty_like(labels)
    place[order] = torch.arange(len(labels), device=device) - starts[labels[order]]
    chosen = _sampled(centres.images >= 2, _HALVED, SEED)
    number = torch.full((len(centres),), -1, dtype=torch.int64, device=device)
    number[chosen] = torch.arange(len(chosen), device=device)
    half = 2 * number[labels] + place % 2
    vectors = sums(embeddings, half, 2 * len(chosen), half >= 0).view(len(chosen), 2, embeddings.shape[1])
    F.normalize(vectors, dim=2, out=vectors)
    cosine = (vectors[:, 0] * vectors[:, 1]).sum(1).double().cpu().numpy()
    sizes = torch.bincount(half[half >= 0], minlength=2 * len(chosen)).view(-1, 2).cpu().numpy()
    # Halves that are no more alike than strangers are not of one person: labels are wrong now and then.
    sure = cosine > np.median(impostors.nearest) if len(impostors.nearest) else np.ones(len(cosine), bool)
    alone = sure & (sizes.max(1, initial=0) == 1)
    # Halves of h and g images: cos^2 = r^2 / ((r + (1 - r) / h) (r + (1 - r) / g)), so single images tell r directly.
    alike = float(np.median(cosine[alone])) if alone.sum() >= 20 else _solve_alike(cosine[sure], sizes[sure])
    return Halves(cosine, sizes, alike, impostors.usual_rival)


def genuine_scores(halves: Sequence[Halves], centres: Sequence[Centres]) -> NDArray[np.float64]:
    """Scores of halves, brought to the numbers of images that the sets' identities have.

    Each half pair stands for its whole identity against one of any set with as many images as one drawn there has.
    """
    # Sorted, and drawn from anew for each set: the order of the sets must not show.
    images = np.sort(np.concatenate([part.images.cpu().numpy() for part in centres]))
    parts = []
    for part in halves:
        if len(part.cosine):
            other = np.random.default_rng(SEED).choice(images[images > 0], len(part.cosine))
            whole = expected_cosine(part.alike, part.sizes.sum(1), other)
            factor = whole / expected_cosine(part.alike, *part.sizes.T)
            parts.append(np.minimum(part.cosine * factor, 1) - part.usual_rival)
    return np.concatenate(parts) if parts else np.empty(0)


def expected_cosine(alike: float, first: NDArray[np.int64], second: NDArray[np.int64]) -> NDArray[np.float64]:
    """Cosine of the means of `first` and of `second` unit embeddings of one person, whose mean cosine is `alike`.

    A mean of n unit vectors with cosine r between any two has the squared length r + (1 - r) / n.
    """
    return alike / np.sqrt((alike + (1 - alike) / first) * (alike + (1 - alike) / second))


def _solve_alike(cosine: NDArray[np.float64], sizes: NDArray[np.int64]) -> float:
    """The mean cosine of two images that explains the median cosine of the halves best."""
    if not len(cosine):
        return float("nan")
    grid = np.linspace(0.02, 0.99, 98)
    return float(min(grid, key=lambda r: abs(np.median(expected_cosine(r, *sizes.T) - cosine))))


def _sampled(wanted: Tensor, most: int, seed: int) -> Tensor:
    """The numbers of the identities that are `wanted`, bool [identities], int64 and rising; of more than `most` a
    sample of so many.
    """
    numbers = wanted.nonzero().flatten()
    if len(numbers) <= most:
        return numbers
    chosen = np.sort(np.random.default_rng(seed).permutation(len(numbers))[:most])
    return numbers[torch.from_numpy(chosen).to(numbers.device)]
