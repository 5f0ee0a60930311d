"""Drawn people as embeddings: what the tests of merging share."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class DrawnSet:
    """`embeddings` float32 [images, D], unit; `labels` int64 [images]; `person` int64 [identities]."""

    embeddings: Tensor
    labels: Tensor
    person: Tensor


def draw_set(person: Tensor, images: Tensor, seed: int, size: int = 64, spread: float = 0.7) -> DrawnSet:
    """An identity for each number in `person` with its number of `images`; equal numbers are one person in any set.

    Images are a person's direction plus noise; their mean cosine is 1 / (1 + spread^2), 0.67.
    """
    everyone = F.normalize(torch.randn(int(person.max()) + 1, size, generator=torch.Generator().manual_seed(99)))
    labels = torch.arange(len(person)).repeat_interleave(images)
    noise = torch.randn(len(labels), size, generator=torch.Generator().manual_seed(seed)) / size**0.5
    return DrawnSet(F.normalize(everyone[person][labels] + spread * noise), labels, person)
