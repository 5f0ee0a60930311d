#!/usr/bin/env python3
"""Pack a verification set (`lfw.bin`) from a list of pairs and a folder of aligned images.

    python data/pack_bin.py --pairs lfw/pairs.txt --images lfw/images --output datasets/mine/lfw.bin
    python data/pack_bin.py --pairs lfw/pairs.txt --images photos --detector scrfd.onnx --output datasets/mine/lfw.bin
    python data/pack_bin.py --draw 300 --pairs others.csv --images others --output datasets/mine/others.bin

The list is LFW's: `name i j` for two images of a person and `name1 i name2 j` for two people, separated by tabs or
blanks; image i of a person is IMAGES/name/name_%04d.jpg (or .png, ...). The first line may say how many pairs there are
(`10 300`: 10 folds of 300 of each kind). Or it is a CSV with the header `path1,path2,same`: paths in IMAGES, 1 or 0.
`--draw` writes such a CSV first, of pairs that it draws from the folders IMAGES/<person>.
The order of the pairs is kept: testing cuts it into 10 consecutive folds, so each tenth needs pairs of both kinds.
Images keep their bytes, unless a resize is asked for, or a detector: then they are photos whose faces are aligned.
"""

import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from shlex import quote

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, READS, Config
from data.fitting import Fit, LeftOut, check_detector, chosen_detection, fit_images
from data.folds import FOLDS, unmixed_folds
from data.pair_drawing import draw_pairs
from data.pair_lists import PairFiles, PairsError, read_pairs
from data.verification_bin import write_bin
from utils.files import require_writable
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import describe, parse_settings


def pack_bin(pairs_path: Path, images: Path, output: Path, fit: Fit, workers: int) -> tuple[int, int]:
    """Write the verification set `output`; returns the numbers of pairs and of those of one person.

    `workers` processes read and check the images; 0 means this one. Raises PairsError and ImageError, with the line,
    FileExistsError when `output` is there, OSError where it cannot be. Photos without a face are an error that lists
    them all: without their pairs the ten folds would be others. Warns of folds that have pairs of one kind only.
    """
    _require_free(output)
    pairs = read_pairs(pairs_path, images)
    files = PairFiles(pairs, pairs_path)
    encoded: list[bytes] = []
    missed: list[LeftOut] = []
    with progress_bar(len(files), "image", "pack") as bar:
        for image in fit_images(files, np.arange(len(files)), fit, workers):
            if isinstance(image, LeftOut):
                missed.append(image)
            else:
                encoded.append(image.encoded)
            bar.update()
    if missed:
        raise PairsError(
            f"no face was found in {len(missed):,} of {len(files):,} images: lower --detector-threshold, or take their "
            "pairs out of the list\n" + "\n".join(f"  {image.where}: {image.reason}" for image in missed)
        )
    same = [pair.same for pair in pairs]
    unmixed = unmixed_folds(same)
    if unmixed and 0 < sum(same) < len(same):
        warnings.warn(
            f"{pairs_path}: {unmixed} of the {FOLDS} folds that a test cuts it into have pairs of one kind only, so "
            "that accuracies hang on the order of the pairs: mix the kinds, in turn say",
            stacklevel=2,
        )
    write_bin(output, [encoded[i] for i in files.index.ravel()], same)
    return len(same), sum(same)


def _require_free(output: Path) -> None:
    if output.exists():
        raise FileExistsError(f"{output} exists: name another output, or remove it first")
    require_writable(output)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("pack_bin", "nothing was packed"):
        config = parse_settings(Config, PRESETS, ("pack_bin", "common"), __doc__, argv, reads=READS["pack_bin"])
        print(describe(config, READS["pack_bin"]))
        chosen = config.pack_bin
        for name in ("pairs", "images", "output"):
            if not getattr(chosen, name):
                raise PairsError(f"--{name} is missing: list of pairs, folder of images and .bin to write are needed")
        if Path(chosen.output).suffix != ".bin":
            raise PairsError(f"--output {chosen.output}: verification sets are found by the ending .bin")
        detection = chosen_detection(chosen)
        fit = Fit(chosen.image_size, chosen.other_sizes, chosen.quality, detection)
        check_detector(fit)
        workers = worker_count(config.common.workers)
        if chosen.draw:
            _require_free(Path(chosen.output))
            draw_pairs(Path(chosen.images), chosen.draw, chosen.seed, Path(chosen.pairs))
            print(f"{chosen.pairs}: {chosen.draw:,} pairs of one person and {chosen.draw:,} of two, drawn")
        pairs, same = pack_bin(Path(chosen.pairs), Path(chosen.images), Path(chosen.output), fit, workers)
    print(f"{chosen.output}: {pairs:,} pairs, {same:,} of one person")
    if same in (0, pairs):
        print(f"no test takes it: all pairs are of {'one person' if same else 'two people'}, none of the other kind")
    elif pairs < FOLDS:
        print(f"no test takes so few: it cuts them into {FOLDS} folds, so {FOLDS} pairs are the least")
    else:
        print(f"test on it with: python all_pair_test.py {quote(chosen.output)}")


if __name__ == "__main__":
    main()
