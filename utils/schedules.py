"""Learning rates as arrays indexed by step, so that a resumed run cannot drift from an uninterrupted one."""

import numpy as np


def linear_decay(steps: int, warmup_steps: int, peak: float) -> np.ndarray:
    """float64 [steps]: up in equal parts to `peak` over `warmup_steps`, then down to (almost) 0 at the last step.

    Without warm-up this is insightface's recipe: step i has peak x (1 - i / steps).
    """
    step = np.arange(steps)
    warmup = (step + 1) / max(1, warmup_steps)
    decay = (steps - step) / max(1, steps - warmup_steps)
    return peak * np.where(step < warmup_steps, warmup, decay)
