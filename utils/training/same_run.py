"""Whether a checkpoint, and the other processes, belong to the same run as this process."""

import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from config import Config
from data.face_sets import FaceSet
from data.images_fingerprint import sample_digest
from data.joined_sets import identity_keys
from data.verification_bin import PairImages, VerificationPairs
from utils.program import program_facts
from utils.ranks import Ranks, UnlikeRanksError
from utils.settings import by_name, flatten
from utils.training.run_folders import TrainingError, goes_on

#: Settings that cannot change in a run: they decide which faces a step sees, and what tensors a checkpoint has.
FIXED = (
    "train.batch_size", "train.seed", "train.optimizer", "data.order", "loss.sub_centers", "model.network",
    "model.embedding_size",
)  # fmt: skip

#: Settings that have an effect at the start of a run only.
AT_FIRST = ("train.init", "train.verify_at_start", "model.pretrained")

#: Settings in which processes may differ: those of the machine, paths for which the first process's are taken, and
#: paths whose content is compared instead.
OWN = (
    "common.runs", "common.workers", "data.root", "data.verification", "train.init", "train.name", "train.resume",
)  # fmt: skip


def set_facts(faces: FaceSet, verified: Sequence[VerificationPairs]) -> dict[str, str]:
    """Descriptions of the sets, by setting, which have to be the same for all processes."""
    notes = set_notes(faces)
    sums = f"{notes['labels']:x}-{notes['identities']:x}-{sample_digest(faces, tolerant=True)[:8]}"
    tests = [f"{one.name} ({describe_pairs(one)})" for one in verified]
    return {
        "data.root": f"{len(faces):,} images of {len(faces.identities):,} identities (checksums {sums})",
        "data.verification": ", ".join(tests) or "nothing",
    }


def describe_pairs(pairs: VerificationPairs) -> str:
    """What accuracies on a verification set depend on: the number of pairs, digests of their images and of which are
    whose."""
    which = zlib.crc32(pairs.index.tobytes() + pairs.same.tobytes())
    return f"{len(pairs.same):,} pairs, {sample_digest(PairImages(pairs))[:8]}-{which:08x}"


def require_same_settings(config: Config, ranks: Ranks) -> None:
    """Raise UnlikeRanksError, on all ranks, unless they run one program with the same settings. Waits."""
    try:
        ranks.require_alike(lambda: program_facts() | flatten(config, without=OWN))
    except UnlikeRanksError:
        # One that does not see the run has other settings, as it could not take them from there.
        ranks.require_alike(lambda: {"train.resume": "a run is there" if goes_on(config) else "no run is there"})
        raise


def set_notes(faces: FaceSet) -> dict[str, int]:
    """What a checkpoint keeps of the training set: the number of images, a checksum of their labels in order, and one
    of the names of the identities."""
    return {
        "images": len(faces.labels),
        "labels": zlib.crc32(faces.labels.astype("<i8").data),
        "identities": _checksum(identity_keys(faces)),
    }


def check_notes(notes: Mapping[str, Any], config: Config, faces: FaceSet, run: Path) -> None:
    """Raise TrainingError when the `run` cannot go on, with these settings and faces, from a checkpoint with `notes`:
    its `set_notes` and its `settings`."""
    before, now = by_name(notes["settings"]), flatten(config)
    for name in FIXED:
        if before.get(name) != now[name]:
            raise TrainingError(
                f"{name}: the run to go on with has {before.get(name)}, which cannot become {now[name]} in its middle; "
                "start a new one, from its weights if you like (train.init)"
            )
    here = set_notes(faces)
    # Older versions took the checksum of the names in classes.csv, with the paths of joined sets as they were spelled.
    if notes["identities"] not in (here["identities"], _checksum(faces.identities)):
        raise TrainingError(
            f"data.root: {faces.path} does not have the identities that {run} began with (see also "
            "data.min_images): its class centres would be other people's. Start a new run, from its weights if you "
            "like (train.init)"
        )
    # Checkpoints of older versions say nothing of the images, and are trusted.
    if notes.get("images", here["images"]) != here["images"]:
        found = f"has {here['images']:,} images, {run} began with {notes['images']:,} (see also data.min_images)"
    elif notes.get("labels", here["labels"]) != here["labels"]:
        found = f"does not have as many images of each identity as {run} began with"
    else:
        return
    raise TrainingError(
        f"data.root: {faces.path} {found}: its steps would show other faces. Bring back the set of then, or start a "
        "new run, from its weights if you like (train.init)"
    )


def unused_again(notes: Mapping[str, Any], config: Config, run: Path) -> list[str]:
    """A line for each setting that was changed, but has no effect when the `run` goes on from a checkpoint."""
    before, now = by_name(notes["settings"]), flatten(config)
    why = f"{run} goes on from its checkpoint"
    return [f"{name} not used: {why}" for name in AT_FIRST if before.get(name, now[name]) != now[name]]


def _checksum(identities: Sequence[str]) -> int:
    """Of the identities behind the classes, in their order."""
    return zlib.crc32("\n".join(identities).encode("utf-8", "surrogateescape"))
