"""Whether an ONNX graph turns pixels of 0..255 into what its network wants by itself, seen from its first nodes."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx

# What becomes of the faces before a network computes with them: their pixels in another shape, order or type; a value
# that is not of pixels; arithmetic; and where the network begins.
_CARRY = {
    "Cast", "Clip", "Concat", "DequantizeLinear", "Flatten", "Gather", "Identity", "Pad", "QuantizeLinear", "Reshape",
    "Resize", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
}  # fmt: skip
_ABOUT_SHAPES = {"Shape", "Size"}
_ARITHMETIC = {"Add", "Div", "Mul", "Sub"}
_BEGIN = {"Conv", "Einsum", "Gemm", "MatMul", "QLinearConv"}

# Who adds or subtracts more than that has pixels of 0..255 before him; and so has who comes to less than that.
_SHIFT, _NORMALISED = 10.0, 10.0


def normalises_itself(graph: "onnx.GraphProto", entry: str) -> bool | None:
    """Whether the graph normalises its input `entry`, pixels of 0..255, before its first layer; None: unclear.

    It does if what it adds, or what 0..255 come to, says so. Other arithmetic may be that of a network which wants
    normalised faces all the same: `x * 127.5 / 128`, `(x + 1) / 2`. Arithmetic on shapes and on weights is none.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    constants, faces = set(tensors), {entry}
    largest, touched = 255.0, False
    for node in graph.node:  # in an order in which each comes after those that it needs
        others = [name for name in node.input if name and name not in faces]
        if faces.isdisjoint(node.input):
            if constants.issuperset(others):
                constants.update(node.output)
        elif node.op_type in _ARITHMETIC:
            if not others or not constants.issuperset(others):
                return None
            constant = _value(tensors, makers, others[0])
            if constant is None:
                return True  # nobody lets a graph compute how to rescale what it is fed normalised
            if node.op_type == "Div" and node.input[0] not in faces:
                return None
            largest, touched = _after(node.op_type, largest, constant), True
            if (node.op_type in ("Add", "Sub") and constant > _SHIFT) or largest <= _NORMALISED:
                return True
            faces.update(node.output)
        elif node.op_type in _CARRY:
            faces.update(node.output)
        elif node.op_type not in _ABOUT_SHAPES:
            return (None if touched else False) if node.op_type in _BEGIN else None
    return None if touched else False


def _after(operation: str, largest: float, constant: float) -> float:
    """The largest absolute value after `operation` with a constant of about that absolute value."""
    if operation in ("Add", "Sub"):
        return largest + constant
    return largest * constant if operation == "Mul" else largest / max(constant, 1e-12)


def _value(tensors: Mapping[str, Any], makers: Mapping[str, Any], name: str) -> float | None:
    """The largest absolute value of a constant; None for one that the graph computes, or that lies in another file.

    `tensors`: those that the graph has; `makers`: its nodes. Each by the name of what it is, or makes.
    """
    from onnx import numpy_helper

    seen: set[str] = set()
    while name not in seen and name in makers and makers[name].op_type in ("Cast", "Identity") and makers[name].input:
        seen.add(name)
        name = makers[name].input[0]
    tensor = tensors.get(name)
    if name in makers and makers[name].op_type == "Constant":
        for attribute in makers[name].attribute:
            if attribute.name == "value":
                tensor = attribute.t if tensor is None else tensor
            elif attribute.name.startswith("value_"):  # float, int, floats or ints
                values = [attribute.f or attribute.i, *attribute.floats, *attribute.ints]
                return max(map(abs, map(float, values)))
    if tensor is None or tensor.external_data:
        return None
    try:
        return float(np.abs(numpy_helper.to_array(tensor).astype(np.float64)).max())
    except (ValueError, TypeError):
        return None
