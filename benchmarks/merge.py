#!/usr/bin/env python3
"""How well a merge finds who is who, on real people whose names are known; and how fast it compares.

    python benchmarks/merge.py --face-data ../shared/data --output merge_proof
    python benchmarks/merge.py --speed 50000,50000,512

Proof: LFW is cut into sets with a known overlap, and joined again. People with several images are in all sets, their
images dealt out; the others are in one. Precision and recall count pairs of identities of different sets in one
group. The weights are insightface's MobileFaceNet "y1". The rule was found on one half of the people (`--part tuning`),
the numbers are for the other half. "Best fixed" is the threshold on plain means that gives the highest F1 in hindsight,
which nobody has who merges. LFW itself has a few wrong labels, and people under two names: they count as errors.

Speed: processor time of the comparison over that of the bare product in the same blocks.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data.face_sets import open_face_set
from dataset_merge.calibration import CalibrationError
from dataset_merge.centres import Method, identity_centres
from dataset_merge.deciding import Decided, MatchSettings, decide
from dataset_merge.matching import top_matches, usual_block
from utils.plots import draw_curves

# Of the halves that the rule was found on and measured on.
PART_SEED = 7


@dataclass(frozen=True)
class People:
    """Images of known people: `embeddings` float32 [images, D], unit; `person` int64 [images]."""

    embeddings: NDArray[np.float32]
    person: NDArray[np.int64]


@dataclass(frozen=True)
class CutSet:
    """A set cut from the people: `images`, positions; `labels` of theirs; `person` that each identity is."""

    images: NDArray[np.int64]
    labels: NDArray[np.int64]
    person: NDArray[np.int64]


@dataclass(frozen=True)
class Quality:
    """Of joined pairs of identities: `precision`, `recall` and their harmonic mean `f1`."""

    precision: float
    recall: float
    f1: float


def embed(path: Path, weights: Path, cache: Path | None) -> People:
    """The embeddings (mirror image added) and names of the set at `path`, kept in the folder `cache`."""
    from models.embedders import load_embedder
    from models.embedding import embed_images

    faces = open_face_set(path)
    embedder = load_embedder(weights, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return People(embed_images(embedder, faces, 64, 2, True, path.name, cache=cache), faces.labels)


def part_of(people: People, part: str, seed: int = PART_SEED) -> NDArray[np.int64]:
    """The people of the tuning or the held-out half, drawn by `seed`; or `all` of them."""
    everyone = np.random.default_rng(seed).permutation(int(people.person.max()) + 1)
    half = len(everyone) // 2
    return {"tuning": everyone[:half], "held-out": everyone[half:], "all": everyone}[part]


def cut(
    people: People, chosen: Sequence[int] | NDArray[np.int64], sets: int, seed: int, most: int = 0, noise: float = 0.0
) -> list[CutSet]:
    """Deal the images of each person out to `sets` sets; people with fewer images than sets go to random ones.

    `most`: images of a person in each set, 0 for all of them. `noise`: share of the images of each set that get the
    label of a random identity; the person of an identity is then the one with most images in it, its own of several.
    """
    generator = np.random.default_rng(seed)
    of_person = _images_of(people)
    members: list[list[tuple[int, NDArray[np.int64]]]] = [[] for _ in range(sets)]
    for person in chosen:
        images = generator.permutation(of_person[person])
        for number, place in enumerate(generator.permutation(sets)[: len(images)]):
            own = images[number::sets]
            members[place].append((int(person), own[:most] if most else own))
    return [_as_set(people, part, noise, generator) for part in members]


def _images_of(people: People) -> list[NDArray[np.int64]]:
    """The positions of the images of each person."""
    order = np.argsort(people.person, kind="stable")
    return np.split(order, np.cumsum(np.bincount(people.person))[:-1])


def _as_set(
    people: People, members: list[tuple[int, NDArray[np.int64]]], noise: float, generator: np.random.Generator
) -> CutSet:
    images = np.concatenate([own for _, own in members])
    labels = np.repeat(np.arange(len(members)), [len(own) for _, own in members])
    moved = generator.random(len(labels)) < noise
    labels[moved] = generator.integers(len(members), size=int(moved.sum()))
    kept, labels = np.unique(labels, return_inverse=True)
    person = np.empty(len(kept), np.int64)
    for label, name in enumerate(kept):
        votes = np.bincount(people.person[images[labels == label]])
        named = members[name][0]
        person[label] = named if named < len(votes) and votes[named] == votes.max() else votes.argmax()
    return CutSet(images, labels, person)


def cut_within(people: People, chosen: NDArray[np.int64], share: float, seed: int) -> CutSet:
    """One set of the people, of whom a share is there twice: `share` x len(chosen) of those with two images or more,
    each with every other image under a name of its own.
    """
    generator = np.random.default_rng(seed)
    of_person = _images_of(people)
    several = [int(person) for person in generator.permutation(chosen) if len(of_person[person]) > 1]
    twice = several[: round(share * len(chosen))]
    members = [(int(person), of_person[person]) for person in np.setdiff1d(chosen, twice, assume_unique=True)]
    members += [(person, of_person[person][start::2]) for person in twice for start in (0, 1)]
    return _as_set(people, members, 0.0, generator)


def true_pairs(sets: Sequence[CutSet]) -> int:
    """Pairs of identities of different sets that are one person; of a single set those inside it."""
    if len(sets) == 1:
        return int(len(sets[0].person) - len(np.unique(sets[0].person)))
    total = 0
    for one, other in combinations(sets, 2):
        counts = np.bincount(other.person, minlength=int(one.person.max()) + 1)
        total += int(counts[one.person].sum())
    return total


def quality(joined: int, right: int, total: int) -> Quality:
    """From the numbers of joined pairs, of right ones among them, and of all that there are."""
    return Quality(right / max(1, joined), right / max(1, total), 2 * right / max(1, joined + total))


def merge(people: People, sets: Sequence[CutSet], settings: MatchSettings) -> Decided:
    """Who is who in the sets, as the program decides it."""
    return decide(
        [people.embeddings[part.images] for part in sets],
        [part.labels for part in sets],
        [len(part.person) for part in sets],
        settings,
        [f"set {number}" for number in range(len(sets))],
        torch.device("cpu"),
    )


def judge(sets: Sequence[CutSet], decided: Decided) -> Quality:
    """Precision and recall of the groups, as pairs of identities of different sets; of a single set those inside it."""
    person = np.concatenate([part.person for part in sets])
    source, group = decided.source.numpy(), decided.grouping.group
    order = np.argsort(group, kind="stable")
    joined = right = 0
    for members in np.split(order, np.cumsum(np.bincount(group))[:-1]):
        for one, other in combinations(members.tolist(), 2):
            if len(sets) == 1 or source[one] != source[other]:
                joined += 1
                right += bool(person[one] == person[other])
    return quality(joined, right, true_pairs(sets))


Curve = tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]


def curve(score: NDArray, right: NDArray[np.bool_], total: int) -> Curve:
    """Thresholds, falling, and precision, recall and F1 of the pairs that reach each."""
    order = np.argsort(-score, kind="stable")
    hits, joined = right[order].cumsum(), np.arange(1, len(order) + 1)
    return score[order], hits / joined, hits / total, 2 * hits / (joined + total)


def plain_pairs(people: People, sets: Sequence[CutSet], mutual: bool) -> tuple[NDArray, NDArray[np.bool_]]:
    """Cosines of plain means, of all pairs above 0.2 or the mutual best ones, and whether each is right."""
    centres = [
        identity_centres(torch.from_numpy(people.embeddings[s.images]), torch.from_numpy(s.labels), len(s.person))
        for s in sets
    ]
    scores, right = [], []
    for one, other in combinations(range(len(sets)), 2):
        cosines = (centres[one].vectors @ centres[other].vectors.T).numpy()
        if mutual:
            j = cosines.argmax(1)
            i = np.flatnonzero(cosines.argmax(0)[j] == np.arange(len(j)))
            j = j[i]
        else:
            i, j = np.nonzero(cosines > 0.2)
        scores.append(cosines[i, j])
        right.append(sets[one].person[i] == sets[other].person[j])
    return np.concatenate(scores), np.concatenate(right)


def best_fixed(people: People, sets: Sequence[CutSet], mutual: bool) -> tuple[Quality, float]:
    """The best that a fixed threshold on plain means gives, in hindsight, and that threshold."""
    scores, right = plain_pairs(people, sets, mutual)
    thresholds, precision, recall, f1 = curve(scores, right, true_pairs(sets))
    best = int(f1.argmax())
    return Quality(float(precision[best]), float(recall[best]), float(f1[best])), float(thresholds[best])


def prove(people: People, chosen: NDArray[np.int64], name: str, seeds: int, output: Path | None) -> list[str]:
    """The table's rows for every way to cut the people."""
    ways = {
        "halves": (2, 0, 0.0),
        "one image a side": (2, 1, 0.0),
        "three sets": (3, 0, 0.0),
        "halves, 5 % wrong labels": (2, 0, 0.05),
        "halves, 20 % wrong labels": (2, 0, 0.2),
    }
    rows = []
    for way, (count, most, noise) in ways.items():
        results: dict[str, list[Quality]] = {}
        expected: list[float] = []
        refused: set[str] = set()
        for seed in range(seeds):
            sets = cut(people, chosen, count, seed, most, noise)
            results.setdefault("best fixed, all pairs", []).append(best_fixed(people, sets, False)[0])
            results.setdefault("best fixed, mutual best", []).append(best_fixed(people, sets, True)[0])
            results.setdefault("--t 0.65", []).append(judge(sets, merge(people, sets, MatchSettings())))
            tried = [("", method, 0.01) for method in get_args(Method)[: 3 if noise or way == "halves" else 1]]
            if noise > 0.1:
                tried += [(" --wrong-joins 0.1", method, 0.1) for method in get_args(Method)]
            for flags, method, share in tried:
                rule = f"--t auto{flags}, {method}"
                try:
                    decided = merge(people, sets, MatchSettings(None, method, wrong_joins=share))
                except CalibrationError:
                    refused.add(rule)
                    continue
                results.setdefault(rule, []).append(judge(sets, decided))
                if rule == "--t auto, mean" and decided.calibration:
                    expected.append(decided.calibration.expected_wrong / max(1, decided.calibration.expected_joins))
            if output and seed == 0 and "--t auto, mean" not in refused:
                draw(
                    people,
                    sets,
                    f"{name}, {way}",
                    output / f"{name}_{way}.png".replace(" ", "_").replace(",", "").replace("_%", ""),
                )
        rows += [_row(f"{name}: {way}", rule, values, seeds) for rule, values in results.items()]
        shares = f"{100 * np.mean(expected):.2f} %" if expected else "unknown"
        rows += [_row(f"{name}: {way}", rule, [], seeds) for rule in refused - results.keys()]
        print(*(row for row in rows if f" {name}: {way} |" in row), f"(expected wrong: {shares})", sep="\n", flush=True)
    return rows


def prove_within(people: People, chosen: NDArray[np.int64], name: str, seeds: int) -> list[str]:
    """The table's rows for one set with people who are in it twice."""
    rows = []
    for share in (0.01, 0.05, 0.15):
        for rule, settings in {
            "--t 0.65 --within": MatchSettings(within=True),
            "--t auto --within": MatchSettings(None, within=True),
            "--t auto --within --rule clusters": MatchSettings(None, within=True, rule="clusters"),
        }.items():
            results = []
            for seed in range(seeds):
                part = cut_within(people, chosen, share, seed)
                try:
                    results.append(judge([part], merge(people, [part], settings)))
                except CalibrationError:
                    continue
            rows.append(_row(f"{name}: {100 * share:g} % twice", rule, results, seeds))
            print(rows[-1], flush=True)
    return rows


def _row(cut_name: str, rule: str, results: Sequence[Quality], seeds: int) -> str:
    """A line of the table; of `seeds` cuts those without a result were refused."""
    if not results:
        return f"| {cut_name} | {rule} | refused | | |"
    values = ([q.precision for q in results], [q.recall for q in results], [q.f1 for q in results])
    refused = f" ({seeds - len(results)} of {seeds} cuts refused)" if len(results) < seeds else ""
    return f"| {cut_name} | {rule}{refused} | {' | '.join(f'{np.mean(v):.4f} ± {np.std(v):.4f}' for v in values)} |"


def draw(people: People, sets: Sequence[CutSet], title: str, path: Path) -> None:
    """Precision over recall: a fixed threshold on plain means, and the rule of --t auto, over all thresholds."""
    decided = merge(people, sets, MatchSettings(None))
    person = np.concatenate([part.person for part in sets])
    pairs = decided.grouping.pairs
    mutual = np.array([decision != "not mutual" for decision in decided.grouping.decision])
    right = (person[pairs.first] == person[pairs.second])[mutual]
    total = true_pairs(sets)
    lines = {}
    for name, scores in (
        ("fixed, all pairs", plain_pairs(people, sets, False)),
        ("fixed, mutual best", plain_pairs(people, sets, True)),
        ("auto's score", (pairs.score[mutual], right)),
    ):
        _, precision, recall, _ = curve(*scores, total)
        shown = (recall > 0.8) & (precision > 0.8)
        lines[name] = (recall[shown], precision[shown])
    reached = judge(sets, decided)
    lines["--t auto"] = (np.array([reached.recall]), np.array([reached.precision]))
    draw_curves(path, lines, "recall", "precision", title)


def speed(first: int, second: int, size: int, block: int, device: torch.device, repeats: int) -> str:
    """Time of the comparison, and of the bare products in the same blocks, the least of `repeats`. CPU: processor time;
    CUDA: wall clock.
    """
    generator = torch.Generator().manual_seed(0)
    rows, columns = (F.normalize(torch.randn(n, size, generator=generator)).to(device) for n in (first, second))
    block = block or usual_block(device)
    buffer = rows.new_empty(block * block)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()

    def bare() -> None:
        for i in range(0, first, block):
            for j in range(0, second, block):
                one, other = rows[i : i + block], columns[j : j + block]
                torch.mm(one, other.T, out=buffer[: len(one) * len(other)].view(len(one), len(other)))

    top_matches(rows[:block], columns[:block], block=block)
    times: list[list[float]] = [[], [], []]
    for _ in range(repeats):
        for kept, work in zip(
            times,
            (
                bare,
                lambda: top_matches(rows, columns, 8, 0.4, block),
                lambda: top_matches(rows, columns, 2, -1.0, block),
            ),
            strict=True,
        ):
            began = now()
            work()
            kept.append(now() - began)
    product, floor, auto = (min(kept) for kept in times)
    rate = 2 * first * second * size / product / 1e9
    return (
        f"{first:,} x {second:,} x {size}, blocks of {block:,}, {device}: product {product:.2f} s ({rate:,.0f} "
        f"GFLOP/s), 8 best above 0.4: {floor / product:.3f} times that, 2 best without a floor (--t auto): "
        f"{auto / product:.3f}"
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--face-data", type=Path, help="folder with lfw/images, faces_celeba5k and models")
    parser.add_argument("--part", choices=("tuning", "held-out", "all"), default="held-out")
    parser.add_argument("--part-seed", type=int, default=PART_SEED, help="halves the people")
    parser.add_argument("--seeds", type=int, default=5, help="random cuts of each kind")
    parser.add_argument("--cache", type=Path, help="folder that keeps the embeddings")
    parser.add_argument("--output", type=Path, help="folder for the table and the curves")
    parser.add_argument("--celeba", action="store_true", help="faces_celeba5k too")
    parser.add_argument("--speed", help="measure a comparison instead: N,M,D")
    parser.add_argument("--block", type=int, default=0, help="of --speed; 0: as in a merge")
    parser.add_argument("--repeats", type=int, default=3, help="of --speed: the least time of so many counts")
    options = parser.parse_args()
    if options.speed:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        print(speed(*map(int, options.speed.split(",")), options.block, device, options.repeats))
        return
    if not options.face_data:
        parser.error("--face-data: name the folder of real faces, or --speed N,M,D")
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
    weights = options.face_data / "models" / "mobilefacenet_y1_128d.onnx"
    sets = {"lfw": options.face_data / "lfw" / "images"}
    if options.celeba:
        sets["celeba"] = options.face_data / "faces_celeba5k"
    rows = ["| cut | rule | precision | recall | F1 |", "|---|---|---|---|---|"]
    for name, path in sets.items():
        people = embed(path, weights, options.cache)
        chosen = part_of(people, options.part, options.part_seed)
        rows += prove(people, chosen, name, options.seeds, options.output)
        rows += prove_within(people, chosen, name, options.seeds)
    if options.output:
        (options.output / "merge.md").write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
