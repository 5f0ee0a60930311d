#!/usr/bin/env python3
"""Pack a training set (`train.rec`, `train.idx`, `property`) from folders of images, a list, a CSV or another set.

    python data/pack_set.py --source my_faces --output datasets/mine                  # my_faces/<identity>/<image>
    python data/pack_set.py --source faces.lst --image-root photos --output datasets/mine
    python data/pack_set.py --source datasets/ms1mv3 --min-images 20 --shuffle --limit 1000 --output datasets/small

The lists and their columns are described in `data/set_sources.py` and docs/own_data.md. Faces with landmarks are
aligned; all other images keep their bytes, unless a resize is asked for. Identities get the labels 0, 1, 2 ... in the
order of their numbers or names (or shuffled); `packed.csv` in the set says which is which. OUTPUT appears when it is
whole: an interrupted run leaves nothing that could be taken for a set.
"""

import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, Config, PackConfig
from data.face_sets import FaceSet, FaceSetError, write_face_set
from data.fitting import Fit, fit_images
from data.identity_choice import Identity, choose_identities
from data.set_sources import open_source
from utils.files import require_free, write_csv_atomic
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings


@dataclass(frozen=True)
class Packed:
    """What `pack` did: identities, images, of them with new bytes (aligned or resized)."""

    identities: int
    images: int
    changed: int


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


def pack(faces: FaceSet, identities: Sequence[Identity], output: Path, fit: Fit, workers: int) -> Packed:
    """Write `identities` of `faces` as the new set `output`, labelled in their order.

    `workers` processes read and check; 0 means this one. Raises ImageError and FaceSetError, with file or record, for
    images that do not fit, FileExistsError when `output` is there; then there is no new set.
    """
    order = np.concatenate([identity.images for identity in identities])
    changed = 0

    def encoded() -> Generator[bytes, None, None]:
        nonlocal changed
        with progress_bar(len(order), "image", "pack") as bar:
            for image in fit_images(faces, order, fit, workers):
                changed += image.changed
                bar.update()
                yield image.encoded

    with write_face_set(output, fit.size) as out:
        with closing(encoded()) as images:
            for identity in identities:
                out.add_identity(islice(images, len(identity.images)))
        rows = ((label, identity.name, len(identity.images)) for label, identity in enumerate(identities))
        write_csv_atomic(out.folder / "packed.csv", ("label", "identity", "images"), rows)
    return Packed(len(identities), len(order), changed)


def summary(packed: Packed, source: str, output: str) -> str:
    """What became of the set, for the screen."""
    kept = f"byte for byte as in {source}"
    if packed.changed:
        all_changed = packed.changed == packed.images
        kept = (
            "all aligned or resized"
            if all_changed
            else f"{packed.changed:,} of them aligned or resized, the rest {kept}"
        )
    return f"{output}: {packed.images:,} images of {packed.identities:,} identities, {kept}"


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("pack_set", "nothing was packed"):
        config = parse_settings(Config, PRESETS, ("pack", "common"), __doc__, argv)
        print(describe(config, ("pack", "common")))
        pick = config.pack
        if not pick.source:
            raise FaceSetError("name what to pack: --source A (folder of identities, .rec set, .lst or CSV)")
        if not pick.output:
            raise FaceSetError("name a folder for the set: --output B")
        require_free(pick.output)
        faces = open_source(pick.source, pick.image_root or None)
        identities = select(faces, pick)
        fit = Fit(pick.image_size, pick.other_sizes, pick.quality)
        packed = pack(faces, identities, Path(pick.output), fit, worker_count(config.common.workers))
    print(summary(packed, pick.source, pick.output))
    print(f"train on it with: python train.py --data.root {pick.output}")


if __name__ == "__main__":
    main()
