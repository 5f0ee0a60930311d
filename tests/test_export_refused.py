"""An export that cannot be made, or is no longer the model, says so and leaves nothing behind."""

import copy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from data.images import encode_png
from data.verification_bin import write_bin
from models.embedders import NetworkEmbedder
from saved_steps import files_up_to
from tiny_exports import options, run
from utils import export as script
from utils.export import export
from utils.exporting.exportable import ExportError
from utils.exporting.source import CPU, Source, load_source
from utils.settings import ConfigError


@pytest.fixture(scope="module")
def source(tested_run: Path) -> Source:
    return load_source(tested_run, "auto", "r50", 512, 112, "")


@pytest.fixture(scope="module")
def exported(tested_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ONNX file of it."""
    return run(tested_run, tmp_path_factory.mktemp("exports") / "x.onnx")


def test_a_bin_that_cannot_be_tested_on_leaves_no_export(tested_run: Path, tmp_path: Path) -> None:
    """Its accuracy is measured before the export is written: an error after it would look as if there were none."""
    face = encode_png(np.zeros((48, 48, 3), np.uint8))
    write_bin(tmp_path / "large.bin", [face] * 20, [True, False] * 5)
    with pytest.raises(SystemExit, match="large, image A of pair 0 is 48x48 pixels, expected 32x32"):
        run(tested_run, tmp_path / "x.onnx", "--precision", "fp16", "--set", str(tmp_path / "large.bin"))
    assert not (tmp_path / "x.onnx").exists()


def test_where_nothing_can_be_written_is_told_before_any_face_is_embedded(
    tested_run: Path, tiny_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measuring the accuracy of a large network takes an hour on a CPU."""
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "README.md").touch()
    monkeypatch.setattr(script, "verify", lambda *_: pytest.fail("faces were embedded"))
    flags = ["--precision", "fp16", "--set", f"{tiny_set}/tiny.bin"]
    with pytest.raises(SystemExit, match="there exists and is not empty"):
        run(tested_run, tmp_path / "there", "--format", "hub", *flags)
    with pytest.raises(SystemExit, match=r"x\.onnx cannot be written, as .*README\.md is a file"):
        run(tested_run, tmp_path / "there" / "README.md" / "x.onnx", *flags)


def test_an_interrupt_after_the_export_does_not_say_that_nothing_is_there(
    tested_run: Path,
    tiny_set: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its accuracy is measured when it has its place already."""

    def interrupted(model: object, *_: object) -> float:
        if output.exists():
            raise KeyboardInterrupt
        return 0.5

    output = tmp_path / "x.safetensors"
    monkeypatch.setattr(script, "accuracy", interrupted)
    with pytest.raises(SystemExit):
        run(tested_run, output, "--format", "safetensors", "--precision", "fp16", "--set", f"{tiny_set}/tiny.bin")
    assert capsys.readouterr().err == "\nexport: interrupted; an export is there whole, or not at all\n"


@pytest.mark.parametrize("format_name", ["onnx", "torchscript", "safetensors", "hub"])
def test_a_full_disk_is_an_error_in_a_line(
    tested_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], format_name: str
) -> None:
    """Whichever library writes the file; nothing is left of it. What is said goes to memory: it would not fit."""
    output = tmp_path / f"x{script._SUFFIXES[format_name]}"
    with files_up_to(1000), pytest.raises(SystemExit, match=r"^export: .*File too large"):
        run(tested_run, output, "--format", format_name)
    assert not [*tmp_path.iterdir()]


def test_an_export_that_differs_is_not_kept(
    source: Source, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever goes wrong in an exporter, a file that gives other embeddings never appears, nor replaces a good one."""
    good = Path(shutil.copy(exported, tmp_path / "x.onnx"))
    before = good.read_bytes()
    exporter = script.to_onnx

    def wrong(module: nn.Module, image_size: int) -> Any:
        module = copy.deepcopy(module)
        with torch.no_grad():
            next(module.parameters()).mul_(-1)
        return exporter(module, image_size)

    monkeypatch.setattr(script, "to_onnx", wrong)
    with pytest.raises(ExportError, match=r"the onnx export deviates from the model by .*the bound is 1e-05"):
        export(source, good, options())
    assert good.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]
    with pytest.raises(ExportError, match="the bound is 1e-12"):
        export(source, tmp_path / "folder", options(format="hub", precision="fp16", limit=1e-12))
    assert [path.name for path in tmp_path.iterdir()] == ["x.onnx"]


def test_float16_that_overflows_on_a_card_is_refused(source: Source, tmp_path: Path) -> None:
    """onnxruntime computes float16 files in float32 on a CPU, which hides what a card would overflow at."""
    network = copy.deepcopy(source.network)
    convolutions = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    with torch.no_grad():
        convolutions[0].weight.mul_(1e6)
        convolutions[0].bias.mul_(1e6)
    embedder = NetworkEmbedder(network, 32, CPU, "huge")
    huge = Source(embedder, source.facts, source.trained_on)
    with pytest.raises(ExportError, match="the network computed in float16 deviates"):
        export(huge, tmp_path / "x.onnx", options(precision="fp16"))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_exported_says_so(
    tested_run: Path, source: Source, exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings that contradict each other, exports of exports, endings that would not load, packages that lack."""
    for settings in ({"format": "torchscript", "precision": "int8"}, {"format": "hub", "fold_normalisation": True}):
        with pytest.raises(ConfigError, match=r"export\.(precision|fold_normalisation)"):
            options(**settings)
    script_file = run(tested_run, tmp_path / "x.pt", "--format", "torchscript")
    for path in (exported, script_file):
        with pytest.raises(SystemExit, match="is an export already"):
            run(path, tmp_path / "y.onnx")
    with pytest.raises(SystemExit, match=r"export\.output: .*must end with \.pt"):
        run(tested_run, tmp_path / "y.onnx", "--format", "torchscript")
    with pytest.raises(SystemExit, match="is not empty"):
        run(tested_run, tmp_path, "--format", "hub")
    for package in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ExportError, match="pip install onnx onnxscript onnxruntime"):
        export(source, tmp_path / "y.onnx", options())
