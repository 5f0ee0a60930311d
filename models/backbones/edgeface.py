"""EdgeFace: a small network for phones, convolutions and attention among channels, with linear layers of low rank.

George et al., EdgeFace: Efficient Face Recognition Model for Edge Devices (arXiv:2307.01838), on Maaz et al., EdgeNeXt
(arXiv:2206.10589), with the attention of El-Nouby et al., XCiT (arXiv:2106.09681). Names, sizes and parameter names are
those of the published checkpoints (otroshi/edgeface), which therefore load as they are.
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, height_and_width
from models.backbones.stochastic_depth import DropPath, rising

_EPS = 1e-6
_KERNELS = (3, 5, 7, 9)
_SPLITS = (2, 2, 3, 4)
_LAYER_SCALE = 1e-6
_FREQUENCIES = 32
_SMALLEST = 32


class LowRank(nn.Module):
    """A linear layer whose matrix is the product of two of rank `rank`."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(inputs, rank, bias=False)
        self.linear2 = nn.Linear(rank, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(self.linear1(x))


def _linear(inputs: int, outputs: int, gamma: float | None) -> nn.Module:
    """A linear layer, of rank `gamma` x the smaller of its sizes where `gamma` is given."""
    if gamma is None:
        layer = nn.Linear(inputs, outputs)
        _initialise(layer)
        return layer
    return LowRank(inputs, outputs, max(2, int(min(inputs, outputs) * gamma)))  # as published, not initialised anew


def _convolution(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    padding = kernel // 2 if stride == 1 else 0
    layer = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups)
    _initialise(layer)
    return layer


def _initialise(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.04, b=0.04)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class MLP(nn.Module):
    """Two layers over the last dimension."""

    def __init__(self, width: int, gamma: float | None) -> None:
        super().__init__()
        self.fc1 = _linear(width, 4 * width, gamma)
        self.fc2 = _linear(4 * width, width, gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ConvolutionBlock(nn.Module):
    """[B, C, H, W] plus an MLP of its depthwise convolution."""

    recomputable = True

    def __init__(self, width: int, kernel: int, gamma: float | None, drop_path: float) -> None:
        super().__init__()
        self.conv_dw = _convolution(width, width, kernel, groups=width)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = MLP(width, gamma)
        self.gamma = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        y = self.gamma * self.mlp(self.norm(self.conv_dw(x).permute(0, 2, 3, 1)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class PositionalEncoding(nn.Module):
    """Sines and cosines of row and column, projected: [1, width, H, W]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_projection = _convolution(2 * _FREQUENCIES, width, 1)

    def forward(self, height: int, width: int) -> Tensor:
        device = self.token_projection.weight.device
        order = torch.arange(_FREQUENCIES, dtype=torch.float32, device=device)
        waves = 10000 ** (2 * torch.div(order, 2, rounding_mode="floor") / _FREQUENCIES)

        def encode(count: int) -> Tensor:
            """[count, frequencies]: sine and cosine in turn."""
            places = torch.arange(1, count + 1, dtype=torch.float32, device=device) / (count + 1e-6) * 2 * math.pi
            angles = places[:, None] / waves
            return torch.stack((angles[:, 0::2].sin(), angles[:, 1::2].cos()), dim=2).flatten(1)

        rows = encode(height)[:, None].expand(height, width, -1)
        columns = encode(width)[None].expand(height, width, -1)
        encoding = torch.cat((rows, columns), dim=2).permute(2, 0, 1)[None]
        # To its device as well: traced, that of `arange` is a constant, where the network is when it is traced.
        return self.token_projection(encoding.type_as(self.token_projection.weight))


class ChannelAttention(nn.Module):
    """Attention among the channels of a head, by their cosine over all tokens; [B, tokens, width]."""

    def __init__(self, width: int, heads: int, gamma: float | None) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = _linear(width, 3 * width, gamma)
        self.proj = _linear(width, width, gamma)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 4, 1).unbind(0)
        cosines = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        weights = (cosines * self.temperature).softmax(dim=-1)
        return self.proj((weights @ v).permute(0, 3, 1, 2).reshape(batch, tokens, width))


class SplitAttentionBlock(nn.Module):
    """[B, C, H, W] plus: depthwise convolutions of its parts, each of which also sees the one before, attention among
    the channels, and an MLP."""

    recomputable = True

    def __init__(
        self, width: int, splits: int, heads: int, positions: bool, gamma: float | None, drop_path: float
    ) -> None:
        super().__init__()
        part = math.ceil(width / splits)
        self.convs = nn.ModuleList(_convolution(part, part, 3, groups=part) for _ in range(splits - 1))
        self.pos_embd = PositionalEncoding(width) if positions else None
        self.norm_xca = nn.LayerNorm(width, eps=_EPS)
        self.gamma_xca = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.xca = ChannelAttention(width, heads, gamma)
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.mlp = MLP(width, gamma)
        self.gamma = nn.Parameter(torch.full((width,), _LAYER_SCALE))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        parts = x.chunk(len(self.convs) + 1, dim=1)
        seen: list[Tensor] = []
        for convolution, part in zip(self.convs, parts[:-1], strict=True):
            seen.append(convolution(part + seen[-1] if seen else part))
        y = torch.cat([*seen, parts[-1]], dim=1)
        if self.pos_embd is not None:
            y = y + self.pos_embd(height, width)
        y = y.permute(0, 2, 3, 1).reshape(batch, height * width, channels)
        y = y + self.drop_path(self.gamma_xca * self.xca(self.norm_xca(y)))
        y = self.gamma * self.mlp(self.norm(y))
        return x + self.drop_path(y.view(batch, height, width, channels).permute(0, 3, 1, 2))


class Stage(nn.Module):
    """Blocks at half the size, the last one with attention. The first stage keeps the size and has no attention."""

    def __init__(
        self, index: int, inputs: int, width: int, heads: int, gamma: float | None, drop_paths: list[float]
    ) -> None:
        super().__init__()
        self.downsample: nn.Module = nn.Identity()
        if index:
            self.downsample = nn.Sequential(ChannelNorm(inputs, eps=_EPS), _convolution(inputs, width, 2, stride=2))
        blocks: list[nn.Module] = [
            ConvolutionBlock(width, _KERNELS[index], gamma, drop_path)
            for drop_path in (drop_paths[:-1] if index else drop_paths)
        ]
        if index:
            blocks.append(SplitAttentionBlock(width, _SPLITS[index], heads, index == 1, gamma, drop_paths[-1]))
        self.blocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.downsample(x))


class Head(nn.Module):
    """float32 [B, C, H, W] to [B, embedding_size]: the mean over places, normalised, through a linear layer."""

    def __init__(self, width: int, embedding_size: int, gamma: float | None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=_EPS)
        self.fc = nn.Linear(width, embedding_size) if gamma is None else _linear(width, embedding_size, gamma)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(x.mean((2, 3))))


class EdgeFace(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    Sizes from 32 pixels up; rows and columns that strides leave over are not seen. `widths` and `depths` of the four
    stages; `gamma`: rank of the linear layers relative to full, None for full ones.
    """

    def __init__(
        self,
        widths: tuple[int, int, int, int],
        depths: tuple[int, int, int, int],
        heads: int,
        gamma: float | None,
        embedding_size: int = 512,
        image_size: ImageSize = 112,
        *,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        height, columns = height_and_width(image_size)
        if min(height, columns) < _SMALLEST:
            raise ValueError(f"EdgeFace needs images of {_SMALLEST} pixels or more, got {height}x{columns}")
        probabilities = rising(drop_path, sum(depths))
        stages: list[nn.Module] = []
        for index, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            before = sum(depths[:index])
            inputs = widths[max(index - 1, 0)]
            stages.append(Stage(index, inputs, width, heads, gamma, probabilities[before : before + depth]))
        stem = nn.Sequential(_convolution(3, widths[0], 4, stride=4), ChannelNorm(widths[0], eps=_EPS))
        self.model = nn.ModuleDict(
            {"stem": stem, "stages": nn.Sequential(*stages), "head": Head(widths[-1], embedding_size, gamma)}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.model["stages"](self.model["stem"](x))
        with full_precision_of(x):
            return self.model["head"](x.float())


NETWORKS = {
    "edgeface_xxs": partial(EdgeFace, (24, 48, 88, 168), (2, 2, 6, 2), 4, None),
    "edgeface_xs_gamma_06": partial(EdgeFace, (32, 64, 100, 192), (3, 3, 9, 3), 4, 0.6),
    "edgeface_s_gamma_05": partial(EdgeFace, (48, 96, 160, 304), (3, 3, 9, 3), 8, 0.5),
    "edgeface_base": partial(EdgeFace, (80, 160, 288, 584), (3, 3, 9, 3), 8, None),
}
