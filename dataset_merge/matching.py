"""Who is who across sets: identity centres, and the mutual best matches between two lists of them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.devices import full_precision


def identity_sums(embeddings: Tensor, labels: Tensor, identities: int) -> Tensor:
    """Sum of each identity's unit embeddings: float32 [identities, D] from [images, D] and int64 [images].

    Normalised, a sum is the identity's centre, normalise(mean(embeddings)); sums of two identities add up to that of
    their union, which centres do not.
    """
    return embeddings.new_zeros(identities, embeddings.shape[1]).index_add_(0, labels, embeddings)


class Matches(NamedTuple):
    """For each newcomer: `score`, its highest cosine to anyone known, float32 [N]; `known`, who that is, int64 [N];
    `mutual`, whether that one has no higher cosine to another newcomer, bool [N].
    """

    score: Tensor
    known: Tensor
    mutual: Tensor


def best_matches(newcomers: Tensor, known: Tensor, block: int = 4096) -> Matches:
    """Best matches between the sums of `newcomers` [N, D] and of `known` [M, D], on their device, in blocks.

    Takes 4 x block^2 bytes for the cosines beside the normalised sums, never N x M. Equal cosines go to the first.
    """
    newcomers, known = F.normalize(newcomers), F.normalize(known)
    n, m = len(newcomers), len(known)
    score, best_known = newcomers.new_full((n,), -torch.inf), torch.zeros(n, dtype=torch.int64, device=known.device)
    claim, claimant = known.new_full((m,), -torch.inf), torch.zeros(m, dtype=torch.int64, device=known.device)
    with full_precision(known.device):
        for i in range(0, n, block):
            for j in range(0, m, block):
                cosines = newcomers[i : i + block] @ known[j : j + block].T
                _keep_better(score[i : i + block], best_known[i : i + block], cosines, j)
                _keep_better(claim[j : j + block], claimant[j : j + block], cosines.T, i)
    mutual = claimant[best_known] == torch.arange(n, device=known.device)
    return Matches(score, best_known, mutual)


def _keep_better(score: Tensor, index: Tensor, cosines: Tensor, offset: int) -> None:
    """Replace `score` and `index` in place where the best of a row of `cosines` is better."""
    best, position = cosines.max(dim=1)
    better = best > score
    score[better], index[better] = best[better], position[better] + offset
