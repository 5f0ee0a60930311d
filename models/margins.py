"""Margins: what a loss does to the cosine between an embedding and its own class centre.

Only target cosines pass through here ([B], not [B, classes]). Each margin is written out, so that autograd gives the
exact gradient of the formula.
"""

import math
from typing import Protocol

import torch
from torch import Tensor


class Margin(Protocol):
    """Target cosines [B] in [-1, 1] to what takes their place among the logits, before the scale."""

    def __call__(self, cosine: Tensor) -> Tensor: ...


class ArcFace:
    """cos(t + m), t the angle to the class centre, m in radians (0.5 as published).

    Deng et al., arXiv:1801.07698. Where t + m passes pi the cosine would rise again; -2 - cos(t + m) continues it,
    equal at t + m = pi and falling on, so that a worse angle never earns a better logit.
    """

    def __init__(self, margin: float = 0.5) -> None:
        self.cos_m, self.sin_m = math.cos(margin), math.sin(margin)
        self.turn = math.cos(math.pi - margin)  # the cosine at which t + m = pi

    def __call__(self, cosine: Tensor) -> Tensor:
        # (1 - c)(1 + c) keeps its digits near +-1. The floor bounds the slope sin(t + m) / sin t, infinite at t = 0.
        sine = ((1 - cosine) * (1 + cosine)).clamp_min(1e-12).sqrt()
        shifted = cosine * self.cos_m - sine * self.sin_m
        return torch.where(cosine >= self.turn, shifted, -2 - shifted)


class CosFace:
    """cos t - m (m = 0.4 in insightface's recipes). Wang et al., arXiv:1801.09414."""

    def __init__(self, margin: float = 0.4) -> None:
        self.margin = margin

    def __call__(self, cosine: Tensor) -> Tensor:
        return cosine - self.margin


class NoMargin:
    """cos t: softmax over cosines, known as NormFace. Wang et al., arXiv:1704.06369."""

    def __init__(self, margin: float = 0.0) -> None:
        del margin  # one signature for all

    def __call__(self, cosine: Tensor) -> Tensor:
        return cosine


_MARGINS: dict[str, type[ArcFace | CosFace | NoMargin]] = {"arcface": ArcFace, "cosface": CosFace, "softmax": NoMargin}


def create_margin(name: str, margin: float) -> Margin:
    """The margin called `name` in the config (`loss.name`)."""
    return _MARGINS[name](margin)
