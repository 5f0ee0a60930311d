"""Networks as ONNX files, for onnxruntime, OpenCV, TensorRT, and the `insightface` package.

insightface (model_zoo/arcface_onnx.py) takes a file for one that normalises its input itself when among its first eight
nodes one has a name that begins with `Sub` or `_minus`, and one a name that begins with `Mul` or `_mul`; whatever the
nodes do. So these two names stand there when normalisation is folded in, and nowhere when it is not.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from utils.exporting.exportable import INPUT, OUTPUT, ExportError

if TYPE_CHECKING:
    import onnx

#: The oldest that torch's exporter writes by itself; onnxruntime has it since 1.14.
OPSET = 18
IR_VERSION = 8

_SIZE_LIMIT = 2**31 - 2**20  # of one protobuf message, less room for the graph
_TELLTALE = ("Sub", "_minus", "Mul", "_mul")
_NEEDED = ("onnx", "onnxscript", "onnxruntime")


def require_onnx() -> None:
    """Raise ExportError unless the packages that ONNX exports need are there."""
    missing = []
    for name in _NEEDED:
        try:
            __import__(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ExportError(f"--format onnx needs more packages: pip install {' '.join(missing)}")


def to_onnx(module: nn.Module, image_size: int) -> "onnx.ModelProto":
    """`module`, float32 [B, 3, image_size, image_size] to [B, D], as an ONNX model for any number of faces.

    Raises ExportError for a network that does not fit into one file, or that the exporter cannot follow.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values())
    if size > _SIZE_LIMIT:
        raise ExportError(f"its weights take {size / 2**30:.1f} GiB, an ONNX file ends at 2: try --precision fp16")
    faces = torch.zeros(2, 3, image_size, image_size)
    with warnings.catch_warnings():
        # Deprecations inside torch and onnxscript, which are theirs to mend.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        try:
            program = torch.onnx.export(
                module,
                (faces,),
                input_names=[INPUT],
                output_names=[OUTPUT],
                opset_version=OPSET,
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("N")},),
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"torch cannot export this network to ONNX: {str(error)[:600]}") from error
    assert program is not None
    model = program.model_proto
    model.ir_version = IR_VERSION
    for node in model.graph.node:
        del node.metadata_props[:]  # stack traces, with paths of this machine
    return model


def prepend_normalisation(model: "onnx.ModelProto", mean: float, scale: float) -> None:
    """Let `model` take RGB 0..255: (input - mean) * scale comes before all else."""
    from onnx import helper, numpy_helper

    mean_name, scale_name, centred, normalised = (f"/normalisation/{name}" for name in ("mean", "scale", "a", "b"))
    graph = model.graph
    for node in graph.node:
        for i, name in enumerate(node.input):
            if name == INPUT:
                node.input[i] = normalised
    constants = {mean_name: mean, scale_name: scale}
    graph.initializer.extend(
        numpy_helper.from_array(np.array(value, np.float32), name) for name, value in constants.items()
    )
    own = [
        helper.make_node("Sub", [INPUT, mean_name], [centred], "Sub_mean"),
        helper.make_node("Mul", [centred, scale_name], [normalised], "Mul_scale"),
    ]
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*own, *others])


def rename_telltale_nodes(model: "onnx.ModelProto") -> None:
    """Give the network's own nodes no name that insightface would take for normalisation."""
    for node in model.graph.node:
        if node.name.startswith(_TELLTALE):
            node.name = f"net_{node.name}"


def write_onnx(model: "onnx.ModelProto", path: Path, metadata: dict[str, str]) -> None:
    """Check `model` by ONNX's own rules and write it to `path` with `metadata`. Raises ExportError."""
    import onnx

    onnx.helper.set_model_props(model, metadata)
    model.producer_name = "insightface-pytorch"
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"the exported network is no valid ONNX: {error}") from error
    onnx.save(model, str(path))
