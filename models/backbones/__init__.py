"""Networks by name. A new one is a file in this folder, with a table `NETWORKS`, and its line in `FILES`."""

import difflib
import inspect
from collections.abc import Callable, Iterable
from importlib import import_module

from torch import nn

from models.backbones.sizes import ImageSize

#: What makes a network: (embedding_size, image_size), and options by keyword, which mean "as published" when left out.
Builder = Callable[..., nn.Module]

#: Files of this folder that hold networks; their names are listed in this order.
FILES = (
    "iresnet",
    "ir",
    "mobilefacenet",
    "mobilefacenet_original",
    "vit",
    "edgeface",
    "demonet",
)
TIMM = "timm:"


def collect(files: Iterable[str]) -> dict[str, Builder]:
    """The tables `NETWORKS` of `files` in one. Raises ValueError for a name that two files give."""
    networks: dict[str, Builder] = {}
    for file in files:
        added: dict[str, Builder] = import_module(f"{__name__}.{file}").NETWORKS
        if twice := networks.keys() & added.keys():
            raise ValueError(f"models/backbones/{file}.py: there is a network {min(twice)!r} already")
        networks |= added
    return networks


#: Name to what makes the network.
NETWORKS: dict[str, Builder] = collect(FILES)


def create_network(name: str, embedding_size: int, image_size: ImageSize, **options: float | None) -> nn.Module:
    """The network called `name`, or `timm:NAME` for any of timm's: float [B, 3, height, width], RGB in [-1, 1], to
    float32 [B, embedding_size], not normalised.

    `options`: `drop_path`, `mask_ratio`, `dropout`, `pretrained`, for networks that know them; None is as published.
    Raises ValueError for a name that there is not, an option that the network does not know, and a size that it cannot
    take.
    """
    builder = _builder(name)
    given = {option: value for option, value in options.items() if value is not None}
    for option in given:
        if option not in inspect.signature(builder).parameters:
            raise ValueError(f"model.{option}: the network {name} has no such option; leave it out")
    return builder(embedding_size, image_size, **given)


def _builder(name: str) -> Builder:
    if name in NETWORKS:
        return NETWORKS[name]
    if name.startswith(TIMM):
        from models.backbones.timm_networks import timm_builder

        return timm_builder(name.removeprefix(TIMM))
    near = difflib.get_close_matches(name, NETWORKS, n=3)
    guess = f" (did you mean {' or '.join(near)}?)" if near else ""
    raise ValueError(
        f"model.network: there is no network {name!r}{guess}; there are {', '.join(NETWORKS)}, and {TIMM}NAME for any "
        "of timm's"
    )
