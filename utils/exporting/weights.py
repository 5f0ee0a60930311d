"""Weights as safetensors, with the settings that they are loaded by, as training writes them."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.checkpoints import write_safetensors
from utils.exporting.facts import ModelFacts


def settings_of(facts: ModelFacts) -> dict[str, dict[str, Any]]:
    """The run's settings as they are published; of weights from elsewhere those that are known."""
    settings = {section: dict(fields) for section, fields in facts.settings.items()}
    settings.setdefault("data", {})["image_size"] = facts.image_size
    settings.setdefault("model", {}).update(network=facts.network, embedding_size=facts.embedding_size)
    return settings


def write_weights(network: nn.Module, path: Path, facts: ModelFacts, metadata: dict[str, str], half: bool) -> None:
    """The state dict of `network`, in float16 with `half`, with `metadata` and all that load_embedder needs.

    Raises OSError.
    """
    tensors = {
        name: value.half() if half and value.dtype == torch.float32 else value
        for name, value in network.state_dict().items()
    }
    write_safetensors(path, tensors, {**metadata, "settings": json.dumps(settings_of(facts), indent=2)})
