"""Which of a class's sub-centers holds most of its faces, and how far every face is from that one.

Deng et al., Sub-center ArcFace: Boosting Face Recognition by Large-scale Noisy Web Faces, ECCV 2020: clean faces of a
class gather at one of its centres, the dominant one; faces far from it carry a wrong label.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from utils.devices import full_precision


def own_cosines(embeddings: Tensor, labels: Tensor, centres: Tensor, sub_centers: int, block: int = 4096) -> Tensor:
    """Cosines of every face with the centres of its own class: [N, sub_centers], on the embeddings' device.

    `embeddings`: float [N, D], unit vectors; `labels`: int64 [N], -1 for faces that do not count, whose row is NaN;
    `centres`: of the same dtype, [classes * sub_centers, D], of any length, class after class, on any device.
    Memory beside the result: two floats x block x sub_centers x D.
    """
    of_class = centres.unflatten(0, (-1, sub_centers))
    cosines = embeddings.new_empty(len(labels), sub_centers)
    with full_precision(embeddings.device):
        for start in range(0, len(labels), block):
            part = slice(start, start + block)
            own = of_class[labels[part].clamp_min(0).to(centres.device)].to(embeddings.device)
            cosines[part] = torch.einsum("bd,bkd->bk", embeddings[part], F.normalize(own, dim=2))
    return cosines.masked_fill_((labels < 0).to(cosines.device)[:, None], torch.nan)


def nearest(cosines: Tensor) -> Tensor:
    """The sub-center that each face is nearest to: int64 [N] from [N, sub_centers]; of equally near ones the first."""
    return cosines.argmax(1)


def dominant(cosines: Tensor, labels: Tensor, classes: int) -> Tensor:
    """The sub-center of each class that most of its faces are nearest to: int64 [classes], -1 for one without faces.

    `cosines`: as `own_cosines` gives them, for all faces; `labels`: int64 [N], -1 for faces that do not count. Of equal
    sub-centers it is the first, as in the authors' code. Takes 25 bytes a face, and 8 x sub_centers a class.
    """
    sub_centers, counted = cosines.shape[1], labels >= 0
    cells = labels[counted] * sub_centers + nearest(cosines)[counted]
    faces = torch.bincount(cells, minlength=classes * sub_centers).view(classes, sub_centers)
    return torch.where(faces.any(1), faces.argmax(1), -1)


def angles(cosines: Tensor, labels: Tensor, dominants: Tensor) -> Tensor:
    """The angle of each face with the dominant sub-center of its class: [N], degrees, 0 to 180; NaN for none.

    `cosines` and `labels` as for `dominant`, which gives `dominants`.
    """
    own = cosines.gather(1, dominants[labels.clamp_min(0)].clamp_min(0)[:, None])[:, 0]
    return own.clamp(-1, 1).acos().rad2deg()
