"""IR and IR-SE: IResNet in the layout of face.evoLVe, TFace, AdaFace and CVLface, and with squeeze and excitation.

Deng et al., ArcFace (arXiv:1801.07698), section 3.2; Hu et al., Squeeze-and-Excitation Networks (arXiv:1709.01507).
Two layouts go under these names, and checkpoints of one do not load into the other:

- `ir...`: TFace (recognition/torchkit/backbone/model_irse.py), AdaFace (net.py) and CVLface: a norm before the PReLU,
  as IResNet has it; depths 152 and 200 of bottlenecks with 2,048 outputs; a last norm without weights.
- `evolve_ir...`: face.evoLVe (backbone/model_irse.py) and InsightFace_Pytorch of TreB1eN: no norm before the PReLU, no
  bottlenecks; a last norm with weights.

Both differ from `r...` in the first unit: its shortcut is every second pixel, where IResNet has a convolution.
Parameter names are those of the originals. AdaFace divides by the length at the end, which is left out here.
"""

from functools import partial
from typing import Literal

from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, grid

_UNITS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    101: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (3, 24, 36, 3),
}
_BOTTLENECKS = (152, 200)
Layout = Literal["tface", "evolve"]


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class SqueezeExcitation(nn.Module):
    """Channels weighted by 0 to 1, computed from the means of all channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, channels // 16, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.fc2 = nn.Conv2d(channels // 16, channels, 1, bias=False)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.sigmoid(self.fc2(self.relu(self.fc1(self.avg_pool(x)))))


def _branch(inputs: int, outputs: int, stride: int, layout: Layout, bottleneck: bool) -> list[nn.Module]:
    """The residual branch without its squeeze and excitation."""
    if bottleneck:
        inner = outputs // 4
        return [
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, inner, 1, bias=False),
            nn.BatchNorm2d(inner),
            nn.PReLU(inner),
            _conv3x3(inner, inner),
            nn.BatchNorm2d(inner),
            nn.PReLU(inner),
            nn.Conv2d(inner, outputs, 1, stride, bias=False),
            nn.BatchNorm2d(outputs),
        ]
    between = [nn.BatchNorm2d(outputs), nn.PReLU(outputs)] if layout == "tface" else [nn.PReLU(outputs)]
    return [
        nn.BatchNorm2d(inputs),
        _conv3x3(inputs, outputs),
        *between,
        _conv3x3(outputs, outputs, stride),
        nn.BatchNorm2d(outputs),
    ]


class ResidualUnit(nn.Module):
    """The shortcut, every `stride`-th pixel or a 1x1 convolution of them, plus the branch."""

    recomputable = True

    def __init__(
        self, inputs: int, outputs: int, stride: int, layout: Layout, bottleneck: bool, excitation: bool
    ) -> None:
        super().__init__()
        if inputs != outputs:
            self.shortcut_layer: nn.Module = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        else:
            self.shortcut_layer = nn.MaxPool2d(1, stride) if stride > 1 else nn.Identity()
        self.res_layer = nn.Sequential(*_branch(inputs, outputs, stride, layout, bottleneck))
        if excitation:
            name = "se_block" if layout == "tface" else str(len(self.res_layer))
            self.res_layer.add_module(name, SqueezeExcitation(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class IRNet(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    `depth`: 18, 34, 50, 101, 152 or 200. Sizes must be multiples of 16. `dropout`: of what the last linear layer sees;
    0.4 in TFace and AdaFace, 0.5 in face.evoLVe.
    """

    def __init__(
        self,
        depth: int,
        embedding_size: int = 512,
        image_size: ImageSize = 112,
        *,
        dropout: float | None = None,
        layout: Layout = "tface",
        excitation: bool = False,
    ) -> None:
        super().__init__()
        rows, columns = grid(image_size, 16, "IR")
        bottleneck = layout == "tface" and depth in _BOTTLENECKS
        widths = [width * (4 if bottleneck else 1) for width in (64, 128, 256, 512)]
        self.input_layer = nn.Sequential(_conv3x3(3, 64), nn.BatchNorm2d(64), nn.PReLU(64))
        units: list[nn.Module] = []
        inputs = 64
        for width, count in zip(widths, _UNITS[depth], strict=True):
            for i in range(count):
                units.append(ResidualUnit(inputs, width, 2 if i == 0 else 1, layout, bottleneck, excitation))
                inputs = width
        self.body = nn.Sequential(*units)
        self.output_layer = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Dropout((0.4 if layout == "tface" else 0.5) if dropout is None else dropout),
            nn.Flatten(),
            nn.Linear(inputs * rows * columns, embedding_size),
            nn.BatchNorm1d(embedding_size, affine=layout == "evolve"),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                if layout == "tface":
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                else:
                    nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.input_layer(x))
        with full_precision_of(x):
            return self.output_layer(x.float())


NETWORKS = {
    **{f"ir{depth}": partial(IRNet, depth) for depth in _UNITS},
    **{f"ir_se{depth}": partial(IRNet, depth, excitation=True) for depth in (50, 101, 152, 200)},
    **{f"evolve_ir{depth}": partial(IRNet, depth, layout="evolve") for depth in (50, 101, 152)},
    **{f"evolve_ir_se{depth}": partial(IRNet, depth, layout="evolve", excitation=True) for depth in (50, 101, 152)},
}
