"""Angles from cosines, and cosines that go on falling where the angle has passed pi.

For the cosine with the own class only ([B]). All of it is finite, with a finite gradient, at cos = +-1 and a rounding
error beyond.
"""

import math

import torch
from torch import Tensor


def sine(cosine: Tensor) -> Tensor:
    """sin t of an angle t in [0, pi], by its cosine."""
    # (1 - c)(1 + c) keeps its digits near +-1. The floor bounds the slope c / sin t, infinite at both ends.
    return ((1 - cosine) * (1 + cosine)).clamp_min(1e-12).sqrt()


def angle(cosine: Tensor) -> Tensor:
    """t in (0, pi) by its cosine: acos, with all its digits at both ends."""
    return torch.atan2(sine(cosine), cosine)


def add_to_angle(cosine: Tensor, margin: Tensor | float) -> Tensor:
    """cos(t + m) without acos, for |m| < pi, monotone in t.

    Where t + m passes pi the cosine would rise again; -2 - cos(t + m) continues it, equal at t + m = pi and falling on,
    so that a worse angle never earns a better logit. Where m < 0 and t + m < 0 it would fall; it stays at cos 0 = 1.
    """
    cos_m = margin.cos() if isinstance(margin, Tensor) else math.cos(margin)
    sin_m = margin.sin() if isinstance(margin, Tensor) else math.sin(margin)
    shifted = cosine * cos_m - sine(cosine) * sin_m
    past_pi = (cosine < -cos_m) & (margin > 0)
    below_zero = (cosine > cos_m) & (margin < 0)
    return torch.where(past_pi, -2 - shifted, torch.where(below_zero, 1.0, shifted))


def continued_cosine(angle: Tensor) -> Tensor:
    """cos x for x in [0, pi], continued for any x >= 0: (-1)^k cos x - 2k in [k pi, (k + 1) pi], ever falling.

    SphereFace's psi (arXiv:1704.08063, section 3.2).
    """
    k = (angle / math.pi).floor()
    return (1 - 2 * k.remainder(2)) * torch.cos(angle) - 2 * k
