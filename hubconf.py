"""Entry points for torch.hub: models of this project without installing it.

    import torch
    embedder = torch.hub.load("CHECKOUT", "embedder", "runs/NAME", source="local")
    network = torch.hub.load("CHECKOUT", "r50", weights="backbone.pth", source="local")

`embedder` turns uint8 faces into unit vectors; the others are the networks by their names, `torch.nn.Module`s with
random weights unless `weights` names a file.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

_ROOT = Path(__file__).resolve().parent
for _package in ("data", "models", "utils"):
    # The packages here have everyday names: another of the same name, imported before, would be taken for ours.
    _loaded = getattr(sys.modules.get(_package), "__file__", None)
    if _package in sys.modules and (_loaded is None or _ROOT not in Path(_loaded).resolve().parents):
        raise ImportError(
            f"a package called {_package!r} is loaded already, from {_loaded}, and hides that of {_ROOT}: "
            "load this hub model in a program that has none of that name, or export it with --format torchscript"
        )

from models.backbones import NETWORKS, create_network  # noqa: E402
from models.embedders import load_embedder as _load_embedder  # noqa: E402
from models.weights import create_with_weights as _create_with_weights  # noqa: E402

#: Packages that torch.hub looks for first.
dependencies = ["torch", "numpy", "safetensors", "tqdm"]


def embedder(weights: str | Path, device: str = "auto", **options: Any) -> Any:
    """The model at `weights`: a run folder, a folder of `utils.export --format hub`, or a file of any kind that loads.

    `.embed(images)` takes uint8 [N, size, size, 3] RGB and gives float32 unit vectors [N, D]. `options` are those of
    models.load_embedder.
    """
    return _load_embedder(weights, device, **options)


def _entry(name: str) -> Callable[..., nn.Module]:
    def create(
        weights: str | Path = "", embedding_size: int = 0, image_size: int = 0, colour: str = "auto", **options: Any
    ) -> nn.Module:
        if weights:
            return _create_with_weights(name, weights, embedding_size, image_size, colour, **options).eval()
        return create_network(name, embedding_size or 512, image_size or 112, **options).eval()

    create.__name__ = create.__qualname__ = name
    create.__doc__ = (
        f"The network {name}, in eval mode: float32 [B, 3, image_size, image_size], RGB in [-1, 1], to "
        "[B, embedding_size].\n\n`weights`: a run folder or a file, which says both sizes; empty: random ones, of 512 "
        "and 112. `colour`: of weights that do not say it, rgb or bgr. `options`: see create_network."
    )
    return create


globals().update({_name: _entry(_name) for _name in NETWORKS})
