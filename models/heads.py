"""Classification heads: class centres, and the margin softmax over the cosines to them."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.margins import Margin


class HeadOutput(NamedTuple):
    """`loss`: mean over the batch, scalar; `correct`: share of faces nearest to their own centre, margin aside."""

    loss: Tensor
    correct: Tensor


class DenseHead(nn.Module):
    """All class centres on one device, all logits in memory.

    `weight`: float32 [classes, embedding_size]; initialised as insightface does, normal with deviation 0.01.
    """

    def __init__(self, classes: int, embedding_size: int, margin: Margin, scale: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, embedding_size).normal_(0, 0.01))
        self.margin = margin
        self.scale = scale

    def forward(self, embeddings: Tensor, labels: Tensor) -> HeadOutput:
        """`embeddings`: [B, embedding_size], any length; `labels`: int64 [B], -1 for faces that do not count."""
        # Cosines decide at the third digit once multiplied by s = 64: float32 throughout.
        with torch.autocast(embeddings.device.type, enabled=False):
            cosine = F.normalize(embeddings.float()) @ F.normalize(self.weight).T
            target = cosine.gather(1, labels.clamp_min(0)[:, None])
            logits = self.scale * cosine.scatter(1, labels.clamp_min(0)[:, None], self.margin(target))
            losses = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
            counted = (labels >= 0).sum().clamp_min(1)
            correct = (cosine.detach().argmax(1) == labels).sum() / counted
            return HeadOutput(losses / counted, correct)
