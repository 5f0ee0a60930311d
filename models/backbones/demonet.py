"""A small embedding net that learns the demo set within minutes on a CPU."""

import torch
from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, grid


def _convolve(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    # ReLU, not PReLU, whose backward pass takes several times as long on a CPU.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = _convolve(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class DemoNet(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    34 M multiply-adds at 112x112. The head weighs every place of the last feature map by itself, as ArcFace nets do:
    in an aligned face the place of a feature says what it is. Sizes must be multiples of 16.
    """

    def __init__(self, embedding_size: int = 128, image_size: ImageSize = 112) -> None:
        super().__init__()
        rows, columns = grid(image_size, 16, "DemoNet")
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
            nn.Linear(32 * rows * columns, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x.contiguous(memory_format=torch.channels_last))  # a third faster on a CPU
        with full_precision_of(x):
            return self.head(x.float())


NETWORKS = {"demo": DemoNet}
