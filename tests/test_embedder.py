"""Models from anywhere give the embeddings that their weights mean."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from models import create_network
from models.embedder import NetworkEmbedder, OnnxEmbedder, load_embedder, normalises_itself
from utils.checkpoints import CheckpointError, Progress, save_backbone

CPU = torch.device("cpu")
SIZE = 16


def write_onnx(path: Path, before: tuple[str, ...] = (), batch: int | str = "N", size: int = SIZE) -> Path:
    """A net of one convolution as large as the image, with `before` (Sub, Mul, ...) between it and the input."""
    kernel = np.random.default_rng(0).normal(0, 0.01, (5, 3, size, size)).astype(np.float32)
    weights = [numpy_helper.from_array(kernel, "kernel"), numpy_helper.from_array(np.array([2], np.float32), "two")]
    nodes, last = [], "x"
    for number, operation in enumerate(before):
        nodes.append(helper.make_node(operation, [last, "two"], [f"x{number}"]))
        last = f"x{number}"
    nodes += [helper.make_node("Conv", [last, "kernel"], ["maps"]), helper.make_node("Flatten", ["maps"], ["y"])]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, size, size])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])]
    graph = helper.make_graph(nodes, "net", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, path)
    return path


def expected(path: Path, inputs: np.ndarray) -> np.ndarray:
    """The convolution by hand: float64 unit vectors of [B, 3, size, size]."""
    kernel = numpy_helper.to_array(onnx.load(path).graph.initializer[0]).astype(np.float64)
    out = np.einsum("bchw,dchw->bd", inputs.astype(np.float64), kernel)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


@pytest.fixture
def faces() -> torch.Tensor:
    return torch.randint(0, 256, (7, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("operations", "own"),
    [
        (["Sub", "Mul", "Conv"], True),
        (["Transpose", "Div", "Conv"], True),
        (["Conv", "Mul", "Sub"], False),
        (["BatchNormalization", "Conv"], False),
        ([], False),
    ],
)
def test_own_normalisation_is_found_by_operation_types(operations: list[str], own: bool) -> None:
    """Arithmetic before the first convolution means that the net normalises; names and later nodes do not matter."""
    assert normalises_itself(operations) is own


@pytest.mark.parametrize(
    ("before", "normalisation", "formula"),
    [
        ((), "auto", lambda x: (x - 127.5) / 127.5),
        (("Mul",), "auto", lambda x: 2 * x),
        ((), "none", lambda x: x),
        ((), "128", lambda x: (x - 127.5) / 128),
        (("Sub",), "127.5", lambda x: (x - 127.5) / 127.5 - 2),
    ],
)
def test_onnx_inputs(tmp_path: Path, faces: torch.Tensor, before: tuple[str, ...], normalisation: str, formula) -> None:
    """The net sees RGB in NCHW, normalised as found or as told."""
    path = write_onnx(tmp_path / "net.onnx", before)
    embedder = OnnxEmbedder(path, normalisation, CPU)
    inputs = formula(faces.permute(0, 3, 1, 2).numpy().astype(np.float64))
    np.testing.assert_allclose(embedder.embed(faces, mirror=False), expected(path, inputs), atol=2e-6)


def test_mirror_adds_the_embedding_of_the_mirrored_image(tmp_path: Path, faces: torch.Tensor) -> None:
    """Published protocol: f(x) + f(mirror(x)), not normalised before the sum, then normalised."""
    path = write_onnx(tmp_path / "net.onnx")
    inputs = (faces.permute(0, 3, 1, 2).numpy() - 127.5) / 127.5
    # The net is linear, so the sum of two embeddings is the embedding of the sum.
    wanted = expected(path, inputs + inputs[..., ::-1])
    np.testing.assert_allclose(OnnxEmbedder(path, "auto", CPU).embed(faces, mirror=True), wanted, atol=2e-6)


@pytest.mark.parametrize("batch", [1, 3, 10])
def test_onnx_files_with_a_fixed_batch(tmp_path: Path, faces: torch.Tensor, batch: int) -> None:
    """Exports with the batch size burnt in are fed in such batches, the last one filled up."""
    free, fixed = write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b.onnx", batch=batch)
    wanted = OnnxEmbedder(free, "auto", CPU).embed(faces, mirror=True)
    torch.testing.assert_close(OnnxEmbedder(fixed, "auto", CPU).embed(faces, mirror=True), wanted)


def test_a_state_dict_and_our_own_file_are_the_same_model(tmp_path: Path) -> None:
    """insightface's plain .pth needs the network's name; ours knows it. Both give the network's own embeddings."""
    torch.manual_seed(0)
    network = create_network("mbf", 32, 48).eval()
    torch.save(network.state_dict(), tmp_path / "backbone.pth")
    settings = '{"model": {"network": "mbf", "embedding_size": 32}, "data": {"image_size": 48}}'
    (tmp_path / "run").mkdir()
    save_backbone(tmp_path / "run" / "best.safetensors", network, settings, Progress(1, 0.9))
    faces = torch.randint(0, 256, (2, 48, 48, 3), dtype=torch.uint8)
    wanted = NetworkEmbedder(network, 48, CPU, "x").embed(faces, mirror=True)
    plain = load_embedder(tmp_path / "backbone.pth", CPU, network="mbf", embedding_size=32, image_size=48)
    for embedder in (plain, load_embedder(tmp_path / "run", CPU)):
        torch.testing.assert_close(embedder.embed(faces, mirror=True), wanted)
    assert load_embedder(tmp_path / "run", CPU).name == "run"
    torch.testing.assert_close(wanted.norm(dim=1), torch.ones(2))


def test_pickled_code_is_never_run(tmp_path: Path) -> None:
    """A .pth that is more than tensors is refused."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"evil\.pth holds more than tensors"):
        load_embedder(tmp_path / "evil.pth", CPU)
    assert not (tmp_path / "executed").exists()


def test_what_is_no_model_says_so(tmp_path: Path) -> None:
    """Missing, foreign and mismatched files name themselves."""
    (tmp_path / "x.txt").touch()
    (tmp_path / "x.onnx").write_bytes(b"no protobuf")
    torch.save({"weight": torch.zeros(1)}, tmp_path / "x.pth")
    for name, message in (
        ("y.onnx", "there is no model at"),
        ("x.txt", "expected a run folder"),
        ("x.onnx", "is no ONNX model"),
        ("x.pth", "does not hold the weights of r18"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_embedder(tmp_path / name, CPU, network="r18")
