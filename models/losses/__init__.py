"""Margin losses by name. One class a loss; its docstring has the source, the formula and the published values."""

import inspect
from typing import Any

from models.losses.adaface import AdaFace
from models.losses.arcface import ArcFace
from models.losses.combined import CombinedMargin
from models.losses.cosface import CosFace
from models.losses.curricularface import CurricularFace
from models.losses.elasticface import ElasticArc, ElasticCos
from models.losses.interface import MarginLoss
from models.losses.interface import Targets as Targets
from models.losses.magface import MagFace
from models.losses.softmax import NormFace, Softmax
from models.losses.sphereface import SphereFace, SphereFaceR

LOSSES: dict[str, type[MarginLoss]] = {
    "softmax": Softmax,
    "normface": NormFace,
    "sphereface": SphereFace,
    "sphereface_r": SphereFaceR,
    "cosface": CosFace,
    "arcface": ArcFace,
    "combined": CombinedMargin,
    "curricularface": CurricularFace,
    "magface": MagFace,
    "adaface": AdaFace,
    "elastic_arc": ElasticArc,
    "elastic_cos": ElasticCos,
}


def create_loss(name: str, filter_above: float = 0.0, margin_warmup: int = 0, **options: Any) -> MarginLoss:
    """The loss called `name` (`loss.name`), with `filter_above` and `margin_warmup` (see MarginLoss). Options that it
    does not have are ignored; None means as published.

    Raises ValueError for a name that is not in `LOSSES`.
    """
    if name not in LOSSES:
        raise ValueError(f"loss.name: there is no loss {name!r}; there are {', '.join(LOSSES)}")
    known = inspect.signature(LOSSES[name]).parameters
    loss = LOSSES[name](**{key: value for key, value in options.items() if key in known and value is not None})
    loss.filter_above, loss.margin_warmup = filter_above, margin_warmup
    return loss
