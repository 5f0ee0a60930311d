#!/usr/bin/env python3
"""Write a training set without the faces that a run with sub-centers shows to be mislabelled.

    python train.py --data.root datasets/web --loss.sub-centers 3 --name noisy
    python data/drop_noisy.py --run runs/noisy --output datasets/web_clean
    python train.py --data.root datasets/web_clean

A class's dominant sub-center is the one that most of its faces are nearest to. Faces farther from it than --angle are
noise (Deng et al., Sub-center ArcFace, ECCV 2020). Network and centres are those of the run's newest checkpoint; the
set is the one that the run was trained on, or --source, if it has moved.

The new set has the layout of train.rec sets, images as the bytes they were, identities in their order; those that lose
all their faces drop out. With it come `noisy.csv` (each face that was dropped: where it lies, its identity, its angle
in degrees, its nearest sub-center), `identities.csv` (what became of each identity, its dominant sub-center) and
`angles.png`. Broken images are dropped, too, and have no angle. docs/losses.md shows an example.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from config import PRESETS, READS, Config
from data.face_set_writer import training_advice, write_face_set
from data.face_sets import FaceSet, FaceSetError, images_by_identity
from data.images import ImageError
from data.joined_sets import identity_keys, open_training_set
from data.loading import DecodedFaces, sequential_loader
from models.embedders import Embedder, load_embedder
from models.heads.sub_centers import angles, dominant, nearest, own_cosines
from utils.checkpoints import CheckpointError
from utils.devices import pick_device
from utils.files import require_free, write_csv_atomic
from utils.plots import draw_curves, histogram_outline
from utils.processes import worker_count
from utils.progress import progress_bar, say
from utils.scripts import printable, readable_errors
from utils.settings import build, by_name, describe, parse_settings
from utils.text_files import open_text, read_rows
from utils.texts import listed
from utils.training.run_folders import CHECKPOINTS
from utils.training.run_notes import require_run_notes
from utils.training.saved_checkpoints import BACKBONE, DamagedError, Saved, checkpoint_folders

HEAD = "head.weight"

# Identities named on the screen; identities.csv has them all.
SHOWN = 20


@dataclass(frozen=True)
class Measured:
    """Of every face: `angle` with its class's dominant sub-center, float32 [images], degrees, NaN for a broken image;
    `nearest` sub-center, int64 [images]. Of every class: `dominant` sub-center, int64 [identities].
    """

    angle: np.ndarray
    nearest: np.ndarray
    dominant: np.ndarray


@dataclass(frozen=True)
class Cleaned:
    """What became of a set: faces `kept` and `dropped`, of them `broken`; identities left; names of those `lost`."""

    kept: int
    dropped: int
    broken: int
    identities: int
    lost: list[str]


def newest_checkpoint(run: Path) -> Saved:
    """The newest undamaged checkpoint of `run`, which is only read: it may be training still.

    Raises CheckpointError when it has none.
    """
    for folder in reversed(checkpoint_folders(run / CHECKPOINTS)):
        try:
            saved = Saved(folder)
            require_run_notes(saved)
            saved.check(saved.files)
        except DamagedError as error:
            say(f"passed over: {error}")
            continue
        return saved
    raise CheckpointError(f"drop_noisy.run: {run} has no whole checkpoint in {CHECKPOINTS}: name the folder of a run")


def run_settings(saved: Saved) -> Config:
    """The settings that the checkpoint was trained with. Raises CheckpointError if they have one sub-center a class."""
    config = build(Config, by_name(saved.notes["settings"]))
    if config.loss.sub_centers == 1:
        raise CheckpointError(
            f"{saved.folder} has one centre a class, which says nothing about noise: "
            "train with --loss.sub-centers 3 first"
        )
    return config


def open_set_of(run: Path, trained: Config, source: Sequence[str]) -> FaceSet:
    """The training set of `run`, from `source` if given. Raises FaceSetError unless its identities are the classes."""
    try:
        faces = open_training_set(source or trained.data.root, trained.data.min_images)
    except FaceSetError as error:
        setting = "drop_noisy.source" if source else f"the data.root of {run}"
        raise FaceSetError(f"{setting}: {error}; --source names the set that the run was trained on") from None
    file = run / "classes.csv"
    classes = _read_classes(file)
    if len(classes) != len(faces.identities):
        raise FaceSetError(
            f"{faces.path} has {len(faces.identities):,} identities, {file} {len(classes):,}: "
            "name the set that the run was trained on with --source"
        )
    joined = len(source or trained.data.root) > 1
    for number, (name, trained_name) in enumerate(zip(identity_keys(faces), classes, strict=True)):
        # Of joined sets the names in the file begin with the paths that they had, the keys with their numbers.
        same = trained_name.endswith(name[name.index(": ") :]) if joined else name == trained_name
        if not same:
            raise FaceSetError(
                f"{faces.path}: identity {number} is {name!r}, in {file} it is {trained_name!r}: "
                "name the set that the run was trained on with --source"
            )
    return faces


def _read_classes(file: Path) -> list[str]:
    """The identities of a run's classes. Raises FaceSetError for what train.py did not write."""
    with open_text(file) as table:
        rows = read_rows(table, file, FaceSetError)
        header = next(rows, (1, []))[1]
        if "identity" not in header:
            raise FaceSetError(f"{file}: its header {','.join(header)[:100]!r} lacks identity: is it a run's?")
        classes = []
        for line, row in rows:
            if len(row) != len(header):
                raise FaceSetError(f"{file}, line {line}: {len(row)} columns, expected {len(header)}")
            classes.append(row[header.index("identity")])
    return classes


def load_centres(saved: Saved, trained: Config, classes: int) -> Tensor:
    """The sub-centers of all classes, float32 [classes * sub_centers, D], on the CPU. Raises CheckpointError."""
    rows, expected = saved.shape(HEAD)[0], classes * trained.loss.sub_centers
    if rows != expected:
        raise CheckpointError(
            f"{saved.folder} has {rows:,} centres, not {trained.loss.sub_centers} for each of {classes:,} identities"
        )
    return saved.rows(HEAD, 0, rows)


def measure(
    faces: FaceSet,
    embedder: Embedder,
    centres: Tensor,
    sub_centers: int,
    batch_size: int,
    workers: int,
    mirror: bool,
    resize: bool = False,
    broken_limit: int = 0,
) -> Measured:
    """How far every face is from the dominant sub-center of its class, with a progress bar.

    Memory: 4 x sub_centers + 40 bytes a face; embeddings are not kept. Broken images are named; ImageError when they
    are more than `broken_limit`.
    """
    decoded = DecodedFaces(faces, faces.labels, embedder.image_size, resize, tolerant=True)
    cosines, labels = torch.empty(len(faces), sub_centers), torch.from_numpy(faces.labels).clone()
    start, broken = 0, 0
    with progress_bar(len(faces), "image", "measure") as bar:
        for batch, batch_labels, messages in sequential_loader(decoded, batch_size, workers, embedder.device):
            for message in messages:
                say(f"left out: {message}")
            broken += len(messages)
            if broken > broken_limit:
                raise ImageError(f"{broken} images are broken, data.broken_limit allows {broken_limit}: {messages[-1]}")
            part = slice(start, start + len(batch))
            labels[part] = batch_labels
            unit = embedder.embed(batch, mirror)
            cosines[part] = own_cosines(unit, labels[part].to(unit.device), centres, sub_centers).cpu()
            start = part.stop
            bar.update(len(batch))
    dominants = dominant(cosines, labels, len(faces.identities))
    angle = angles(cosines, labels, dominants)
    return Measured(angle.numpy(), nearest(cosines).numpy(), dominants.numpy())


def write_clean(faces: FaceSet, measured: Measured, limit: float, output: Path, image_size: int) -> Cleaned:
    """Write the faces of `measured` within `limit` degrees as the new set `output`, and what is listed above.

    Raises FaceSetError when no face is left, FileExistsError when `output` is there and not empty.
    """
    keep = measured.angle <= limit  # not so for NaN
    if not keep.any():
        raise FaceSetError(f"{faces.path}: no face is within {limit:g} degrees: raise --angle, or train for longer")
    labels: list[int | str] = []
    images = images_by_identity(faces)
    with write_face_set(output, image_size) as out:
        with progress_bar(int(keep.sum()), "image", "write") as bar:
            for positions in images:
                kept = positions[keep[positions]].tolist()
                labels.append(out.add_identity(faces.encoded(i) for i in kept) if kept else "")
                bar.update(len(kept))
        write_csv_atomic(
            out.folder / "noisy.csv",
            ("image", "identity", "angle", "sub_center"),
            (_noisy_row(faces, measured, i) for positions in images for i in positions[~keep[positions]].tolist()),
        )
        of_identity = (np.bincount(faces.labels[one], minlength=len(images)).tolist() for one in (keep, ~keep))
        dominants = (found if found >= 0 else "" for found in measured.dominant.tolist())
        write_csv_atomic(
            out.folder / "identities.csv",
            ("identity", "label", "kept", "dropped", "dominant"),
            zip(faces.identities, labels, *of_identity, dominants, strict=True),
        )
        if np.isfinite(measured.angle).any():
            draw_angles(out.folder / "angles.png", measured.angle, limit, str(faces.path))
    lost = [name for name, label in zip(faces.identities, labels, strict=True) if label == ""]
    broken = int(np.isnan(measured.angle).sum())
    return Cleaned(int(keep.sum()), int((~keep).sum()), broken, len(labels) - len(lost), lost)


def _noisy_row(faces: FaceSet, measured: Measured, i: int) -> tuple[object, ...]:
    angle, name = float(measured.angle[i]), faces.identities[faces.labels[i]]
    if math.isnan(angle):
        return faces.describe(i), name, "", ""
    return faces.describe(i), name, f"{angle:.2f}", int(measured.nearest[i])


def draw_angles(path: Path, angle: np.ndarray, limit: float, name: str) -> None:
    """Histogram of the angles (degrees, NaN for none) of a set's faces, bars a degree wide, with the cut at `limit`."""
    angle = angle[np.isfinite(angle)]
    # 20 bars or more: see histogram_outline.
    edges = np.arange(0.0, max(24, math.ceil(max(limit, float(angle.max())))) + 1)
    outline = histogram_outline(angle, edges)
    cut = (np.full(50, limit), np.linspace(0, outline[1].max(), 50))  # 50 points: without dots
    title = f"{name}: {angle.size:,} faces, {np.sum(angle > limit):,} beyond the cut"
    xlabel = "angle with the dominant sub-center of the identity, degrees"
    draw_curves(path, {"faces": outline, f"cut at {limit:g} degrees": cut}, xlabel, "faces", title)


def summary(cleaned: Cleaned, limit: float, output: str) -> str:
    """What became of the set, for the screen."""
    share = cleaned.dropped / (cleaned.kept + cleaned.dropped)
    text = (
        f"{output}: {cleaned.kept:,} faces of {cleaned.identities:,} identities kept, {cleaned.dropped:,} dropped "
        f"({share:.1%}): farther than {limit:g} degrees from the dominant sub-center"
    )
    if cleaned.broken:
        text += f", {cleaned.broken:,} of them broken"
    text += "; see its noisy.csv"
    if cleaned.lost:
        names = listed(cleaned.lost, SHOWN)
        text += f"\nidentities that lost all their faces and so drop out ({len(cleaned.lost):,}): {names}"
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("drop_noisy", "nothing was written"):
        config = parse_settings(Config, PRESETS, ("drop_noisy", "common"), __doc__, argv, reads=READS["drop_noisy"])
        print(describe(config, READS["drop_noisy"]))
        options = config.drop_noisy
        if not options.run:
            raise CheckpointError("name the run with the sub-centers: --run runs/NAME")
        if not options.output:
            raise FaceSetError("name a folder for the set: --output CLEAN")
        require_free(options.output)
        run, device = Path(options.run), pick_device(config.common.device)
        saved = newest_checkpoint(run)
        trained = run_settings(saved)
        faces = open_set_of(run, trained, options.source)
        centres = load_centres(saved, trained, len(faces.identities))
        embedder = load_embedder(saved.folder / BACKBONE, device)
        print(f"{saved.folder} on {embedder.runs_on}: {len(faces):,} faces of {len(faces.identities):,} identities")
        measured = measure(
            faces,
            embedder,
            centres,
            trained.loss.sub_centers,
            options.batch_size,
            worker_count(config.common.workers),
            options.mirror,
            trained.data.resize,
            trained.data.broken_limit,
        )
        cleaned = write_clean(faces, measured, options.angle, Path(options.output), embedder.image_size)
    print(printable(summary(cleaned, options.angle, options.output)))
    print(training_advice(options.output, embedder.image_size))


if __name__ == "__main__":
    main()
