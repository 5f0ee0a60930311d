#!/usr/bin/env python3
"""Recipes for a small training set, side by side on one card: which one comes out best on LFW.

    python benchmarks/small_sets.py --output small
    python benchmarks/small_sets.py --output grid --seeds 1 --recipes published \\
        --variant 'mild: --loss.scale 32 --loss.margin 0.3' --variant 'more decay: --preset small --weight-decay 2e-2'

The face sets of `--train`, without the identities that `--overlap` lists as people of LFW, are packed into OUTPUT once,
and LFW's pairs into OUTPUT/lfw.bin, unless `--lfw` is a .bin. Then each recipe is trained with each seed by train.py,
several runs at a time. All have the same network and see the same number of images: `--epochs` times those of the set;
a recipe that leaves identities out (data.min_images) has more epochs instead. Recipes: `published`, insightface's for
one card, unchanged; `small`, the preset; and a `--variant` for any others, with the flags of train.py.

A run verifies once, at its end, so nothing is chosen by the result. OUTPUT/table.md has, for each recipe, the accuracy
on LFW (10-fold) of each seed, mean and standard error, and the difference to the first recipe, seed by seed. It is
written anew after each run; the same command goes on where it was stopped, and trains nothing twice. Sets and pairs
that OUTPUT has already are taken as they are: other ones want another OUTPUT.
"""

import argparse
import csv
import math
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import PRESETS, Config
from data.face_sets import open_face_set
from data.fitting import Fit
from data.identity_choice import choose_identities
from data.joined_sets import open_training_set
from data.pack_bin import pack_bin
from data.pack_set import pack
from utils.checkpoints import CONFIG
from utils.devices import describe_device, pick_device
from utils.files import write_text_atomic
from utils.processes import worker_count
from utils.scripts import readable_errors
from utils.settings import build, flatten, from_json, parse_settings
from utils.training.metrics import METRICS, VERIFIED, VERIFIED_AVERAGE, read_metrics

RECIPES = {"published": ["--preset", "ms1mv3_r18", "--train.batch-size", "128"], "small": ["--preset", "small"]}
NEVER = str(10**9)  # steps
#: Settings that runs of one recipe may differ in, and those that do not change what is learned.
BESIDE = ("train.name", "train.seed", "train.resume", "common.device", "common.workers", "common.runs")


@dataclass(frozen=True)
class Run:
    """A recipe with a seed. `config`: all its settings; `flags`: what train.py gets; `steps`: of the whole run."""

    recipe: str
    config: Config
    flags: list[str]
    steps: int

    @property
    def folder(self) -> Path:
        return Path(self.config.common.runs) / self.config.train.name

    @property
    def said(self) -> Path:
        """The file of what train.py said."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    @property
    def images(self) -> int:
        """Images that it sees."""
        return self.steps * self.config.train.batch_size


@dataclass(frozen=True)
class Result:
    """`accuracy`: on LFW, 0..1; `rate`: images/s, the median of the log's lines."""

    accuracy: float
    rate: float


def overlapping(table: Path, face_set: Path) -> set[str]:
    """The identities of `face_set` that `table` (columns `set`, the folder's name, and `identity`) says to leave out.

    Identities of a set with an identities.csv go by its `name`, numbers with leading zeros or without. Raises
    ValueError for one that the set does not have.
    """
    names = {name: name for name in open_face_set(face_set).identities}
    listed = face_set / "identities.csv"
    if listed.exists():
        names = {row["name"].lstrip("0"): row["label"] for row in csv.DictReader(listed.open(encoding="utf-8"))}
    out = set()
    for row in csv.DictReader(table.open(encoding="utf-8")):
        if row["set"] == face_set.name:
            identity = row["identity"].lstrip("0") if listed.exists() else row["identity"]
            if identity not in names:
                raise ValueError(
                    f"{table}: {face_set} has no identity {row['identity']!r}: is it another version of it?"
                )
            out.add(names[identity])
    return out


def prepare_set(face_set: Path, overlap: Path | None, output: Path, size: int) -> Path:
    """`face_set` without the people of LFW, packed into `output` unless it is there."""
    if not output.exists():
        faces = open_face_set(face_set)
        out = overlapping(overlap, face_set) if overlap else set()
        chosen = choose_identities(faces, [name for name in faces.identities if name not in out], 1)
        pack(faces, chosen, output, Fit(size, "refuse", 95), worker_count(-1))
        print(f"{face_set.name}: {len(out)} identities of {len(faces.identities):,} are people of LFW, left out")
    return output


def prepare_lfw(lfw: Path, output: Path, size: int) -> Path:
    """The verification set: `lfw` if it is a .bin, else made of its pairs.txt and images."""
    if lfw.suffix == ".bin":
        return lfw
    if not output.exists():
        pack_bin(lfw / "pairs.txt", lfw / "images", output, Fit(size, "refuse", 95), worker_count(-1))
    return output


def read_recipes(names: str, variants: Sequence[str]) -> dict[str, list[str]]:
    """The flags of each recipe: those of RECIPES that are named, comma separated, and the variants (`name: flags`)."""
    recipes = {}
    for name in filter(None, names.split(",")):
        if name not in RECIPES:
            raise ValueError(f"--recipes {name}: there is {' and '.join(RECIPES)}; others are given with --variant")
        recipes[name] = RECIPES[name]
    for variant in variants:
        name, colon, flags = variant.partition(":")
        if not colon or not name.strip() or name.strip() in recipes or set(name) & set("/,|"):
            raise ValueError(f"--variant {variant!r}: must be 'NAME: FLAGS', with a name of its own without / , |")
        recipes[name.strip()] = shlex.split(flags)
    if not recipes:
        raise ValueError("no recipes: name some with --recipes or --variant")
    return recipes


def plan(recipe: str, flags: list[str], seed: int, roots: Sequence[Path], lfw: Path, given: argparse.Namespace) -> Run:
    """The run of `recipe` with `seed`: its own flags, and after them those that are the same for all."""
    common = {
        "data.root": ",".join(map(str, roots)),
        "data.verification": lfw,
        "data.image-size": given.image_size,
        "model.network": given.network,
        "train.name": f"{recipe.replace(' ', '_')}-{seed}",
        "train.resume": "auto",
        "train.seed": seed,
        "train.compile": "off",  # takes longer than such a run
        "train.verify-every": NEVER,
        "train.checkpoint-every": NEVER,
        "common.runs": given.output / "runs",
        "common.device": given.device,
        "common.workers": given.workers,
    }
    flags = [*flags, *(f"--{name}={value}" for name, value in common.items()), "--no-train.verify-at-start"]
    config = parse_settings(Config, PRESETS, ("train", "common"), "", [*flags, f"--train.epochs={given.epochs}"])
    images, batch = len(open_training_set(roots, config.data.min_images)), config.train.batch_size
    epochs = given.epochs * len(open_training_set(roots, 1)) // images
    config = replace(config, train=replace(config.train, epochs=epochs))
    return Run(recipe, config, [*flags, f"--train.epochs={epochs}"], epochs * (images // batch))


def result(run: Run) -> Result | None:
    """What a run came to; None if it is not done. Raises ValueError for one that was made with other settings."""
    if not (run.folder / CONFIG).exists():
        return None
    before, now = flatten(build(Config, from_json((run.folder / CONFIG).read_text()))), flatten(run.config)
    for name, value in now.items():
        if name not in BESIDE and before[name] != value:
            raise ValueError(f"{run.folder} has {name} {before[name]}, now it is {value}: take another --output")
    lines = read_metrics(run.folder) if (run.folder / METRICS).exists() else []
    tag = VERIFIED_AVERAGE if run.config.train.ema else VERIFIED
    last = [line for line in lines if line["step"] == run.steps]
    found = [value for line in last for name, value in line.items() if name.startswith(tag)]
    rates = [line["train/images_per_s"] for line in lines if "train/images_per_s" in line]
    return Result(found[-1], statistics.median(rates)) if found and rates else None


def train_all(runs: Sequence[Run], jobs: int, report: Any) -> list[Run]:
    """Train the runs that are not done, `jobs` at a time, and `report()` after each; returns those that failed."""
    waiting, going, failed = deque(run for run in runs if result(run) is None), dict[subprocess.Popen, Run](), []
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    try:
        while waiting or going:
            while waiting and len(going) < jobs:
                run = waiting.popleft()
                run.folder.parent.mkdir(parents=True, exist_ok=True)
                with run.said.open("ab") as log:
                    command = [sys.executable, str(ROOT / "train.py"), *run.flags]
                    environment = {**os.environ, "OMP_NUM_THREADS": threads}
                    process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
                going[process] = run
            for process in [process for process in going if process.poll() is not None]:
                run = going.pop(process)
                if process.returncode:
                    failed.append(run)
                    last = run.said.read_text(errors="replace").splitlines()[-1:]
                    print(f"{run.config.train.name} failed: {''.join(last)}", flush=True)
                report()
            time.sleep(0.1)
    finally:
        for process in going:
            process.terminate()  # train.py saves its state, and goes on from there
        for process in going:
            process.wait()
    return failed


def spread(values: Sequence[float]) -> str:
    """Mean and its standard error, of shares, in %."""
    mean = 100 * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.2f}"
    return f"{mean:.2f} +- {100 * statistics.stdev(values) / math.sqrt(len(values)):.2f}"


def differing(configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """{recipe: {setting: value}}: of the first recipe all settings that not all share, of others what the first has
    otherwise."""
    flat = {name: {k: v for k, v in flatten(config).items() if k not in BESIDE} for name, config in configs.items()}
    first = next(iter(flat.values()))
    shared = {setting for setting in first if all(settings[setting] == first[setting] for settings in flat.values())}
    return {
        name: {k: v for k, v in settings.items() if k not in shared and (settings is first or v != first[k])}
        for name, settings in flat.items()
    }


def make_table(runs: Sequence[Run], seeds: int) -> str:
    """Markdown: a row for each recipe, with the seeds that are done."""
    results = {(run.recipe, run.config.train.seed): result(run) for run in runs}
    of_recipe = {run.recipe: run for run in reversed(runs)}
    names = list(dict.fromkeys(run.recipe for run in runs))
    settings = differing({name: of_recipe[name].config for name in names})
    columns = [f"seed {seed}" for seed in range(seeds)]
    head = ["recipe", *columns, "LFW, %", f"over {names[0]}", "images seen", "images/s", "settings"]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in names:
        found = [results[name, seed] for seed in range(seeds)]
        done = [one for one in found if one]
        pairs = [(one, results[names[0], seed]) for seed, one in enumerate(found)]
        over = [one.accuracy - first.accuracy for one, first in pairs if one and first]
        cells = [
            name,
            *(f"{100 * one.accuracy:.2f}" if one else "" for one in found),
            spread([one.accuracy for one in done]) if done else "",
            spread(over) if over and name != names[0] else "",
            f"{of_recipe[name].images:,}",
            f"{statistics.median(one.rate for one in done):,.0f}" if done else "",
            ", ".join(f"{setting} {value}" for setting, value in settings[name].items()),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    default = Path(os.environ.get("FACE_DATA", ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for sets, runs and the table")
    add("--train", default=f"{default}/faces_celeba5k,{default}/faces_glint24", help="face sets, comma separated")
    add("--overlap", default=str(default / "lfw_overlap.csv"), help="CSV of identities to leave out; empty: none")
    add("--lfw", type=Path, default=default / "lfw", help="a .bin, or a folder with pairs.txt and images/")
    add("--recipes", default=",".join(RECIPES), help="comma separated; others are compared with the first")
    add("--variant", action="append", default=[], metavar="'NAME: FLAGS'", help="one more recipe; repeatable")
    add("--network", default="r18", help="of all recipes")
    add("--epochs", type=int, default=20, help="passes over the whole set; other recipes see as many images")
    add("--seeds", type=int, default=3, help="runs of each recipe, with the seeds 0, 1, ...; 0: prepare only")
    add("--jobs", type=int, default=1, help="runs at a time")
    add("--workers", type=int, default=2, help="processes of each run that decode images")
    add("--device", default="auto", help="as common.device of train.py")
    add("--image-size", type=int, default=112, help="pixels")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Prepare, train, and print the table."""
    given = parse(argv)
    given.output = given.output.resolve()
    with readable_errors("small_sets", "the same command goes on"):
        recipes, sets = read_recipes(given.recipes, given.variant), [Path(name) for name in given.train.split(",")]
        if len({one.name for one in sets}) < len(sets):
            raise ValueError(
                f"--train {given.train}: two sets have the same name, which OUTPUT/sets goes by: rename one"
            )
        given.output.mkdir(parents=True, exist_ok=True)
        overlap = Path(given.overlap) if given.overlap else None
        roots = [prepare_set(one, overlap, given.output / "sets" / one.name, given.image_size) for one in sets]
        lfw = prepare_lfw(given.lfw.resolve(), given.output / "lfw.bin", given.image_size)
        # Seed after seed, so that a comparison that is cut short has as many of each recipe.
        runs = [
            plan(name, flags, seed, roots, lfw, given) for seed in range(given.seeds) for name, flags in recipes.items()
        ]
        faces = open_training_set(roots, 1)
        about = f"{given.network}, {describe_device(pick_device(given.device))}, {given.jobs} runs at a time; "
        about += f"{len(faces):,} images of {len(faces.identities):,} identities"
        print(about, flush=True)

        if not runs:
            return

        def report() -> None:
            write_text_atomic(given.output / "table.md", f"{about}\n\n{make_table(runs, given.seeds)}\n")

        began = time.monotonic()
        failed = train_all(runs, given.jobs, report)
        report()
    print(f"{time.monotonic() - began:.0f} s\n\n{make_table(runs, given.seeds)}")
    if failed:
        sys.exit(f"{len(failed)} runs failed: what they said is in {given.output / 'runs'}/*.txt")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # else the runs would go on without it
    main()
