"""The face sets of a run: what it trains on, and what it verifies on."""

from pathlib import Path

from config import DataConfig
from data.face_sets import FaceSet, FaceSetError
from data.image_sizes import require_size
from data.joined_sets import open_training_set
from data.verification_bin import VerificationPairs, chosen_bins, read_bin
from utils.training.run_folders import TrainingError


def open_faces(data: DataConfig) -> FaceSet:
    """The training set of `data.root`. Raises FaceSetError, also for one that cannot be trained on."""
    for root in data.root:
        if not Path(root).exists():
            raise FaceSetError(
                f"data.root: {root} does not exist: name your set's folder with --data.root, or in config.py"
            )
    try:
        faces: FaceSet = open_training_set(data.root, data.min_images)
        if len(faces.identities) == 1:
            raise FaceSetError(
                f"{faces.path}: all of its {len(faces):,} images are of one identity, {faces.identities[0]}: a set has "
                "a folder, or a label, for each person, two or more"
            )
        require_size(faces, data.image_size, data.broken_limit, data.resize)
    except FaceSetError as error:
        raise FaceSetError(f"data.root: {error}") from None
    return faces


def verification_sets(data: DataConfig) -> list[VerificationPairs]:
    """The sets of `data.verification`. Raises TrainingError."""
    try:
        tests = [read_bin(path) for path in chosen_bins(data.verification, data.root)]
    except FileNotFoundError as error:
        raise TrainingError(f"data.verification: {error.filename} does not exist") from None
    except (ValueError, OSError) as error:
        raise TrainingError(f"data.verification: {error}") from None
    names = [test.name for test in tests]
    if len(set(names)) < len(names):
        raise TrainingError(f"data.verification: two sets have the same name ({', '.join(names)}): rename one")
    return tests
