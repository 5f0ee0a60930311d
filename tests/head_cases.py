"""Heads trained on made-up batches: what the tests of the engines compare, alone and on several processes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.heads import BlockwiseHead, DenseHead, Head, RowAdamW, RowSGD
from models.losses import LOSSES, create_loss
from utils.ranks import Ranks

CLASSES, SIZE, BATCH, STEPS = 23, 6, 12, 20
SAMPLED = 6  # faces of the batch that `sample_once` takes: fewer than the classes of a rank
SGD = RowSGD(momentum=0.9, weight_decay=1e-2)
OPTIMIZERS = {"sgd": SGD, "adamw": RowAdamW(weight_decay=0.1)}
LR = {"sgd": 0.05, "adamw": 0.02}
#: Equal up to the order in which float64 numbers were added; 20 steps multiply that.
CLOSE = {"rtol": 1e-8, "atol": 1e-9}


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Embeddings [BATCH, SIZE] of many lengths and their labels, float64, all ranks' of one step.

    One face of each batch does not count; classes 8 to 11, the whole middle of the range, never occur.
    """
    generator = torch.Generator().manual_seed(1000 + step)
    embeddings = torch.randn(BATCH, SIZE, generator=generator, dtype=torch.float64)
    embeddings *= torch.logspace(-1, 2, BATCH, dtype=torch.float64)[:, None]
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels = torch.where((labels >= 8) & (labels < 12), labels - 8, labels)
    labels[step % BATCH] = -1
    return embeddings, labels


def dense(name: str, sub_centers: int = 1, optimizer: str = "sgd") -> DenseHead:
    """The reference head."""
    return DenseHead(create_loss(name), CLASSES, SIZE, OPTIMIZERS[optimizer], sub_centers).double()


def blockwise(name: str, sub_centers: int = 1, optimizer: str = "sgd", **options: Any) -> BlockwiseHead:
    """The head under test, with blocks that do not divide the classes."""
    settings = {"batch_size": BATCH, "block": 5, **options}
    return BlockwiseHead(
        create_loss(name), CLASSES, SIZE, OPTIMIZERS[optimizer], sub_centers=sub_centers, **settings
    ).double()


def train(head: Head, steps: int = STEPS, lr: float = LR["sgd"], faces: slice = slice(None)) -> dict[str, Tensor]:
    """What `steps` steps come to on this process's `faces` of each batch: losses, hits, gradients of the embeddings,
    and all that the head saves."""
    losses, hits, gradients = [], [], []
    for step in range(steps):
        embeddings, labels = (part[faces].to(head.weight.device) for part in batch(step))
        embeddings.requires_grad_()
        head.lr = lr
        output = head(embeddings, labels, step)
        output.loss.backward()
        head.update(step)
        assert embeddings.grad is not None
        losses.append(output.loss.detach())
        hits.append(output.correct)
        gradients.append(embeddings.grad)
    return {"losses": torch.stack(losses), "hits": torch.stack(hits), "gradients": torch.stack(gradients)} | {
        name: value.clone() for name, value in head.state_dict().items()
    }


def train_every_loss(batch_size: int) -> dict[str, dict[str, Tensor]]:
    """On each rank: `train` with every loss, with and without sub-centers and fused updates.

    The last rank has fewer faces than `batch_size`.
    """
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD)
    faces = slice(ranks.rank * batch_size, min((ranks.rank + 1) * batch_size, BATCH))
    results = {}
    for name in LOSSES:
        for sub_centers, fused in ((1, True), (3, False)):
            head = blockwise(name, sub_centers, batch_size=batch_size, ranks=ranks, fused=fused)
            results[f"{name} {sub_centers}"] = train(head, faces=faces)
    return results


def sample_once(sample_rate: float) -> dict[str, Tensor]:
    """On each rank: the classes that it samples, and loss, gradients and state after a step with them."""
    assert dist.group.WORLD is not None
    ranks = Ranks(dist.group.WORLD)
    each = SAMPLED // ranks.size
    faces = slice(ranks.rank * each, (ranks.rank + 1) * each)
    head = blockwise("arcface", batch_size=each, ranks=ranks, sample_rate=sample_rate)
    chosen = head.choose(batch(0)[1][:SAMPLED], step=0)
    assert chosen.classes is not None
    return {"classes": chosen.classes + head.held.start} | train(head, steps=1, faces=faces)
