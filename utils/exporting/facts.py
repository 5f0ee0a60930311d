"""What is known of a model, for the metadata of its exports and for its model card."""

import importlib.metadata
import inspect
import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch

from models.inputs import Normalisation
from models.losses import LOSSES, create_loss
from utils.texts import encodable
from utils.training.schedules import peak_lr

#: Sections of a run's settings that a model's users need; the others name folders of the machine that trained it.
PUBLISHED_SECTIONS = ("data", "model", "loss", "train")
_SETS, _PATHS = {"data.root", "data.verification"}, {"train.name", "train.init"}


@dataclass(frozen=True)
class ModelFacts:
    """`settings`: by section and field, {} for weights from elsewhere; `tests`: the sets of the run's `results.json`,
    as they are there; `best_accuracy`: 0..1, on the verification sets of the training, None when there were none.
    """

    name: str
    network: str
    embedding_size: int
    image_size: int
    parameters: int
    settings: dict[str, dict[str, Any]]
    step: int | None
    best_accuracy: float | None
    tests: dict[str, dict[str, Any]]
    mirror: bool
    licence: str

    @property
    def training_sets(self) -> str:
        """Names of the training sets, comma separated; empty when they are not known."""
        return ", ".join(self.settings.get("data", {}).get("root", ()))

    @property
    def loss(self) -> str:
        """The loss with the numbers it was trained with; empty when it is not known."""
        loss = self.settings.get("loss", {})
        if not loss:
            return ""
        numbers = [f"{key} {value:g}" for key, value in own_loss_settings(loss).items()]
        return f"{loss['name']} ({', '.join(numbers)})" if numbers else str(loss["name"])

    def accuracies(self) -> dict[str, float]:
        """Accuracies (0..1) by the 10-fold protocol, by set."""
        return {name: result["accuracy"] for name, result in self.tests.items() if "accuracy" in result}

    def metadata(self, folded: bool, precision: str, normalisation: Normalisation = "127.5") -> dict[str, str]:
        """What a file says of itself, its network's `normalisation` being `folded` into it or not."""
        formula = "none, RGB 0..255" if normalisation == "none" else f"(rgb - 127.5) / {normalisation}"
        own = {"step": self.step, "best_accuracy": self.best_accuracy}
        return {
            "network": self.network,
            "embedding_size": str(self.embedding_size),
            "image_size": str(self.image_size),
            "colour_order": "RGB",
            "normalisation": f"{formula}, {'inside this file' if folded else 'to be done by the caller'}",
            "input": f"float32 [N, 3, {self.image_size}, {self.image_size}], RGB, "
            + ("0..255" if folded else "in [-1, 1]"),
            "output": f"float32 [N, {self.embedding_size}], not of unit length: divide by its length before comparing",
            "precision": precision,
            "training_sets": self.training_sets or "unknown",
            "loss": self.loss or "unknown",
            "accuracy": json.dumps(self.accuracies()),
            "mirror_added": json.dumps(self.mirror),
            "licence": self.licence or "unknown",
            "versions": json.dumps(versions()),
            **{key: repr(value) for key, value in own.items() if value is not None},
        }


def used_settings(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """`settings` with the numbers that were used where they say "as published" or "by rule", for people to read; of the
    loss only what it has.
    """
    used = {section: dict(fields) for section, fields in settings.items()}
    if "loss" in used:
        loss = used["loss"]
        with_any = ("margin_warmup_epochs", "sub_centers", "sample_rate")
        others: dict[str, Any] = {name: loss[name] for name in with_any if loss.get(name)}
        used["loss"] = {"name": loss["name"], **own_loss_settings(loss), **others}
    train = used.get("train", {})
    if train.get("lr") == 0 and {"optimizer", "batch_size"} <= train.keys():
        train["lr"] = round(peak_lr(0, train["optimizer"], train["batch_size"]), 6)
    if train.get("precision") == "auto":
        train["precision"] = "bf16 or fp16 where the device has it, else fp32"
    return used


def own_loss_settings(loss: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in the section `loss` that the loss has, 0 for margin, scale and deviation being what is published;
    without what is off.
    """
    if loss["name"] not in LOSSES:  # of a later version
        return {}
    made = create_loss(**{**loss, "margin": loss.get("margin") or None, "scale": loss.get("scale") or None})
    own = [name for name in (*inspect.signature(LOSSES[loss["name"]]).parameters, "filter_above") if name in loss]
    return {name: getattr(made, name) for name in own if getattr(made, name) or name not in ("plus", "filter_above")}


def publishable(settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The settings that a model's users need, sets by their names, without paths: all of it text that UTF-8 has."""
    kept: dict[str, dict[str, Any]] = {}
    for section in PUBLISHED_SECTIONS:
        for field, value in settings.get(section, {}).items():
            name = f"{section}.{field}"
            if name in _SETS:
                value = [encodable(set_name(path)) for path in value]
            elif name in _PATHS:
                value = encodable(PurePath(value).name)
            kept.setdefault(section, {})[field] = value
    return kept


def set_name(path: str) -> str:
    """What a set is called: the name of its folder, or of its `.bin`."""
    parts = PurePath(path)
    parts = parts.parent if parts.name == "train.rec" else parts
    return parts.stem if parts.suffix in (".rec", ".bin") else parts.name


def versions() -> dict[str, str]:
    """Of this project, and of the packages that a file depends on."""
    project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
    found = {project["name"]: project["version"], "torch": torch.__version__}
    for package in ("onnx", "onnxruntime", "onnxscript"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
