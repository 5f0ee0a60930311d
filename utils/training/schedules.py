"""Learning rates as arrays indexed by step, so that a resumed run cannot drift from an uninterrupted one.

The peak by rule goes through published points; docs/training.md has a table.
"""

import math
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

ScheduleName = Literal["poly", "cosine", "step", "constant", "wsd"]
OptimizerName = Literal["sgd", "adamw", "muon"]


def peak_lr(lr: float, optimizer: OptimizerName, batch_size: int) -> float:
    """`lr`, or if that is 0 the peak for `batch_size` images a step by rule.

    SGD: through the two points that insightface publishes, 0.1 for 1024 images and 0.02 for 128. AdamW: its 0.001,
    times the square root of images / 1024 (Malladi et al., arXiv:2205.10287). Muon: as AdamW, whose lengths of steps it
    has (arXiv:2502.16982). Raises ValueError for another optimizer.
    """
    if optimizer not in get_args(OptimizerName):
        raise ValueError(f"train.optimizer: must be one of {', '.join(get_args(OptimizerName))}, got {optimizer!r}")
    if lr:
        return lr
    if optimizer == "sgd":
        return 0.1 * (batch_size / 1024) ** (math.log(5) / math.log(8))
    return 1e-3 * math.sqrt(batch_size / 1024)


def learning_rates(
    schedule: ScheduleName,
    steps: int,
    steps_per_epoch: int,
    peak: float,
    *,
    warmup_epochs: float = 0.0,
    power: float = 1.0,
    milestones: Sequence[int] = (),
    milestone_factor: float = 0.1,
    decay_epochs: float = 0.0,
    final: float = 0.0,
) -> np.ndarray:
    """float64 [steps]: up in equal parts to `peak` over `warmup_epochs`, then as `schedule` says.

    - poly falls with the steps that remain, to the given `power`. Power 1 without warm-up is insightface's recipe: step
      i has peak x (1 - i / steps).
    - cosine falls along half a cosine (arXiv:1608.03983, without restarts).
    - step multiplies by `milestone_factor` at the start of each of the `milestones`, epochs counted from 0.
    - constant stays.
    - wsd stays, and falls as poly over the last `decay_epochs` (arXiv:2404.06395); 0: over the last fifth of the run.

    poly, cosine and wsd fall to the share `final` of the peak, which a step after the last would have. Whatever the
    schedule, warm-up goes first. Raises ValueError for a schedule that there is not.
    """
    step = np.arange(steps)
    warmup_steps = round(warmup_epochs * steps_per_epoch)
    remaining = (steps - step) / max(1, steps - warmup_steps)
    if schedule == "poly":
        share = final + (1 - final) * remaining**power
    elif schedule == "cosine":
        share = final + (1 - final) * (1 + np.cos(np.pi * (1 - remaining))) / 2
    elif schedule == "step":
        bounds = np.sort(np.array(milestones, np.int64)) * steps_per_epoch
        share = milestone_factor ** np.searchsorted(bounds, step, side="right").astype(np.float64)
    elif schedule == "constant":
        share = np.ones(steps)
    elif schedule == "wsd":
        decay_steps = round(decay_epochs * steps_per_epoch) if decay_epochs else round(steps / 5)
        decay_steps = max(1, min(decay_steps, steps - warmup_steps))
        share = final + (1 - final) * np.minimum(1, (steps - step) / decay_steps) ** power
    else:
        raise ValueError(f"train.schedule: there is no schedule {schedule!r}")
    warmup = (step + 1) / max(1, warmup_steps)
    return peak * np.where(step < warmup_steps, warmup, share)
