"""Loads models of any kind as embedders."""

from pathlib import Path

import torch

from models.embedders.interface import Embedder
from models.embedders.network import PRECISIONS, NetworkEmbedder, Precision
from models.embedders.onnx_file import OnnxEmbedder
from models.embedders.torchscript import TorchScriptEmbedder
from models.inputs import check_choices
from models.weights import load_network, model_file
from models.weights.reading import is_torchscript
from utils.checkpoints import CheckpointError
from utils.devices import pick_device


def load_embedder(
    path: Path | str,
    device: torch.device | str = "auto",
    normalisation: str = "auto",
    network: str = "",
    embedding_size: int = 0,
    image_size: int = 112,
    colour: str = "auto",
    precision: Precision = "fp32",
) -> Embedder:
    """The model at `path`: a run folder (its best), `.safetensors`, a state dict or checkpoint (`.pth`, `.pt`,
    `.ckpt`), a TorchScript file, or `.onnx`. docs/embedders.md tells which load, and how.

    Files of ours know their network; that of others is told from the names and shapes of their weights. `network`,
    `embedding_size` and `image_size` decide only where those leave a choice. `normalisation` and `colour` say what the
    network expects of a face (see InputSpec), `auto` being what is known of where the file comes from. `precision`:
    `fp32`, in which accuracies are quoted, `bf16` or `fp16`. Raises CheckpointError for a path that holds no such
    model, ValueError for options that are none of these.
    """
    chosen = pick_device(device) if isinstance(device, str) else device
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    check_choices(normalisation, colour)
    path = Path(path)
    file = model_file(path)
    if file.suffix == ".onnx":
        if precision != "fp32":
            raise CheckpointError(f"{file}: an ONNX file computes as it was exported, not in {precision}: export it so")
        return OnnxEmbedder(file, normalisation, chosen, colour, image_size)
    if is_torchscript(file):
        return TorchScriptEmbedder(file, normalisation, chosen, colour, image_size, PRECISIONS[precision])
    loaded = load_network(file, network, embedding_size, image_size, normalisation, colour)
    name = path.resolve().name if path.is_dir() else path.stem
    return NetworkEmbedder(loaded.network.eval(), loaded.image_size, chosen, name, PRECISIONS[precision], loaded.inputs)
