"""The sets of a merge, opened and checked before hours of work, and the room that they will take on the disk."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import MergeConfig
from data.face_sets import EncodedImages, FaceSet, FaceSetError, open_face_set
from data.images_fingerprint import sample_digest
from dataset_merge.calibration import require_identities
from dataset_merge.disk_space import as_size, available, needed, require_space, stored_sizes
from dataset_merge.exclude import HeldOutSet, open_held_out
from dataset_merge.face_sizes import face_size, require_faces_of
from models.embedders import Embedder
from models.embedding import features_to_make
from utils.files import nearest_existing, require_free, require_writable


@dataclass(frozen=True)
class OpenedSets:
    """`sets` to merge, and those whose people are left out; `image_size`: height and width of all their faces."""

    sets: list[FaceSet]
    held_out: list[HeldOutSet]
    image_size: int

    def images(self) -> Iterator[EncodedImages]:
        """The images of each of them."""
        yield from self.sets
        yield from (test.images for test in self.held_out)

    def digests(self) -> dict[str, str]:
        """Of a sample of the images of each, by path."""
        paths = [*(str(faces.path) for faces in self.sets), *(test.path for test in self.held_out)]
        digests = (f"images {sample_digest(images)[:8]}" for images in self.images())
        return dict(zip(paths, digests, strict=True))


def cache_folder(merge: MergeConfig) -> Path:
    """Where the embeddings are kept."""
    output = Path(merge.output)
    return Path(merge.cache) if merge.cache else output.with_name(f"{output.name}.embeddings")


def open_sets(merge: MergeConfig) -> OpenedSets:
    """The sets, checked against each other and the settings. Raises FaceSetError for what cannot be merged so, and
    CalibrationError for sets too small to find a threshold."""
    least = 1 if merge.within or merge.clean != "off" or merge.exclude or merge.decisions else 2
    if len(merge.sets) < least:
        raise FaceSetError(
            "name two sets or more to merge: --merge A,B (one will do with --within, --clean or --exclude)"
        )
    if not Path(merge.output).name:
        raise FaceSetError("name a folder for the merged set: --output C")
    if merge.decisions and merge.exclude:
        raise FaceSetError(
            "--exclude cannot be combined with --decisions, which say who is excluded: edit them, or compare anew"
        )
    if merge.t != "auto" and merge.wrong_joins != MergeConfig.wrong_joins and not merge.decisions:
        raise FaceSetError(
            f"--wrong-joins is for --t auto, which finds a threshold; --t {merge.t} is one: leave one out"
        )
    if merge.decisions and not Path(merge.decisions).is_file():
        raise FaceSetError(f"there is no table of decisions at {merge.decisions}: give the merge.csv of a merge")
    if not merge.dry_run:
        require_free(merge.output)
    require_writable(Path(merge.output))
    _require_outside(merge)
    sets = [open_face_set(path) for path in merge.sets]
    if merge.t == "auto" and not merge.decisions and (len(sets) > 1 or merge.within):
        require_identities([len(faces.identities) for faces in sets], [str(faces.path) for faces in sets])
    held_out = [open_held_out(path) for path in merge.exclude]
    size = face_size(sets)
    for test in held_out:
        require_faces_of(test.images, test.path, size, sets[0].path)
    return OpenedSets(sets, held_out, size)


def _require_outside(merge: MergeConfig) -> None:
    """Raise FaceSetError when something would be written into a set, as the next to open it may take it for a
    person, or the cache into the output.
    """
    if cache_folder(merge).resolve().is_relative_to(Path(merge.output).resolve()):
        raise FaceSetError(
            f"the cache {cache_folder(merge)} lies inside the output {merge.output}, which has to be empty: name a "
            "folder outside of it with --cache"
        )
    for flag, folder in (("--output", Path(merge.output)), ("--cache", cache_folder(merge))):
        for source in map(Path, (*merge.sets, *merge.exclude)):
            if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
                raise FaceSetError(f"{folder} lies inside the set {source}: name a folder outside of it with {flag}")


def tell_size(merge: MergeConfig, opened: OpenedSets, embedder: Embedder | None) -> str:
    """What the embeddings and the merged set will take, for the screen. Raises FaceSetError when the disk has no room
    for the embeddings and the least of the set.
    """
    output, cache = Path(merge.output), cache_folder(merge)
    sizes = [stored_sizes(faces) for faces in opened.sets]
    most = needed(np.concatenate(sizes), sum(len(faces.identities) for faces in opened.sets))
    kept = sum(features_to_make(embedder, images, merge.mirror, cache) for images in opened.images()) if embedder else 0
    room = shutil.disk_usage(nearest_existing(cache)).free
    if kept > room:
        raise FaceSetError(
            f"the embeddings need {as_size(kept)} in {cache}, but its disk has {as_size(room)}: free "
            f"{as_size(kept - room)}, or name a folder on another disk (--cache)"
        )
    shared = kept if nearest_existing(cache).stat().st_dev == nearest_existing(output).stat().st_dev else 0
    # A second copy within the first set may go, too, where its identities are joined.
    whole = merge.on_match != "keep-larger" and (not merge.within or merge.duplicates == "keep")
    first_stays = whole and not (merge.exclude or merge.clean == "apply" or merge.decisions)
    if first_stays and not merge.dry_run:
        require_space(output, needed(sizes[0], 0), shared)
    free = available(output)
    text = (
        f"disk: the embeddings take {as_size(kept)} in {cache}, the merged set {as_size(most)} at most; "
        f"{as_size(free)} are free"
    )
    return text if most + shared <= free else text + ": it may not fit, which is known once it is decided"
