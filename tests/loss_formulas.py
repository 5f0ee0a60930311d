"""The margin losses as plain formulas in float64, a face and a class at a time, and what is compared with them."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.losses import LOSSES, MarginLoss, Targets, create_loss

#: What the papers and the authors' code have.
PUBLISHED: dict[str, dict[str, float]] = {
    "softmax": {},
    "normface": {"scale": 64},
    "sphereface": {"margin": 4, "lambda_base": 1000, "lambda_gamma": 0.12, "lambda_power": 1, "lambda_min": 5},
    "sphereface_r": {"margin": 1.5, "scale": 30},
    "cosface": {"margin": 0.35, "scale": 64},
    "arcface": {"margin": 0.5, "scale": 64},
    "combined": {"m1": 1, "m2": 0.3, "m3": 0.2, "scale": 64},
    "curricularface": {"margin": 0.5, "scale": 64, "rate": 0.01},
    "magface": {
        "scale": 64,
        "norm_low": 10,
        "norm_high": 110,
        "margin_low": 0.45,
        "margin_high": 0.8,
        "penalty_weight": 35,
    },
    "adaface": {"margin": 0.4, "h": 0.333, "scale": 64, "rate": 0.01},
    "elastic_arc": {"margin": 0.5, "std": 0.05, "scale": 64, "plus": False, "seed": 0},
    "elastic_cos": {"margin": 0.35, "std": 0.05, "scale": 64, "plus": False, "seed": 0},
}


#: Losses with options that change what is computed.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    ("sphereface", {"lambda_base": 0, "lambda_min": 0}),
    ("sphereface", {"margin": 2.5, "lambda_base": 3, "lambda_gamma": 0.5, "lambda_power": 2, "lambda_min": 0.01}),
    ("sphereface_r", {"margin": 3.0, "scale": 8.0}),
    ("cosface", {"margin": 0.2, "scale": 8.0}),
    ("arcface", {"margin": 0.1}),
    ("arcface", {"margin": 1.0}),
    ("arcface", {"margin": 1.5, "scale": 16.0}),
    ("combined", {"m1": 0.9, "m2": 0.4, "m3": 0.15}),
    ("combined", {"m1": 3.5, "m2": 0.7, "m3": 0.1, "scale": 4.0}),
    ("curricularface", {"margin": 0.3, "scale": 10.0}),
    ("magface", {"scale": 16.0, "norm_low": 20.0, "norm_high": 60.0, "margin_high": 1.2, "penalty_weight": 3.0}),
    ("adaface", {"margin": 0.6, "h": 1.0, "scale": 12.0}),
    ("elastic_arc", {"std": 0.15, "seed": 7, "plus": True, "scale": 9.0}),
    ("elastic_cos", {"std": 0.15, "seed": 7, "plus": True, "scale": 9.0}),
]


IDS = [f"{name}{'+' if options else ''}{i}" for i, (name, options) in enumerate(CASES)]


every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)


every_loss = pytest.mark.parametrize("name", LOSSES)


STEP = 4


def make(name: str, **options: Any) -> MarginLoss:
    """The loss in float64, its statistics no longer those of the start."""
    loss = create_loss(name, **options).double()
    start = {"t": 0.25, "norm_mean": 30.0, "norm_std": 25.0}
    for key, buffer in loss.named_buffers():
        buffer.fill_(start[key])
    return loss


def falling(x: Tensor) -> Tensor:
    """cos x up to pi, and onwards by mirrored copies, each 2 lower than the last but one."""
    k = 0
    while x > (k + 1) * math.pi:
        k += 1
    return (-1) ** k * torch.cos(x) - 2 * k


def annealed(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    plain = max(o.lambda_min, o.lambda_base * (1 + o.lambda_gamma * (STEP + 1)) ** -o.lambda_power)
    return a * (falling(o.margin * t) + plain * c) / (1 + plain)


def held(a: Tensor, o: SimpleNamespace) -> Tensor:
    return a if o.norm_low < a < o.norm_high else 0 * a + (o.norm_low if a < o.norm_high else o.norm_high)


def by_magnitude(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    share = (held(a, o) - o.norm_low) / (o.norm_high - o.norm_low)
    return o.scale * falling(t + o.margin_low + share * (o.margin_high - o.margin_low))


def by_quality(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    q = min(max(o.h * (a.item() - o.norm_mean) / (o.norm_std + 0.001), -1), 1)
    g_angle, g_add = -o.margin * q, o.margin * q + o.margin
    return o.scale * ((falling(t + g_angle) if t + g_angle > 0 else 1 + 0 * t) - g_add)


#: Logit of the own class of a face, from the product c, the angle t, the embedding's length a and all the options.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, SimpleNamespace], Tensor]] = {
    "softmax": lambda c, t, a, o: a * c,
    "normface": lambda c, t, a, o: o.scale * torch.cos(t),
    "sphereface": annealed,
    "sphereface_r": lambda c, t, a, o: o.scale * torch.cos(o.margin * t if o.margin * t < math.pi else 0 * t + math.pi),
    "cosface": lambda c, t, a, o: o.scale * (torch.cos(t) - o.margin),
    "arcface": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "combined": lambda c, t, a, o: o.scale * (falling(o.m1 * t + o.m2) - o.m3),
    "curricularface": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "magface": by_magnitude,
    "adaface": by_quality,
    "elastic_arc": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "elastic_cos": lambda c, t, a, o: o.scale * (torch.cos(t) - o.margin),
}


def drawn_margins(cosines: list[Tensor], o: SimpleNamespace) -> list[float]:
    """ElasticFace's margins of a batch whose faces all count."""
    margins = np.random.default_rng([o.seed, STEP, 3]).normal(o.margin, o.std, len(cosines)).tolist()
    if o.plus:
        farthest_first = sorted(range(len(cosines)), key=lambda i: cosines[i].item())
        for i, margin in zip(farthest_first, sorted(margins, reverse=True), strict=True):
            margins[i] = margin
    return margins


def reference(
    name: str, options: dict[str, Any], embeddings: Tensor, centres: Tensor, labels: Tensor, state: dict[str, float]
) -> Tensor:
    """The loss, a face and a class at a time. `state`: the statistics as they are used."""
    o = SimpleNamespace(**{"scale": None, "filter_above": 0, **PUBLISHED[name], **options, **state})
    if name != "softmax":
        centres = torch.stack([centre / centre.norm() for centre in centres])
    rows = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    lengths = [embeddings[i].norm() for i in rows]
    products = [[embeddings[i] @ centre / a for centre in centres] for i, a in zip(rows, lengths, strict=True)]
    own = [row[labels[i]] for i, row in zip(rows, products, strict=True)]
    margins = drawn_margins(own, o) if name.startswith("elastic") else [getattr(o, "margin", 0)] * len(rows)
    losses = []
    for i, a, row, c, o.margin in zip(rows, lengths, products, own, margins, strict=True):
        target = FORMULAS[name](c, torch.acos(c), a, o)
        logits = []
        for label, product in enumerate(row):
            hard = name == "curricularface" and product > target / o.scale
            value = product * (o.t + product) if hard else product
            value = 0 * product if 0 < o.filter_above < product else value
            logits.append(target if label == labels[i] else (o.scale or a) * value)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - target)
    loss = torch.stack(losses).mean()
    if name == "magface":
        g = [1 / held(a, o) + held(a, o) / o.norm_high**2 for a in lengths]
        loss = loss + o.penalty_weight * torch.stack(g).mean()
    return loss


def dense_loss(
    loss: MarginLoss, embeddings: Tensor, centres: Tensor, labels: Tensor, slopes: bool = False
) -> tuple[Tensor, Targets]:
    """What a head computes. `slopes`: take the gradient of the other classes from `others` instead of autograd."""
    counted, column = labels >= 0, labels.clamp_min(0)[:, None]
    norm = embeddings.norm(dim=1)
    products = F.normalize(embeddings) @ (F.normalize(centres) if loss.unit_centres else centres).T
    targets = loss.targets(products.gather(1, column)[:, 0], norm, counted, STEP)
    value, slope = loss.others(products, targets.bar)
    if slopes:
        value = value.detach() + (1 if slope is None else slope) * (products - products.detach())
    logits = (targets.scale.reshape(-1, 1) * value).scatter(1, column, targets.logits[:, None])
    mean = torch.where(counted, logits.logsumexp(1) - targets.logits, 0).sum() / counted.sum()
    return mean if targets.penalty is None else mean + targets.penalty, targets


def faces(nearest: float = 0.01, count: int = 14, size: int = 6, classes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, centres and labels (float64): of any angle to the own centre, from `nearest` to pi - `nearest`, of
    lengths from 3 to 130; two labels are -1."""
    torch.manual_seed(3)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, size, dtype=torch.float64)
    own = F.normalize(centres)[labels]
    across = torch.randn(count, size, dtype=torch.float64)
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    angles = torch.linspace(nearest, math.pi - nearest, count, dtype=torch.float64)[:, None]
    lengths = torch.linspace(3, 130, count, dtype=torch.float64)[torch.randperm(count), None]
    labels[torch.tensor([2, 9])] = -1
    return lengths * (angles.cos() * own + angles.sin() * across), centres, labels


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, retain_graph=True)
