"""The model that is exported, and what is known of it."""

import json
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from models.embedders import NetworkEmbedder
from models.embedders.network import PRECISIONS
from models.inputs import Normalisation
from models.weights import load_network, model_file
from models.weights.reading import is_torchscript
from utils.checkpoints import BEST, HUB_WEIGHTS, CheckpointError, read_safetensors, run_settings
from utils.exporting.checks import require_results, require_settings
from utils.exporting.exportable import ExportError
from utils.exporting.facts import ModelFacts, publishable

CPU = torch.device("cpu")

T = TypeVar("T", int, float)


@dataclass(frozen=True)
class Source:
    """`embedder`: the model on the CPU, in float32; `trained_on`: its run's settings by section and field, with the
    paths that they had, {} for weights from elsewhere.
    """

    embedder: NetworkEmbedder
    facts: ModelFacts
    trained_on: dict[str, dict[str, Any]]

    @property
    def network(self) -> nn.Module:
        """In eval mode."""
        return self.embedder.network

    @property
    def normalisation(self) -> Normalisation:
        """What the network expects of RGB 0..255; see InputSpec."""
        return self.embedder.inputs.normalisation


def load_source(
    path: Path,
    normalisation: str,
    network: str,
    embedding_size: int,
    image_size: int,
    licence: str,
    colour: str = "auto",
) -> Source:
    """The model at `path`; the other arguments as in load_embedder.

    Raises CheckpointError where there is none, ExportError for one that has no torch network.
    """
    file = model_file(path)
    if file.suffix == ".onnx" or is_torchscript(file):
        raise ExportError(f"{path} is an export already: name the run or the weights that it was made from")
    loaded = load_network(file, network, embedding_size, image_size, normalisation, colour)
    name = path.resolve().name if path.is_dir() else path.stem
    embedder = NetworkEmbedder(loaded.network.eval(), loaded.image_size, CPU, name, inputs=loaded.inputs)
    saved = _saved_metadata(file)
    settings = run_settings(saved)
    require_settings(settings, file)
    run = file.parent if settings else None
    tested = (_tested(run / "test", embedder) if run else {}) or _stated_tests(saved)
    facts = ModelFacts(
        name=run.resolve().name if run and file.name in (BEST, HUB_WEIGHTS) else name,
        network=loaded.name,
        embedding_size=loaded.embedding_size,
        image_size=loaded.image_size,
        parameters=sum(parameter.numel() for parameter in loaded.network.parameters()),
        settings=publishable(settings),
        step=_stated(file, saved, "step", int),
        best_accuracy=(_stated(file, saved, "best_accuracy", float) if _is_best(file, saved) else None)
        or None,  # 0 where the run verified on nothing
        tests=tested.get("sets", {}),
        mirror=tested.get("mirror", False),
        licence=licence or _stated_licence(saved),
    )
    return Source(embedder, facts, settings)


def _is_best(file: Path, metadata: Mapping[str, str]) -> bool:
    """Whether the best accuracy that a file states is that of its own weights: a checkpoint states its run's best."""
    is_export = "mirror_added" in metadata
    return is_export or file.name in (BEST, HUB_WEIGHTS) or file.name.startswith(f"{Path(BEST).stem}-until-")


def _stated_licence(metadata: Mapping[str, str]) -> str:
    """That of an export that is exported again; empty: none was stated."""
    licence = metadata.get("licence", "")
    return "" if licence == "unknown" else licence


def _stated_tests(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The accuracies that an export states, which is exported again, as `results.json` has them; {} for other files."""
    try:
        accuracies, mirror = json.loads(metadata["accuracy"]), json.loads(metadata["mirror_added"])
        sets = {name: {"protocol": "10 folds", "accuracy": float(accuracy)} for name, accuracy in accuracies.items()}
        require_results({"sets": sets})
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):  # another program's words
        return {}
    return {"sets": sets, "mirror": bool(mirror)}


def _tested(folder: Path, model: NetworkEmbedder) -> dict[str, Any]:
    """What all_pair_test.py left in `folder` of `model`; {}, with a warning, where it tested other weights.

    A run that went on, or one whose folder holds the test of another checkpoint, has numbers that are not the model's.
    """
    results, report = folder / "results.json", folder / "report.json"
    if not results.is_file():
        return {}
    try:
        found = json.loads(results.read_text())
        precision = PRECISIONS[found.get("precision", "fp32")]
        require_results(found)
        models = json.loads(report.read_text())["models"] if report.is_file() else {}
        tested = [one["fingerprint"] for one in models.values()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        warnings.warn(f"{results}, or {report.name} beside it, is damaged ({error!r}): left out", stacklevel=3)
        return {}
    known = NetworkEmbedder(model.network, model.image_size, CPU, model.name, precision, model.inputs).fingerprint
    if tested and tested[0] != known:
        warnings.warn(
            f"{results} is of other weights than these: its numbers are left out; test these to have theirs",
            stacklevel=3,
        )
        return {}
    return found


def _stated(file: Path, saved: Mapping[str, str], name: str, kind: Callable[[str], T]) -> T | None:
    """What the metadata say of `name`, None if nothing. Raises CheckpointError where that is no number."""
    try:
        value = kind(saved[name]) if name in saved else None
        if value is None or -math.inf < value < math.inf:
            return value
        raise ValueError
    except ValueError:
        raise CheckpointError(
            f"{file}: its metadata have {saved[name][:20]!r} for {name}, which is no number"
        ) from None


def _saved_metadata(file: Path) -> dict[str, str]:
    try:
        return read_safetensors(file, metadata_only=True)[1]
    except CheckpointError:  # a file of another kind
        return {}
