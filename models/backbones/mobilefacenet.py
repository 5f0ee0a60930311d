"""MobileFaceNet: inverted residuals for faces, in the variant that insightface trains as `mbf`.

Chen et al., MobileFaceNets (arXiv:1804.07573). insightface's is twice as wide, has more units, and embeds by a global
depthwise convolution, a linear layer and a norm. Parameter names are those of its checkpoints, which therefore load
as they are.
"""

import torch
from torch import Tensor, nn


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, padding: int = 0, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False), nn.BatchNorm2d(outputs)
    )


class _Layers(nn.Module):
    """A sequence under the name `layers`, which insightface's parameter names contain at every level."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def _conv_block(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> _Layers:
    return _Layers(*_conv(inputs, outputs, kernel, stride, kernel // 2, groups), nn.PReLU(outputs))


class InvertedResidual(_Layers):
    """Expand to `width` channels by a 1x1, filter each by a 3x3, project by a linear 1x1; plus the input if asked."""

    recomputable = True

    def __init__(self, inputs: int, outputs: int, width: int, stride: int = 1, residual: bool = False) -> None:
        super().__init__(
            _conv_block(inputs, width, 1),
            _conv_block(width, width, 3, stride, groups=width),
            _Layers(*_conv(width, outputs, 1)),
        )
        self.residual = residual

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.residual else self.layers(x)


def _residuals(channels: int, width: int, units: int) -> _Layers:
    return _Layers(*(InvertedResidual(channels, channels, width, residual=True) for _ in range(units)))


class MobileFaceNet(nn.Module):
    """Faces to embeddings: float [B, 3, size, size], RGB in [-1, 1], to [B, embedding_size].

    `image_size` must be a multiple of 16.
    """

    def __init__(self, embedding_size: int = 512, image_size: int = 112) -> None:
        super().__init__()
        if image_size % 16:
            raise ValueError(f"MobileFaceNet needs an image size that is a multiple of 16, got {image_size}")
        self.layers = nn.ModuleList(
            [
                _conv_block(3, 128, 3, stride=2),
                _conv_block(128, 128, 3, groups=64),
                InvertedResidual(128, 128, 128, stride=2),
                _residuals(128, 128, units=4),
                InvertedResidual(128, 256, 256, stride=2),
                _residuals(256, 256, units=6),
                InvertedResidual(256, 256, 512, stride=2),
                _residuals(256, 256, units=2),
            ]
        )
        self.conv_sep = _conv_block(256, 512, 1)
        self.features = _Layers(
            _Layers(*_conv(512, 512, image_size // 16, groups=512)),
            nn.Flatten(),
            nn.Linear(512, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        # As published, half precision ends before the last convolutions.
        with torch.autocast(x.device.type, enabled=False):
            return self.features(self.conv_sep(x.float()))
