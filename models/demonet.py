"""A small embedding net that learns the demo set within minutes on a CPU."""

import torch
from torch import nn
from torch.nn import functional as F

HEAD_GRID = 7  # what 112 pixels leave after four halvings


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = _convolve(channels, channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.body(x)


class DemoNet(nn.Module):
    """Faces, float [batch, 3, 112, 112] in [-1, 1], RGB, to embeddings, float [batch, num_features].

    Other square inputs work as well, as long as their side is a multiple of 16. The embeddings are not
    normalised. The head weighs every place of the last feature map by itself, as ArcFace nets do: in an
    aligned face the place of a feature says what it is.
    """

    def __init__(self, num_features: int = 128) -> None:
        super().__init__()
        self.body = nn.Sequential(
            _convolve(3, 16, stride=2),
            _convolve(16, 32, stride=2),
            _Residual(32),
            _convolve(32, 64, stride=2),
            _Residual(64),
            _convolve(64, 128, stride=2),
            _Residual(128),
            nn.Conv2d(128, 32, 1, bias=False),
            nn.BatchNorm2d(32),
        )
        self.head = nn.Sequential(
            nn.Flatten(),
            nn.Linear(32 * HEAD_GRID * HEAD_GRID, num_features, bias=False),
            nn.BatchNorm1d(num_features),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous(memory_format=torch.channels_last)  # a third faster on a CPU
        return self.head(F.adaptive_avg_pool2d(self.body(x), HEAD_GRID))
