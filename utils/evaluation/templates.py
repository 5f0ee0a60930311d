"""Templates: one vector for several images and videos of a person, as IJB-B and IJB-C ask for.

A template is the sum over its media (a photo, or a video) of the mean feature of the media's images, scaled to unit
length. That is a weighted sum of the images' features, worked out for all templates at once: time is linear in images.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_COLUMNS = 64


@dataclass(frozen=True)
class Pooling:
    """What goes into the sums; published IJB numbers have the defaults.

    mirror: the feature of the mirrored image is added. unit_images: features are scaled to unit length before they are
    summed; if not, images whose feature is long count for more. detector_score: features count times the detector's
    confidence in the face.
    """

    mirror: bool = True
    unit_images: bool = False
    detector_score: bool = True

    def describe(self) -> str:
        """The choice in words."""
        return ", ".join(
            (
                "mirrored image added" if self.mirror else "no mirrored image",
                "features scaled to unit length" if self.unit_images else "features as long as they are",
                "times the detector's score" if self.detector_score else "no detector's score",
            )
        )


PUBLISHED = Pooling()


def image_features(
    plain: NDArray[np.floating],
    mirrored: NDArray[np.floating] | None,
    scores: NDArray[np.floating],
    pooling: Pooling = PUBLISHED,
) -> NDArray[np.float32]:
    """What is summed of each image, float32 [N, D].

    plain, mirrored: features of the images and of their mirror images, [N, D], as long as the network makes them;
    mirrored is None where there is none, or `plain` has it added already. scores: [N], the detector's. Raises
    ValueError for a feature that is not finite, or has no direction where it is to be scaled.
    """
    features = np.array(plain, np.float32)
    if len(scores) != len(features):
        raise ValueError(f"{len(features)} features need as many detector scores, not {len(scores)}")
    if pooling.mirror and mirrored is not None:
        if mirrored.shape != features.shape:
            raise ValueError(f"features of mirrored images have the shape {mirrored.shape}, others {features.shape}")
        features += mirrored
    norms = np.sqrt(np.einsum("nd,nd->n", features, features, dtype=np.float64))
    bad = ~np.isfinite(norms) | (pooling.unit_images & (norms == 0))
    if bad.any():
        raise ValueError(f"feature {int(bad.argmax())} is not finite or has zero norm ({int(bad.sum())} such images)")
    weights = np.ones(len(features))
    if pooling.unit_images:
        weights /= norms
    if pooling.detector_score:
        weights *= scores
    features *= weights[:, None].astype(np.float32)
    return features


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
