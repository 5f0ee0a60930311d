"""How different people score far out: a generalised Pareto tail, fitted to scores some of which are of one person."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# Scores that the tail is fitted to, at most.
_FITTED = 2000
_RESAMPLED = 200


@dataclass(frozen=True)
class Tail:
    """Survival of impostor scores above `start`: `count` of them, generalised Pareto with `shape` and `scale`."""

    start: float
    count: float
    shape: float
    scale: float

    def above(self, score: NDArray[np.float64] | float) -> NDArray[np.float64]:
        """Expected number of impostor scores above `score`, which is not below `start`."""
        excess = np.maximum(np.asarray(score, np.float64) - self.start, 0)
        return self.count * _survival(excess, self.shape, self.scale)


def _survival(excess: NDArray[np.float64], shape: NDArray | float, scale: NDArray | float) -> NDArray[np.float64]:
    """1 - CDF of the generalised Pareto distribution with a shape of 0 or less."""
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = np.maximum(1 + np.asarray(shape) * excess / scale, 0)
        return np.where(np.asarray(shape) == 0, np.exp(-excess / scale), inside ** (-1 / np.asarray(shape)))


def fit_tails(
    scores: NDArray[np.float64],
    maxima: NDArray[np.float64],
    genuine: NDArray[np.float64],
    seed: int,
    resampled: int = _RESAMPLED,
) -> list[Tail]:
    """The tail of impostor scores, and its fits to `resampled` bootstrap samples, by maximum likelihood on a grid.

    The sets hold some people twice, under two names, and their scores are no impostors': the scores above the median
    are taken as a mixture of a generalised Pareto distribution (Pickands 1975; shape -0.3 to 0, thin tails) and of such
    pairs, half of which score as `genuine` do and half evenly up to 1: where labels are wrong, two identities often
    share some images only. The scale is 0.7 to 1.4 times that of the Gumbel distribution whose lower half `maxima` have
    (each the highest score of someone): there are few such pairs in it.
    """
    top = np.sort(scores)[::-1][: min(len(scores) // 2 + 1, _FITTED)]
    start, top = float(top[-1]), top[:-1]
    excess = top - start
    # Gumbel's quantiles: Q(0.5) - Q(0.1) = scale x (ln ln 10 - ln ln 2). Few of the lower half are one person twice.
    lower, middle = np.percentile(maxima, [10, 50])
    width = max(float(middle - lower) / (np.log(np.log(10)) - np.log(np.log(2))), 1e-6)
    shapes = np.array([-0.3, -0.25, -0.2, -0.15, -0.1, -0.05, 0.0])
    scales = width * np.geomspace(0.7, 1.4, 36)
    same = np.array([0, 0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    shape, scale, share = (grid.ravel() for grid in np.meshgrid(shapes, scales, same, indexing="ij"))
    high = genuine[genuine > start]
    span = max(1 - start, float(excess.max(initial=0)), 1e-6)
    twice = np.full(len(top), 1 / span)
    if len(high) >= 50:
        counts, edges = np.histogram(high, bins=20, range=(start, start + span))
        density = (counts + 0.5) / (counts + 0.5).sum() / (edges[1] - edges[0])
        twice = (density[np.clip(np.digitize(top, edges) - 1, 0, 19)] + twice) / 2
    with np.errstate(divide="ignore", invalid="ignore"):
        fine = [
            np.where(s == 0, np.exp(-excess / b), np.maximum(1 + s * excess / b, 0) ** (-1 / (s or 1) - 1)) / b
            for s in shapes
            for b in scales
        ]
    one = np.stack(fine)  # [shapes x scales, scores]
    likelihood = np.log(
        (1 - same)[None, :, None] * one[:, None] + same[None, :, None] * twice + 1e-12, dtype=np.float64
    ).reshape(-1, len(top))
    generator = np.random.default_rng(seed)
    weights = generator.multinomial(len(top), np.full(len(top), 1 / len(top)), size=resampled).T
    weights = np.concatenate([np.ones((len(top), 1)), weights], 1)
    best = (likelihood @ weights).argmax(0)
    return [Tail(start, len(top) * (1 - share[i]), float(shape[i]), float(scale[i])) for i in best]
