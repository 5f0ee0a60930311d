"""Networks with weights loaded from files."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from models.backbones import NETWORKS, TIMM, create_network
from models.inputs import InputSpec, check_choices
from models.weights.adaface import adaface
from models.weights.cvlface import cvlface
from models.weights.evolve import evolve
from models.weights.mxnet_mobilefacenet import mxnet_mobilefacenet
from models.weights.origin import Origin
from models.weights.reading import (
    COUNTER,
    Checkpoint,
    model_file,
    parts_under_prefixes,
    read_checkpoint,
    strip_prefixes,
)
from models.weights.recognition import (
    Recognised,
    Shapes,
    differences,
    expected_shapes,
    most_similar,
    recognise,
    shapes_of,
)
from models.weights.tface import tface
from utils.checkpoints import CheckpointError, load_backbone, read_safetensors, run_settings, shorten

#: What is asked, in this order, whether a checkpoint is of its kind; a new kind is a file and its line here.
ORIGINS: tuple[Callable[[Checkpoint], Origin | None], ...] = (adaface, cvlface, evolve, tface, mxnet_mobilefacenet)


@dataclass(frozen=True)
class Loaded:
    """A network with its weights, which takes RGB; its name and sizes; the input that it expects."""

    network: nn.Module
    name: str
    embedding_size: int
    image_size: int
    inputs: InputSpec


def load_network(
    file: Path,
    network: str = "",
    embedding_size: int = 0,
    image_size: int = 112,
    normalisation: str = "auto",
    colour: str = "auto",
) -> Loaded:
    """The network whose weights are in `file`, recognised by their names and shapes unless the file names it.

    `network`, `embedding_size` and `image_size` decide if several fit; `normalisation` and `colour`, unless `auto`,
    override what is known of the file's origin. Weights that were trained on BGR are changed to take RGB. Raises
    CheckpointError if no network fits.
    """
    check_choices(normalisation, colour)
    origin, stated = _read(file)
    known = stated or _recognised(shapes_of(origin.state), file, network, embedding_size, image_size)
    with _about(file):
        module = create_network(known.network, known.embedding_size, known.image_size)
    _fill(module, _state_for_rgb(origin, module, colour), file, known.network)
    inputs = InputSpec(origin.normalisation).chosen(normalisation)
    return Loaded(module, known.network, known.embedding_size, known.image_size, inputs)


def load_weights(module: nn.Module, path: Path | str, network: str, colour: str = "auto") -> None:
    """Fill `module`, a network called `network`, with the weights at `path`: a run folder (its best), a `.safetensors`,
    or a checkpoint of any kind that load_network knows. The network takes RGB afterwards; `colour` as in load_network.

    Raises CheckpointError for a path that holds no such weights.
    """
    check_choices("auto", colour)
    file = model_file(path)
    origin, _ = _read(file)
    _fill(module, _state_for_rgb(origin, module, colour), file, network)


def create_with_weights(
    network: str, path: Path | str, embedding_size: int = 0, image_size: int = 0, colour: str = "auto", **options: Any
) -> nn.Module:
    """The network called `network`, made with `options`, with the weights at `path`; sizes of 0 are theirs.

    Otherwise as load_weights.
    """
    check_choices("auto", colour)
    file = model_file(path)
    origin, stated = _read(file)
    size = image_size or 112
    known = stated or recognise(shapes_of(origin.state), (network,), size) or Recognised(network, 512, size)
    module = create_network(network, embedding_size or known.embedding_size, image_size or known.image_size, **options)
    _fill(module, _state_for_rgb(origin, module, colour), file, network)
    return module


def _read(file: Path) -> tuple[Origin, Recognised | None]:
    """The weights in a file of any kind, and their network, if the file has a run's settings."""
    ours = file.suffix == ".safetensors" and run_settings(read_safetensors(file, metadata_only=True)[1])
    if not ours:
        return read_origin(file), None
    state, settings = load_backbone(file)
    model = settings["model"]
    known = Recognised(model["network"], model["embedding_size"], settings["data"]["image_size"])
    if not known.network.startswith(TIMM):  # of timm's some have to be made for real to be compared with
        with _about(file):
            expected = expected_shapes(known.network, known.embedding_size, known.image_size)
        _require_fit(expected, shapes_of(strip_prefixes(state)), file, known.network)
    return Origin(state), known


@contextmanager
def _about(file: Path) -> Iterator[None]:
    """A ValueError about the network that `file` names, which may be no network here, names the file."""
    try:
        yield
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from None


def read_origin(file: Path) -> Origin:
    """The weights in a file of another project, and what they were trained on, as far as the file shows."""
    checkpoint = read_checkpoint(file)
    checkpoint = replace(checkpoint, state=_network_in(checkpoint.state))
    for kind in ORIGINS:
        origin = kind(checkpoint)
        if origin is not None:
            return origin
    return Origin(checkpoint.state)


def _network_in(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of weights that are no network's as a whole, those under the one prefix of wrappers that are; else all."""
    parts = parts_under_prefixes(state)
    if parts and recognise(shapes_of(state), NETWORKS, 112) is None:
        networks = [part for part in parts if recognise(shapes_of(part), NETWORKS, 112)]
        return networks[0] if len(networks) == 1 else state
    return state


def _state_for_rgb(origin: Origin, module: nn.Module, colour: str) -> Mapping[str, Tensor]:
    """The weights, changed if need be so that `module` takes RGB. `colour`: what they were trained on; `auto`: what is
    known of their origin, with a warning if that is unsure.
    """
    if colour == "auto" and origin.doubt:
        warnings.warn(origin.doubt, stacklevel=4)
    chosen = origin.colour if colour == "auto" else colour
    return for_rgb(origin.state, module) if chosen == "bgr" else origin.state


def for_rgb(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights of a BGR network for the same network, `module`, to take RGB: the input channels of the first
    convolution are swapped.
    """
    own = strip_prefixes(module.state_dict())
    first = next(name for name, value in own.items() if value.dim() == 4 and value.shape[1] == 3)
    return {
        name: value.flip(1) if name == first and value.dim() == 4 else value
        for name, value in strip_prefixes(state).items()
    }


def _recognised(found: Shapes, file: Path, network: str, embedding_size: int, image_size: int) -> Recognised:
    names: Iterable[str] = dict.fromkeys((network, *NETWORKS) if network else NETWORKS)
    known = recognise(found, names, image_size)
    if known:
        return known
    likely = most_similar(found, names, image_size)
    if likely is None and network:
        likely = Recognised(network, embedding_size or 512, image_size)
        looks = f"looks like none of the networks here, and is not {likely}"
    elif likely is None:
        raise CheckpointError(f"{file} looks like none of the networks here; it begins with {', '.join([*found][:6])}")
    else:
        looks = f"looks like {likely}, but does not fit it"
    expected = expected_shapes(likely.network, likely.embedding_size, likely.image_size)
    raise CheckpointError(f"{file} {looks}: {differences(found, expected)}")


def _fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, network: str) -> None:
    own = module.state_dict()
    stripped = strip_prefixes({name: name for name in own})
    counters = {name: value for name, value in own.items() if name.endswith(COUNTER)}
    state = {**counters, **{stripped.get(name, name): value for name, value in strip_prefixes(state).items()}}
    _require_fit(shapes_of(own), shapes_of(state), file, network)
    for name, value in state.items():
        if own[name].is_floating_point() and not value.is_floating_point():
            raise CheckpointError(f"{file}: its tensors are no plain weights: {name} is of {value.dtype}")
    try:
        module.load_state_dict(state)
    except RuntimeError as error:  # sparse or quantised ones, or without values
        raise CheckpointError(f"{file}: its tensors are no plain weights: {shorten(str(error), 2)}") from None


def _require_fit(expected: Shapes, found: Shapes, file: Path, network: str) -> None:
    """Raise CheckpointError unless weights with the shapes `found` are those of `network`, which has `expected`."""
    found = {name: shape for name, shape in expected.items() if name.endswith(COUNTER)} | found
    if expected != found:
        known, wanted = recognise(found, NETWORKS, 112), recognise(expected, (network,), 112)
        looks = f"; it looks like {known}: say {_flags(known, wanted)}" if known else ""
        raise CheckpointError(
            f"{file} does not hold the weights of {wanted or network}{looks}. {differences(found, expected)}"
        )


def _flags(known: Recognised, wanted: Recognised | None) -> str:
    """Flags for the settings in which `known`, the network of a file, differs from `wanted`, the network made."""
    settings = {"network": "model.network", "embedding_size": "model.embedding-size", "image_size": "data.image-size"}
    given = asdict(wanted) if wanted else {}
    return " ".join(
        f"--{settings[field]} {value}" for field, value in asdict(known).items() if value != given.get(field)
    )
