"""Faces to unit embeddings, whatever the model was trained with: networks of this project, state dicts, ONNX files."""

import pickle
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.loading import to_network_input
from models import create_network
from utils.checkpoints import BEST, CheckpointError, load_backbone, shorten
from utils.devices import describe_device, full_precision


class Embedder(Protocol):
    """`name`, `runs_on`: the model and what computes it, for people; `image_size`: of the faces it takes; `device`:
    where its embeddings arrive.
    """

    name: str
    runs_on: str
    image_size: int
    device: torch.device

    def embed(self, faces: Tensor, mirror: bool) -> Tensor:
        """uint8 [B, image_size, image_size, 3] RGB to float32 unit vectors [B, D], on `device`.

        With `mirror` the embedding of the mirrored face is added before normalising, as published numbers have it.
        """


def _embed(forward: Callable[[Tensor, bool], Tensor], faces: Tensor, mirror: bool) -> Tensor:
    embeddings = forward(faces, False)
    if mirror:
        embeddings = embeddings + forward(faces, True)
    return F.normalize(embeddings)


class NetworkEmbedder:
    """A torch network. `precision`: float32 (no TF32) is what accuracies are quoted in; other dtypes are faster."""

    def __init__(
        self,
        network: nn.Module,
        image_size: int,
        device: torch.device,
        name: str,
        precision: torch.dtype = torch.float32,
    ) -> None:
        self.network, self._precision = network.to(device), precision
        self.image_size, self.device, self.name = image_size, device, name
        self.runs_on = describe_device(device)

    @torch.inference_mode()
    def embed(self, faces: Tensor, mirror: bool) -> Tensor:
        faces = faces.to(self.device, non_blocking=True)
        if self._precision == torch.float32:
            context: AbstractContextManager = full_precision(self.device)
        else:
            context = torch.autocast(self.device.type, self._precision)
        with context:
            return _embed(lambda batch, flip: self.network(to_network_input(batch, flip)).float(), faces, mirror)


class OnnxEmbedder:
    """An ONNX file through onnxruntime, on CUDA where that is installed for it and `device` says so.

    `normalisation` says what the net expects of RGB 0..255: `none`, `127.5` ((x - 127.5) / 127.5), `128`
    ((x - 127.5) / 128), or `auto`: nothing when the graph subtracts, multiplies or divides before its first
    convolution, else `127.5`.
    """

    def __init__(self, path: Path, normalisation: str, device: torch.device) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise CheckpointError(
                f"{path}: ONNX models need two more packages: pip install onnx onnxruntime (onnxruntime-gpu for CUDA)"
            ) from error
        try:
            graph = onnx.load(path, load_external_data=False).graph
        except Exception as error:  # protobuf's own exception types differ between its versions
            raise CheckpointError(f"{path} is no ONNX model: {error}") from None
        if normalisation == "auto":
            normalisation = "none" if normalises_itself([node.op_type for node in graph.node]) else "127.5"
        self._scale = {"none": None, "127.5": 127.5, "128": 128.0}[normalisation]
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # scores are quoted in float32
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=providers)
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise CheckpointError(f"onnxruntime cannot run {path}: {error}") from None
        shape = self._session.get_inputs()[0].shape
        if len(shape) != 4 or shape[1] != 3 or not isinstance(shape[2], int) or shape[2] != shape[3]:
            raise CheckpointError(f"{path} takes inputs of shape {shape}: expected [N, 3, size, size]")
        self.image_size = shape[2]
        self._fixed_batch = shape[0] if isinstance(shape[0], int) else None
        self.device, self.name = device, path.stem
        self.runs_on = f"onnxruntime {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"

    def embed(self, faces: Tensor, mirror: bool) -> Tensor:
        return _embed(self._forward, faces, mirror)

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        pixels = faces.numpy()[:, :, ::-1] if mirror else faces.numpy()
        inputs = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), np.float32)
        if self._scale:
            inputs = (inputs - np.float32(127.5)) / np.float32(self._scale)
        return torch.from_numpy(np.concatenate([self._run(part) for part in self._batches(inputs)])).to(self.device)

    def _batches(self, inputs: np.ndarray) -> list[np.ndarray]:
        if self._fixed_batch is None:
            return [inputs]
        return [inputs[i : i + self._fixed_batch] for i in range(0, len(inputs), self._fixed_batch)]

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        count = len(inputs)
        if self._fixed_batch is not None and count < self._fixed_batch:
            inputs = np.concatenate([inputs, np.repeat(inputs[-1:], self._fixed_batch - count, axis=0)])
        output: Any = self._session.run(None, {self._session.get_inputs()[0].name: inputs})[0]
        return output[:count]


def normalises_itself(operations: list[str]) -> bool:
    """Whether a graph with these operation types, in order, normalises its input before its first convolution."""
    before = operations[: operations.index("Conv")] if "Conv" in operations else []
    return any(operation in ("Sub", "Mul", "Div") for operation in before)


def _load_state_dict(file: Path) -> dict[str, Tensor]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError):
        raise CheckpointError(f"{file} holds more than tensors, or is damaged: it was not loaded") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{file} is no state dict (names to tensors): save network.state_dict() of it")
    return state


def load_embedder(
    path: Path | str,
    device: torch.device,
    normalisation: str = "auto",
    network: str = "r50",
    embedding_size: int = 512,
    image_size: int = 112,
) -> Embedder:
    """The model at `path`: a run folder (its best), a `.safetensors` of ours, a `.pth`/`.pt` state dict, or `.onnx`.

    Files of ours know their network; `network`, `embedding_size` and `image_size` describe a state dict,
    `normalisation` an ONNX file (see OnnxEmbedder). Raises CheckpointError for a path that holds no such model.
    """
    path = Path(path)
    file = path / BEST if path.is_dir() else path
    if not file.exists():
        raise CheckpointError(f"there is no model at {file}")
    if file.suffix == ".onnx":
        return OnnxEmbedder(file, normalisation, device)
    name = path.name if path.is_dir() else path.stem
    if file.suffix == ".safetensors":
        state, settings = load_backbone(file)
        network, embedding_size = settings["model"]["network"], settings["model"]["embedding_size"]
        image_size = settings["data"]["image_size"]
    elif file.suffix in (".pth", ".pt"):
        state = _load_state_dict(file)
    else:
        raise CheckpointError(f"{file}: expected a run folder, .safetensors, .pth, .pt or .onnx")
    module = create_network(network, embedding_size, image_size)
    _fill(module, state, file, network)
    return NetworkEmbedder(module.eval(), image_size, device, name)


def load_weights(module: nn.Module, path: Path | str, network: str) -> None:
    """Fill `module`, a network called `network`, with the weights at `path`: a run folder (its best), a `.safetensors`
    of ours, or a `.pth`/`.pt` state dict.

    Raises CheckpointError for a path that holds no such weights.
    """
    file = Path(path) / BEST if Path(path).is_dir() else Path(path)
    if not file.exists():
        raise CheckpointError(f"there is no model at {file}")
    state = load_backbone(file)[0] if file.suffix == ".safetensors" else _load_state_dict(file)
    _fill(module, state, file, network)


def _fill(module: nn.Module, state: Mapping[str, Tensor], file: Path, network: str) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            f"{file} does not hold the weights of {network} (of another? say --model.network): {shorten(str(error))}"
        ) from None
