"""An ONNX file as an embedder, through onnxruntime."""

import json
import math
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from models.embedders.interface import FaceEmbedder, digest
from models.embedders.onnx_normalisation import normalises_itself
from models.inputs import InputSpec
from utils.checkpoints import CheckpointError, shorten

if TYPE_CHECKING:
    import onnx

#: Key of an ONNX file's metadata under which exports of this project keep the InputSpec as JSON.
INPUTS_KEY = "face_inputs"

#: The largest fixed batch: any number of faces takes memory for as many.
MOST_AT_ONCE = 4096

#: Of nets for faces of 112 high and 96 wide (SphereFace's crop): the columns of a 112x112 face that they see.
NARROW_COLUMNS = (8, 104)


class OnnxEmbedder(FaceEmbedder):
    """An ONNX file, on CUDA where onnxruntime has it and `device` says so.

    `normalisation` says what the net expects of RGB 0..255: `none`, `127.5` ((x - 127.5) / 127.5), `128`
    ((x - 127.5) / 128), or `auto`: what the file's metadata say; without any, nothing when the graph makes small
    numbers of 0..255 before its first layer, else `127.5`. `colour`: `rgb`, `bgr`, or `auto`: what the metadata say,
    else RGB. Inputs [N, 3, H, W] and [N, H, W, 3], 112 x 96 as well (the columns 8..103 of a face of 112 x 112);
    `image_size` is that of a file that takes any. A file that says that it takes any number of faces, and fails on
    several, gets one at a time.
    """

    def __init__(
        self, path: Path, normalisation: str, device: torch.device, colour: str = "auto", image_size: int = 112
    ) -> None:
        model, beside = _read(path)
        self._session, self._quiet = _open_session(path, device)
        (entry,) = self._session.get_inputs()
        self._entry, self._dtype = entry.name, np.float16 if entry.type == "tensor(float16)" else np.float32
        height, width, self._channels_last = _input_size(path, entry.shape, image_size)
        self.image_size = height
        self._fixed_batch = entry.shape[0] if isinstance(entry.shape[0], int) else None
        if self._fixed_batch is not None and self._fixed_batch > MOST_AT_ONCE:
            raise CheckpointError(
                f"{path} takes {self._fixed_batch:,} faces at once, {MOST_AT_ONCE:,} are the most: export it for any "
                "number of faces"
            )
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        self.inputs = _input_spec(path, metadata, model.graph, self._entry, normalisation, colour)
        if width < height:
            self.inputs = replace(self.inputs, columns=NARROW_COLUMNS)
        self.device, self.name, self._path = device, path.stem, path
        self.runs_on = f"onnxruntime {self._session.get_providers()[0].removesuffix('ExecutionProvider')}"
        weights = [(path.parent / name).read_bytes() for name in beside]
        self._fingerprint = digest(path.read_bytes(), *weights, self.inputs.as_json(), self.image_size)

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
        try:
            return self._run_batch(inputs)
        except CheckpointError as error:
            if self._fixed_batch is not None:
                raise
            self._fixed_batch = 1
            try:
                rows = np.concatenate([self._run_batch(part) for part in self._batches(inputs)])
            except CheckpointError:
                self._fixed_batch = None
                raise error from None
            warnings.warn(f"{error}. It gets one face at a time, which works, slowly", stacklevel=2)
            return rows

    def _run_batch(self, inputs: np.ndarray) -> np.ndarray:
        count = len(inputs)
        if self._fixed_batch is not None and count < self._fixed_batch:
            filler = np.zeros((self._fixed_batch - count, *inputs.shape[1:]), inputs.dtype)
            inputs = np.concatenate([inputs, filler])
        try:
            output: Any = self._session.run(None, {self._entry: inputs}, self._quiet)[0]
        except Exception as error:  # onnxruntime's own exception types have no common base
            raise CheckpointError(
                f"{self._path}: onnxruntime fails on {len(inputs)} faces, input {list(inputs.shape)}: "
                + " ".join(shorten(str(error), 3).split())
            ) from None
        if np.shape(output)[:1] != (len(inputs),):
            raise CheckpointError(
                f"{self._path}: its output for {len(inputs)} faces is {list(np.shape(output))}, not an embedding of "
                "each: is it a detector?"
            )
        return output[:count]


def _read(path: Path) -> tuple["onnx.ModelProto", list[str]]:
    """The model without its weights, and the names of the files beside it that hold some of them."""
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise CheckpointError(
            f"{path}: ONNX models need two more packages: pip install onnx onnxruntime (onnxruntime-gpu for CUDA)"
        ) from error
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf's own exception types differ between its versions
        raise CheckpointError(f"{path} is no ONNX model: {error}") from None
    external = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    beside = sorted({entry.value for entry in external if entry.key == "location"})
    for name in beside:
        if not (path.parent / name).is_file():  # a device has no end
            raise CheckpointError(f"{path}: its weights are in {name!r}, which is no file there: copy that, too")
    return model, beside


def _open_session(path: Path, device: torch.device) -> tuple[Any, Any]:
    """(an onnxruntime session that has one input, the faces; the options of its runs)."""
    import onnxruntime

    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, ("CUDAExecutionProvider", {"use_tf32": 0}))  # scores are quoted in float32
    try:
        session = onnxruntime.InferenceSession(str(path), providers=providers)
    except Exception as error:  # onnxruntime's own exception types have no common base
        raise CheckpointError(f"onnxruntime cannot run {path}: {error}") from None
    entries = session.get_inputs()
    if [entry.type for entry in entries] not in (["tensor(float)"], ["tensor(float16)"]):
        found = ", ".join(f"{entry.name}: {entry.type}" for entry in entries) or "nothing"
        raise CheckpointError(f"{path} takes {found}: expected one input of float32 or float16, the faces")
    quiet = onnxruntime.RunOptions()  # errors are raised, and need not be on the screen as well
    quiet.log_severity_level = 4
    return session, quiet


def _input_size(path: Path, shape: list[Any], image_size: int) -> tuple[int, int, bool]:
    """(height, width, whether channels come last) of what a net takes, given its input's shape."""
    if len(shape) == 4 and 3 in (shape[1], shape[3]) and shape[0] != 0:
        channels_last = shape[1] != 3
        sides = shape[1:3] if channels_last else shape[2:4]
        height, width = (side if isinstance(side, int) and side > 0 else image_size for side in sides)
        if height == width or (height, width) == (112, 96):
            return height, width, channels_last
    raise CheckpointError(f"{path} takes inputs of shape {shape}: expected [N, 3, size, size]")


def _input_spec(
    path: Path, metadata: dict[str, str], graph: "onnx.GraphProto", entry: str, normalisation: str, colour: str
) -> InputSpec:
    try:
        stated: dict[str, Any] = json.loads(metadata.get(INPUTS_KEY, "{}"))
        if normalisation == "auto":
            normalisation = stated.get("normalisation") or _found_normalisation(path, graph, entry)
        colour = stated.get("colour", "rgb") if colour == "auto" else colour
        chosen: dict[str, Any] = {"normalisation": normalisation, "colour": colour}
        return InputSpec(**chosen)
    except (ValueError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path}: its metadata {INPUTS_KEY!r} cannot be used: {error}") from None


def _found_normalisation(path: Path, graph: "onnx.GraphProto", entry: str) -> str:
    own = normalises_itself(graph, entry)
    if own is None:
        warnings.warn(
            f"{path}: its first nodes do not show whether it normalises its input itself: taken for a net that wants "
            "(x - 127.5) / 127.5; say --model.normalisation none, 127.5 or 128",
            stacklevel=4,
        )
    return "none" if own else "127.5"
