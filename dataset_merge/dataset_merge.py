#!/usr/bin/env python3
"""Join face sets by identity: people who are in several sets get one label in the merged one.

    python dataset_merge/dataset_merge.py --merge A,B --output C --model runs/NAME --batch-size 64 --t 0.65

Every image is embedded; an identity's centre is the normalised mean of its unit embeddings. The sets are taken in the
order given. An identity joins the one of the sets before that it is most similar to when their cosine is at least t
and that one has no better match in the same set; otherwise it is added. So two identities that one set holds apart
stay apart. The merged set has the layout of train.rec sets, images as the bytes they were; with it come `merge.csv`
(what became of every identity), and the pairs nearest to the threshold as a picture.
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from config import PRESETS, Config
from data.face_sets import (
    FaceSet,
    FaceSetError,
    FaceSetWriter,
    images_by_identity,
    open_face_set,
    write_face_set,
)
from data.images import decode_rgb
from dataset_merge.matching import identity_sums
from dataset_merge.plan import Decision, plan_merge
from models.embedder import Embedder, load_embedder
from models.embedding import embed_images
from utils.checkpoints import newest_run
from utils.devices import pick_device
from utils.files import require_free, write_csv_atomic
from utils.plots import draw_contact_sheet
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings

ROWS_DRAWN = 24
IMAGES_DRAWN = 4  # of each side


def merge(paths: Sequence[Path], output: Path, embedder: Embedder, config: Config) -> list[Decision]:
    """Merge the sets at `paths` into the new folder `output`; returns what became of every identity."""
    require_free(output)
    sets = [open_face_set(path) for path in paths]
    workers = worker_count(config.common.workers)
    sums = []
    for path, faces in zip(paths, sets, strict=True):
        embeddings = embed_images(embedder, faces, config.merge.batch_size, workers, config.merge.mirror, str(path))
        labels = torch.from_numpy(faces.labels).to(embedder.device)
        sums.append(identity_sums(torch.from_numpy(embeddings).to(embedder.device), labels, len(faces.identities)))
    decisions = plan_merge(sums, sets, config.merge.t)
    with write_face_set(output, embedder.image_size) as out:
        write_merged(out, sets, decisions)
        header = [field.name for field in fields(Decision)]
        write_csv_atomic(out.folder / "merge.csv", header, (list(asdict(decision).values()) for decision in decisions))
        draw_nearest_pairs(out.folder / "nearest_to_t.png", sets, decisions, config.merge.t)
    return decisions


def write_merged(out: FaceSetWriter, sets: Sequence[FaceSet], decisions: Sequence[Decision]) -> None:
    """Write every identity's images, those of all its sets together, in the order of the new labels."""
    members: list[list[tuple[FaceSet, np.ndarray]]] = [[] for _ in range(1 + max(d.new_label for d in decisions))]
    images = [images_by_identity(faces) for faces in sets]
    position = [0] * len(sets)
    for decision in decisions:
        source = decision.source
        members[decision.new_label].append((sets[source], images[source][position[source]]))
        position[source] += 1
    with progress_bar(sum(map(len, sets)), "image", "write") as bar:
        for parts in members:
            out.add_identity(faces.encoded(int(i)) for faces, indices in parts for i in indices)
            bar.update(sum(len(indices) for _, indices in parts))


def draw_nearest_pairs(path: Path, sets: Sequence[FaceSet], decisions: Sequence[Decision], t: float) -> None:
    """A row for each of the pairs whose cosine is nearest to `t`: four images of the newcomer, four of its match."""
    compared = [decision for decision in decisions if decision.score is not None]
    nearest = sorted(compared, key=lambda decision: abs((decision.score or 0) - t))[:ROWS_DRAWN]
    nearest.sort(key=lambda decision: decision.score or 0, reverse=True)
    images = [images_by_identity(faces) for faces in sets]
    names = [{name: identity for identity, name in enumerate(faces.identities)} for faces in sets]
    cells, labels = [], []
    for decision in nearest:
        assert decision.match_source is not None
        assert decision.match_label is not None
        for source, label in ((decision.source, decision.label), (decision.match_source, decision.match_label)):
            own = images[source][names[source][label]]
            chosen = own[np.linspace(0, len(own) - 1, IMAGES_DRAWN).round().astype(int)]
            cells += [decode_rgb(sets[source].encoded(int(i)), sets[source].describe(int(i))) for i in chosen]
        labels.append(f"{decision.score:.3f} {decision.decision}")
    if cells:
        draw_contact_sheet(path, cells, 2 * IMAGES_DRAWN, f"pairs nearest to t = {t:g}: newcomer, match", labels)


def summary(paths: Sequence[Path], decisions: Sequence[Decision]) -> str:
    """How many identities of each set were joined and added, as a table."""
    lines = [f"{'set':<40} {'identities':>10} {'images':>10} {'joined':>10} {'added':>10}"]
    for source, path in enumerate(paths):
        own = [decision for decision in decisions if decision.source == source]
        joined = sum(decision.decision == "joined" for decision in own)
        images = sum(decision.images for decision in own)
        lines.append(f"{path!s:<40} {len(own):>10,} {images:>10,} {joined:>10,} {len(own) - joined:>10,}")
    identities = 1 + max(decision.new_label for decision in decisions)
    images = sum(decision.images for decision in decisions)
    lines.append(f"{'merged':<40} {identities:>10,} {images:>10,}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("dataset_merge", "nothing was written"):
        config = parse_settings(Config, PRESETS, ("merge", "common"), __doc__, argv)
        print(describe(config, ("merge", "common")))
        paths = [Path(path) for path in config.merge.sets]
        if len(paths) < 2:
            raise FaceSetError("name two sets or more to merge: --merge A,B")
        if not config.merge.output:
            raise FaceSetError("name a folder for the merged set: --output C")
        model = Path(config.merge.model) if config.merge.model else newest_run(Path(config.common.runs))
        embedder = load_embedder(
            model,
            pick_device(config.common.device),
            config.model.normalisation,
            config.model.network,
            config.model.embedding_size,
            config.data.image_size,
        )
        decisions = merge(paths, Path(config.merge.output), embedder, config)
    print(summary(paths, decisions))
    print(f"{config.merge.output}: train on it with: python train.py --data.root {config.merge.output}")


if __name__ == "__main__":
    main()
