"""Networks by name."""

from collections.abc import Callable
from functools import partial

from torch import nn

from models.backbones.demonet import DemoNet
from models.backbones.iresnet import IResNet
from models.backbones.mobilefacenet import MobileFaceNet

#: Name to a function of (embedding_size, image_size).
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    **{f"r{depth}": partial(IResNet, depth) for depth in (18, 34, 50, 100, 200)},
    "mbf": MobileFaceNet,
    "demo": DemoNet,
}


def create_network(name: str, embedding_size: int, image_size: int) -> nn.Module:
    """The network called `name`, float [B, 3, image_size, image_size], RGB in [-1, 1], to [B, embedding_size].

    Raises ValueError for a name that is not in `NETWORKS`.
    """
    if name not in NETWORKS:
        raise ValueError(f"model.network: there is no network {name!r}; there are {', '.join(NETWORKS)}")
    return NETWORKS[name](embedding_size, image_size)
