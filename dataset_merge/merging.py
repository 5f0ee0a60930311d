"""The stages of a merge: embed, clean, decide, find duplicates, write. Each goes on where it was interrupted."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from config import Config, MergeConfig
from data.face_sets import EncodedImages, FaceSet, FaceSetError
from data.images import ImageError
from data.joined_sets import JoinedFaceSet
from dataset_merge import cleaning
from dataset_merge.calibration import Calibration
from dataset_merge.centres import identity_centres
from dataset_merge.cleaning import CleanedFaceSet, Findings, find_wrong
from dataset_merge.deciding import MatchSettings, decide
from dataset_merge.decisions import Decision, Identities, Match, decide_groups
from dataset_merge.decisions_table import read_decisions, write_decisions
from dataset_merge.disk_space import as_size, available, needed, require_space, stored_sizes
from dataset_merge.duplicates import Duplicate
from dataset_merge.exclude import HeldOutSet, Leaks, find_leaks
from dataset_merge.face_sizes import how_to_mend
from dataset_merge.grouping import Grouping
from dataset_merge.joined_duplicates import COLUMNS, JoinedRows, parts_of, search, without
from dataset_merge.merge_report import PICTURES, Merge, write_report
from dataset_merge.opening import OpenedSets, cache_folder
from dataset_merge.table_sources import check_sources, write_sources
from dataset_merge.unit_rows import UnitRows
from dataset_merge.writing import made_from, write_images
from models.embedders import Embedder
from models.embedding import embed_images
from utils.checkpoints import CheckpointError, newest_run, settings_beside
from utils.files import write_csv_atomic
from utils.processes import worker_count
from utils.ranks import Ranks
from utils.resumable import JournalError, resumable_folder

MERGE_CSV, DUPLICATES_CSV, CLEANING_CSV = "merge.csv", "duplicates.csv", "cleaning.csv"


def needs_embeddings(merge: MergeConfig) -> bool:
    """Whether the faces have to be compared; not to apply decisions that were made before, but for duplicates."""
    return not merge.decisions or merge.duplicates == "near" or merge.clean != "off"


def model_of(config: Config) -> Path:
    """The model that compares the faces: the one that is named, or the newest run's."""
    if config.merge.model:
        return Path(config.merge.model)
    try:
        return newest_run(Path(config.common.runs))
    except CheckpointError as error:
        if not config.merge.decisions or config.merge.clean != "off":
            raise
        raise CheckpointError(
            f"{error}; decisions need one for near copies alone: --duplicates bytes, or keep, goes without"
        ) from None


def run_merge(config: Config, embedder: Embedder | None, opened: OpenedSets, ranks: Ranks) -> Merge | None:
    """Merge sets as `config.merge` asks; the embedder may be missing where `needs_embeddings` says so.

    Of several ranks the first one decides and writes, and returns what was done, the others None.
    """
    merge, cache, workers = config.merge, cache_folder(config.merge), worker_count(config.common.workers)
    sets: Sequence[FaceSet] = opened.sets
    known = _known_by_heart(model_of(config), sets) if merge.t == "auto" and not merge.decisions else None
    remark, decisions = None, None
    if merge.decisions:
        remark = check_sources(Path(merge.decisions), merge, sets)
        if merge.clean != "apply":  # else who there is to decide on is known once the sets are cleaned
            decisions = read_decisions(Path(merge.decisions), sets)
    cache.mkdir(parents=True, exist_ok=True)

    def embed(images: EncodedImages, title: str) -> UnitRows:
        assert embedder is not None
        try:
            features = embed_images(
                embedder, images, merge.batch_size, workers, merge.mirror, title, ranks, cache, normalised=False
            )
        except ImageError as error:
            raise FaceSetError(f"{error}; {how_to_mend(title)}") from None
        return UnitRows(features, images.describe)

    embeddings = [embed(faces, str(faces.path)) for faces in sets] if embedder else []
    sets, embeddings, findings = _cleaned(merge, sets, embeddings)
    compared = _Compared()
    if not merge.decisions:
        assert embedder is not None
        probes = [(test, embed(test.images, test.path)) for test in opened.held_out]
        compared = _compare(merge, sets, embeddings, probes, embedder.device, ranks, cache)
    if not ranks.first:
        return None
    if decisions is None:
        decisions = read_decisions(Path(merge.decisions), sets) if merge.decisions else _decide(merge, sets, compared)
    if not any(row.new_label is not None for row in decisions):
        raise FaceSetError("every identity is excluded: nothing is left to write")
    everything, parts = JoinedFaceSet(sets), parts_of(sets, decisions)
    duplicates: list[Duplicate] = []
    if merge.duplicates != "keep":
        rows = JoinedRows(embeddings) if merge.duplicates == "near" else None
        made_by = f"{embedder.fingerprint}{' mirror' if merge.mirror else ''}" if embedder and rows else ""
        duplicates = search(cache, sets, everything, parts, rows, made_by, workers)
    choice = without(duplicates, parts)
    sizes = np.concatenate([stored_sizes(faces) for faces in sets])
    warnings = (
        remark,
        known,
        compared.calibration.warning if compared.calibration else None,
        compared.leaks.warning if compared.leaks else None,
    )
    done = Merge(
        paths=[Path(path) for path in merge.sets],
        original=opened.sets,
        sets=sets,
        everything=everything,
        settings={f"merge.{name}": value for name, value in vars(merge).items()},
        image_size=opened.image_size,
        decisions=decisions,
        size=needed(sizes[np.concatenate(choice)], len(choice)),
        grouping=compared.grouping,
        calibration=compared.calibration,
        leaks=compared.leaks,
        held_out=opened.held_out,
        findings=findings,
        applied=merge.clean == "apply",
        duplicates=duplicates,
        dry_run=merge.dry_run,
        notes=[warning for warning in warnings if warning],
    )
    _write(merge, done, choice)
    return done


def _known_by_heart(model: Path, sets: Sequence[FaceSet]) -> str | None:
    """A warning when `model` is of a run that trained on one of the sets."""
    started_in = (Path(), *model.resolve().parents[:3])  # a relative path is one from where the training was started
    roots = [Path(root) for root in settings_beside(model).get("data.root", ())]
    trained_on = {(folder / root).resolve() for folder in started_in for root in roots}
    known = [str(faces.path) for faces in sets if trained_on & {faces.path.resolve(), faces.path.resolve().parent}]
    if not known:
        return None
    return (
        f"{model} was trained on {', '.join(known)}: it holds those people farther apart than it will hold new ones, "
        "so --t auto expects too few wrong joins. Take a model that has not seen the sets, or a higher --t, and look "
        "at the pairs next to it in report.html."
    )


def _cleaned(
    merge: MergeConfig, sets: Sequence[FaceSet], embeddings: list[UnitRows]
) -> tuple[Sequence[FaceSet], list[UnitRows], list[Findings]]:
    """The sets and embeddings to go on with, cleaned if that is asked for, and what does not belong in the sets."""
    if merge.clean == "off":
        return sets, embeddings, []
    findings = [
        find_wrong(rows, faces.labels, len(faces.identities), merge.clean_outlier, merge.clean_mixed)
        for rows, faces in zip(embeddings, sets, strict=True)
    ]
    if merge.clean == "report":
        return sets, embeddings, findings
    cleaned = [CleanedFaceSet(faces, wrong) for faces, wrong in zip(sets, findings, strict=True)]
    parts = [rows.part(faces.positions) for rows, faces in zip(embeddings, cleaned, strict=True)]
    return cleaned, parts, findings


@dataclass(frozen=True)
class _Compared:
    """Who is who: None for one set that is left as it is; and how near everybody is to the test sets."""

    grouping: Grouping | None = None
    calibration: Calibration | None = None
    leaks: Leaks | None = None


def _compare(
    merge: MergeConfig,
    sets: Sequence[FaceSet],
    embeddings: Sequence[UnitRows],
    probes: Sequence[tuple[HeldOutSet, UnitRows]],
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
        centres = identity_centres(embeddings[0], labels_there, counts[0], merge.centre)
    leaks = find_leaks(centres.vectors.to(device), probes, merge.exclude_t, ranks) if probes else None
    return _Compared(grouping, calibration, leaks)


def _decide(merge: MergeConfig, sets: Sequence[FaceSet], compared: _Compared) -> list[Decision]:
    people, grouping = Identities(sets), compared.grouping
    excluded = compared.leaks.excluded if compared.leaks else {}
    if grouping is None:
        return decide_groups(people, np.arange(len(people)), [None] * len(people), merge.on_match, excluded)
    matches = [
        Match(int(people.source[match]), people.name(match), score) if match >= 0 else None
        for match, score in zip(grouping.match.tolist(), grouping.score.tolist(), strict=True)
    ]
    return decide_groups(people, grouping.group, matches, merge.on_match, excluded)


def _write(merge: MergeConfig, done: Merge, choice: Sequence[np.ndarray]) -> None:
    """Write all that was decided. `choice`: the images under each new label, int64 positions in all sets."""
    output = Path(merge.output)
    if merge.dry_run:
        if done.size > available(output):
            done.notes.append(f"The set needs {as_size(done.size)}, the disk has {as_size(available(output))} free.")
        folder = dry_run_folder(output)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (*PICTURES, DUPLICATES_CSV, CLEANING_CSV):  # of a dry run with other settings
            (folder / name).unlink(missing_ok=True)
        _write_tables(folder, merge, done)
        return
    require_space(output, done.size)
    try:
        with resumable_folder(output, made_from(done.sets, choice), merge.restart) as work:
            taken_over = write_images(work, done.everything, choice, done.image_size)
            _write_tables(work.path, merge, done)
    except JournalError as error:
        raise JournalError(
            f"{error}: go on with the settings and sets of that merge, or discard what it wrote with --restart"
        ) from None
    if taken_over:
        done.notes.append(f"{taken_over:,} images were taken over from an interrupted run")


def dry_run_folder(output: Path) -> Path:
    """Where a dry run of a merge to `output` puts its tables and its report."""
    return output.with_name(f"{output.name}.dry_run")


def _write_tables(folder: Path, merge: MergeConfig, done: Merge) -> None:
    write_decisions(folder / MERGE_CSV, done.decisions)
    write_sources(folder, merge, done.original)
    if done.findings:
        rows = cleaning.table(done.original, done.findings, done.applied)
        write_csv_atomic(folder / CLEANING_CSV, cleaning.COLUMNS, rows)
    if done.duplicates:
        describe = done.everything.describe
        named = ((describe(i), describe(kept), kind, f"{alike:.6f}") for i, kept, kind, alike in done.duplicates)
        write_csv_atomic(folder / DUPLICATES_CSV, COLUMNS, named)
    write_report(folder, done)
