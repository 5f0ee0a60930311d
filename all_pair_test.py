#!/usr/bin/env python3
"""Test face recognition models.

    python all_pair_test.py                                the newest run's best on the verification sets of config.py
    python all_pair_test.py lfw.bin agedb_30.bin --model runs/NAME
    python all_pair_test.py lfw_images/ --model w600k_r50.onnx --identify
    python all_pair_test.py lfw.bin lfw_images/ --model A.onnx runs/B     two models, and which is better
    torchrun --nproc-per-node=8 all_pair_test.py IJBC/ --model runs/NAME

A `.bin`, or a list of pairs (pairs.txt, with --images FOLDER), gets the 10-fold protocol that published accuracies use.
A face set (a folder with a .rec, a .rec file, or a folder with one folder per identity) gets the all-pairs test: every
image against every other, the share of genuine pairs accepted (TAR) at thresholds that let a given share of impostor
pairs pass (FAR), exact to the last pair. A folder of IJB-B or IJB-C gets its own 1:1 and 1:N protocols.
`report.html` has all numbers with their intervals, warnings and pictures, `report.json` the same for programs, and
`results.json` the first model's numbers alone. docs/numbers.md tells how each number is made.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from config import PRESETS, READS, Config
from data.face_sets import FaceSetError
from data.images import decode_face
from data.images_fingerprint import sample_digest
from data.pair_lists import PairFiles
from data.verification_bin import chosen_bins
from models.embedders import Embedder, load_embedder
from models.embedders.network import Precision
from utils.checkpoints import BEST, HUB_WEIGHTS, newest_run, run_of, settings_beside
from utils.devices import pick_device
from utils.evaluation.board import write_board
from utils.evaluation.check_sets import (
    TrainingSample,
    check_faces,
    check_reduced_precision,
    check_training_set,
    sample_training_set,
)
from utils.evaluation.checks import Finding
from utils.evaluation.columns import Tables, read_tables
from utils.evaluation.embeddings import embed_by_all
from utils.evaluation.measure import Measured, Options, compare, measure
from utils.evaluation.pictures import draw_finding, draw_overview, draw_set
from utils.evaluation.report_html import write_html
from utils.evaluation.report_json import as_json, first_model_as_json, pictures_of
from utils.evaluation.report_text import table
from utils.evaluation.test_sets import TestSet, distinct_names, open_test_set, set_names
from utils.evaluation.tested import Picture, TestedModel, TestedSet
from utils.files import write_text_atomic
from utils.processes import worker_count
from utils.program import program_facts
from utils.ranks import DAYS, Ranks, join_ranks
from utils.scripts import end_rank, printable, readable_errors
from utils.settings import Settings, describe, flatten, parse_settings

_MODEL_ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".onnx")


def is_model(path: Path) -> bool:
    """Whether a path named without `--model` is one: a run folder, one to upload, or a file of weights."""
    return path.suffix in _MODEL_ENDINGS or (path / BEST).exists() or (path / HUB_WEIGHTS).exists()


def chosen_models(models: Sequence[str], sets: Sequence[str], runs: str) -> list[Path]:
    """The models to test: those that are named, by `--model` or among the sets; else the newest run's best."""
    named = [Path(model) for model in models] + [Path(path) for path in sets if is_model(Path(path))]
    return named or [newest_run(Path(runs))]


def saved_settings(settings: Settings) -> Settings:
    """The sets that the run of the first model was trained and verified on."""
    models = chosen_models(settings["test.model"], settings["test.sets"], settings["common.runs"])
    saved = settings_beside(models[0])
    return {name: saved[name] for name in ("data.root", "data.verification") if name in saved}


def chosen_sets(config: Config) -> list[Path]:
    """The sets to test on: those that are named, else the verification sets of the run or of config.py."""
    named = [Path(path) for path in config.test.sets if not is_model(Path(path))]
    sets = named or chosen_bins(config.data.verification, config.data.root)
    if not sets:
        models = f"{', '.join(config.test.sets)}, named without a flag, is a model; " if config.test.sets else ""
        beside = f"put .bin files beside {', '.join(config.data.root)}"
        raise FaceSetError(f"nothing to test on: {models}name a set (without --model), or {beside}")
    return sets


def default_output(model: Path, runs: Path) -> Path:
    """`test` inside a run's folder; a folder of its own for a model from elsewhere."""
    run = run_of(model)
    name = model.parent.resolve().name if model.name == HUB_WEIGHTS else model.stem
    return run / "test" if run else runs / f"test-{name}"


def model_names(paths: Sequence[Path]) -> list[str]:
    """What models are called: the run's name or the file's stem, with folders before it where two clash.

    Raises ValueError for a model that is named twice.
    """
    parts = [(path.parent if path.name == BEST else path).resolve() for path in paths]
    if len(set(parts)) < len(parts):
        raise ValueError(f"a model is named twice: {', '.join(map(str, paths))}")
    return distinct_names(parts, [part.stem if part.is_file() else part.name for part in parts])


class Test:
    """The models, and what all sets have in common. Every rank has one."""

    __test__ = False

    def __init__(self, config: Config, paths: Sequence[Path], output: Path, ranks: Ranks) -> None:
        chosen = config.test
        self.config, self.output, self.ranks = config, output, ranks
        self.device = pick_device(config.common.device)
        self.names = model_names(paths)
        self.embedders = [self._load(path, chosen.precision) for path in paths]
        self.paths = list(paths)
        cache = Path(chosen.cache_folder) if chosen.cache_folder else Path(config.common.runs) / "embeddings"
        self.options = Options(
            batch_size=chosen.batch_size,
            workers=worker_count(config.common.workers),
            mirror=chosen.mirror,
            cache=cache if chosen.cache else None,
            draws=chosen.draws,
            seed=chosen.seed,
            identify=chosen.identify,
            hardest=chosen.hardest,
        )
        self.notes: list[Finding] = []
        self.training: TrainingSample | None = None

    def _load(self, path: Path, precision: Precision) -> Embedder:
        model = self.config.model
        size = self.config.data.image_size
        return load_embedder(
            path,
            self.device,
            model.normalisation,
            model.network,
            model.embedding_size,
            size,
            model.colour,
            precision,
        )

    def models(self) -> list[TestedModel]:
        """The models as the report names them."""
        facts = zip(self.names, self.paths, self.embedders, strict=True)
        return [TestedModel(name, path, one.runs_on, one.fingerprint) for name, path, one in facts]

    def take_training_sample(self) -> None:
        """Take the sample of the training set that test sets are compared with, unless none is asked for, or note why
        there is none."""
        chosen = self.config.test.training_set
        if chosen == ("none",):
            return
        known = bool(chosen) or bool(settings_beside(self.paths[0]))
        roots = [Path(root) for root in chosen or self.config.data.root]
        missing = [str(root) for root in roots if not root.exists()]
        if chosen and missing:
            raise FaceSetError(f"--training-set: {', '.join(missing)} does not exist (none: there is none)")
        sample = self.config.test.training_sample
        if not sample:
            return
        if not roots or not known or missing:
            text = "The training set is not known or not here: nothing tells whether it shares images or people with "
            self.notes.append(Finding("people", "note", text + "the test sets (--training-set names it)."))
            return
        self.training = sample_training_set(roots, sample, self.embedders[0], self.options)

    def open(self, name: str, path: Path) -> tuple[TestSet, Tables]:
        """A set and its tables. All are opened before the first is tested: an error in the last one should come before
        hours of work on the others, not after."""
        images = self.config.test.images
        test_set = open_test_set(path, name, Path(images) if images else None, self.embedders[0].image_size)
        for size in {embedder.image_size for embedder in self.embedders}:
            decode_face(test_set.images.encoded(0), size, False, test_set.images.describe(0))
        return test_set, read_tables(test_set, self.config.test.breakdown, self.config.test.quality)

    def run(self, test_set: TestSet, tables: Tables, alone: bool) -> TestedSet | None:
        """All models on one set, with its checks and pictures; of the only one, `alone`, the overview has the ROC. Only
        the first rank has the result."""
        chosen = self.config.test
        title = f"{test_set.name}, {', '.join(self.names)}"
        features = embed_by_all(self.embedders, test_set.images, title, self.options, self.ranks)
        measured = [
            measure(rows, embedder.device, model, test_set, tables, self.options, self.ranks)
            for rows, embedder, model in zip(features, self.embedders, self.names, strict=True)
        ]
        if not self.ranks.first:
            return None
        done = [one for one in measured if one is not None]
        comparisons = [
            (done[0].model, other.model, found)
            for other in done[1:]
            for found in compare(done[0], other, test_set, self.options)
        ]
        findings = self._check(test_set, done) if chosen.checks else []
        size = self.embedders[0].image_size
        pictures = draw_set(self.output, test_set, done, size, alone)
        if self.training is not None:
            drawn = [draw_finding(self.output, test_set, self.training, finding, size) for finding in findings]
            pictures += [picture for picture in drawn if picture is not None]
        return TestedSet(test_set, done, comparisons, findings, pictures)

    def _check(self, test_set: TestSet, measured: Sequence[Measured]) -> list[Finding]:
        findings = check_faces(test_set, measured, self.embedders, self.options)
        precision = self.config.test.precision
        if precision != "fp32":
            for path, one in zip(self.paths, measured, strict=True):
                found = check_reduced_precision(test_set, one, self._load(path, "fp32"), precision, self.options)
                findings += [found] if found is not None else []
        if self.training is not None:
            findings += check_training_set(test_set, measured[0], self.training, self.embedders[0].image_size)
        return findings


def remove_pictures(output: Path) -> None:
    """Remove the pictures of the test whose report is in `output`: nobody should take them for this one's.

    Its page has them inside, and stays until there is another.
    """
    try:
        pictures = pictures_of(json.loads((output / "report.json").read_text()))
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return  # there is none, or it is damaged, or another program's
    for name in pictures:
        with suppress(OSError):
            (output / name).unlink()


def write_reports(test: Test, tested: Sequence[TestedSet]) -> list[Picture]:
    """Write `report.json`, `report.html` and `results.json` of the sets tested so far; the pictures of all of them."""
    settings = {name.removeprefix("test."): value for name, value in flatten(test.config).items() if "test." in name}
    models, output = test.models(), test.output
    overview = draw_overview(output, {one.test_set.name: one.measured for one in tested})
    everything = as_json(models, tested, settings, test.notes, overview)
    write_text_atomic(output / "report.json", json.dumps(everything, indent=2, allow_nan=False))
    first = first_model_as_json(models, tested, settings)
    write_text_atomic(output / "results.json", json.dumps(first, indent=2, allow_nan=False))
    title = f"Test of {', '.join(test.names)}"
    write_html(output / "report.html", title, models, tested, settings, test.notes, overview)
    return overview


def run_test(config: Config, ranks: Ranks) -> None:
    """Test all models on all sets; the first rank prints and writes."""
    ranks.require_alike(lambda: program_facts() | flatten(config, without=["common.workers"]))
    paths = chosen_models(config.test.model, config.test.sets, config.common.runs)
    sets = chosen_sets(config)
    names = set_names(sets)
    output = Path(config.test.output) if config.test.output else default_output(paths[0], Path(config.common.runs))
    test = Test(config, paths, output, ranks)
    opened = [test.open(name, path) for name, path in zip(names, sets, strict=True)]
    if config.test.identify and all(test_set.pairs is not None for test_set, _ in opened):
        raise FaceSetError(
            f"--identify: in {', '.join(names)} there are only pairs, which do not say who is on an image: leave it "
            "out, or name a face set"
        )
    ranks.require_alike(lambda: {str(one.path): f"images {sample_digest(one.images)[:8]}" for one, _ in opened})
    if ranks.first:
        if config.test.images and not any(isinstance(one.images, PairFiles) for one, _ in opened):
            print(f"test.images not used: no list of pairs is among {', '.join(names)}")
        mirror = "with" if config.test.mirror else "without"
        for model in test.models():
            print(f"model: {model.path}, {mirror} mirror image, {config.test.precision}, {model.runs_on}")
        if test.options.cache:
            print(f"embeddings are kept in {test.options.cache} (--no-cache: not)")
        output.mkdir(parents=True, exist_ok=True)
        remove_pictures(output)
        if config.test.checks:
            test.take_training_sample()
    tested: list[TestedSet] = []
    overview: list[Picture] = []
    for test_set, tables in opened:
        one = test.run(test_set, tables, alone=len(opened) == 1)
        if one is not None:
            tested.append(one)
            overview = write_reports(test, tested)
    if ranks.first:
        if run_of(paths[0]) == paths[0]:
            write_board(output, tested, overview)
        print(printable(table(tested)))
        for note in test.notes:
            print(printable(f"note: {note.text}"))
        print(f"numbers and pictures: {output} (open {output / 'report.html'})")


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("all_pair_test", "report.html and report.json have the sets tested before"):
        config = parse_settings(Config, PRESETS, ("test", "common"), __doc__, argv, saved_settings, reads=READS["test"])
        with join_ranks(pick_device(config.common.device), DAYS) as ranks:
            if ranks.first:
                print(describe(config, READS["test"]))
            run_test(config, ranks)


if __name__ == "__main__":
    main()
    end_rank()
