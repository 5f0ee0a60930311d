"""Nets with the inputs and outputs of SCRFD whose answers can be computed by hand."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

STRIDES = {3: (8, 16, 32), 5: (8, 16, 32, 64, 128)}
ANCHORS = {3: 2, 5: 1}
WIDTHS = (1, 4, 10)
# Of `red_block_detector`: left, top, right and bottom of the box, and the landmarks, from the anchor, in strides.
BOX = np.array([1, 2, 3, 4], np.float32)
LANDMARKS = np.array([(1.0, 1.5), (3.0, 1.25), (2.0, 2.5), (1.25, 3.5), (3.0, 3.75)], np.float32)


def random_weights(levels: int, seed: int = 0) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of a linear detector whose scores, boxes and landmarks all depend on all three colours, differently."""
    rng = np.random.default_rng(seed)
    anchors = ANCHORS[levels]
    weights = [rng.normal(0, 0.4, (15 * anchors, 3)) for _ in range(levels)]
    biases = [rng.normal(0, 0.2, 15 * anchors) for _ in range(levels)]
    for bias in biases:
        bias[anchors : 5 * anchors] += 2  # most boxes have an inside
    return weights, biases


def linear_detector(
    path: Path,
    weights: list[np.ndarray],
    biases: list[np.ndarray],
    size: tuple[int | str, int | str] = ("h", "w"),
    batched: bool = False,
) -> Path:
    """A net whose outputs are linear in the mean colour (as the net sees it) of each stride x stride patch.

    `weights` [15 * anchors, 3] and `biases` [15 * anchors] of each stride: the scores of the anchors first, then four
    distances an anchor, then ten offsets. `batched`: outputs have a leading dimension of 1.
    """
    levels = len(weights)
    nodes, constants = [], []
    outputs: list[list[str]] = [[], [], []]
    for level, (stride, weight, bias) in enumerate(zip(STRIDES[levels], weights, biases, strict=True)):
        anchors = ANCHORS[levels]
        constants += [
            numpy_helper.from_array(weight.astype(np.float32)[:, :, None, None], f"weight{level}"),
            numpy_helper.from_array(bias.astype(np.float32), f"bias{level}"),
            numpy_helper.from_array(np.array([anchors * width for width in WIDTHS]), f"split{level}"),
        ]
        parts = [f"part{level}_{width}" for width in WIDTHS]
        nodes += [
            helper.make_node(
                "AveragePool", ["image"], [f"mean{level}"], kernel_shape=[stride] * 2, strides=[stride] * 2
            ),
            helper.make_node("Conv", [f"mean{level}", f"weight{level}", f"bias{level}"], [f"all{level}"]),
            helper.make_node("Split", [f"all{level}", f"split{level}"], parts, axis=1),
        ]
        for kind, (part, width) in enumerate(zip(parts, WIDTHS, strict=True)):
            shape = [1, -1, width] if batched else [-1, width]
            constants.append(numpy_helper.from_array(np.array(shape), f"shape_{part}"))
            nodes += [
                helper.make_node("Transpose", [part], [f"rows_{part}"], perm=[0, 2, 3, 1]),
                helper.make_node("Reshape", [f"rows_{part}", f"shape_{part}"], [f"out_{part}"]),
            ]
            outputs[kind].append(f"out_{part}")
    return save(
        path, nodes, [name for names in outputs for name in names], constants, [1, 3, *size], 3 if batched else 2
    )


def red_block_detector(path: Path, constant_score: float | None = None) -> Path:
    """Sees a face at every place of stride 8 whose 8x8 pixels are red, and none in black, grey or white.

    The score is 127.5 / 128 for red of 255, less for darker red. Box and landmarks lie at `BOX` and `LANDMARKS` from
    the place. With `constant_score` every place has that score instead, whatever the picture.
    """
    weights, biases = [], []
    for level in range(3):
        weight, bias = np.zeros((30, 3)), np.zeros(30)
        if constant_score is not None:
            bias[:2] = constant_score
        elif level == 0:
            # To the net 255 is 127.5 / 128 and 0 is -127.5 / 128: this is 0 for black and 127.5 / 128 for red.
            weight[0], bias[0] = (0.5, -0.5, -0.5), -0.5 * 127.5 / 128
        bias[2:10] = np.tile(BOX, 2)
        bias[10:] = np.tile(LANDMARKS.ravel(), 2)
        weights.append(weight)
        biases.append(bias)
    return linear_detector(path, weights, biases)


def lookup_detector(path: Path, size: int, colours: np.ndarray, anchors: np.ndarray, landmarks: np.ndarray) -> Path:
    """Knows some photos: that with the nearest mean colour, `colours` [n, 3] as the net sees them, is the one.

    It then has the score 1 at the stride-8 place `anchors` [n] (row * columns + column) and 0 elsewhere, and says
    `landmarks` [n, 5, 2], in pixels of the input of `size` x `size`.
    """
    columns = size // 8
    places = np.stack([anchors % columns, anchors // columns], axis=1)[:, None] * 8.0
    scores = np.zeros((len(colours), columns * columns * 2, 1), np.float32)
    scores[np.arange(len(colours)), anchors * 2] = 1
    constants = [
        numpy_helper.from_array(colours.astype(np.float32), "colours"),
        numpy_helper.from_array(scores, "scores"),
        numpy_helper.from_array(((landmarks - places) / 8).reshape(-1, 10).astype(np.float32), "offsets"),
        numpy_helper.from_array(np.array([2, 3]), "height_width"),
        numpy_helper.from_array(np.array([1]), "channel"),
        numpy_helper.from_array(np.array([columns * columns * 2, 10]), "offsets8"),
    ]
    nodes = [
        helper.make_node("ReduceMean", ["image", "height_width"], ["colour"], keepdims=0),
        helper.make_node("Sub", ["colour", "colours"], ["differences"]),
        helper.make_node("Abs", ["differences"], ["distances"]),
        helper.make_node("ReduceSum", ["distances", "channel"], ["sums"], keepdims=0),
        helper.make_node("ArgMin", ["sums"], ["which"], keepdims=0),
        helper.make_node("Gather", ["scores", "which"], ["score0"], axis=0),
        helper.make_node("Gather", ["offsets", "which"], ["offset"], axis=0),
        helper.make_node("Expand", ["offset", "offsets8"], ["kps0"]),
    ]
    names = [["score0"], ["box0"], ["kps0"]]
    constants.append(numpy_helper.from_array(np.ones((columns * columns * 2, 4), np.float32), "ones"))
    nodes.append(helper.make_node("Identity", ["ones"], ["box0"]))
    for level, stride in enumerate((16, 32), 1):
        for kind, (name, width) in enumerate(zip(("score", "box", "kps"), WIDTHS, strict=True)):
            zeros = np.zeros(((size // stride) ** 2 * 2, width), np.float32)
            constants.append(numpy_helper.from_array(zeros, f"{name}_zeros{level}"))
            nodes.append(helper.make_node("Identity", [f"{name}_zeros{level}"], [f"{name}{level}"]))
            names[kind].append(f"{name}{level}")
    return save(path, nodes, [name for kind in names for name in kind], constants, [1, 3, size, size])


def save(path: Path, nodes: list, outputs: list[str], constants: list, shape: list[int | str], rank: int = 2) -> Path:
    """The graph as a file; its outputs are stated to be rows, not how many, as in nets exported for any size."""
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, [None] * rank) for name in outputs],
        constants,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path
