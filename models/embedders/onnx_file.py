"""An ONNX file as an embedder, through onnxruntime."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.embedders.interface import FaceEmbedder, digest
from models.inputs import InputSpec
from utils.checkpoints import CheckpointError

#: Key of an ONNX file's metadata under which exports of this project keep the InputSpec as JSON.
INPUTS_KEY = "face_inputs"

#: Of nets for faces of 112 high and 96 wide (SphereFace's crop): the columns of a 112x112 face that they see.
NARROW_COLUMNS = (8, 104)


class OnnxEmbedder(FaceEmbedder):
    """An ONNX file, on CUDA where onnxruntime has it and `device` says so.

    `normalisation` says what the net expects of RGB 0..255: `none`, `127.5` ((x - 127.5) / 127.5), `128`
    ((x - 127.5) / 128), or `auto`: what the file's metadata say; without any, nothing when the graph subtracts,
    multiplies or divides before its first convolution, else `127.5`. `colour`: `rgb`, `bgr`, or `auto`: what the
    metadata say, else RGB. Inputs [N, 3, H, W] and [N, H, W, 3], 112 x 96 as well (the columns 8..103 of a face of
    112 x 112); `image_size` is that of a file that takes any.
    """

    def __init__(
        self,
        path: Path,
        normalisation: str,
        device: torch.device,
        colour: str = "auto",
        image_size: int = 112,
    ) -> None:
        try:
            import onnx
            import onnxruntime
        except ImportError as error:
            raise CheckpointError(
                f"{path}: ONNX models need two more packages: pip install onnx onnxruntime (onnxruntime-gpu for CUDA)"
            ) from error
        try:
            model = onnx.load(path, load_external_data=False)
            beside = sorted({entry.value for tensor in model.graph.initializer for entry in tensor.external_data
                             if entry.key == "location"})  # fmt: skip
            files = [(path.parent / name).read_bytes() for name in beside]
        except Exception as error:  # protobuf's own exception types differ between its versions
            raise CheckpointError(f"{path} is no ONNX model: {error}") from None
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # scores are quoted in float32
        try:
            self._session = onnxruntime.InferenceSession(str(path), providers=providers)
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise CheckpointError(f"onnxruntime cannot run {path}: {error}") from None
        entry, *others = self._session.get_inputs()
        if others or entry.type not in ("tensor(float)", "tensor(float16)"):
            found = ", ".join(f"{one.name}: {one.type}" for one in (entry, *others))
            raise CheckpointError(f"{path} takes {found}: expected one input of float32 or float16, the faces")
        self._entry, self._dtype = entry.name, np.float16 if entry.type == "tensor(float16)" else np.float32
        height, width, self._channels_last = _input_size(path, entry.shape, image_size)
        self.image_size = height
        self._fixed_batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.inputs = _input_spec(path, metadata, [node.op_type for node in model.graph.node], normalisation, colour)
        if width < height:
            self.inputs = replace(self.inputs, columns=NARROW_COLUMNS)
        self.device, self.name = device, path.stem
        self.runs_on = f"onnxruntime {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"
        self._fingerprint = digest(path.read_bytes(), *files, self.inputs.as_json(), self.image_size)

    @property
    def fingerprint(self) -> str:
        """Of the file's bytes, as it was opened."""
        return self._fingerprint

    def _forward(self, faces: Tensor, mirror: bool) -> Tensor:
        pixels = self.inputs.to_input(faces.cpu(), mirror)
        if self._channels_last:
            pixels = pixels.permute(0, 2, 3, 1)
        inputs = np.ascontiguousarray(pixels.numpy(), self._dtype)
        outputs = np.concatenate([self._run(part) for part in self._batches(inputs)])
        flat = outputs.reshape(len(outputs), math.prod(outputs.shape[1:]))
        return torch.from_numpy(flat).float().to(self.device)

    def _batches(self, inputs: np.ndarray) -> list[np.ndarray]:
        if self._fixed_batch is None or not len(inputs):
            return [inputs]
        return [inputs[i : i + self._fixed_batch] for i in range(0, len(inputs), self._fixed_batch)]

    def _run(self, inputs: np.ndarray) -> np.ndarray:
        count = len(inputs)
        if self._fixed_batch is not None and count < self._fixed_batch:
            filler = np.zeros((self._fixed_batch - count, *inputs.shape[1:]), inputs.dtype)
            inputs = np.concatenate([inputs, filler])
        output: Any = self._session.run(None, {self._entry: inputs})[0]
        if len(output) != len(inputs):
            raise CheckpointError(
                f"{self.name}: its output for {len(inputs)} faces is {list(output.shape)}, not an embedding of each: "
                "is it a detector?"
            )
        return output[:count]


def _input_size(path: Path, shape: list[Any], image_size: int) -> tuple[int, int, bool]:
    """(height, width, whether channels come last) of what a net takes, given its input's shape."""
    if len(shape) == 4 and 3 in (shape[1], shape[3]):
        channels_last = shape[1] != 3
        sides = shape[1:3] if channels_last else shape[2:4]
        height, width = (side if isinstance(side, int) and side > 0 else image_size for side in sides)
        if height == width or (height, width) == (112, 96):
            return height, width, channels_last
    raise CheckpointError(f"{path} takes inputs of shape {shape}: expected [N, 3, size, size]")


def _input_spec(
    path: Path, metadata: dict[str, str], operations: list[str], normalisation: str, colour: str
) -> InputSpec:
    try:
        stated: dict[str, Any] = json.loads(metadata.get(INPUTS_KEY, "{}"))
        own = "none" if normalises_itself(operations) else "127.5"
        return InputSpec(
            stated.get("normalisation", own) if normalisation == "auto" else normalisation,  # type: ignore[arg-type]
            stated.get("colour", "rgb") if colour == "auto" else colour,  # type: ignore[arg-type]
        )
    except (ValueError, AttributeError) as error:
        raise CheckpointError(f"{path}: its metadata {INPUTS_KEY!r} cannot be used: {error}") from None


def normalises_itself(operations: list[str]) -> bool:
    """Whether a graph with these operation types, in order, normalises its input before its first convolution."""
    before = operations[: operations.index("Conv")] if "Conv" in operations else []
    return any(operation in ("Sub", "Mul", "Div") for operation in before)
