"""IResNet, the backbone of ArcFace: pre-activation residual units with PReLU on 112x112 faces.

Deng et al., ArcFace (arXiv:1801.07698), section 3.2; Duta et al., Improved Residual Networks (arXiv:2004.04989).
Parameter names are those of insightface's PyTorch checkpoints (arcface_torch/backbones/iresnet.py), which therefore
load as they are. A depth of 152 it has in mxnet only (symbol/fresnet.py), with these units.
"""

from functools import partial

import torch
from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, grid

# insightface's models were trained with these.
_EPS = 1e-5
_BLOCKS = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    152: (3, 8, 36, 3),
    200: (6, 26, 60, 6),
}


def _conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


class IBasicBlock(nn.Module):
    """norm, conv, norm, PReLU, conv (with the stride), norm, plus the shortcut."""

    recomputable = True

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs, eps=_EPS)
        self.conv1 = _conv3x3(inputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.prelu = nn.PReLU(outputs)
        self.conv2 = _conv3x3(outputs, outputs, stride)
        self.bn3 = nn.BatchNorm2d(outputs, eps=_EPS)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs, eps=_EPS)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        return self.bn3(self.conv2(out)) + shortcut


def _layer(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    """`blocks` units, the first of which halves the size."""
    rest = (IBasicBlock(outputs, outputs, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(IBasicBlock(inputs, outputs, stride=2), *rest)


class IResNet(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    `depth`: 18, 34, 50, 100, 152 or 200. Sizes must be multiples of 16. `dropout`: of what the last linear layer sees.
    """

    def __init__(
        self, depth: int, embedding_size: int = 512, image_size: ImageSize = 112, dropout: float = 0.0
    ) -> None:
        super().__init__()
        rows, columns = grid(image_size, 16, "IResNet")
        self.conv1 = _conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64, eps=_EPS)
        self.prelu = nn.PReLU(64)
        blocks = _BLOCKS[depth]
        self.layer1 = _layer(64, 64, blocks[0])
        self.layer2 = _layer(64, 128, blocks[1])
        self.layer3 = _layer(128, 256, blocks[2])
        self.layer4 = _layer(256, 512, blocks[3])
        self.bn2 = nn.BatchNorm2d(512, eps=_EPS)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(512 * rows * columns, embedding_size)
        self.features = nn.BatchNorm1d(embedding_size, eps=_EPS)
        self.features.weight.requires_grad = False  # its scale is fixed to 1: embeddings are normalised anyway
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = torch.flatten(self.bn2(x), 1)
        with full_precision_of(x):
            return self.features(self.fc(self.dropout(x.float())))


NETWORKS = {f"r{depth}": partial(IResNet, depth) for depth in _BLOCKS}
