"""ONNX files of others: what they expect is seen from their graphs, and what they do wrong is said."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from data.images import decode_rgb
from models.embedders import OnnxEmbedder, load_embedder
from models.embedders.onnx_normalisation import _value, normalises_itself
from test_embedder import CPU, SIZE, reshaped, with_metadata, write_onnx
from utils.checkpoints import CheckpointError
from utils.export import main as export_main

FACES = torch.randint(0, 256, (7, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

Nodes = list[tuple[str, list[str], str]]


@pytest.mark.parametrize(
    ("nodes", "own"),
    [
        ([("Sub", ["x", "mid"], "a"), ("Mul", ["a", "mid"], "b"), ("Conv", ["b", "kernel"], "y")], True),
        ([("Transpose", ["x"], "a"), ("Div", ["a", "mid"], "b"), ("Conv", ["b", "kernel"], "y")], True),
        ([("Constant", [], "c"), ("Neg", ["c"], "d"), ("Add", ["x", "d"], "a"), ("Conv", ["a", "kernel"], "y")], True),
        ([("Conv", ["x", "kernel"], "a"), ("Mul", ["a", "mid"], "b"), ("Sub", ["b", "mid"], "y")], False),
        # Padding to a multiple of what the first layer takes: arithmetic on the shape.
        ([("Shape", ["x"], "s"), ("Mod", ["s", "mid"], "m"), ("Sub", ["mid", "m"], "p"), ("Pad", ["x", "p"], "a"),
          ("Conv", ["a", "kernel"], "y")], False),
        # Standardised weights: arithmetic on the kernel.
        ([("Sub", ["kernel", "mid"], "k"), ("Mul", ["k", "mid"], "w"), ("Conv", ["x", "w"], "y")], False),
        ([("Reshape", ["x", "mid"], "a"), ("MatMul", ["a", "kernel"], "y")], False),
        ([("Flatten", ["x"], "a"), ("Gemm", ["a", "kernel"], "y")], False),
        # An input that is left out keeps nothing from being a constant; the faces' own shape is none.
        ([("Clip", ["mid", "", "mid"], "c"), ("Sub", ["x", "c"], "a"), ("Conv", ["a", "kernel"], "y")], True),
        ([("Shape", ["x"], "s"), ("Cast", ["s"], "c"), ("Div", ["x", "c"], "a"), ("Conv", ["a", "kernel"], "y")], None),
        ([], False),
        ([("BatchNormalization", ["x", "mid", "mid", "mid", "mid"], "a"), ("Conv", ["a", "kernel"], "y")], None),
        ([("Sub", ["x", "x"], "a"), ("Conv", ["a", "kernel"], "y")], None),
    ],
)  # fmt: skip
def test_own_normalisation_is_arithmetic_with_constants_on_the_faces(nodes: Nodes, own: bool | None) -> None:
    """Before the first layer, and of the faces themselves: raw pixels in a net that wants [-1, 1] raise no error."""
    made = [helper.make_node(operation, inputs, [output]) for operation, inputs, output in nodes]
    constants = [helper.make_tensor(name, TensorProto.FLOAT, [1], [127.5]) for name in ("mid", "kernel")]
    assert normalises_itself(helper.make_graph(made, "net", [], [], constants), "x") is own


def test_constants_at_the_end_of_a_long_chain() -> None:
    """Thousands of nodes that hand a constant on are followed to it, and those that hand it in a circle,
    or have none, are left."""
    chain = [("Identity", [f"c{i}"], f"c{i + 1}") for i in range(3_000)]
    made = [
        helper.make_node(operation, inputs, [output])
        for operation, inputs, output in [*chain, ("Sub", ["x", "c3000"], "a"), ("Conv", ["a", "c0"], "y")]
    ]
    constant = helper.make_tensor("c0", TensorProto.FLOAT, [1], [127.5])
    assert normalises_itself(helper.make_graph(made, "net", [], [], [constant]), "x") is True
    circle = [helper.make_node("Identity", ["b"], ["a"]), helper.make_node("Cast", ["a"], ["b"], to=1)]
    assert _value({}, {"a": circle[0], "b": circle[1]}, "a") is None
    assert _value({}, {"a": helper.make_node("Identity", [], ["a"])}, "a") is None


@pytest.mark.parametrize(
    ("operations", "own"),
    [
        ([("Mul", 127.5 / 128)], None),  # rescales [-1, 1]
        ([("Add", 1.0), ("Div", 2.0)], None),  # [-1, 1] to [0, 1]
        ([("Add", 1.0), ("Mul", 0.5), ("Sub", 0.45), ("Div", 0.225)], None),
        ([("Mul", 2.0), ("Sub", 1.0)], None),  # [0, 1] to [-1, 1]
        ([("Sub", 127.5)], True),  # and no more: a batch norm does the rest
        ([("Sub", [123.7, 116.3, 103.5]), ("Div", [58.4, 57.1, 57.4])], True),
        ([("Div", 255.0)], True),
        ([("Mul", 1 / 255), ("Sub", 0.5)], True),
        ([("Mul", 0.5), ("Mul", 0.5), ("Mul", 0.02)], True),
        ([("Add", -127.5), ("Mul", 0.0078125)], True),
        ([], False),
    ],
)
@pytest.mark.parametrize("how", ["initializer", "node", "numbers", "cast"])
def test_arithmetic_that_leaves_pixels_as_large_as_they_were(operations: list[Any], own: bool | None, how: str) -> None:
    """It is no normalisation of 0..255: fed so, a net that wants [-1, 1] gives embeddings that say nothing."""
    nodes, constants, entry = [], [], "x"
    for number, (operation, value) in enumerate(operations):
        tensor = numpy_helper.from_array(np.float32(value).reshape(1, -1, 1, 1), f"c{number}")
        constant = f"c{number}"
        if how == "node":
            nodes.append(helper.make_node("Constant", [], [constant], value=tensor))
        elif how == "numbers":
            numbers = np.atleast_1d(value).astype(float).tolist()
            nodes.append(helper.make_node("Constant", [], [constant], value_floats=numbers))
        else:
            constants.append(tensor)
        if how == "cast":
            nodes.append(helper.make_node("Cast", [constant], [f"f{number}"], to=TensorProto.FLOAT))
            constant = f"f{number}"
        nodes.append(helper.make_node(operation, [entry, constant], [f"y{number}"]))
        entry = f"y{number}"
    nodes.append(helper.make_node("Conv", [entry, "kernel"], ["y"]))
    constants.append(helper.make_tensor("kernel", TensorProto.FLOAT, [1], [1.0]))
    assert normalises_itself(helper.make_graph(nodes, "net", [], [], constants), "x") is own


def test_an_export_whose_metadata_are_lost_gives_the_same(tmp_path: Path, face_data: Path) -> None:
    """Real weights, whose network multiplies the [-1, 1] it is fed by 127.5 / 128: no sign that it wants 0..255."""
    weights = face_data / "models" / "mobilefacenet_xiaoccer_068.ckpt"
    path = tmp_path / "a.onnx"
    export_main(["--model", str(weights), "--format", "onnx", "--output", str(path), "--set", "", "--workers", "0"])
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, path)
    crops = sorted((face_data / "lfw" / "images").glob("*/*_0001.jpg"))[:8]
    faces = torch.stack([torch.from_numpy(decode_rgb(crop.read_bytes(), "")) for crop in crops])
    with pytest.warns(UserWarning, match="its first nodes do not show whether it normalises its input itself"):
        embedder = load_embedder(path, CPU)
    expected = load_embedder(weights, CPU).embed(faces)
    assert torch.nn.functional.cosine_similarity(embedder.embed(faces), expected).min() > 0.999


def test_constants_in_a_file_of_their_own(tmp_path: Path) -> None:
    """Whatever they are, reading the graph reads no file beside it, least of all one in the folder one is in."""
    path = write_onnx(tmp_path / "net.onnx", ("Sub",))
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert load_embedder(path, CPU).embed(FACES).shape == (7, 5)


def test_unclear_normalisation_is_warned_of(tmp_path: Path) -> None:
    """Nobody can know it then: it is said what is taken and what to say; whoever has said it hears nothing."""
    path = write_onnx(tmp_path / "net.onnx", ("Max",))
    with pytest.warns(UserWarning, match=r"net\.onnx: its first nodes do not show.* say --model\.normalisation none"):
        embedder = load_embedder(path, CPU)
    assert isinstance(embedder, OnnxEmbedder)
    assert embedder.inputs.normalisation == "127.5"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_embedder(path, CPU, normalisation="none")
        load_embedder(with_metadata(path, '{"normalisation": "128"}'), CPU)


def ending(path: Path, *nodes: Any, shape: list[int] | None = None) -> Path:
    """The net of `path` with `nodes` in place of its last one, which turns `maps` into `y`; `shape`: a constant."""
    model = onnx.load(path)
    del model.graph.node[-1]
    model.graph.node.extend(nodes)
    if shape is not None:
        model.graph.initializer.append(numpy_helper.from_array(np.array(shape), "shape"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, None))
    onnx.save(model, path)
    return path


@pytest.mark.parametrize("shape", [[1, 5], [1, -1]])
def test_onnx_files_that_take_one_face_whatever_they_say(tmp_path: Path, shape: list[int]) -> None:
    """Exporters name the batch N and leave a reshape to 1 in the graph: such a file gets one face at a time, said."""
    reshape = helper.make_node("Reshape", ["maps", "shape"], ["y"])
    path = ending(write_onnx(tmp_path / "one.onnx"), reshape, shape=shape)
    embedder = load_embedder(path, CPU)
    with pytest.warns(UserWarning, match=r"one\.onnx: .* 7 faces.*It gets one face at a time"):
        found = embedder.embed(FACES)
    torch.testing.assert_close(found, load_embedder(write_onnx(tmp_path / "a.onnx"), CPU).embed(FACES))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(embedder.embed(FACES), found)  # known from then on


def test_onnx_files_that_run_wrong(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """What onnxruntime raises, a scalar, no input: an error that names the file, which scripts show in a line, the same
    again when it is asked again, and nothing of onnxruntime's own on the screen.
    """
    wrong_size = reshaped(write_onnx(tmp_path / "size.onnx", size=24), ["N", 3, SIZE, SIZE])
    scalar = ending(write_onnx(tmp_path / "scalar.onnx"), helper.make_node("ReduceMean", ["maps"], ["y"], keepdims=0))
    reshape = helper.make_node("Reshape", ["maps", "shape"], ["y"])
    fixed = ending(write_onnx(tmp_path / "fixed.onnx", batch=4), reshape, shape=[1, -1])
    for path, message in (
        (wrong_size, r"size\.onnx: onnxruntime fails on 7 faces, input \[7, 3, 16, 16\]: .*"),
        (scalar, r"scalar\.onnx: its output for 7 faces is \[\], not an embedding of each"),
        (fixed, r"fixed\.onnx: its output for 4 faces is \[1, 20\], not an embedding of each"),
    ):
        embedder = load_embedder(path, CPU)
        capfd.readouterr()
        for _ in range(2):
            with pytest.raises(CheckpointError, match=message):
                embedder.embed(FACES)
        assert capfd.readouterr().err == ""
    with pytest.raises(CheckpointError, match=r"takes inputs of shape \[0, 3, 16, 16\]"):
        load_embedder(reshaped(write_onnx(tmp_path / "empty.onnx"), [0, 3, SIZE, SIZE]), CPU)
    model = onnx.load(write_onnx(tmp_path / "plain.onnx"))
    model.graph.node[0].input[0] = "faces"
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((1, 3, SIZE, SIZE), np.float32), "faces"))
    del model.graph.input[:]
    onnx.save(model, tmp_path / "closed.onnx")
    with pytest.raises(CheckpointError, match=r"closed\.onnx takes nothing: expected one input"):
        load_embedder(tmp_path / "closed.onnx", CPU)


@pytest.mark.parametrize("location", ["weights.data", "/dev/null"])
def test_onnx_files_whose_weights_are_elsewhere(tmp_path: Path, location: str) -> None:
    """A large model comes as two files: where the second was left behind, it is named. A device is never read: some
    have no end, and a file of other people's can name any.
    """
    path = tmp_path / "net.onnx"
    model = onnx.load(write_onnx(path))
    onnx.save(model, path, save_as_external_data=True, location="weights.data", size_threshold=0)
    assert load_embedder(path, CPU).embed(FACES).shape == (7, 5)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        next(entry for entry in tensor.external_data if entry.key == "location").value = location
    path.write_bytes(model.SerializeToString())
    (tmp_path / "weights.data").unlink()
    with pytest.raises(CheckpointError, match=rf"net\.onnx: its weights are in '{location}', which is no file there"):
        load_embedder(path, CPU)
