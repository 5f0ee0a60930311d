"""Templates: one vector for several images and videos of a person, as IJB-B and IJB-C ask for.

A template is the sum over its media (a photo, or a video) of the mean feature of the media's images, scaled to unit
length. That is a weighted sum of the images' features, worked out for all templates at once: time is linear in images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COLUMNS = 64


def image_features(features: NDArray[np.floating], scores: NDArray[np.floating]) -> NDArray[np.float32]:
    """What is summed of each image, float32 [N, D]: its feature times `scores` [N], the detector's confidence.

    Features are as long as the network makes them, as in published IJB numbers: long ones count for more.
    """
    return np.asarray(features, np.float32) * np.asarray(scores, np.float32)[:, None]


@dataclass(frozen=True, eq=False)
class Templates:
    """ids: int64 [T], ascending. vectors: float32 [T, D], unit rows."""

    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]

    def rows(self, ids: NDArray[np.integer]) -> NDArray[np.int64]:
        """The row of each id. Raises ValueError for one that is no template's."""
        rows = np.searchsorted(self.ids, ids).clip(max=len(self.ids) - 1)
        unknown = self.ids[rows] != ids
        if unknown.any():
            raise ValueError(f"template {np.asarray(ids)[unknown][0]} has no images")
        return rows


def pool_templates(
    features: NDArray[np.floating], templates: NDArray[np.integer], media: NDArray[np.integer]
) -> Templates:
    """Features of images to templates, summed in float64.

    features: [N, D]; templates, media: integers [N], where each image belongs. A media's number may come again in
    another template. Raises ValueError for a template whose sum has no direction.
    """
    ids, rows = np.unique(templates, return_inverse=True)
    media_numbers = np.unique(media, return_inverse=True)[1]
    key = rows * (int(media_numbers.max()) + 1) + media_numbers
    _, group, sizes = np.unique(key, return_inverse=True, return_counts=True)
    order = np.argsort(rows, kind="stable")
    weights = 1.0 / sizes[group][order, None]
    starts = np.flatnonzero(np.diff(rows[order], prepend=-1))
    sums = np.empty((len(ids), features.shape[1]))
    for start in range(0, features.shape[1], _COLUMNS):
        part = slice(start, start + _COLUMNS)
        sums[:, part] = np.add.reduceat(weights * features[order, part], starts)
    norms = np.linalg.norm(sums, axis=1, keepdims=True)
    bad = ~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0)
    if bad.any():
        raise ValueError(f"template {ids[bad.argmax()]} has no direction ({int(bad.sum())} such templates)")
    return Templates(ids.astype(np.int64), (sums / norms).astype(np.float32))
