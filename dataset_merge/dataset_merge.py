#!/usr/bin/env python3
"""Join face sets by identity: people who are in several sets get one label in the merged one.

    python dataset_merge/dataset_merge.py --merge A,B --output C --model runs/NAME --batch-size 64 --t 0.65
    python dataset_merge/dataset_merge.py --merge A,B,D --output C --model r50.onnx --t auto --exclude lfw.bin --dry-run
    python dataset_merge/dataset_merge.py --merge A,B --output C --decisions merge.csv --duplicates bytes

Every image is embedded, every identity compared with those of the other sets, and who is the same person gets one
label; those of the first set come first. Identities that one set holds apart stay apart, unless --within. The merged
set has the layout of train.rec sets, images as the bytes they were. With it come `merge.csv` (what became of every
identity; edited, it is applied by --decisions), `report.html` (counts, threshold, faces near it to judge by eye), and
where it looked for them `duplicates.csv` and `cleaning.csv`. OUTPUT appears when it is whole. An interrupted run, a
killed one too, goes on where it stopped when it is started again: embeddings are kept in `OUTPUT.embeddings`. Several
processes under torchrun share the comparing. docs/merging.md explains all of it.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import PRESETS, READS, Config
from data.face_set_writer import training_advice
from dataset_merge.decisions import decision_counts
from dataset_merge.disk_space import as_size
from dataset_merge.merge_report import Merge
from dataset_merge.merging import dry_run_folder, model_of, needs_embeddings, run_merge
from dataset_merge.opening import open_sets, tell_size
from models.embedders import Embedder, load_embedder
from utils.devices import pick_device
from utils.program import program_facts
from utils.ranks import DAYS, join_ranks
from utils.scripts import end_rank, readable_errors
from utils.settings import describe, flatten, parse_settings
from utils.texts import columns_of


def summary(done: Merge) -> str:
    """How many identities of each set were joined, added and left out, as a table."""
    columns, rows = decision_counts([str(path) for path in done.paths], done.decisions, len(done.duplicates))
    cells = [columns, *([f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows)]
    width = max(40, *(columns_of(row[0]) for row in cells))
    lines = [
        f"{name}{' ' * (width - columns_of(name))}" + "".join(f" {cell:>10}" for cell in rest) for name, *rest in cells
    ]
    lines = [line.rstrip() for line in lines]
    if done.duplicates:
        same = sum(duplicate.kind == "bytes" for duplicate in done.duplicates)
        lines.append(
            f"left out: {len(done.duplicates):,} images that were there already, {same:,} of them to the byte "
            "(duplicates.csv)"
        )
    if done.findings:
        found = sum(len(wrong.found) for wrong in done.findings)
        lines.append(f"cleaning.csv: {found:,} images that do not belong, {'dealt with' if done.applied else 'kept'}")
    return "\n".join([*lines, *done.notes])


def load_model(config: Config) -> Embedder:
    """The model that compares the faces."""
    return load_embedder(
        model_of(config),
        pick_device(config.common.device),
        config.model.normalisation,
        config.model.network,
        config.model.embedding_size,
        config.data.image_size,
        config.model.colour,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("dataset_merge", "the same command goes on where it stopped"):
        config = parse_settings(Config, PRESETS, ("merge", "common"), __doc__, argv, reads=READS["merge"])
        with join_ranks(pick_device(config.common.device), DAYS) as ranks:
            if ranks.first:
                print(describe(config, READS["merge"]))
            ranks.require_alike(lambda: program_facts() | flatten(config, without=["common.workers"]))
            opened = open_sets(config.merge)
            ranks.require_alike(opened.digests)
            embedder = load_model(config) if needs_embeddings(config.merge) else None
            room = tell_size(config.merge, opened, embedder)
            if ranks.first:
                print(room)
            done = run_merge(config, embedder, opened, ranks)
    if done is None:
        return
    output = Path(config.merge.output)
    if done.calibration is not None:
        print("\n".join(done.calibration.explanation))
    print(summary(done))
    if config.merge.dry_run:
        print(f"{dry_run_folder(output)}: merge.csv and report.html; the set itself would take {as_size(done.size)}")
    else:
        print(f"{output}: report.html tells how; {training_advice(output, done.image_size)}")


if __name__ == "__main__":
    main()
    end_rank()
