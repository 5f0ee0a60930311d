#!/usr/bin/env python3
"""Pack a training set (`train.rec`, `train.idx`, `property`) from folders of images, a list, a CSV or another set.

    python data/pack_set.py --source my_faces --output datasets/mine                  # my_faces/<identity>/<image>
    python data/pack_set.py --source faces.lst --image-root photos --output datasets/mine
    python data/pack_set.py --source photos --detector scrfd.onnx --output datasets/mine    # photos/<identity>/<image>
    python data/pack_set.py --source datasets/ms1mv3 --min-images 20 --shuffle --limit 1000 --output datasets/small

The lists and their columns are described in `data/set_sources.py` and docs/own_data.md. Faces with landmarks are
aligned; all other images keep their bytes, unless a resize is asked for, or a detector that finds the landmarks:
photos in which it finds no face are left out, as are, with --bad-images skip, images that do not decode or fit;
`left_out.csv` in the set names them. Identities get the labels 0, 1, 2 ... in the order of their numbers or names (or
shuffled); `packed.csv` in the set says which is which. OUTPUT appears when it is whole. An interrupted run, killed ones
too, leaves `.NAME.partial` beside it, and the same command goes on from there; --restart begins anew.
"""

import sys
import unicodedata
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, READS, Config, PackConfig
from data.face_set_writer import training_advice
from data.face_sets import FaceSet, FaceSetError, FolderFaceSet
from data.fitting import Fit, check_detector, chosen_detection, fit_images
from data.identity_choice import Identity, choose_identities
from data.images import ImageError
from data.resumable_set import ResumableSet, made_from
from data.set_sources import open_source
from utils.files import require_free
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.resumable import JournalError, resumable_folder
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings
from utils.texts import listed


@dataclass(frozen=True)
class Packed:
    """What `pack` did: identities; images, of them with new bytes, of them an interrupted run's; what it left out."""

    identities: int
    images: int
    changed: int
    taken_over: int = 0
    left_out_images: int = 0
    left_out_identities: int = 0


def select(faces: FaceSet, pick: PackConfig) -> list[Identity]:
    """The identities of `faces` that `pick` asks for, in the order of the new labels.

    Raises FaceSetError when none is left, or when one that is asked for by name does not exist.
    """
    identities = choose_identities(faces, pick.identities, pick.min_images)
    if pick.shuffle:
        rng = np.random.default_rng(pick.seed)
        shuffled = [identities[i] for i in rng.permutation(len(identities))]
        identities = [Identity(name, rng.permutation(images)) for name, images in shuffled]
    return identities[: pick.limit or None]


def warn_of_like_names(identities: Sequence[Identity]) -> None:
    """Warn of names that differ in case or in Unicode's form alone: most likely one person, spelled in two ways."""
    first: dict[str, str] = {}
    alike = []
    for name in (identity.name for identity in identities):
        earlier = first.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if earlier != name:
            alike.append(f"{earlier} and {name}")
    if alike:
        warnings.warn(
            f"{listed(alike, 3)} are names that differ in case or in the form of their letters alone: they are packed "
            "as two people each",
            stacklevel=2,
        )


def pack(
    faces: FaceSet, identities: Sequence[Identity], output: Path, fit: Fit, workers: int, restart: bool = False
) -> Packed:
    """Write `identities` of `faces` as the new set `output`, labelled in their order.

    `workers` processes read and check; 0 means this one. An interrupted call is gone on with by the next one, or begun
    anew with `restart`. Raises ImageError and FaceSetError, with file or record, for images that do not fit,
    FileExistsError when `output` is there, BusyError when another process is packing it, JournalError when what was
    interrupted is another set. Images that `fit` leaves out, and identities without another image, are named in
    `left_out.csv`; FaceSetError when nothing is left.
    """
    made = made_from(faces, identities, fit)
    refusing = {**made, "bad_images": "refuse"}  # the same set, up to the first bad image, which ends it
    try:
        with resumable_folder(output, made, restart, or_from=refusing) as folder:
            return _pack(ResumableSet(folder, faces, identities), faces, fit, workers)
    except ImageError as error:
        raise ImageError(f"{error}; --bad-images skip goes on without such images, and lists them") from None
    except JournalError as error:
        raise JournalError(
            f"{error}: go on with the settings and images of that run, or discard what it packed with --restart"
        ) from None


def _pack(out: ResumableSet, faces: FaceSet, fit: Fit, workers: int) -> Packed:
    taken_over, rest = out.standing.images, out.rest
    with (
        progress_bar(out.standing.taken + len(rest), "image", "pack", initial=out.standing.taken) as bar,
        closing(fit_images(faces, rest, fit, workers)) as images,
    ):
        for image in images:
            out.add(image)
            bar.update()
    found = out.finish(fit.size)
    done = out.standing
    return Packed(found, done.images, done.changed, taken_over, done.left_out, done.lost_identities)


def summary(packed: Packed, source: str, output: str) -> str:
    """What became of the set, for the screen."""
    kept = f"byte for byte as in {source}"
    if packed.changed == packed.images:
        kept = "all aligned or resized"
    elif packed.changed:
        kept = f"{packed.changed:,} of them aligned or resized, the rest {kept}"
    text = f"{output}: {packed.images:,} images of {packed.identities:,} identities, {kept}"
    if packed.taken_over:
        text += f"; {packed.taken_over:,} of them taken over from an interrupted run"
    if packed.left_out_images:
        text += f"\nleft out (left_out.csv): {packed.left_out_images:,} images"
        text += f", and with them {packed.left_out_identities:,} identities" if packed.left_out_identities else ""
    return text


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("pack_set", "the same command goes on where it stopped"):
        config = parse_settings(Config, PRESETS, ("pack", "common"), __doc__, argv, reads=READS["pack"])
        print(describe(config, READS["pack"]))
        pick = config.pack
        if not pick.source:
            raise FaceSetError("name what to pack: --source A (folder of identities, .rec set, .lst or CSV)")
        if not pick.output:
            raise FaceSetError("name a folder for the set: --output B")
        require_free(pick.output)
        faces = open_source(pick.source, pick.image_root or None, detected=bool(pick.detector))
        if isinstance(faces, FolderFaceSet) and Path(pick.output).resolve().is_relative_to(faces.path.resolve()):
            raise FaceSetError(
                f"{pick.output} lies inside the set {pick.source}, whose next reader would take it for a person: name "
                "a folder outside of it with --output"
            )
        identities = select(faces, pick)
        warn_of_like_names(identities)
        detection = chosen_detection(pick)
        fit = Fit(pick.image_size, pick.other_sizes, pick.quality, detection, pick.bad_images)
        check_detector(fit)
        workers = worker_count(config.common.workers)
        packed = pack(faces, identities, Path(pick.output), fit, workers, pick.restart)
    print(summary(packed, pick.source, pick.output))
    if packed.identities > 1:
        print(training_advice(pick.output, pick.image_size))
    else:
        print("training needs two identities or more: join it with another set (dataset_merge/dataset_merge.py)")


if __name__ == "__main__":
    main()
