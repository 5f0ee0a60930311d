"""Faces as small as a test needs them."""

import numpy as np

from data.images import encode_png


def tiny_face(identity: int, shot: int) -> bytes:
    """A 32x32 PNG: a pattern that is the identity's own, under noise that is the shot's."""
    pattern = np.random.default_rng(identity).integers(60, 196, (4, 4, 3)).repeat(8, 0).repeat(8, 1)
    noise = np.random.default_rng([identity, shot]).normal(0, 20, (32, 32, 3))
    return encode_png(np.clip(pattern + noise, 0, 255).astype(np.uint8))
