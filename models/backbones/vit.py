"""Vision transformers as insightface trains them: patches of 9x9, no class token, all tokens seen by the head.

Dosovitskiy et al., An Image is Worth 16x16 Words (arXiv:2010.11929); masks after He et al., Masked Autoencoders
(arXiv:2111.06377). Sizes, ReLU6, the masking of patches and the initialisation are those of
arcface_torch/backbones/vit.py; parameter names too, so its checkpoints load as they are.

Differences: `mask_ratio` is obeyed (there, any ratio above 0 masks a tenth). Attention is the fused kernel, which takes
half precision as it comes and sums in float32, where the original converts to float32 first. As there, the stream of
tokens, the norms and the head are float32.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.backbones.precision import full_precision_of
from models.backbones.sizes import ImageSize, height_and_width
from models.backbones.stochastic_depth import DropPath, rising

PATCH = 9
_HEADS = 8
_EPS = 2e-5  # of the head's norms


class Attention(nn.Module):
    """Self-attention with eight heads: [B, tokens, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, _HEADS, width // _HEADS).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, width))


class MLP(nn.Module):
    """Two layers over each token: [B, tokens, width]."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu6(self.fc1(x)))


class Block(nn.Module):
    """float32 [B, tokens, width] plus attention, plus an MLP."""

    recomputable = True

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLP(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x))).float()
        return x + self.drop_path(self.mlp(self.norm2(x))).float()


class PatchEmbedding(nn.Module):
    """[B, 3, H, W] to [B, tokens, width], row by row."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, PATCH, PATCH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """Faces to embeddings: float [B, 3, height, width], RGB in [-1, 1], to [B, embedding_size].

    Sizes from 9 pixels up; what is left over beside whole patches is not seen (112: 108 pixels are). `mask_ratio`: the
    part of the patches that training leaves out, at random for each face; the head sees a learnt token in their place.
    `drop_path`: the probability that the last block's branches are left out in training, rising evenly from 0.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        embedding_size: int = 512,
        image_size: ImageSize = 112,
        *,
        mask_ratio: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        height, columns = height_and_width(image_size)
        if min(height, columns) < PATCH:
            raise ValueError(f"a vision transformer needs images of {PATCH} pixels or more, got {height}x{columns}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"model.mask_ratio: must be from 0 to below 1, got {mask_ratio}")
        tokens = (height // PATCH) * (columns // PATCH)
        self.kept = max(int(tokens * (1 - mask_ratio)), 1) if mask_ratio else tokens
        self.patch_embed = PatchEmbedding(width)
        self.pos_embed = nn.Parameter(torch.empty(1, tokens, width))
        self.blocks = nn.ModuleList(Block(width, probability) for probability in rising(drop_path, depth))
        self.norm = nn.LayerNorm(width)
        self.feature = nn.Sequential(
            nn.Linear(width * tokens, width, bias=False),
            nn.BatchNorm1d(width, eps=_EPS),
            nn.Linear(width, embedding_size, bias=False),
            nn.BatchNorm1d(embedding_size, eps=_EPS),
        )
        # Checkpoints hold the token even of networks that never used it.
        self.mask_token = nn.Parameter(torch.empty(1, 1, width), requires_grad=self.kept < tokens)
        nn.init.normal_(self.mask_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x).float() + self.pos_embed
        tokens = x.shape[1]
        order = None
        if self.training and self.kept < tokens:
            order = torch.rand(x.shape[:2], device=x.device).argsort(1)
            x = _take(x, order[:, : self.kept])
        for block in self.blocks:
            x = block(x)
        with full_precision_of(x):
            x = self.norm(x.float())
            if order is not None:
                masked = self.mask_token.expand(x.shape[0], tokens - self.kept, -1)
                x = _take(torch.cat([x, masked], 1), order.argsort(1))
            return self.feature(x.flatten(1))


def _take(x: Tensor, places: Tensor) -> Tensor:
    """[B, N, D] at `places` [B, M] to [B, M, D]."""
    return x.gather(1, places.unsqueeze(2).expand(-1, -1, x.shape[2]))


NETWORKS = {
    "vit_t": partial(VisionTransformer, 256, 12),
    "vit_s": partial(VisionTransformer, 512, 12),
    "vit_b": partial(VisionTransformer, 512, 24),
    "vit_l": partial(VisionTransformer, 768, 24),
    "vit_h": partial(VisionTransformer, 1024, 48, mask_ratio=0.0),
    # As published for WebFace42M.
    "vit_t_dp005_mask0": partial(VisionTransformer, 256, 12, mask_ratio=0.0, drop_path=0.05),
    "vit_s_dp005_mask_0": partial(VisionTransformer, 512, 12, mask_ratio=0.0, drop_path=0.05),
    "vit_b_dp005_mask_005": partial(VisionTransformer, 512, 24, mask_ratio=0.05, drop_path=0.05),
    "vit_l_dp005_mask_005": partial(VisionTransformer, 768, 24, mask_ratio=0.05, drop_path=0.05),
}
