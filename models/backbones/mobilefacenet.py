"""MobileFaceNet: inverted residuals for faces, in the variants that insightface trains as `mbf` and `mbf_large`.

Chen et al., MobileFaceNets (arXiv:1804.07573), which mobilefacenet_original.py has. insightface's `mbf` is twice as
wide, `mbf_large` four times and twice as deep; both keep the widths within their units. Parameter names are those of
its checkpoints (arcface_torch/backbones/mobilefacenet.py), which therefore load as they are.
"""

from functools import partial

from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, grid


def _conv(
    inputs: int, outputs: int, kernel: int | tuple[int, int], stride: int = 1, padding: int = 0, groups: int = 1
) -> nn.Sequential:
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
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    `units`: residual ones of the four sizes; `scale`: width, in those of the paper. Sizes must be multiples of 16.
    """

    def __init__(
        self,
        embedding_size: int = 512,
        image_size: ImageSize = 112,
        units: tuple[int, int, int, int] = (1, 4, 6, 2),
        scale: int = 2,
    ) -> None:
        super().__init__()
        size = grid(image_size, 16, "MobileFaceNet")
        narrow, wide = 64 * scale, 128 * scale
        first = _conv_block(narrow, narrow, 3, groups=64) if units[0] == 1 else _residuals(narrow, 128, units[0])
        self.layers = nn.ModuleList(
            [
                _conv_block(3, narrow, 3, stride=2),
                first,
                InvertedResidual(narrow, narrow, 128, stride=2),
                _residuals(narrow, 128, units[1]),
                InvertedResidual(narrow, wide, 256, stride=2),
                _residuals(wide, 256, units[2]),
                InvertedResidual(wide, wide, 512, stride=2),
                _residuals(wide, 256, units[3]),
            ]
        )
        self.conv_sep = _conv_block(wide, 512, 1)
        self.features = _Layers(
            _Layers(*_conv(512, 512, size, groups=512)),
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
        with full_precision_of(x):
            return self.features(self.conv_sep(x.float()))


NETWORKS = {
    "mbf": MobileFaceNet,
    "mbf_large": partial(MobileFaceNet, units=(2, 8, 12, 4), scale=4),
}
