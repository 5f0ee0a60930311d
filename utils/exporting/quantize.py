"""ONNX networks with int8 weights and activations, by onnxruntime's static quantisation.

Weights are symmetric int8, one scale a channel; activations uint8, over the range that the calibration faces show on
average of their batches. Convolutions and matrix products compute in int8, all else in float32, as do the layers that
cost the most: the first convolution, the grouped ones, and of the last three those that are small. Mean 1 - cosine of
two MobileFaceNets of 1 M parameters, without the first and the grouped ones in int8: 0.004 and 0.067; without the last
as well: 0.004 and 0.003. Nodes are kept in the QDQ form, which every runtime reads.
"""

import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

_OPERATIONS = ["Conv", "Gemm", "MatMul"]

# Share of all weights up to which one of the last layers is kept in float32: the IResNets' last has 30 % and more.
_SMALL = 0.15


def quantize(model: "onnx.ModelProto", input_name: str, faces: np.ndarray, batch_size: int) -> "onnx.ModelProto":
    """`model` in int8. `faces`: float32 [n, 3, size, size], as the network takes them, to find the ranges with."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[np.ndarray] = iter(np.array_split(faces, -(-len(faces) // batch_size)))

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self._batches, None)
            return None if batch is None else {input_name: batch}

    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of tensors that are not quantised, which are those that should not be
    try:
        with tempfile.TemporaryDirectory() as folder:
            given, prepared, done = (Path(folder) / f"{name}.onnx" for name in ("given", "prepared", "done"))
            onnx.save(model, str(given))
            quant_pre_process(str(given), str(prepared), skip_symbolic_shape=True)
            quantize_static(
                str(prepared),
                str(done),
                Reader(),
                op_types_to_quantize=_OPERATIONS,
                per_channel=True,
                nodes_to_exclude=_sensitive(onnx.load(str(prepared))),
                extra_options={"CalibMovingAverage": True},
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
            return onnx.load(str(done))
    finally:
        logger.setLevel(level)


def _sensitive(model: "onnx.ModelProto") -> list[str]:
    """Names of the first convolution, of those with groups, and of the last three layers where they are small."""
    layers = [node for node in model.graph.node if node.op_type in _OPERATIONS]
    weights = {tensor.name: math.prod(tensor.dims) for tensor in model.graph.initializer}
    sizes = {node.name: sum(weights.get(name, 0) for name in node.input) for node in layers}
    most = _SMALL * sum(sizes.values())
    convolutions = [node for node in layers if node.op_type == "Conv"]
    grouped = [node for node in convolutions if any(a.name == "group" and a.i > 1 for a in node.attribute)]
    last = [node for node in layers[-3:] if sizes[node.name] <= most]
    return sorted({node.name for node in [*convolutions[:1], *grouped, *last]})
