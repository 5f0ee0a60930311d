"""MobileFaceNet as its paper has it, and two published ports that differ at the ends.

Chen et al., MobileFaceNets (arXiv:1804.07573), table 1. One graph, three names:

- `mobilefacenet`: the paper's, "less than 1 million parameters" without slopes; embeddings of 128 numbers.
- `mobilefacenet_y1`: insightface's mxnet symbol (fmobilefacenet, "y1"): a bias before the last norm, whose scale is
  fixed at 1, and mxnet's epsilons.
- `mobilefacenet_xiaoccer`: Xiaoccer/MobileFaceNet_Pytorch: sees the middle 6/7 of the columns, 96 of 112.

The ports were trained on (rgb - 127.5) / 128; they scale their input themselves. Parameter names are Xiaoccer's.
"""

from collections import OrderedDict
from functools import partial

from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, grid, height_and_width

#: Expansion, outputs, how many units, stride of the first.
_UNITS = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))


def _block(
    inputs: int,
    outputs: int,
    kernel: int | tuple[int, int],
    stride: int = 1,
    padding: int = 0,
    *,
    depthwise: bool = False,
    linear: bool = False,
    bias: bool = False,
    eps: float,
) -> nn.Sequential:
    groups = inputs if depthwise else 1
    layers: list[tuple[str, nn.Module]] = [
        ("conv", nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=bias)),
        ("bn", nn.BatchNorm2d(outputs, eps=eps)),
    ]
    if not linear:
        layers.append(("prelu", nn.PReLU(outputs)))
    return nn.Sequential(OrderedDict(layers))


class Bottleneck(nn.Module):
    """Expand by a 1x1, filter each channel by a 3x3, project by a linear 1x1; plus the input where shapes are equal."""

    recomputable = True

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int, eps: float) -> None:
        super().__init__()
        width = inputs * expansion
        self.residual = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, width, 1, bias=False),
            nn.BatchNorm2d(width, eps=eps),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, groups=width, bias=False),
            nn.BatchNorm2d(width, eps=eps),
            nn.PReLU(width),
            nn.Conv2d(width, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, eps=eps),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.residual else self.conv(x)


class OriginalMobileFaceNet(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    Sizes must be multiples of 16. `input_scale` is what the input is multiplied by first. `narrow`: only the middle 6/7
    of the columns of square faces are seen, whose size must be a multiple of 112; faces that are as narrow are taken as
    they are. `last_bias`: a bias before the last norm, which keeps a scale of 1. `last_eps` is that norm's, `eps` the
    others'.
    """

    def __init__(
        self,
        embedding_size: int = 128,
        image_size: ImageSize = 112,
        *,
        input_scale: float = 1.0,
        narrow: bool = False,
        last_bias: bool = False,
        eps: float = 1e-5,
        last_eps: float = 1e-5,
    ) -> None:
        super().__init__()
        height, width = height_and_width(image_size)
        if narrow and height == width:
            if height % 112:
                raise ValueError(f"this MobileFaceNet needs an image size that is a multiple of 112, got {height}")
            width = height * 6 // 7
        size = grid((height, width), 16, "MobileFaceNet")
        self.input_scale, self.columns = input_scale, width if narrow else None
        self.conv1 = _block(3, 64, 3, stride=2, padding=1, eps=eps)
        self.dw_conv1 = _block(64, 64, 3, padding=1, depthwise=True, eps=eps)
        units: list[nn.Module] = []
        inputs = 64
        for expansion, outputs, count, stride in _UNITS:
            for i in range(count):
                units.append(Bottleneck(inputs, outputs, stride if i == 0 else 1, expansion, eps))
                inputs = outputs
        self.blocks = nn.Sequential(*units)
        self.conv2 = _block(inputs, 512, 1, eps=eps)
        self.linear7 = _block(512, 512, size, depthwise=True, linear=True, eps=eps)
        self.linear1 = _block(512, embedding_size, 1, linear=True, bias=last_bias, eps=last_eps)
        if last_bias:
            self.linear1.get_parameter("bn.weight").requires_grad = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                # As in both ports: the inputs of a depthwise convolution are counted as if it were full.
                fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
                nn.init.normal_(module.weight, 0, (2 / fan_out) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.columns is not None:
            first = (x.shape[3] - self.columns) // 2
            x = x[..., first : first + self.columns]
        if self.input_scale != 1:
            x = x * self.input_scale
        x = self.blocks(self.dw_conv1(self.conv1(x)))
        with full_precision_of(x):
            return self.linear1(self.linear7(self.conv2(x.float()))).flatten(1)

    def extra_repr(self) -> str:
        """What decides the numbers and is in no weight: fingerprints are made of it."""
        return f"input_scale={self.input_scale}, columns={self.columns}"


NETWORKS = {
    "mobilefacenet": OriginalMobileFaceNet,
    "mobilefacenet_y1": partial(
        OriginalMobileFaceNet, input_scale=127.5 / 128, last_bias=True, eps=1e-3, last_eps=2e-5
    ),
    "mobilefacenet_xiaoccer": partial(OriginalMobileFaceNet, input_scale=127.5 / 128, narrow=True),
}
