#!/usr/bin/env python3
"""Test a face recognition model.

    python all_pair_test.py                                the newest run's best on the verification sets of config.py
    python all_pair_test.py lfw.bin agedb_30.bin --model runs/NAME
    python all_pair_test.py lfw_images/ --model w600k_r50.onnx

A `.bin` gets the 10-fold protocol that published accuracies use. A face set (a folder with a .rec, a .rec file, or a
folder with one folder per identity) gets the all-pairs test: every image against every other, the share of genuine
pairs accepted (TAR) at thresholds that let a given share of impostor pairs pass (FAR), exact to the last pair.
Computed in float32. Numbers go to `results.json`, ROC and score histograms to PNG files beside it.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from config import PRESETS, Config
from data.face_sets import FaceSet, FaceSetError, open_face_set
from data.verification_bin import VerificationPairs, find_bins, read_bin
from models.embedder import Embedder, load_embedder
from models.embedding import embed_images, verify
from utils.checkpoints import CONFIG, newest_run, settings_beside
from utils.devices import pick_device
from utils.evaluation.all_pairs import AllPairsResult, all_pairs
from utils.evaluation.folds import FoldResult
from utils.files import write_text_atomic
from utils.plots import draw_roc, draw_score_histogram
from utils.processes import worker_count
from utils.scripts import readable_errors
from utils.settings import Settings, describe, parse_settings

Curve = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Options:
    """How faces are embedded: images per forward pass, decoding processes, mirrored image added or not."""

    batch_size: int
    workers: int
    mirror: bool


def measure_pairs(
    embedder: Embedder, pairs: VerificationPairs, options: Options, output: Path
) -> tuple[FoldResult, Curve]:
    """The 10-fold protocol on a verification set, its histogram drawn; also returns the ROC."""
    from sklearn.metrics import roc_curve

    result = verify(embedder, pairs, options.batch_size, options.workers, options.mirror)
    cosines = 1 - result.distances / 2
    edges = np.linspace(-1, 1, 201)
    draw_score_histogram(
        output / f"{pairs.name}_scores.png",
        np.histogram(cosines[result.same], edges)[0],
        np.histogram(cosines[~result.same], edges)[0],
        edges,
        f"{pairs.name}: {len(result.same):,} pairs, {embedder.name}",
        {"mean threshold of the folds": result.cosine_threshold},
    )
    far, tar, _ = roc_curve(result.same, cosines)
    return result, (far, tar)


def measure_all_pairs(
    embedder: Embedder, faces: FaceSet, name: str, options: Options, output: Path
) -> tuple[AllPairsResult, Curve]:
    """Every image of `faces` against every other, the histogram drawn; also returns the ROC."""
    embeddings = embed_images(embedder, faces, options.batch_size, options.workers, options.mirror, name)
    on_device = torch.from_numpy(embeddings).to(embedder.device)
    result = all_pairs(on_device, torch.from_numpy(faces.labels), progress=True)
    marked = zip(result.far, result.threshold, result.supported, strict=True)
    draw_score_histogram(
        output / f"{name}_scores.png",
        result.genuine_counts,
        result.impostor_counts,
        result.edges,
        f"{name}: {result.genuine:,} genuine and {result.impostor:,} impostor pairs, {embedder.name}",
        {f"FAR {far:g}": threshold for far, threshold, supported in marked if supported},
    )
    return result, result.roc()


def pairs_as_json(result: FoldResult) -> dict[str, Any]:
    """The numbers of the 10-fold protocol."""
    return {
        "protocol": "10 folds",
        "pairs": len(result.same),
        "accuracy": result.accuracy,
        "std": result.std,
        "fold_accuracies": result.fold_accuracies.tolist(),
        "cosine_threshold": result.cosine_threshold,
    }


def all_pairs_as_json(result: AllPairsResult, faces: FaceSet) -> dict[str, Any]:
    """The numbers of the all-pairs test; `supported` is false where the set has fewer than 1 / FAR impostor pairs."""
    points = zip(result.far, result.tar, result.threshold, result.supported, strict=True)
    return {
        "protocol": "all pairs",
        "images": len(faces),
        "identities": len(faces.identities),
        "genuine_pairs": result.genuine,
        "impostor_pairs": result.impostor,
        "eer": result.eer,
        "auc": result.auc,
        "points": [dict(zip(("far", "tar", "threshold", "supported"), point, strict=True)) for point in points],
    }


def format_results(results: dict[str, dict[str, Any]]) -> str:
    """The results as a table for the screen: percent with three decimals, thresholds as cosines."""
    lines = []
    for name, result in results.items():
        if result["protocol"] == "10 folds":
            lines.append(
                f"{name:<20} {result['pairs']:>12,} pairs   accuracy {percent(result['accuracy'])} "
                f"+- {percent(result['std']).strip()}   threshold {result['cosine_threshold']:.4f}"
            )
            continue
        pairs = result["genuine_pairs"] + result["impostor_pairs"]
        lines.append(
            f"{name:<20} {pairs:>12,} pairs   of {result['images']:,} images, {result['identities']:,} identities: "
            f"{result['genuine_pairs']:,} genuine, {result['impostor_pairs']:,} impostor"
        )
        for point in result["points"]:
            note = "" if point["supported"] else "   too few impostor pairs to tell"
            lines.append(
                f"{'':<20} TAR at FAR {point['far']:<7.0e} {percent(point['tar'])}   "
                f"threshold {point['threshold']:.6f}{note}"
            )
        lines.append(f"{'':<20} EER {percent(result['eer'])}   AUC {percent(result['auc'])}")
    return "\n".join(lines)


def percent(share: float) -> str:
    """A share of 0..1 in percent with three decimals."""
    return f"{100 * share:>7.3f} %"


def set_names(paths: Sequence[Path]) -> list[str]:
    """What sets are called in tables and file names: the file's stem or the folder's name, longer where two clash."""
    parts = [(path.parent if path.name == "train.rec" else path).resolve() for path in paths]
    names = [part.stem if part.suffix in (".bin", ".rec") and part.is_file() else part.name for part in parts]
    return [
        name if names.count(name) == 1 else "_".join(part.parts[-2:]) for name, part in zip(names, parts, strict=True)
    ]


def measure(model: Path, sets: Sequence[Path], config: Config, output: Path) -> dict[str, dict[str, Any]]:
    """Test `model` on every one of `sets`; returns what `results.json` holds for each."""
    names = set_names(sets)
    if len(set(names)) < len(names):
        raise FaceSetError(f"a set is named twice: {', '.join(map(str, sets))}")
    device = pick_device(config.common.device)
    embedder = load_embedder(
        model,
        device,
        config.model.normalisation,
        config.model.network,
        config.model.embedding_size,
        config.data.image_size,
    )
    print(f"model: {model}, {'with' if config.test.mirror else 'without'} mirror image, {embedder.runs_on}")
    options = Options(config.test.batch_size, worker_count(config.common.workers), config.test.mirror)
    output.mkdir(parents=True, exist_ok=True)
    results, curves = {}, {}
    for name, path in zip(names, sets, strict=True):
        if path.suffix == ".bin":
            folds, curves[name] = measure_pairs(embedder, read_bin(path), options, output)
            results[name] = pairs_as_json(folds)
        else:
            faces = open_face_set(path)
            pairs, curves[name] = measure_all_pairs(embedder, faces, name, options, output)
            results[name] = all_pairs_as_json(pairs, faces)
        report = {"model": str(model), "mirror": options.mirror, "sets": results}
        write_text_atomic(output / "results.json", json.dumps(report, indent=2))
    draw_roc(output / "roc.png", curves, f"{embedder.name}{', mirror image added' if options.mirror else ''}")
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("all_pair_test", "results.json has the sets tested before"):
        config = parse_settings(Config, PRESETS, ("test", "common"), __doc__, argv, saved_settings)
        print(describe(config, ("test", "common")))
        model = chosen_model(config.test.model, config.common.runs)
        default = config.data.verification or [path for root in config.data.root for path in find_bins(root)]
        sets = [Path(path) for path in config.test.sets or default]
        if not sets:
            raise FaceSetError(
                f"nothing to test on: name a set, or put .bin files beside {', '.join(config.data.root)}"
            )
        output = Path(config.test.output) if config.test.output else default_output(model, Path(config.common.runs))
        results = measure(model, sets, config, output)
    print(format_results(results))
    print(f"numbers and pictures: {output}")


def chosen_model(model: str, runs: str) -> Path:
    """The model to test: the one that is named, or the newest run's."""
    return Path(model) if model else newest_run(Path(runs))


def saved_settings(settings: Settings) -> Settings:
    """The sets that the run of the chosen model was trained and verified on."""
    saved = settings_beside(chosen_model(settings["test.model"], settings["common.runs"]))
    return {name: saved[name] for name in ("data.root", "data.verification") if name in saved}


def default_output(model: Path, runs: Path) -> Path:
    """`test` inside a run's folder; a folder of its own for a model from elsewhere."""
    run = model if model.is_dir() else model.parent
    return run / "test" if (run / CONFIG).exists() else runs / f"test-{model.stem}"


if __name__ == "__main__":
    main()
