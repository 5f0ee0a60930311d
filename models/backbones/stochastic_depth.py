"""Stochastic depth: residual branches that are left out at random in training.

Huang et al., Deep Networks with Stochastic Depth (arXiv:1603.09382), with the survivors scaled up in training.
"""

from torch import Tensor, nn


class DropPath(nn.Module):
    """The branch of each image, [B, ...], is 0 with `probability` in training, else divided by 1 - `probability`."""

    def __init__(self, probability: float) -> None:
        super().__init__()
        if not 0 <= probability < 1:
            raise ValueError(f"a branch is dropped with a probability from 0 to below 1, got {probability}")
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.probability == 0:
            return x
        kept = 1 - self.probability
        return x * (x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(kept) / kept)

    def extra_repr(self) -> str:
        return f"{self.probability:g}"


def rising(highest: float, blocks: int) -> list[float]:
    """Probabilities of `blocks` in a row: from 0 evenly up to `highest`."""
    return [highest * i / max(blocks - 1, 1) for i in range(blocks)]
