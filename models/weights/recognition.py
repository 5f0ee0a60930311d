"""Recognises the network that weights belong to by their names and shapes."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from models.backbones import create_network
from models.weights.reading import COUNTER, strip_prefixes
from utils.checkpoints import TOO_LARGE
from utils.texts import listed

Shapes = dict[str, tuple[int, ...]]

# Names in a message about weights that do not fit.
SHOWN = 6
_LARGEST = 1024  # height and width of the faces


@dataclass(frozen=True)
class Recognised:
    """A network's name and what it is created with."""

    network: str
    embedding_size: int
    image_size: int

    def __str__(self) -> str:
        size = "" if self.image_size == 112 else f", for faces of {self.image_size}x{self.image_size}"
        return f"{self.network}, {self.embedding_size}-d{size}"


@lru_cache(maxsize=256)
def expected_shapes(network: str, embedding_size: int, image_size: int) -> Shapes:
    """Names, without wrappers' prefixes, and shapes of a network's weights. Raises ValueError where it cannot be."""
    try:
        with torch.device("meta"):  # nothing is allocated
            module = create_network(network, embedding_size, image_size)
    except (NotImplementedError, RuntimeError):  # a network of timm that computes with what it creates
        module = create_network(network, embedding_size, image_size)
    return strip_prefixes(shapes_of(module.state_dict()))


def _usual_shapes(network: str, embedding_size: int, image_size: int) -> Shapes:
    """As expected_shapes at 112 pixels, else at `image_size`; nothing where the network can take neither."""
    for size in (112, image_size):
        try:
            return expected_shapes(network, embedding_size, size)
        except ValueError:
            continue
    return {}


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor by name."""
    return {name: tuple(value.shape) for name, value in state.items()}


def recognise(found: Shapes, networks: Iterable[str], image_size: int) -> Recognised | None:
    """The first of `networks` that has weights of these names and shapes. `image_size` is tried first; if several sizes
    have the same weights (`vit_*` see whole patches) a usual one is taken, else the smallest.
    """
    found = strip_prefixes(found)
    for network in networks:
        likely = _usual_shapes(network, 512, image_size)
        if _named(likely) != _named(found):
            continue
        embedding_size = _embedding_size(found, likely)
        if not embedding_size:
            continue
        at_112 = _usual_shapes(network, embedding_size, image_size)
        for size in dict.fromkeys((image_size, 112, *_likely_sizes(found, at_112))):
            try:
                expected = expected_shapes(network, embedding_size, size)
            except ValueError:
                continue
            if _same(expected, found):
                return Recognised(network, embedding_size, size)
    return None


def _likely_sizes(found: Shapes, at_112: Shapes) -> list[int]:
    """Candidates for the image size of weights with the shapes `found`, given those `at_112` pixels: the last layer, or
    the position embedding, grows with the area. Multiples of 16 come first.
    """
    other = next((name for name in at_112 if name in found and found[name] != at_112[name]), None)
    if other is None:
        return []
    near = round(112 * math.sqrt(math.prod(found[other]) / math.prod(at_112[other])))
    least = near * 108 // 112 - 1  # of 112 pixels, patches of 9 cover 108
    return sorted(range(max(1, least), min(near + 10, _LARGEST + 1)), key=lambda size: (size % 16 > 0, size))


def most_similar(found: Shapes, networks: Iterable[str], image_size: int) -> Recognised | None:
    """The one of `networks` that has most names and shapes in common with `found`; None if less than half."""
    best, most = None, 0.5
    for network in networks:
        likely = _usual_shapes(network, 512, image_size)
        embedding_size = (likely and _embedding_size(found, likely)) or 512
        try:
            expected = expected_shapes(network, embedding_size, image_size)
        except ValueError:
            continue
        common = sum(found.get(name) == shape for name, shape in expected.items())
        share = common / max(len(expected), len(found))
        if share > most:
            best, most = Recognised(network, embedding_size, image_size), share
    return best


def differences(found: Shapes, expected: Shapes) -> str:
    """In words: what of `expected` is missing in `found`, what is there besides, and what has another shape."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    other = [
        f"{name} {list(found[name])} where {list(shape)} is wanted"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = (("missing", missing), ("not the network's", extra), ("of another shape", other))
    return "; ".join(f"{kind}: {listed(names, SHOWN)}" for kind, names in kinds if names) or "nothing"


def _embedding_size(found: Shapes, likely: Shapes) -> int:
    """The embedding size of weights with the shapes `found`, given those of their network at any; 0: none."""
    # The last weight: of every network here its first dimension is the embedding's.
    last = found.get([name for name, shape in likely.items() if shape][-1])
    return last[0] if last and last[0] < TOO_LARGE else 0


def _named(shapes: Shapes) -> frozenset[str]:
    """The names without the counters of norms."""
    return frozenset(name for name in shapes if not name.endswith(COUNTER))


def _same(expected: Shapes, found: Shapes) -> bool:
    return all(found[name] == expected[name] for name in _named(expected))
