#!/usr/bin/env python3
"""Write a trained model for other programs.

    python -m utils.export runs/NAME                                 ONNX, for onnxruntime, OpenCV, insightface
    python -m utils.export runs/NAME --fold-normalisation            that takes RGB 0..255
    python -m utils.export runs/NAME --precision int8 --set lfw.bin  calibrated, with the accuracy before and after
    python -m utils.export runs/NAME --format torchscript            for C++ and torch without this project
    python -m utils.export runs/NAME --format hub --licence mit      a folder to upload, with a model card

RUN is a run folder or weights of any kind that all_pair_test.py takes. Each export is loaded again and compared with
the model on faces; the largest deviation is printed, and an export beyond the bound is not kept. docs/export.md.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, READS, Config, ExportConfig
from data.verification_bin import read_bin
from models.embedders import Embedder, NetworkEmbedder, load_embedder
from models.embedders.onnx_file import INPUTS_KEY
from models.inputs import InputSpec, Normalisation
from utils.checkpoints import CONFIG, HUB_WEIGHTS, newest_run, run_of
from utils.evaluation.verification import verify
from utils.exporting.comparison import (
    LIMITS,
    Deviation,
    Faces,
    choose_calibration,
    choose_set,
    deviation,
    embed_faces,
    load_faces,
)
from utils.exporting.exportable import INPUT, Exportable, ExportError, mean_and_scale, outer_normalisation
from utils.exporting.model_card import card_settings, model_card
from utils.exporting.onnx_file import prepend_normalisation, rename_telltale_nodes, require_onnx, to_onnx, write_onnx
from utils.exporting.quantize import quantize
from utils.exporting.source import CPU, Source, load_source
from utils.exporting.torchscript import write_torchscript
from utils.exporting.weights import settings_of, write_weights
from utils.files import atomic_folder, atomic_path, require_free, require_writable, write_text_atomic
from utils.processes import worker_count
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings

_SUFFIXES = {"onnx": ".onnx", "safetensors": ".safetensors", "torchscript": ".pt", "hub": ""}


@dataclass(frozen=True)
class Done:
    """What became of an export. `half`: of the network in float16 by torch itself, for fp16 in ONNX and TorchScript:
    onnxruntime computes much of a float16 file in float32 on a CPU, and would not show what overflows on a card.
    """

    output: Path
    compared_on: str
    calibrated_on: str
    deviation: Deviation
    half: Deviation | None
    limit: float


def export(source: Source, output: Path, options: ExportConfig) -> Done:
    """Write `source` to `output` and compare the two; nothing is left there when they differ too much.

    Raises ExportError then, and for what cannot be exported as asked.
    """
    _require_possible(source.normalisation, options)
    size, limit = source.embedder.image_size, options.limit or LIMITS[options.precision]
    compared = choose_set(options.set, source.trained_on)
    faces = load_faces(compared, size, options.images)
    reference = embed_faces(source.embedder, faces.pixels, options.batch_size)
    half, calibration = None, None
    if options.precision == "fp16" and options.format in ("onnx", "torchscript"):
        network = Exportable(source.network, source.normalisation, half=True)
        by_torch = NetworkEmbedder(network, size, CPU, "float16", inputs=source.embedder.inputs)
        half = deviation(reference, embed_faces(by_torch, faces.pixels, options.batch_size))
        _require_below(half, limit, "the network computed in float16")
    if options.precision == "int8":
        calibrated = choose_calibration(options.calibration, source.trained_on, compared)
        calibration = load_faces(calibrated, size, options.calibration_images, calibration=True)
    with _writing(output, options.format) as (working, file):
        if options.format == "onnx":
            _write_onnx(source, working, options, calibration)
        elif options.format == "torchscript":
            _write_torchscript(source, working, options)
        elif options.format == "safetensors":
            _write_safetensors(source, working, options)
        else:
            _write_hub(source, working, options)
        exported = deviation(reference, embed_faces(load_embedder(file, CPU), faces.pixels, options.batch_size))
        _require_below(exported, limit, f"the {options.format} export")
    return Done(output, faces.source, calibration.source if calibration else "", exported, half, limit)


def _require_possible(normalisation: Normalisation, options: ExportConfig) -> None:
    if options.format == "onnx":
        require_onnx()
    if options.format in ("onnx", "torchscript"):
        outer_normalisation(normalisation, options.fold_normalisation)
    elif normalisation != "127.5":
        raise ExportError(
            f"weights alone cannot say that this network expects another normalisation ({normalisation}): "
            "export it as onnx or torchscript, with --fold-normalisation"
        )


def _require_below(found: Deviation, limit: float, what: str) -> None:
    if not found.largest <= limit:  # nor when it is NaN
        raise ExportError(
            f"{what} deviates from the model by {found.largest:.2g} (1 - cosine, largest of {found.faces} faces, mean "
            f"{found.mean:.2g}), the bound is {limit:.2g}: nothing was written. --limit sets another bound"
        )


@contextmanager
def _writing(output: Path, format_name: str) -> Iterator[tuple[Path, Path]]:
    """Yield what to write, and the file of it that holds the model; it becomes `output` when the block ends well."""
    if format_name == "hub":
        with atomic_folder(output) as folder:
            yield folder, folder / HUB_WEIGHTS
    else:
        with atomic_path(output) as file:
            yield file, file


def _write_onnx(source: Source, path: Path, options: ExportConfig, calibration: Faces | None) -> None:
    fold, normalisation = options.fold_normalisation, source.normalisation
    module = Exportable(source.network, normalisation, half=options.precision == "fp16")
    model = to_onnx(module, source.embedder.image_size)
    if calibration:
        inputs = source.embedder.inputs.to_input(calibration.pixels).contiguous().numpy()
        model = quantize(model, INPUT, inputs, options.batch_size)
    rename_telltale_nodes(model)
    if fold:
        prepend_normalisation(model, *mean_and_scale(normalisation))
    outer = InputSpec(outer_normalisation(normalisation, fold))
    metadata = source.facts.metadata(fold, options.precision, normalisation)
    write_onnx(model, path, {**metadata, INPUTS_KEY: json.dumps(outer.as_json())})


def _write_torchscript(source: Source, path: Path, options: ExportConfig) -> None:
    fold, size = options.fold_normalisation, source.embedder.image_size
    module = Exportable(source.network, source.normalisation, fold, options.precision == "fp16")
    outer = InputSpec(outer_normalisation(source.normalisation, fold))
    face_embedder = {"image_size": size, "inputs": outer.as_json()}
    write_torchscript(
        module, path, size, face_embedder, source.facts.metadata(fold, options.precision, source.normalisation)
    )


def _write_safetensors(source: Source, path: Path, options: ExportConfig) -> None:
    metadata = source.facts.metadata(False, options.precision)
    write_weights(source.network, path, source.facts, metadata, options.precision == "fp16")


def _write_hub(source: Source, folder: Path, options: ExportConfig) -> None:
    _write_safetensors(source, folder / HUB_WEIGHTS, options)
    metadata = source.facts.metadata(False, options.precision)
    write_text_atomic(folder / CONFIG, card_settings(settings_of(source.facts), metadata))
    write_text_atomic(folder / "README.md", model_card(source.facts, HUB_WEIGHTS, options.precision))


def default_output(model: Path, name: str, options: ExportConfig, runs: Path) -> Path:
    """In `export` in a run's folder; for a model from elsewhere in a folder of its own."""
    run = run_of(model)
    folder = run / "export" if run else runs / f"export-{name}"
    precision = "" if options.precision == "fp32" else f"-{options.precision}"
    folded = "-rgb255" if options.fold_normalisation else ""
    return folder / f"{name}{precision}{folded}{_SUFFIXES[options.format]}"


def describe_export(done: Done, options: ExportConfig) -> str:
    """What was done, for the screen."""
    size = sum(file.stat().st_size for file in [done.output, *done.output.rglob("*")] if file.is_file())
    lines = [f"{done.output}: {options.format}, {options.precision}, {size / 1e6:,.1f} MB"]
    if done.calibrated_on:
        lines.append(f"calibrated on {done.calibrated_on}")
    if done.half:
        lines.append(f"in float16 by torch: largest deviation {done.half.largest:.1e}, mean {done.half.mean:.1e}")
    lines.append(
        f"largest deviation 1 - cosine from the model: {done.deviation.largest:.1e} (bound {done.limit:.0e}), mean "
        f"{done.deviation.mean:.1e}; {done.deviation.faces} faces of {done.compared_on}"
    )
    return "\n".join(lines)


def accuracy(model: Embedder, path: Path, batch_size: int, workers: int) -> float:
    """The 10-fold accuracy on a `.bin`, mirror image added, 0..1."""
    return verify(model, [read_bin(path)], batch_size, workers, True)[0].accuracy


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("export", "an export is there whole, or not at all"):
        config = parse_settings(Config, PRESETS, ("export", "common"), __doc__, argv, reads=READS["export"])
        options = config.export
        if config.test.model and not options.model:
            raise ExportError(
                f"test.model is what all_pair_test.py tests: to export it, --model {quote(config.test.model[0])}"
            )
        print(describe(config, READS["export"]))
        path = Path(options.model[0]) if options.model else newest_run(Path(config.common.runs))
        source = load_source(
            path,
            config.model.normalisation,
            config.model.network,
            config.model.embedding_size,
            config.data.image_size,
            options.licence,
            config.model.colour,
        )
        facts = source.facts
        print(
            f"model: {path}: {facts.network}, {facts.parameters / 1e6:.2f} M parameters, faces of "
            f"{facts.image_size}x{facts.image_size}, embeddings of {facts.embedding_size}"
        )
        output = Path(options.output or default_output(path, facts.name, options, Path(config.common.runs)))
        if output.suffix != _SUFFIXES[options.format] and options.format != "hub":
            raise ExportError(f"export.output: the name must end with {_SUFFIXES[options.format]}, got {output}")
        _require_possible(source.normalisation, options)
        if options.format == "hub":
            require_free(output)
        require_writable(output)
        measured = options.precision != "fp32" and options.set.endswith(".bin")
        how = Path(options.set), options.batch_size, worker_count(config.common.workers)
        # First, so that a set that cannot be tested on ends the program before anything is written.
        before = accuracy(source.embedder, *how) if measured else 0.0
        done = export(source, output, options)
        print(describe_export(done, options))
        if measured:
            after = accuracy(load_embedder(output / HUB_WEIGHTS if options.format == "hub" else output, CPU), *how)
            name = Path(options.set).stem
            print(f"accuracy on {name}: {100 * before:.3f} % by the model, {100 * after:.3f} % by the export")


if __name__ == "__main__":
    main()
