"""Models from anywhere give the embeddings that their weights mean."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from models import create_network
from models.backbones.mobilefacenet_original import OriginalMobileFaceNet
from models.embedders import FaceEmbedder, InputSpec, NetworkEmbedder, OnnxEmbedder, load_embedder
from models.embedders.onnx_file import INPUTS_KEY
from models.weights import load_network
from utils.checkpoints import CheckpointError, Progress, save_backbone

CPU = torch.device("cpu")
SIZE = 16
ROOT = Path(__file__).resolve().parents[1]


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
    ("before", "normalisation", "formula"),
    [
        ((), "auto", lambda x: (x - 127.5) / 127.5),
        (("Div",) * 5, "auto", lambda x: x / 32),
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


def test_an_onnx_file_for_thousands_of_faces_at_once(tmp_path: Path) -> None:
    """Its number takes memory and time whatever there is to embed: too many are refused, not run out of memory for."""
    OnnxEmbedder(write_onnx(tmp_path / "many.onnx", batch=4_096), "auto", CPU)
    with pytest.raises(CheckpointError, match=r"more\.onnx takes 4,097 faces at once, 4,096 are the most"):
        OnnxEmbedder(write_onnx(tmp_path / "more.onnx", batch=4_097), "auto", CPU)


def test_a_state_dict_and_our_own_file_are_the_same_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    monkeypatch.chdir(tmp_path / "run")
    assert load_embedder(tmp_path / "run", CPU).name == load_embedder(".", CPU).name == "run"
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
        ("x.pth", "looks like none of the networks here, and is not r18"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_embedder(tmp_path / name, CPU, network="r18")


@pytest.fixture
def embedder() -> NetworkEmbedder:
    """A network of one layer, whose features tell left from right and the colours apart."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 5))
    return NetworkEmbedder(network.eval(), SIZE, CPU, "linear")


def test_features_have_lengths_and_embeddings_have_none(embedder: NetworkEmbedder, faces: torch.Tensor) -> None:
    """`features` is f(x), with the mirror f(x) + f(flip x); `embed` the same at length 1."""
    pixels = (faces.permute(0, 3, 1, 2).double() - 127.5) / 127.5
    double = embedder.network.double()
    with torch.no_grad():
        plain, both = double(pixels), double(pixels) + double(pixels.flip(3))
    embedder.network.float()
    torch.testing.assert_close(embedder.features(faces, False).double(), plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(embedder.features(faces, True).double(), both, rtol=1e-5, atol=1e-5)
    unit = both / both.norm(dim=1, keepdim=True)
    torch.testing.assert_close(embedder.embed(faces).double(), unit, rtol=1e-5, atol=1e-5)
    assert embedder.features(faces, False).dtype == torch.float32


def test_arrays_lists_and_single_faces(embedder: NetworkEmbedder, faces: torch.Tensor) -> None:
    """What a caller has at hand gives the same numbers, an array for arrays, a vector for one face."""
    wanted = embedder.embed(faces)
    arrays = faces.numpy()
    for given in (arrays, list(arrays), np.repeat(arrays, 20, axis=0)[::20], arrays[:, :, ::-1][:, :, ::-1]):
        found = embedder.embed(given)
        assert isinstance(found, np.ndarray)
        np.testing.assert_allclose(found, wanted.numpy(), atol=1e-6)
    readonly = arrays.copy()
    readonly.flags.writeable = False
    np.testing.assert_allclose(embedder.embed(readonly), wanted.numpy(), atol=1e-6)
    np.testing.assert_allclose(embedder.embed(arrays[0]), wanted[0].numpy(), atol=1e-6)
    torch.testing.assert_close(embedder.embed(faces[0]), wanted[0])
    assert embedder.embed(arrays[:0]).shape == embedder.embed([]).shape == (0, 5)


def test_many_faces_go_through_in_parts(embedder: NetworkEmbedder, faces: torch.Tensor) -> None:
    """An array of any length takes the memory of ARRAY_BATCH faces, and each row is its face's."""
    batches: list[int] = []
    embedder.network.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    many = faces.numpy()[np.arange(150) % 7]
    found = embedder.embed(many, mirror=False)
    assert batches == [64, 64, 22]
    np.testing.assert_allclose(found, embedder.embed(faces, mirror=False).numpy()[np.arange(150) % 7], atol=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        np.zeros((2, SIZE, SIZE, 3), np.float32),
        np.zeros((2, 3, SIZE, SIZE), np.uint8),
        np.zeros((2, SIZE + 1, SIZE, 3), np.uint8),
        np.zeros((2, SIZE, SIZE), np.uint8),
        torch.zeros(2, SIZE, SIZE, 4, dtype=torch.uint8),
    ],
)
def test_other_shapes_and_types_are_refused(embedder: NetworkEmbedder, wrong: np.ndarray | torch.Tensor) -> None:
    """Pixels that were scaled already, channels first, another size: said with what is wanted, not embedded."""
    with pytest.raises(ValueError, match=r"linear takes aligned faces as uint8 \[B, 16, 16, 3\], RGB; got"):
        embedder.embed(wrong)
    with pytest.raises(ValueError, match="must be of one size"):
        embedder.embed([np.zeros((SIZE, SIZE, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)])


@pytest.mark.parametrize(
    ("wrong", "hint"),
    [
        (np.zeros((2, SIZE, SIZE, 3)), "got float64 .*: give the pixels as they are in the picture, 0..255"),
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "the colours come last"),
        (np.zeros((40, 40, 3), np.uint8), "align the faces to this size"),
        (np.zeros((70, SIZE, SIZE), np.uint8), r"got uint8 \[1, 70, 16, 16\]"),
        (["a.jpg", "b.jpg"], "takes pictures, not their names"),
        (Path("a.jpg"), "takes pictures, not their names"),
        ([None], "an array, a tensor or a list of faces, got list"),
        (None, "an array, a tensor or a list of faces, got NoneType"),
    ],
)
def test_newcomers_are_told_what_to_do(embedder: NetworkEmbedder, wrong: Any, hint: str) -> None:
    """Names of files, None of a failed cv2.imread, scaled pixels: the message says what is wanted instead."""
    with pytest.raises(ValueError, match=hint):
        embedder.embed(wrong)


def test_pictures_and_tensors_in_lists(embedder: NetworkEmbedder, faces: torch.Tensor) -> None:
    """What has pixels is an array: Pillow's pictures, one or several, and lists of tensors."""
    wanted = embedder.embed(faces.numpy())
    pictures = [Image.fromarray(face) for face in faces.numpy()]
    np.testing.assert_array_equal(embedder.embed(pictures), wanted)  # type: ignore[arg-type]
    np.testing.assert_array_equal(embedder.embed(list(faces)), wanted)  # type: ignore[arg-type]
    np.testing.assert_allclose(embedder.embed(pictures[0]), wanted[0], atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize(("option", "value"), [("colour", "BGR"), ("normalisation", "255")])
def test_options_that_are_none_are_refused(tmp_path: Path, option: str, value: str) -> None:
    """`BGR` is not `bgr`: it must not be taken for RGB in silence, of weights or of ONNX files."""
    torch.save(create_network("mbf", 32, 48).state_dict(), tmp_path / "x.pth")
    for file in (tmp_path / "x.pth", write_onnx(tmp_path / "x.onnx")):
        with pytest.raises(ValueError, match=f"^{option} must be one of auto, .*, got '{value}'"):
            load_embedder(file, "cpu", **{option: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"^{option} must be one of"):
        load_network(tmp_path / "x.pth", **{option: value})  # type: ignore[arg-type]


def test_onnx_files_that_are_no_embedders(tmp_path: Path, faces: torch.Tensor) -> None:
    """No faces give no embeddings; a detector, whose rows are anchors, and an input of bytes are refused."""
    plain = write_onnx(tmp_path / "plain.onnx")
    assert load_embedder(plain, CPU).embed([]).shape == (0, 5)
    model = onnx.load(plain)
    model.graph.node[-1].CopyFrom(helper.make_node("Reshape", ["maps", "shape"], ["y"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1, 1]), "shape"))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, ["anchors", 1]))
    onnx.save(model, tmp_path / "detector.onnx")
    with pytest.raises(CheckpointError, match=r"its output for 7 faces is \[35, 1\].*is it a detector"):
        load_embedder(tmp_path / "detector.onnx", CPU).embed(faces)
    model = onnx.load(plain)
    model.graph.node.insert(0, helper.make_node("Cast", ["x"], ["pixels"], to=TensorProto.FLOAT))
    model.graph.node[1].input[0] = "pixels"
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    onnx.save(model, tmp_path / "bytes.onnx")
    with pytest.raises(CheckpointError, match=r"bytes\.onnx takes x: tensor\(uint8\): expected one input of float32"):
        load_embedder(tmp_path / "bytes.onnx", CPU)


@pytest.mark.parametrize("seen", [5, "ab", ["a", "b"], [1.5, 3], [True, 3], [0, 9, 2, 4], [9, 9], [-4, 9], {}])
@pytest.mark.parametrize("name", ["rows", "columns"])
def test_parts_of_a_face_that_cannot_be(name: str, seen: Any) -> None:
    """A file that says so is refused when it is opened, not in the middle of the work."""
    with pytest.raises(ValueError, match=f"^{name} must be the first and one past the last, got "):
        InputSpec(**{name: seen})
    assert InputSpec(**{name: [8, 104]}).as_json()[name] == [8, 104]


@pytest.mark.parametrize("normalisation", ["none", "127.5", "128"])
@pytest.mark.parametrize("colour", ["rgb", "bgr"])
def test_inputs(faces: torch.Tensor, normalisation: str, colour: str) -> None:
    """What a network gets: its order of colours, its scale, its part of the picture, mirrored or not."""
    spec = InputSpec(normalisation, colour, rows=(1, 9), columns=(2, 14))  # type: ignore[arg-type]
    for mirror in (False, True):
        wanted = faces.numpy()[:, :, ::-1] if mirror else faces.numpy()
        wanted = wanted[:, 1:9, 2:14, :: -1 if colour == "bgr" else 1].transpose(0, 3, 1, 2).astype(np.float64)
        if normalisation != "none":
            wanted = (wanted - 127.5) / float(normalisation)
        found = spec.to_input(faces, mirror)
        assert found.dtype == torch.float32
        np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="colour must be one of rgb, bgr"):
        InputSpec(colour="grey")  # type: ignore[arg-type]


def test_a_fingerprint_is_of_all_that_decides_the_numbers(embedder: NetworkEmbedder, tmp_path: Path) -> None:
    """The same for the same weights; another for other weights, input, precision, network or file."""
    network = embedder.network

    def made(precision: torch.dtype = torch.float32, inputs: InputSpec | None = None, size: int = SIZE) -> str:
        return NetworkEmbedder(network, size, CPU, "another name", precision, inputs).fingerprint

    first = embedder.fingerprint
    assert made() == first
    prints = {
        first,
        made(torch.bfloat16),
        made(inputs=InputSpec("128")),
        made(inputs=InputSpec(colour="bgr")),
        made(size=8),
    }
    network.append(torch.nn.Identity())
    prints.add(made())
    del network[2]
    with torch.no_grad():
        network[1].weight[0, 0] += 1e-3
    prints.add(made())
    assert len(prints) == 7
    with torch.no_grad():
        network[1].weight[0, 0] -= 1e-3
    network.register_buffer("mean", torch.zeros(1), persistent=False)  # as timm's networks have it
    prints.add(made())
    network.get_buffer("mean").fill_(0.5)
    prints.add(made())
    assert len(prints) == 9
    scaled = [OriginalMobileFaceNet(8, 16, input_scale=scale) for scale in (1.0, 0.5)]
    scaled[1].load_state_dict(scaled[0].state_dict())
    assert len({NetworkEmbedder(one, SIZE, CPU, "x").fingerprint for one in scaled}) == 2
    a, b = write_onnx(tmp_path / "a.onnx"), write_onnx(tmp_path / "b.onnx")
    assert OnnxEmbedder(a, "auto", CPU).fingerprint == OnnxEmbedder(b, "auto", CPU).fingerprint
    assert OnnxEmbedder(a, "auto", CPU).fingerprint != OnnxEmbedder(a, "128", CPU).fingerprint
    write_onnx(b, before=("Mul",))
    assert OnnxEmbedder(a, "none", CPU).fingerprint != OnnxEmbedder(b, "none", CPU).fingerprint


def with_metadata(path: Path, text: str) -> Path:
    model = onnx.load(path)
    entry = model.metadata_props.add()
    entry.key, entry.value = INPUTS_KEY, text
    onnx.save(model, path)
    return path


def test_metadata_of_onnx_files(tmp_path: Path, faces: torch.Tensor) -> None:
    """What an export wrote of its input holds, unless told otherwise; nonsense there is refused."""
    path = with_metadata(write_onnx(tmp_path / "net.onnx"), '{"normalisation": "128", "colour": "bgr"}')
    pixels = faces.permute(0, 3, 1, 2).numpy().astype(np.float64)
    wanted = expected(path, (pixels[:, ::-1] - 127.5) / 128)
    np.testing.assert_allclose(load_embedder(path, CPU).embed(faces, mirror=False), wanted, atol=2e-6)
    found = load_embedder(path, CPU, normalisation="none", colour="rgb").embed(faces, mirror=False)
    np.testing.assert_allclose(found, expected(path, pixels), atol=2e-6)
    with pytest.raises(
        CheckpointError, match=r"bad\.onnx: its metadata 'face_inputs' cannot be used: normalisation must"
    ):
        load_embedder(with_metadata(write_onnx(tmp_path / "bad.onnx"), '{"normalisation": "7"}'), CPU)


def reshaped(path: Path, shape: list[int | str], transpose: bool = False) -> Path:
    """The net of `path` with another shape of its input; `transpose`: its input has the channels last."""
    model = onnx.load(path)
    graph = model.graph
    if transpose:
        graph.node.insert(0, helper.make_node("Transpose", ["x"], ["first"], perm=[0, 3, 1, 2]))
        graph.node[1].input[0] = "first"
    graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, shape))
    onnx.save(model, path)
    return path


def test_shapes_of_onnx_inputs(tmp_path: Path, faces: torch.Tensor) -> None:
    """Channels last, as converters from TensorFlow write it, and any size, are embedded as any other."""
    plain = write_onnx(tmp_path / "plain.onnx")
    wanted = OnnxEmbedder(plain, "auto", CPU).embed(faces)
    last = reshaped(write_onnx(tmp_path / "last.onnx"), ["N", SIZE, SIZE, 3], transpose=True)
    free = reshaped(write_onnx(tmp_path / "free.onnx"), ["N", 3, "height", "width"])
    for path in (last, free):
        torch.testing.assert_close(load_embedder(path, CPU, image_size=SIZE).embed(faces), wanted)
    with pytest.raises(CheckpointError, match=r"takes inputs of shape \['N', 3, 16, 20\]"):
        load_embedder(reshaped(write_onnx(tmp_path / "odd.onnx"), ["N", 3, 16, 20]), CPU)


def test_narrow_onnx_nets_see_the_middle(tmp_path: Path) -> None:
    """A net for 112x96, as SphereFace's, takes 112x112 faces and sees the columns 8..103."""
    path = write_onnx(tmp_path / "narrow.onnx", size=96)
    model = onnx.load(path)
    kernel = np.random.default_rng(1).normal(0, 0.01, (5, 3, 112, 96)).astype(np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    onnx.save(model, path)
    reshaped(path, ["N", 3, 112, 96])
    faces = torch.randint(0, 256, (2, 112, 112, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    inputs = (faces.permute(0, 3, 1, 2).numpy()[..., 8:104] - 127.5) / 127.5
    embedder = load_embedder(path, CPU)
    assert embedder.image_size == 112
    np.testing.assert_allclose(embedder.embed(faces, mirror=False), expected(path, inputs), atol=2e-6)


def test_half_precision_is_near_and_has_a_fingerprint_of_its_own(tmp_path: Path) -> None:
    """`precision` reaches the network; an ONNX file cannot be told it, and neither can a word that is none."""
    torch.manual_seed(0)
    network = create_network("mbf", 32, 48).eval()
    torch.save(network.state_dict(), tmp_path / "x.pth")
    faces = torch.randint(0, 256, (4, 48, 48, 3), dtype=torch.uint8)
    full, half = (load_embedder(tmp_path / "x.pth", "cpu", network="mbf", precision=p) for p in ("fp32", "bf16"))
    cosines = (full.embed(faces) * half.embed(faces)).sum(1)
    assert 0.98 < cosines.min() < 0.999999
    assert full.fingerprint != half.fingerprint
    with pytest.raises(CheckpointError, match="an ONNX file computes as it was exported"):
        load_embedder(write_onnx(tmp_path / "x.onnx"), "cpu", precision="bf16")
    with pytest.raises(ValueError, match="precision must be one of fp32, bf16, fp16, got 'half'"):
        load_embedder(tmp_path / "x.pth", "cpu", precision="half")  # type: ignore[arg-type]


class Mine(FaceEmbedder):
    """As docs/embedders.md has it: a network whose weights want gradients."""

    name, runs_on, image_size, device, fingerprint = "mine", "CPU", SIZE, CPU, "mine 1"  # type: ignore[assignment]

    def __init__(self) -> None:
        self.network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 5))

    def _forward(self, faces: torch.Tensor, mirror: bool) -> torch.Tensor:
        return self.network(InputSpec().to_input(faces, mirror))


def test_an_embedder_of_ones_own(faces: torch.Tensor) -> None:
    """Its author need not think of gradients: arrays come out, and no graph is kept from batch to batch."""
    mine = Mine()
    vectors = mine.embed(faces.numpy())
    assert vectors.shape == (7, 5)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1)
    assert not mine.embed(faces).requires_grad


def test_importing_models_is_light() -> None:
    """`from models import load_embedder` is there, and `import models` alone brings nothing of embedders."""
    code = (
        "import sys, models; print([m for m in ('cv2', 'onnx', 'onnxruntime', 'models.embedders') if m in sys.modules])"
    )
    code += "; from models import load_embedder; print(load_embedder.__module__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]", "models.embedders.load"]


def test_features_are_tensors_like_any_other(embedder: NetworkEmbedder, faces: torch.Tensor) -> None:
    """They can be changed in place, and a layer can learn from them."""
    features = embedder.features(faces, mirror=True)
    features /= features.norm(dim=1, keepdim=True)
    layer = torch.nn.Linear(features.shape[1], 2)
    layer(features).sum().backward()
    assert layer.weight.grad is not None
    assert not features.requires_grad
