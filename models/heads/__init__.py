"""Heads: class centres and the margin softmax over them, by the engine that computes it."""

from typing import Literal, get_args

import torch

from models.heads.blockwise import BlockwiseHead
from models.heads.dense import DenseHead
from models.heads.interface import Head, HeadOutput
from models.heads.row_optimizers import RowAdamW, RowOptimizer, RowSGD
from models.losses import MarginLoss
from utils.ranks import Ranks

__all__ = ["BlockwiseHead", "DenseHead", "Head", "HeadOutput", "RowAdamW", "RowSGD", "create_head"]

Engine = Literal["auto", "dense", "blockwise"]

#: Products [B, block] of a block: about what stays in a CPU's cache, and what keeps a GPU busy. Floats.
_PRODUCTS = {"cpu": 2**19, "cuda": 2**25}


def automatic_block(faces: int, device: torch.device) -> int:
    """Classes to compute at a time for a batch of `faces`, all ranks' together, on `device`."""
    return max(256, _PRODUCTS.get(device.type, _PRODUCTS["cpu"]) // faces)


def create_head(
    loss: MarginLoss,
    classes: int,
    embedding_size: int,
    optimizer: RowOptimizer,
    batch_size: int,
    *,
    device: torch.device,
    engine: Engine = "auto",
    block: int = 0,
    sub_centers: int = 1,
    sample_rate: float = 1.0,
    seed: int = 0,
    ranks: Ranks | None = None,
    fused: bool = True,
    matmul: torch.dtype | None = None,
    compiled: bool = False,
    centres: torch.Tensor | None = None,
) -> Head:
    """The head that the config asks for (`loss.engine` and its kin; see BlockwiseHead for the rest), on `device`.

    `dense` keeps the logits of all classes of a rank in memory; on several ranks, or with sampling, it is a blockwise
    head with a single block. `auto` is blockwise on CUDA, where that is faster, and where one block is not enough.
    `block` 0 is `automatic_block`. `compiled`: what is computed of a block is compiled for `device`. `centres`:
    float32 [classes held * sub_centers, embedding_size], those to start from; None: as `seed` draws them. Raises
    ValueError for an engine that there is not, another range or shape.
    """
    if engine not in get_args(Engine):
        raise ValueError(f"engine: must be one of {', '.join(get_args(Engine))}, got {engine!r}")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate: must be above 0 and at most 1, got {sample_rate}")
    ranks = ranks or Ranks()
    block = block or automatic_block(batch_size * ranks.size, device)
    if engine == "dense" or (engine == "auto" and classes <= block and device.type != "cuda"):
        if ranks.size == 1 and sample_rate == 1:
            return DenseHead(loss, classes, embedding_size, optimizer, sub_centers, seed, centres).to(device)
        block = classes
    head = BlockwiseHead(
        loss,
        classes,
        embedding_size,
        optimizer,
        batch_size,
        block=block,
        sub_centers=sub_centers,
        sample_rate=sample_rate,
        seed=seed,
        ranks=ranks,
        fused=fused,
        matmul=matmul,
        centres=centres,
    ).to(device)
    if compiled:
        head.compile_blocks()
    return head
