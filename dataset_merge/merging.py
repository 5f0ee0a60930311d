"""The stages of a merge: embed, clean, decide, find duplicates, write. Each goes on where it was interrupted."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from config import Config, MergeConfig
from data.face_sets import EncodedImages, FaceSet, FaceSetError, JoinedFaceSet, open_face_set
from dataset_merge import cleaning
from dataset_merge.calibration import Calibration
from dataset_merge.centres import identity_centres
from dataset_merge.cleaning import CleanedFaceSet, Findings, find_wrong
from dataset_merge.deciding import MatchSettings, decide
from dataset_merge.decisions import Decision, Identities, Match, decide_groups, read_decisions, write_decisions
from dataset_merge.exclude import HeldOutSet, Leaks, find_leaks, open_held_out
from dataset_merge.grouping import Grouping
from dataset_merge.joined_duplicates import COLUMNS, JoinedRows, parts_of, search
from dataset_merge.merge_report import PICTURES, Merge, write_report
from dataset_merge.writing import (
    as_size,
    available,
    face_size,
    made_from,
    needed,
    require_space,
    stored_sizes,
    write_images,
)
from models.embedders import Embedder
from models.embedding import embed_images
from utils.files import require_free, write_csv_atomic
from utils.processes import worker_count
from utils.ranks import Ranks
from utils.resumable import JournalError, resumable_folder

MERGE_CSV, DUPLICATES_CSV, CLEANING_CSV = "merge.csv", "duplicates.csv", "cleaning.csv"
# Bytes of embeddings of a set that are kept in memory; those of larger ones are mapped from files.
IN_MEMORY = 1 << 28


def needs_embeddings(merge: MergeConfig) -> bool:
    """Whether the faces have to be compared; not to apply decisions that were made before, but for duplicates."""
    return not merge.decisions or merge.duplicates == "near" or merge.clean != "off"


def open_sets(merge: MergeConfig) -> list[FaceSet]:
    """The sets, checked against the other settings before hours of work."""
    least = 1 if merge.within or merge.clean != "off" or merge.exclude or merge.decisions else 2
    if len(merge.sets) < least:
        raise FaceSetError(
            "name two sets or more to merge: --merge A,B (one will do with --within, --clean or --exclude)"
        )
    if not merge.output:
        raise FaceSetError("name a folder for the merged set: --output C")
    if merge.decisions and merge.exclude:
        raise FaceSetError(
            "--exclude cannot be combined with --decisions, which say who is excluded: edit them, or compare anew"
        )
    if merge.decisions and not Path(merge.decisions).is_file():
        raise FaceSetError(f"there is no table of decisions at {merge.decisions}: give the merge.csv of a merge")
    if not merge.dry_run:
        require_free(merge.output)
    return [open_face_set(path) for path in merge.sets]


def tell_size(merge: MergeConfig, sets: Sequence[FaceSet], sizes: Sequence[np.ndarray]) -> str:
    """What the merged set may need, for the screen. Raises FaceSetError when the disk has not even the least of it."""
    output = Path(merge.output)
    most = needed(np.concatenate(sizes), sum(len(faces.identities) for faces in sets))
    first_stays = merge.on_match != "keep-larger" and not (merge.exclude or merge.clean == "apply" or merge.decisions)
    if first_stays and not merge.dry_run:
        require_space(output, needed(sizes[0], 0))
    text = f"disk: the merged set takes {as_size(most)} at most, {as_size(available(output))} are free"
    return text if most <= available(output) else text + ": it may not fit, which is known once it is decided"


def run_merge(config: Config, embedder: Embedder | None, sets: Sequence[FaceSet], ranks: Ranks) -> Merge | None:
    """Merge `sets` as `config.merge` asks; the embedder may be missing where `needs_embeddings` says so.

    Of several ranks the first one decides and writes, and returns what was done, the others None.
    """
    merge, output = config.merge, Path(config.merge.output)
    image_size = face_size(sets)
    cache = Path(merge.cache) if merge.cache else output.with_name(f"{output.name}.embeddings")
    cache.mkdir(parents=True, exist_ok=True)
    workers = worker_count(config.common.workers)

    def embed(images: EncodedImages, title: str) -> np.ndarray:
        assert embedder is not None
        features = embed_images(
            embedder, images, merge.batch_size, workers, merge.mirror, title, ranks, cache, normalised=False
        )
        return _unit_rows(features, cache)

    embeddings = [embed(faces, str(faces.path)) for faces in sets] if embedder else []
    findings: list[Findings] = []
    original = sets
    if merge.clean != "off":
        findings = [
            find_wrong(rows, faces.labels, len(faces.identities), merge.clean_outlier, merge.clean_mixed)
            for rows, faces in zip(embeddings, sets, strict=True)
        ]
    if merge.clean == "apply":
        cleaned = [CleanedFaceSet(faces, wrong) for faces, wrong in zip(sets, findings, strict=True)]
        embeddings = [_unit_rows(rows, cache, faces.positions) for rows, faces in zip(embeddings, cleaned, strict=True)]
        sets = cleaned
    held_out = [open_held_out(path) for path in merge.exclude]
    compared = None
    if not merge.decisions:
        assert embedder is not None
        probes = [(test, embed(test.images, test.path)) for test in held_out]
        compared = _compare(merge, sets, embeddings, probes, embedder.device, ranks, cache)
    if not ranks.first:
        return None
    decisions = _decisions(merge, sets, compared) if compared else read_decisions(Path(merge.decisions), sets)
    if not any(row.new_label is not None for row in decisions):
        raise FaceSetError("every identity is excluded: nothing is left to write")
    done = Merge(
        [Path(path) for path in merge.sets],
        original,
        sets,
        {f"merge.{name}": value for name, value in vars(merge).items()},
        image_size,
        decisions,
        grouping=compared.grouping if compared else None,
        calibration=compared.calibration if compared else None,
        leaks=compared.leaks if compared else None,
        held_out=held_out,
        findings=findings,
        applied=merge.clean == "apply",
        dry_run=merge.dry_run,
    )
    if done.calibration is not None and done.calibration.warning:
        done.notes.append(done.calibration.warning)
    if done.leaks is not None and done.leaks.warning:
        done.notes.append(done.leaks.warning)
    return _finish(merge, done, embeddings, embedder, cache)


def _unit_rows(features: np.ndarray, folder: Path, positions: np.ndarray | None = None) -> np.ndarray:
    """Unit vectors float32 of the rows at `positions` (None: of all). Large ones are in a file in `folder` that has no
    name and goes with the process: memory may not have room for them. Raises FaceSetError for one that is no number:
    compared, it would hide the matches of all others in its block.
    """
    shape = len(features) if positions is None else len(positions), features.shape[1]
    if shape[0] * shape[1] * 4 <= IN_MEMORY:
        unit = np.empty(shape, np.float32)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:
            unit = np.memmap(file, np.float32, "w+", shape=shape)
    for start in range(0, len(unit), 1 << 16):
        part = slice(start, start + (1 << 16))
        rows = torch.from_numpy(np.array(features[part if positions is None else positions[part]]))
        broken = (~rows.isfinite().all(1)).nonzero().flatten()
        if len(broken):
            raise FaceSetError(
                f"the model gives no finite embedding for {len(broken):,} images, the first at position "
                f"{start + int(broken[0])} of the set: is the model damaged, or too coarse in half precision?"
            )
        unit[part] = F.normalize(rows).numpy()
    return unit


@dataclass(frozen=True)
class _Compared:
    """Who is who: None for one set that is left as it is; and how near everybody is to the test sets."""

    grouping: Grouping | None
    calibration: Calibration | None
    leaks: Leaks | None


def _compare(
    merge: MergeConfig,
    sets: Sequence[FaceSet],
    embeddings: Sequence[np.ndarray],
    probes: Sequence[tuple[HeldOutSet, np.ndarray]],
    device: torch.device,
    ranks: Ranks,
    cache: Path,
) -> _Compared:
    counts = [len(faces.identities) for faces in sets]
    if len(sets) > 1 or merge.within:
        settings = MatchSettings(
            t=None if merge.t == "auto" else merge.t,
            method=merge.centre,
            rule=merge.rule,
            within=merge.within,
            wrong_joins=merge.wrong_joins,
        )
        names, labels = [str(faces.path) for faces in sets], [faces.labels for faces in sets]
        decided = decide(embeddings, labels, counts, settings, names, device, ranks, cache)
        grouping, calibration, centres = decided.grouping, decided.calibration, decided.centres
    else:
        grouping, calibration = None, None
        labels_there = torch.from_numpy(sets[0].labels).to(device)
        centres = identity_centres(torch.from_numpy(embeddings[0]), labels_there, counts[0], merge.centre)
    leaks = find_leaks(centres.vectors.to(device), probes, merge.exclude_t, ranks) if probes else None
    return _Compared(grouping, calibration, leaks)


def _decisions(merge: MergeConfig, sets: Sequence[FaceSet], compared: _Compared) -> list[Decision]:
    people, grouping = Identities(sets), compared.grouping
    excluded = compared.leaks.excluded if compared.leaks else {}
    if grouping is None:
        return decide_groups(people, np.arange(len(people)), [None] * len(people), merge.on_match, excluded)
    matches = [
        Match(int(people.source[match]), people.name(match), score) if match >= 0 else None
        for match, score in zip(grouping.match.tolist(), grouping.score.tolist(), strict=True)
    ]
    return decide_groups(people, grouping.group, matches, merge.on_match, excluded)


def _finish(
    merge: MergeConfig, done: Merge, embeddings: Sequence[np.ndarray], embedder: Embedder | None, cache: Path
) -> Merge:
    """Find duplicates, and write all that was decided."""
    everything = JoinedFaceSet(done.sets)
    parts = parts_of(done.sets, done.decisions)
    if merge.duplicates != "keep":
        rows = JoinedRows(embeddings) if merge.duplicates == "near" else None
        model = embedder.fingerprint if embedder and rows else ""
        done = replace(done, duplicates=search(cache, done.sets, everything, parts, rows, model), everything=everything)
    choice = parts.without(done.duplicates)
    sizes = np.concatenate([stored_sizes(faces) for faces in done.sets])
    done = replace(done, size=needed(sizes[np.concatenate(choice)], len(choice)))
    output = Path(merge.output)
    if merge.dry_run:
        if done.size > available(output):
            done.notes.append(f"The set needs {as_size(done.size)}, the disk has {as_size(available(output))} free.")
        folder = dry_run_folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*PICTURES, DUPLICATES_CSV, CLEANING_CSV):  # of a dry run with other settings
            (folder / name).unlink(missing_ok=True)
        _write_tables(folder, done)
        return done
    require_space(output, done.size)
    try:
        with resumable_folder(output, made_from(done.sets, choice), merge.restart) as work:
            taken_over = write_images(work, everything, choice, done.image_size)
            _write_tables(work.path, done)
    except JournalError as error:
        raise JournalError(
            f"{error}: go on with the settings and sets of that merge, or discard what it wrote with --restart"
        ) from None
    if taken_over:
        done.notes.append(f"{taken_over:,} images were taken over from an interrupted run")
    return done


def dry_run_folder(output: Path) -> Path:
    """Where a dry run of a merge to `output` puts its tables and its report."""
    return output.with_name(f"{output.name}.dry_run")


def _write_tables(folder: Path, done: Merge) -> None:
    write_decisions(folder / MERGE_CSV, done.decisions)
    if done.findings:
        rows = cleaning.table(done.original, done.findings, done.applied)
        write_csv_atomic(folder / CLEANING_CSV, cleaning.COLUMNS, rows)
    if done.duplicates:
        assert done.everything is not None
        describe = done.everything.describe
        named = ((describe(i), describe(kept), kind, f"{alike:.6f}") for i, kept, kind, alike in done.duplicates)
        write_csv_atomic(folder / DUPLICATES_CSV, COLUMNS, named)
    write_report(folder, done)
