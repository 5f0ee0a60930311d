"""Exports give the embeddings of the model that they were made from, and say what they are."""

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

import all_pair_test
from data.face_sets import FaceSetError
from models import create_network, load_embedder
from models.embedders import NetworkEmbedder
from models.embedders.network import Precision
from models.inputs import InputSpec
from tiny_exports import FLAGS, options, run
from utils import export as script
from utils.checkpoints import BEST, Progress, read_safetensors, save_backbone, settings_beside
from utils.export import export
from utils.exporting.comparison import choose_calibration, choose_set, deviation, load_faces
from utils.exporting.exportable import ExportError, mean_and_scale
from utils.exporting.onnx_file import prepend_normalisation, rename_telltale_nodes, write_onnx
from utils.exporting.source import CPU, Source, load_source


@pytest.fixture(scope="module")
def source(tested_run: Path) -> Source:
    return load_source(tested_run, "auto", "r50", 512, 112, "cc-by-nc-4.0")


@pytest.fixture(scope="module")
def faces(tiny_set: Path) -> torch.Tensor:
    return load_faces(tiny_set, 32, 7).pixels


@pytest.fixture(scope="module")
def exported(tested_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The ONNX file that these flags make, made once: torch takes seconds for it."""
    folder = tmp_path_factory.mktemp("exports")

    def export_once(*flags: str) -> Path:
        path = folder / f"x{''.join(flags)}.onnx"
        return path if path.exists() else run(tested_run, path, "--licence", "cc-by-nc-4.0", *flags)

    return export_once


def unit(vectors: np.ndarray) -> np.ndarray:
    """Rows to unit length, float64."""
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def insightface_feeds(path: Path) -> tuple[float, float]:
    """(mean, divisor) that insightface's ArcFaceONNX feeds a file with, by its rule about names of nodes."""
    names = [node.name for node in onnx.load(path).graph.node[:8]]
    sub = any(name.startswith(("Sub", "_minus")) for name in names)
    mul = any(name.startswith(("Mul", "_mul")) for name in names)
    return (0.0, 1.0) if sub and mul else (127.5, 127.5)


@pytest.mark.parametrize("folded", [False, True])
def test_onnx_as_others_run_it(
    tested_run: Path, exported: Callable[..., Path], faces: torch.Tensor, tmp_path: Path, folded: bool
) -> None:
    """insightface's rule about names finds what to feed, and onnxruntime then gives the model's vectors, for any number
    of faces; so does our own embedder, by the metadata and, without them, by the operations."""
    path = exported(*(["--fold-normalisation"] if folded else []))
    mean, divisor = insightface_feeds(path)
    assert (mean, divisor) == ((0.0, 1.0) if folded else (127.5, 127.5))
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [(entry.name, entry.shape, entry.type) for entry in session.get_inputs()] == [
        ("input", ["N", 3, 32, 32], "tensor(float)")
    ]
    assert [entry.name for entry in session.get_outputs()] == ["embedding"]
    expected = load_embedder(tested_run, CPU).embed(faces.numpy(), mirror=False)
    inputs = (faces.permute(0, 3, 1, 2).numpy().astype(np.float32) - np.float32(mean)) / np.float32(divisor)
    for count in (1, 2, 7):
        (found,) = session.run(None, {"input": inputs[:count]})
        np.testing.assert_allclose(unit(found), unit(expected[:count]), atol=1e-5)
    np.testing.assert_allclose(load_embedder(path, CPU).embed(faces.numpy(), mirror=False), expected, atol=1e-5)
    model = onnx.load(path)
    del model.metadata_props[:]
    onnx.save(model, tmp_path / "bare.onnx")
    bare = load_embedder(tmp_path / "bare.onnx", CPU)
    np.testing.assert_allclose(bare.embed(faces.numpy(), mirror=False), expected, atol=1e-5)


def test_metadata_of_an_onnx_file(source: Source, exported: Callable[..., Path]) -> None:
    """What a stranger needs to use the file is in it; paths of the machine that made it are not."""
    for folded in (False, True):
        path = exported(*(["--fold-normalisation"] if folded else []))
        metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
        where = "inside this file" if folded else "to be done by the caller"
        assert metadata["normalisation"] == f"(rgb - 127.5) / 127.5, {where}"
        assert json.loads(metadata["face_inputs"])["normalisation"] == ("none" if folded else "127.5")
    wanted = {
        "network": "demo",
        "embedding_size": "16",
        "image_size": "32",
        "colour_order": "RGB",
        "precision": "fp32",
        "training_sets": "tiny",
        "loss": "arcface (margin 0.2, scale 8)",
        "licence": "cc-by-nc-4.0",
    }
    assert {key: metadata[key] for key in wanted} == wanted
    assert json.loads(metadata["accuracy"]) == {"tiny": 0.9125}
    assert json.loads(metadata["versions"])["torch"] == torch.__version__
    data = path.read_bytes()
    for secret in (source.trained_on["data"]["root"][0], str(Path(__file__).parents[1])):
        assert secret.encode() not in data


def test_fp16_and_int8_onnx(
    tested_run: Path, source: Source, exported: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both are smaller, close to the model, folded or not, and a .bin tells the accuracy before and after."""
    whole = exported().stat().st_size
    half = run(tested_run, tmp_path / "half.onnx", "--precision", "fp16", "--fold-normalisation")
    assert half.stat().st_size < 0.6 * whole
    assert insightface_feeds(half) == (0.0, 1.0)
    assert "in float16 by torch: largest deviation" in capsys.readouterr().out
    (tiny_bin,) = Path(source.trained_on["data"]["root"][0]).glob("*.bin")
    flags = ["--precision", "int8", "--set", str(tiny_bin), "--calibration-images", "8", "--fold-normalisation"]
    small = run(tested_run, tmp_path / "small.onnx", *flags)
    shown = capsys.readouterr().out
    assert small.stat().st_size < 0.4 * whole
    assert insightface_feeds(small) == (0.0, 1.0)
    assert f"calibrated on {tiny_bin.parent}\n" in shown
    assert "accuracy on tiny: " in shown
    graph = onnx.load(small).graph
    assert sum(node.op_type == "QuantizeLinear" for node in graph.node) >= 6
    assert any(weight.data_type == onnx.TensorProto.INT8 for weight in graph.initializer)


@pytest.mark.parametrize("flags", [(), ("--fold-normalisation",), ("--precision", "fp16")])
def test_torchscript(tested_run: Path, faces: torch.Tensor, tmp_path: Path, flags: tuple[str, ...]) -> None:
    """torch alone loads it, for any number of faces; so do we; it says what it is."""
    path = run(tested_run, tmp_path / "x.pt", "--format", "torchscript", *flags)
    extra = {"metadata.json": ""}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        program = torch.jit.load(str(path), _extra_files=extra)
    folded = "--fold-normalisation" in flags
    spec = InputSpec("none" if folded else "127.5")
    expected = load_embedder(tested_run, CPU).embed(faces, mirror=False)
    atol = 1e-2 if "fp16" in flags else 1e-5
    for count in (1, 7):
        with torch.no_grad():
            found = program(spec.to_input(faces[:count]))
        assert found.dtype == torch.float32
        np.testing.assert_allclose(unit(found.numpy()), expected[:count], atol=atol)
    torch.testing.assert_close(load_embedder(path, CPU).embed(faces, mirror=False), expected, atol=atol, rtol=0)
    stated = json.loads(extra["metadata.json"])
    assert stated["normalisation"].endswith("inside this file" if folded else "to be done by the caller")
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    assert not [name for name in records if name.endswith(".debug_pkl")]
    for folder in (Path(__file__).parents[1], Path(torch.__file__).parent, tested_run):
        assert not [name for name, data in records.items() if str(folder).encode() in data]


def test_safetensors(tested_run: Path, source: Source, faces: torch.Tensor, tmp_path: Path) -> None:
    """Loads without being told the network, in float32 exactly; names no folder of the machine that trained it."""
    whole = run(tested_run, tmp_path / "x.safetensors", "--format", "safetensors")
    half = run(tested_run, tmp_path / "h.safetensors", "--format", "safetensors", "--precision", "fp16")
    assert half.stat().st_size < 0.6 * whole.stat().st_size
    expected = source.embedder.embed(faces, mirror=True)
    assert torch.equal(load_embedder(whole, CPU).embed(faces, mirror=True), expected)
    torch.testing.assert_close(load_embedder(half, CPU).embed(faces, mirror=True), expected, atol=5e-3, rtol=0)
    assert source.trained_on["data"]["root"][0].encode() not in whole.read_bytes()


@pytest.mark.parametrize("format_name", ["onnx", "safetensors"])
def test_a_set_whose_name_is_no_utf8(tmp_path: Path, format_name: str) -> None:
    """A folder may be called so, and a run train on it; files that have to state it in UTF-8 can be written all the
    same."""
    data = {"root": ["sets/f\udcff"], "image_size": 32}
    settings = json.dumps({"model": {"network": "demo", "embedding_size": 16}, "data": data})
    (tmp_path / "run").mkdir()
    save_backbone(tmp_path / "run" / BEST, create_network("demo", 16, 32), settings, Progress(1, 0.5))
    source = load_source(tmp_path / "run", "auto", "", 0, 32, "")
    output = tmp_path / f"x{script._SUFFIXES[format_name]}"
    export(source, output, options(format=format_name, images=2))
    if format_name == "safetensors":
        assert read_safetensors(output, metadata_only=True)[1]["training_sets"] == "f?"


def test_another_normalisation_has_to_be_folded_in(source: Source, faces: torch.Tensor, tmp_path: Path) -> None:
    """Callers feed (rgb - 127.5) / 127.5, or RGB as it is: a network that expects else cannot leave it to them."""
    embedder = NetworkEmbedder(source.network, 32, CPU, "other", inputs=InputSpec("128"))
    other = Source(embedder, source.facts, source.trained_on)
    for format_name in ("onnx", "torchscript", "safetensors", "hub"):
        with pytest.raises(ExportError, match=r"another normalisation.*--fold-normalisation"):
            export(other, tmp_path / "x", options(format=format_name))
    for format_name, path in (("onnx", tmp_path / "x.onnx"), ("torchscript", tmp_path / "x.pt")):
        export(other, path, options(format=format_name, fold_normalisation=True))
        if format_name == "onnx":
            metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
            assert metadata["normalisation"] == "(rgb - 127.5) / 128, inside this file"
        found = load_embedder(path, CPU).features(faces, mirror=False)
        torch.testing.assert_close(found, embedder.features(faces, mirror=False), atol=1e-4, rtol=1e-4)
    # A network that takes 0..255 as it is gets the nodes all the same, by whose names insightface knows.
    assert mean_and_scale("none") == (0, 1)
    assert mean_and_scale("127.5") == (127.5, 1 / 127.5)


def test_how_a_model_is_named(tested_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By its place or by --model, as messages say; what another script tests is not what is exported, nor ignored."""
    output = tmp_path / "x.safetensors"
    script.main(["--model", str(tested_run), "--format", "safetensors", "--output", str(output), *FLAGS])
    assert f"model: {tested_run}: demo" in capsys.readouterr().out
    assert output.exists()
    with pytest.raises(
        SystemExit, match=r"test\.model is what all_pair_test\.py tests: to export it, --model elsewhere"
    ):
        script.main(["--test.model", "elsewhere", "--format", "safetensors", *FLAGS])
    with pytest.raises(SystemExit, match=r"or give --model$"):
        script.main(["--common.runs", str(tmp_path), *FLAGS])


def test_default_outputs(tested_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the run's folder; for weights from elsewhere in a folder of their own. Names tell the variants apart."""
    runs = Path("runs")
    for settings, name in (
        ({}, "tiny.onnx"),
        ({"precision": "int8", "fold_normalisation": True}, "tiny-int8-rgb255.onnx"),
        ({"format": "hub"}, "tiny"),
    ):
        assert script.default_output(tested_run, "tiny", options(**settings), runs) == tested_run / "export" / name
    elsewhere = script.default_output(tmp_path / "backbone.pth", "backbone", options(format="torchscript"), runs)
    assert elsewhere == runs / "export-backbone" / "backbone.pt"


def test_settings_of_a_hub_folder_are_settings(tested_run: Path, faces: torch.Tensor, tmp_path: Path) -> None:
    """The folder is a model like any other: it loads by its name, and its config.json is understood by our scripts."""
    folder = run(tested_run, tmp_path / "face-model", "--format", "hub")
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    settings = settings_beside(folder)
    assert settings["model.network"] == "demo"
    assert settings["data.root"] == ["tiny"]
    assert settings["export.normalisation"] == "(rgb - 127.5) / 127.5, to be done by the caller"
    embedder = load_embedder(folder, CPU)
    assert embedder.name == "face-model"
    assert all_pair_test.is_model(folder), "it needs no --model beside a set"
    assert torch.equal(embedder.embed(faces, True), load_embedder(tested_run, CPU).embed(faces, True))
    for file in folder.iterdir():
        assert str(tested_run.parent).encode() not in file.read_bytes()


def test_names_that_would_mislead_insightface_are_changed(tmp_path: Path) -> None:
    """A network with arithmetic of its own, and with names like ours, is told from one that normalises its input."""
    nodes = [
        helper.make_node("Sub", ["input", "mean"], ["scale"], "Sub_1"),
        helper.make_node("Mul", ["scale", "mean"], ["embedding"], "_mul3"),
    ]
    mean = helper.make_tensor("mean", onnx.TensorProto.FLOAT, [], [3.0])
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", 4]) for name in ("input", "embedding")]
    graph = helper.make_graph(nodes, "net", ends[:1], ends[1:], [mean])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    rename_telltale_nodes(model)
    write_onnx(model, tmp_path / "x.onnx", {})
    assert insightface_feeds(tmp_path / "x.onnx") == (127.5, 127.5)
    prepend_normalisation(model, 127.5, 0.5)
    write_onnx(model, tmp_path / "y.onnx", {"key": "value"})
    assert insightface_feeds(tmp_path / "y.onnx") == (0.0, 1.0)
    session = onnxruntime.InferenceSession(str(tmp_path / "y.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": np.array([[0, 127.5, 137.5, 255]], np.float32)})
    np.testing.assert_allclose(found, [[3 * (x - 3) for x in (-63.75, 0, 5, 63.75)]])


def test_deviation_is_one_minus_the_cosine() -> None:
    """In float64, whatever the lengths; not a number where a value is not finite, which no bound lets pass."""
    generator = torch.Generator().manual_seed(0)
    model = torch.randn(5, 16, generator=generator)
    export_ = 3 * model + 1e-3 * torch.randn(5, 16, generator=generator)
    cosines = (unit(model.numpy()) * unit(export_.numpy())).sum(1)
    found = deviation(model, export_)
    assert found.largest == pytest.approx((1 - cosines).max(), rel=1e-6)
    assert found.mean == pytest.approx((1 - cosines).mean(), rel=1e-6)
    assert found.faces == 5
    export_[2, 3] = float("nan")
    assert np.isnan(deviation(model, export_).largest)
    with pytest.raises(ExportError, match="deviates from the model by nan"):
        script._require_below(deviation(model, export_), 1e-5, "it")


def test_faces_to_compare_on(tiny_set: Path, tmp_path: Path) -> None:
    """A named set, else the run's own that is still there, else drawn faces; int8 is calibrated on other faces."""
    settings = {"data": {"root": ["/nowhere", str(tiny_set)], "verification": ["/nowhere.bin"]}}
    assert choose_set("x.bin", settings) == Path("x.bin")
    assert choose_set("", settings) == tiny_set / "tiny.bin"
    out_of_sight = {"data": {"root": ["x" * 300, str(tiny_set)]}}  # not to be looked up, as in others' folders
    assert choose_set("", out_of_sight) == tiny_set / "tiny.bin"
    assert choose_calibration("", out_of_sight, None) == tiny_set
    assert choose_set("", {"data": {"root": ["/nowhere"]}}) is None
    assert choose_set("", {}) is None
    assert choose_calibration("y.bin", settings, None) == Path("y.bin")
    assert choose_calibration("", settings, Path("x.bin")) == tiny_set
    assert choose_calibration("", {}, Path("x.bin")) == Path("x.bin")
    compared, calibrated = (load_faces(tiny_set, 32, 20, calibration) for calibration in (False, True))
    assert compared.pixels.shape == (20, 32, 32, 3)
    alike = (compared.pixels[:, None] == calibrated.pixels).flatten(2).all(2)
    assert not alike.any()
    drawn = [load_faces(None, 48, 3, calibration) for calibration in (False, True)]
    assert drawn[0].pixels.shape == (3, 48, 48, 3)
    assert not torch.equal(drawn[0].pixels, drawn[1].pixels)
    broken = tmp_path / "broken"
    for person in range(3):
        (broken / str(person)).mkdir(parents=True)
        (broken / str(person) / "0.jpg").write_bytes(b"no image")
    with pytest.raises(FaceSetError, match="0 of its 3 faces can be decoded and are square"):
        load_faces(broken, 32, 2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_numbers_of_other_weights_are_not_quoted(tested_run: Path, tmp_path: Path, precision: Precision) -> None:
    """A run that was tested and then went on: its results are those of weights that are no more."""
    folder = tmp_path / "tiny"
    shutil.copytree(tested_run, folder)
    results = folder / "test" / "results.json"
    results.write_text(json.dumps({**json.loads(results.read_text()), "precision": precision}))
    fingerprint = load_embedder(folder, CPU, precision=precision).fingerprint
    models = {"x": {"fingerprint": fingerprint}, "other": {"fingerprint": "1"}}
    (folder / "test" / "report.json").write_text(json.dumps({"models": models}))
    assert load_source(folder, "auto", "", 0, 112, "").facts.accuracies() == {"tiny": 0.9125}
    (folder / "test" / "report.json").write_text(json.dumps({"models": {"x": {"fingerprint": "1"}}}))
    with pytest.warns(UserWarning, match=r"results\.json is of other weights than these"):
        assert load_source(folder, "auto", "", 0, 112, "").facts.tests == {}


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"precision": "x"}', b"\xff", b"[" * 100_000])
@pytest.mark.parametrize("name", ["results.json", "report.json"])
def test_damaged_numbers_are_not_quoted(tested_run: Path, tmp_path: Path, name: str, content: bytes) -> None:
    """What is beside the weights is no reason not to export them."""
    folder = tmp_path / "tiny"
    shutil.copytree(tested_run, folder)
    (folder / "test" / name).write_bytes(content)
    with pytest.warns(UserWarning, match=r"results\.json, or report\.json beside it, is damaged"):
        assert load_source(folder, "auto", "", 0, 112, "").facts.tests == {}


def test_weights_for_bgr_are_exported_for_rgb(tmp_path: Path) -> None:
    """`--model.colour bgr` reaches the export, which takes RGB as every other does."""
    torch.manual_seed(0)
    network = create_network("demo", 16, 32).eval()
    torch.save(network.state_dict(), tmp_path / "bgr.pth")
    flags = ["--format", "safetensors", "--model.colour", "bgr", "--data.image-size", "32"]
    path = run(tmp_path / "bgr.pth", tmp_path / "x.safetensors", *flags)
    faces = load_faces(None, 32, 3).pixels
    wanted = NetworkEmbedder(network, 32, CPU, "x", inputs=InputSpec(colour="bgr")).features(faces, mirror=False)
    torch.testing.assert_close(load_embedder(path, CPU).features(faces, mirror=False), wanted, atol=1e-6, rtol=1e-4)
    plain = NetworkEmbedder(network, 32, CPU, "x").features(faces, mirror=False)
    assert (plain - wanted).norm() > 0.05 * wanted.norm()


@pytest.mark.long
def test_the_real_weights(face_data: Path, tmp_path: Path) -> None:
    """insightface's MobileFaceNet under mxnet's names becomes an ONNX file that embeds real faces as the conversion
    that came with it does: both take RGB 0..255."""
    weights = face_data / "models" / "mobilefacenet_y1_mxnetkeys_state_dict.pth"
    flags = ["--fold-normalisation", "--set", str(face_data / "faces_glint24"), "--images", "12"]
    path = run(weights, tmp_path / "y1.onnx", *flags)
    faces = load_faces(face_data / "faces_glint24", 112, 12).pixels.numpy()
    kit = load_embedder(face_data / "models" / "mobilefacenet_y1_128d.onnx", CPU).embed(faces, mirror=False)
    cosines = (unit(kit) * unit(load_embedder(path, CPU).embed(faces, mirror=False))).sum(1)
    assert cosines.min() > 0.99999
