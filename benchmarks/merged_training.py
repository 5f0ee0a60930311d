#!/usr/bin/env python3
"""What merging is worth: training on a merged set against either part and against their plain concatenation.

    python benchmarks/merged_training.py --folder /tmp/merged_training

Two sets of drawn people are made for each seed; some people are in both, in other pictures. Trained on, for as many
epochs each: the first set; the second; both, with the identities of each apart, so that people of both sets are two
classes that push each other away; the merged set; and the set that a merge without mistakes would make. The merge is
done by dataset_merge.py, with a network that was trained on other people. No run verifies: its last network is taken.

Tested on people who are in no set, all pairs of their pictures: TAR at FAR 1e-3 and equal error rate. The table has
mean and standard error over the seeds, and the difference to the concatenation, seed by seed; --folder gets
`results.csv`, `table.md` and `merged_training.png`.
"""

import argparse
import csv
import math
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from config import PRESETS, Config
from data.face_set_writer import write_face_set
from data.face_sets import open_face_set
from data.make_demo_set import FIRST_NEW_PERSON, FIRST_TEST_PERSON, Album, add_people, draw_people
from dataset_merge import dataset_merge
from models.embedders import load_embedder
from models.embedding import embed_images
from train import train
from utils.demo import count_joins
from utils.evaluation.all_pairs import all_pairs
from utils.files import atomic_path, require_free, write_csv_atomic, write_text_atomic
from utils.processes import worker_count
from utils.settings import build

SIZE = 112
FAR = 1e-3
# The people that the merging network is trained on, and their seed, which is that of the training too.
OTHERS, OTHERS_SEED = "others", 1000
NAMES = ("first set", "second set", "concatenated", "merged", "merged without mistakes")
COLUMNS = ("seed", "trained on", "identities", "images", "tar", "eer", "right joins", "wrong joins", "people in both")


@dataclass(frozen=True)
class Sizes:
    """People only in each set, people in both, pictures of each in a set, people to test on, and passes."""

    own: int
    both: int
    shots: int
    test: int
    epochs: int


def make_sets(folder: Path, sizes: Sizes, seed: int) -> None:
    """Write the two sets, the right union of them, and the people to test on."""
    workers = worker_count(-1)
    shots = range(sizes.shots), range(sizes.shots, 2 * sizes.shots)
    first = range(sizes.both + sizes.own)
    second = [*range(sizes.both), *range(FIRST_NEW_PERSON, FIRST_NEW_PERSON + sizes.own)]
    albums = [
        draw_people(people, part, seed, workers, "draw") for people, part in zip((first, second), shots, strict=True)
    ]
    union: Album = {
        person: albums[0].get(person, []) + albums[1].get(person, []) for person in {**albums[0], **albums[1]}
    }
    strangers = range(FIRST_TEST_PERSON, FIRST_TEST_PERSON + sizes.test)
    held_out = draw_people(strangers, shots[0], seed, workers, "draw")
    for name, album in (("first", albums[0]), ("second", albums[1]), ("union", union), ("test", held_out)):
        with write_face_set(folder / name, SIZE) as out:
            add_people(out, album)


def train_merging_network(folder: Path, people: int, sizes: Sizes) -> None:
    """A run on as many people who are in none of the sets."""
    with write_face_set(folder / OTHERS, SIZE) as out:
        add_people(out, draw_people(range(people), range(sizes.shots), OTHERS_SEED, worker_count(-1), "draw"))
    train_on([folder / OTHERS], folder, OTHERS, sizes, OTHERS_SEED)


def train_on(sets: Sequence[Path], folder: Path, name: str, sizes: Sizes, seed: int) -> Path:
    """A run of the demo's network on `sets`; returns its folder."""
    settings = {
        **PRESETS["demo"],
        "common.device": "cpu",
        "common.runs": str(folder / "runs"),
        "data.root": tuple(map(str, sets)),
        "train.name": name.replace(" ", "_"),
        "train.epochs": sizes.epochs,
        "train.seed": seed,
        "train.verify_at_start": False,
    }
    return train(build(Config, settings))


def merge(folder: Path, model: Path, t: str, wrong_joins: float) -> tuple[int, int, int]:
    """Merge the two sets into `merged`: joins that are right, joins that are wrong, people who are in both."""
    sets = [folder / "first", folder / "second"]
    flags = ["--merge", ",".join(map(str, sets)), "--output", str(folder / "merged"), "--model", str(model), "--t", t]
    share = ["--wrong-joins", str(wrong_joins)] if t == "auto" else []
    dataset_merge.main([*flags, *share, "--device", "cpu"])
    return count_joins(folder / "merged", *sets)


def measure(run: Path, test: Path) -> tuple[float, float]:
    """(TAR at FAR 1e-3, equal error rate) of a run's last network on all pairs of the test people."""
    embedder = load_embedder(run, torch.device("cpu"))
    faces = open_face_set(test)
    embeddings = embed_images(embedder, faces, 64, worker_count(-1), True, str(test))
    result = all_pairs(torch.from_numpy(embeddings), torch.from_numpy(faces.labels), far=[FAR])
    return result.tar[0], result.eer


def measure_seed(
    folder: Path, sizes: Sizes, seed: int, merging: Path, t: str, wrong_joins: float
) -> list[list[object]]:
    """The rows of one seed; `merging`: the run whose network merges."""
    make_sets(folder, sizes, seed)
    first, second, merged, union = (folder / name for name in ("first", "second", "merged", "union"))
    joins: tuple[int, int, int] | None = None
    rows: list[list[object]] = []
    for name, sets in zip(NAMES, ([first], [second], [first, second], [merged], [union]), strict=True):
        if name == "merged":
            joins = merge(folder, merging, t, wrong_joins)
        run = train_on(sets, folder, name, sizes, seed)
        opened = [open_face_set(path) for path in sets]
        counts = sum(len(faces.identities) for faces in opened), sum(map(len, opened))
        rows.append(
            [
                seed,
                name,
                *counts,
                *measure(run, folder / "test"),
                *((joins if name == "merged" else None) or ("", "", "")),
            ]
        )
    return rows


def spread(values: np.ndarray) -> tuple[float, float]:
    """Mean and its standard error; the latter is not a number for one value."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def make_table(rows: Sequence[Sequence[object]]) -> str:
    """Mean and standard error over the seeds, in Markdown."""
    of = {
        name: np.array([[float(str(row[4])), float(str(row[5]))] for row in rows if row[1] == name]) for name in NAMES
    }
    lines = [
        "| trained on | identities | images | TAR at FAR 1e-3, % | equal error rate, % | TAR over concatenated |",
        "|---|---|---|---|---|---|",
    ]
    for name in NAMES:
        counts = [np.mean([int(str(row[i])) for row in rows if row[1] == name]) for i in (2, 3)]
        cells = [f"{100 * mean:.2f} +- {100 * error:.2f}" for mean, error in (spread(of[name][:, i]) for i in (0, 1))]
        mean, error = spread(of[name][:, 0] - of["concatenated"][:, 0])
        difference = "" if name == "concatenated" else f"{100 * mean:+.2f} +- {100 * error:.2f}"
        lines.append(f"| {name} | {counts[0]:,.0f} | {counts[1]:,.0f} | {' | '.join(cells)} | {difference} |")
    return "\n".join(lines)


def draw(path: Path, rows: Sequence[Sequence[object]], title: str) -> None:
    """A point for every seed, means with their standard errors."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column, label in zip(
        figure.subplots(1, 2), (4, 5), ("TAR at FAR 1e-3, %", "equal error rate, %"), strict=True
    ):
        for place, name in enumerate(NAMES):
            values = 100 * np.array([float(str(row[column])) for row in rows if row[1] == name])
            mean, error = spread(values)
            axes.plot(np.full(len(values), place), values, "o", color="#999999", markersize=4)
            axes.errorbar(place + 0.15, mean, error, fmt="s", color="#0072B2", capsize=4)
        axes.set_xticks(range(len(NAMES)), [name.replace(" without ", "\nwithout ") for name in NAMES], rotation=30)
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=10)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--folder",
        type=Path,
        required=True,
        help="for sets, runs and results; one that has results is gone on with, by the same settings",
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--own", type=int, default=100, help="people that only one of the sets has, of each")
    parser.add_argument("--both", type=int, default=100, help="people of both sets")
    parser.add_argument("--shots", type=int, default=8, help="pictures of a person in a set")
    parser.add_argument("--others", type=int, default=600, help="other people that the merging network is trained on")
    parser.add_argument("--test", type=int, default=100, help="people to test on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--t", default="auto", help="as --t of dataset_merge.py")
    parser.add_argument(
        "--wrong-joins",
        type=float,
        default=0.03,
        help="as --wrong-joins of dataset_merge.py, which refuses its default of 0.01 with a network as small as this",
    )
    given = parser.parse_args()
    sizes = Sizes(given.own, given.both, given.shots, given.test, given.epochs)
    results = given.folder / "results.csv"
    began, rows = time.monotonic(), [list(row) for row in csv.reader(results.open())][1:] if results.exists() else []
    merging = given.folder / "runs" / OTHERS
    if not rows:
        require_free(given.folder)
        train_merging_network(given.folder, given.others, sizes)
    for seed in range(len(rows) // len(NAMES), given.seeds):
        shutil.rmtree(given.folder / f"seed{seed}", ignore_errors=True)  # what was interrupted
        rows += measure_seed(given.folder / f"seed{seed}", sizes, seed, merging, given.t, given.wrong_joins)
        write_csv_atomic(results, COLUMNS, rows)
    table = make_table(rows)
    write_text_atomic(given.folder / "table.md", table + "\n")
    title = f"{sizes}, {given.seeds} seeds: each seed, and the mean with its standard error"
    draw(given.folder / "merged_training.png", rows, title)
    joins = [row[6:] for row in rows if row[1] == "merged"]
    print(f"\n{title}\n\n{table}\n\nright and wrong joins, people in both sets, of each seed: {joins}")
    print(f"{time.monotonic() - began:.0f} s; {given.folder / 'merged_training.png'}")


if __name__ == "__main__":
    main()
