"""Runs the checks on a tested set: takes the samples, embeds what is missing, and says what was looked at."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from data.face_sets import EncodedImages, FaceSet, ImageSubset, images_by_identity
from data.images import decode_rgb
from data.joined_sets import identity_keys, open_training_set
from models.embedders import Embedder
from models.embedding import embed_images
from utils.evaluation.bootstrap import connected_groups, drawn_groups
from utils.evaluation.checks import (
    Finding,
    PairSample,
    centres,
    check_alignment,
    check_channels,
    check_folds,
    check_precision,
    is_name,
    same_bytes,
    same_pictures,
    sample_pairs,
    sample_people,
    shared_names,
    shared_people,
)
from utils.evaluation.measure import Measured, Options, unit_rows
from utils.evaluation.test_sets import TestSet
from utils.face_sheets import in_square

# Images of a sample: for the mean face, and for comparisons of two ways to embed.
_FACES, _SAMPLE = 500, 300
# Images of one training person that are embedded, and how many more training images have their bytes compared.
_EACH, _BYTES = 2, 100
_SHOWN = 10


def decode_some(images: EncodedImages, positions: NDArray[np.int64], size: int) -> NDArray[np.uint8]:
    """The images at `positions`, uint8 [P, size, size, 3] RGB; of another size they are scaled, in their shape."""
    faces = [in_square(decode_rgb(images.encoded(int(i)), images.describe(int(i))), size) for i in positions]
    return np.stack(faces) if faces else np.empty((0, size, size, 3), np.uint8)


def check_faces(
    test_set: TestSet, measured: Sequence[Measured], embedders: Sequence[Embedder], options: Options
) -> list[Finding]:
    """Whether the set's faces are aligned, its folds are mixed, and each model sees its colours the right way round.

    It decodes 500 images at random, and embeds 300 with swapped channels by each model.
    """
    random = np.random.default_rng(options.seed)
    count = len(test_set.images)
    positions = np.sort(random.permutation(count)[:_FACES])
    faces = decode_some(test_set.images, positions, embedders[0].image_size)
    findings = [check_alignment(faces, test_set.name)]
    if test_set.pairs is not None and (unmixed := check_folds(test_set.pairs.same, test_set.name)):
        findings.append(unmixed)
    sample = sample_of(test_set, options.seed)
    if sample is None:
        return findings
    pixels = {
        size: decode_some(test_set.images, sample.positions, size) for size in {one.image_size for one in embedders}
    }
    for one, embedder in zip(measured, embedders, strict=True):
        plain = unit_rows(one.features[sample.positions])
        swapped = _embed(embedder, pixels[embedder.image_size][..., ::-1], options)
        findings.append(check_channels(plain, swapped, sample, test_set.name, one.model))
    return findings


def check_reduced_precision(
    test_set: TestSet, measured: Measured, exact: Embedder, precision: str, options: Options
) -> Finding | None:
    """The scores of 300 images against those of the same model in float32, `exact`; None where there are no pairs."""
    sample = sample_of(test_set, options.seed)
    if sample is None:
        return None
    faces = decode_some(test_set.images, sample.positions, exact.image_size)
    reduced = unit_rows(measured.features[sample.positions])
    return check_precision(_embed(exact, faces, options), reduced, sample, precision, measured.model)


def sample_of(test_set: TestSet, seed: int) -> PairSample | None:
    """300 images with pairs of both kinds; None where the set has none, and for templates of many images."""
    if test_set.pairs is not None:
        pairs = test_set.pairs
        groups, _ = drawn_groups(len(pairs.same), connected_groups(pairs.index))
        sample = sample_pairs(pairs.index, pairs.same, groups, _SAMPLE, seed)
    elif test_set.faces is not None:
        sample = sample_people(test_set.faces.labels, _SAMPLE, seed)
    else:
        return None
    return sample if sample.same.any() and not sample.same.all() else None


def _embed(embedder: Embedder, faces: NDArray[np.uint8], options: Options) -> NDArray[np.float32]:
    parts = [faces[start : start + options.batch_size] for start in range(0, len(faces), options.batch_size)]
    tensors = [torch.from_numpy(np.ascontiguousarray(part)) for part in parts]
    features = [embedder.features(tensor, options.mirror).cpu().numpy() for tensor in tensors]
    return unit_rows(np.concatenate(features))


@dataclass(frozen=True, eq=False)
class TrainingSample:
    """What is looked at of a training set.

    byte_positions: int64, images whose bytes are compared. positions: int64 [T], images that were embedded; vectors:
    float32 [T, D], their unit embeddings; people: int64 [T]. names: of all identities.
    """

    faces: FaceSet
    byte_positions: NDArray[np.int64]
    positions: NDArray[np.int64]
    vectors: NDArray[np.float32]
    people: NDArray[np.int64]
    names: list[str]


def sample_training_set(paths: Sequence[Path], images: int, embedder: Embedder, options: Options) -> TrainingSample:
    """Two images each of as many identities as give `images`, embedded; 100 times as many to compare bytes of."""
    faces = open_training_set(paths, 1)
    joined = len(paths) > 1  # of joined sets the keys begin with the number of the set
    names = [key.split(": ", 1)[1] if joined else key for key in identity_keys(faces)]
    random = np.random.default_rng(options.seed)
    images_of = images_by_identity(faces)
    chosen: list[int] = []
    for person in random.permutation(len(faces.identities)).tolist():
        if len(chosen) >= images:
            break
        chosen += random.permutation(images_of[person])[:_EACH].tolist()
    positions = np.sort(np.array(chosen, np.int64))
    title = "sample of the training set"
    vectors = embed_images(
        embedder, ImageSubset(faces, positions), options.batch_size, options.workers, options.mirror, title,
        cache=options.cache,
    )  # fmt: skip
    byte_positions = np.sort(random.permutation(len(faces))[: _BYTES * images])
    return TrainingSample(faces, byte_positions, positions, vectors, faces.labels[positions], names)


def check_training_set(test_set: TestSet, measured: Measured, sample: TrainingSample, size: int) -> list[Finding]:
    """Images and people that the test set shares with the sample of the training set, by the model's embeddings.

    size: of the faces, pixels. Bytes are compared with all of the test set.
    """
    unit = unit_rows(measured.features)
    findings = [
        _duplicates(test_set, sample, unit, size),
        _shared_people(test_set, sample, unit),
    ]
    if any(map(is_name, test_set.identities or [])) and any(map(is_name, sample.names)):
        findings.append(_shared_names(test_set, sample))
    return findings


def _duplicates(test_set: TestSet, sample: TrainingSample, unit: NDArray[np.float32], size: int) -> Finding:
    # The faces of IJB are aligned and encoded when they are read: no file has the same bytes, and reading all is slow.
    positions = sample.byte_positions if test_set.ijb is None else sample.byte_positions[:0]
    equal = same_bytes(test_set.images, sample.faces, positions) if len(positions) else []
    alike = same_pictures(
        unit,
        sample.vectors,
        sample.positions,
        lambda i: decode_some(test_set.images, np.array([i]), size)[0],
        lambda i: decode_some(sample.faces, np.array([i]), size)[0],
    )
    total = len(sample.faces)
    looked = (
        f"bytes of {len(positions):,} and pictures of {len(sample.positions):,} of the {total:,} training "
        "images were compared"
    )
    pairs = tuple(dict.fromkeys([*equal, *alike]))
    if not pairs:
        return Finding("duplicates", "note", f"{test_set.name} shares no image with the training set ({looked}).")
    expected = max(len(equal) * total / max(1, len(positions)), len(alike) * total / max(1, len(sample.positions)))
    where = "; ".join(f"{test_set.describe(a)} is {sample.faces.describe(b)}" for a, b in pairs[:_SHOWN])
    return Finding(
        "duplicates",
        "warning",
        f"{test_set.name} and the training set share images: {len(equal):,} equal to the byte, {len(alike):,} the same "
        f"picture ({looked}: about {expected:,.0f} in all). The model was trained on what it is tested on. {where}"
        f"{'; ...' if len(pairs) > _SHOWN else ''}",
        pairs,
    )


def _shared_people(test_set: TestSet, sample: TrainingSample, unit: NDArray[np.float32]) -> Finding:
    people = test_set.people if test_set.people is not None else np.arange(len(unit))
    _, numbers = np.unique(people, return_inverse=True)
    training_people, training_numbers = np.unique(sample.people, return_inverse=True)
    found, threshold = shared_people(centres(unit, numbers), centres(sample.vectors, training_numbers))
    total = len(sample.faces.identities)
    looked = f"{len(training_people):,} of {total:,} training identities looked at, from a cosine of {threshold:.3f} on"
    if threshold >= 1:
        return Finding(
            "people",
            "unclear",
            f"{test_set.name}: whether it shares people with the training set, the model cannot tell. The centres of "
            f"different people are so much alike to it that no cosine would be sure ({threshold:.3f} asked for).",
        )
    if not found:
        text = f"no person of the training set was found in {test_set.name} ({looked})."
        return Finding("people", "note", text)
    firsts = [
        (int(np.flatnonzero(numbers == a)[0]), int(sample.positions[np.flatnonzero(training_numbers == b)[0]]))
        for a, b, _ in found
    ]
    names = "; ".join(
        f"{_person(test_set, first)} is training identity {sample.names[int(training_people[b])]} ({cosine:.3f})"
        for (first, _), (_, b, cosine) in zip(firsts[:_SHOWN], found, strict=False)
    )
    return Finding(
        "people",
        "warning",
        f"{test_set.name} and the training set probably share people: {len(found):,} ({looked}: about "
        f"{len(found) * total / len(training_people):,.0f} in all). {names}{'; ...' if len(found) > _SHOWN else ''}",
        tuple(firsts),
    )


def _person(test_set: TestSet, image: int) -> str:
    if test_set.identities is not None and test_set.people is not None:
        return test_set.identities[int(test_set.people[image])]
    return test_set.describe(image)


def _shared_names(test_set: TestSet, sample: TrainingSample) -> Finding:
    assert test_set.identities is not None
    shared = shared_names(test_set.identities, sample.names)
    if not shared:
        text = f"{test_set.name} shares no name of a person with the training set ({len(sample.names):,} names)."
        return Finding("people", "note", text)
    shown = f"{', '.join(shared[:_SHOWN])}{', ...' if len(shared) > _SHOWN else ''}"
    text = f"{test_set.name} and the training set share {len(shared):,} names of people: {shown}"
    return Finding("people", "warning", text)
