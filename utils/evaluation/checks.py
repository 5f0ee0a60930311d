"""What may be wrong with a test although it ran: each check returns findings in words, and says what it looked at.

Checks look at samples, so that they cost little beside the test itself. docs/numbers.md explains every finding.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from data.face_sets import EncodedImages
from data.folds import FOLDS, unmixed_folds
from utils.evaluation.alignment import eye_contrast

Vectors = NDArray[np.floating]
#: Pixels of an image of a set: uint8 [S, S, 3] RGB, by its position.
Pixels = Callable[[int], NDArray[np.uint8]]

# Faces fewer than this have no mean that could be judged.
_LEAST_FACES = 20
# Images of a person in a sample, at most.
_EACH = 4
# The separation has to grow by this share, and by more than chance does in 99 of 100 draws.
_CLEARLY = 0.01
_DRAWS = 400
# Half of the protocol's step of squared distances, as a cosine: a smaller deviation cannot move a threshold by a step.
_DEVIATION = 0.005
# Cosine from which two images may be one picture, and the correlation of their thumbnails from which they are.
_ALIKE, _SAME_PICTURE = 0.9, 0.95
_THUMBNAIL = 16
# Two centres belong to one person when they are this likely impostors, by the impostors' own spread; see
# `shared_people`.
_SIGMAS = 6.0


@dataclass(frozen=True)
class Finding:
    """What a check found. level: `warning`, when numbers should not be trusted before it is looked into; `unclear`,
    when the check could not tell; `note`, when it only tells. pairs: images to look at, (position in the test set,
    position in the training set)."""

    check: Literal["alignment", "channels", "duplicates", "people", "precision", "folds"]
    level: Literal["warning", "unclear", "note"]
    text: str
    pairs: tuple[tuple[int, int], ...] = field(default=())


def check_alignment(faces: NDArray[np.uint8], name: str) -> Finding:
    """Whether faces, uint8 [N, S, S, 3] RGB, have their eyes where the template has them."""
    if len(faces) < _LEAST_FACES:
        text = f"{name}: {len(faces)} faces are too few to tell whether they are aligned."
        return Finding("alignment", "unclear", text)
    found = eye_contrast(faces)
    looked = f"(eyes at the template's places: {found.at_template:.2f}, aligned photographs have 1.0 to 1.2; "
    looked += f"mean of {len(faces)} faces)"
    if found.verdict == "aligned":
        return Finding("alignment", "note", f"{name} is aligned to the template {looked}.")
    if found.verdict == "elsewhere":
        crop = f"enlarged {found.zoom:g} times and moved by ({found.right:+d}, {found.down:+d}) pixels of 112"
        return Finding(
            "alignment",
            "warning",
            f"{name} looks unaligned or wrongly cropped {looked}. The eyes are seen better, {found.best:.2f}, when the "
            f"faces are {crop}. Align the photographs with the five points (data/pack_bin.py or data/pack_set.py with "
            "--detector): accuracies of unaligned faces say little about the model.",
        )
    return Finding(
        "alignment",
        "unclear",
        f"{name}: the mean face shows no clear eyes anywhere {looked}: these are no photographs of faces, or each is "
        "turned and placed differently.",
    )


def check_folds(same: NDArray[np.bool_], name: str) -> Finding | None:
    """Whether the folds that the pairs are cut into have both kinds, `same` telling those of one person."""
    unmixed = unmixed_folds(same)
    if not unmixed:
        return None
    return Finding(
        "folds",
        "warning",
        f"{unmixed} of the {FOLDS} folds of {name} have pairs of one kind only, so that its accuracy hangs on the "
        "order of the pairs: mix the kinds, in turn say, when the set is packed (data/pack_bin.py).",
    )


def check_channels(plain: Vectors, swapped: Vectors, sample: "PairSample", name: str, model: str) -> Finding:
    """Whether the model tells people apart better when red and blue are swapped.

    plain, swapped: unit embeddings [images of the sample, D] of the faces as they are and with swapped channels.
    """
    gain = separation_gain(plain, swapped, sample)
    shown = f"separation of genuine and impostor scores {gain.plain:.2f} as it is, {gain.swapped:.2f} swapped"
    shown += f", change {100 * gain.low:+.1f} .. {100 * gain.high:+.1f} % (99 %); {len(plain)} faces of {name}"
    if gain.low > _CLEARLY:
        return Finding(
            "channels",
            "warning",
            f"{model} does clearly better on {name} with red and blue swapped ({shown}). Either the set was written "
            "from BGR pixels, or the model expects BGR: see docs/embedders.md for how to say so.",
        )
    return Finding(
        "channels", "note", f"{model} does not do clearly better on {name} with red and blue swapped ({shown})."
    )


def check_precision(exact: Vectors, reduced: Vectors, sample: "PairSample", precision: str, model: str) -> Finding:
    """How far scores in `precision` are from those in float32; unit embeddings [images of the sample, D] of each."""
    deviation = np.abs(sample.scores(exact) - sample.scores(reduced))
    shown = f"scores differ by {deviation.mean():.1e} on average and {deviation.max():.1e} at most from those in fp32 "
    shown += f"({len(deviation):,} pairs of {len(exact)} faces)"
    if deviation.max() >= _DEVIATION:
        text = f"{model} in {precision}: {shown}, more than half a step of the thresholds ({_DEVIATION}): quote fp32."
        return Finding("precision", "warning", text)
    return Finding("precision", "note", f"{model} in {precision}: {shown}.")


@dataclass(frozen=True, eq=False)
class PairSample:
    """A sample of a set.

    positions: int64 [S], its images. index: int64 [P, 2], pairs of them, by their place in `positions`. same: bool
    [P]. groups: int64 [S], what is drawn together: a person, or connected pairs of a list.
    """

    positions: NDArray[np.int64]
    index: NDArray[np.int64]
    same: NDArray[np.bool_]
    groups: NDArray[np.int64]

    def scores(self, vectors: Vectors) -> NDArray[np.float64]:
        """Cosines [P] of the pairs, from unit vectors [S, D]."""
        exact = vectors.astype(np.float64)
        return np.einsum("pd,pd->p", exact[self.index[:, 0]], exact[self.index[:, 1]])


def sample_people(people: NDArray[np.int64], images: int, seed: int) -> PairSample:
    """People who have two images or more, four images at most of each, until there are `images`; all their pairs."""
    generator = np.random.default_rng(seed)
    order = np.argsort(people, kind="stable")
    groups = np.split(order, np.flatnonzero(np.diff(people[order])) + 1)
    groups = [group for group in groups if len(group) > 1]
    chosen: list[NDArray[np.int64]] = []
    for number in generator.permutation(len(groups)).tolist():
        if sum(map(len, chosen)) >= images:
            break
        chosen.append(np.sort(generator.permutation(groups[number])[:_EACH]))
    positions = np.concatenate(chosen) if chosen else np.empty(0, np.int64)
    owner = np.repeat(np.arange(len(chosen)), [len(group) for group in chosen])
    index = np.stack(np.triu_indices(len(positions), 1), 1).astype(np.int64)
    return PairSample(positions, index, owner[index[:, 0]] == owner[index[:, 1]], owner)


def sample_pairs(
    index: NDArray[np.int64], same: NDArray[np.bool_], groups: NDArray[np.int64], images: int, seed: int
) -> PairSample:
    """Pairs of a list, as many of each kind, of `images` images at most. groups: int64 [P], connected pairs.

    An image of several pairs is in the sample once for each.
    """
    generator = np.random.default_rng(seed)
    kinds = [generator.permutation(np.flatnonzero(same == kind))[: images // 4] for kind in (True, False)]
    least = min(map(len, kinds))
    chosen = np.sort(np.concatenate([kind[:least] for kind in kinds]))
    places = np.arange(2 * len(chosen)).reshape(-1, 2)
    return PairSample(index[chosen].reshape(-1), places, same[chosen], np.repeat(groups[chosen], 2))


@dataclass(frozen=True)
class SeparationGain:
    """The separation of a sample in two conditions, and the 99 % interval, over draws of its groups, of its growth from
    plain to swapped, a share of plain."""

    plain: float
    swapped: float
    low: float
    high: float


def separation_gain(plain: Vectors, swapped: Vectors, sample: PairSample) -> SeparationGain:
    """(mean genuine - mean impostor score) / standard deviation of the impostor scores, in both conditions.

    The genuine scores' own spread hangs on a few bad images, and would hide a difference that nearly all pairs show.
    """
    scores = np.stack([sample.scores(plain), sample.scores(swapped)])
    count = int(sample.groups.max()) + 1
    first, second = sample.groups[sample.index].T
    generator = np.random.default_rng(0)
    ratios = []
    for _ in range(_DRAWS):
        drawn = np.bincount(generator.integers(0, count, count), minlength=count).astype(np.float64)
        weight = np.where(first == second, drawn[first], drawn[first] * drawn[second])
        if weight[sample.same].any() and weight[~sample.same].any():
            before, after = (_separation(row, sample.same, weight) for row in scores)
            ratios.append((after - before) / max(abs(before), 1e-12))
    low, high = np.quantile(ratios, (0.005, 0.995)) if ratios else (-1.0, 1.0)
    ones = np.ones(len(sample.same))
    before, after = (_separation(row, sample.same, ones) for row in scores)
    return SeparationGain(before, after, float(low), float(high))


def _separation(scores: NDArray[np.float64], same: NDArray[np.bool_], weight: NDArray[np.float64]) -> float:
    genuine, impostor = (np.average(scores[kind], weights=weight[kind]) for kind in (same, ~same))
    variance = np.average((scores[~same] - impostor) ** 2, weights=weight[~same])
    return float((genuine - impostor) / max(np.sqrt(variance), 1e-12))


def same_bytes(test: EncodedImages, training: EncodedImages, positions: NDArray[np.int64]) -> list[tuple[int, int]]:
    """(position in the test set, position in the training set) of images that are equal to the byte.

    All of `test` is compared with the training images at `positions`.
    """
    known = {hashlib.sha256(test.encoded(i)).digest(): i for i in range(len(test))}
    found = []
    for i in positions.tolist():
        match = known.get(hashlib.sha256(training.encoded(i)).digest())
        if match is not None:
            found.append((match, i))
    return found


def same_pictures(
    test: Vectors, training: Vectors, positions: NDArray[np.int64], test_pixels: Pixels, training_pixels: Pixels
) -> list[tuple[int, int]]:
    """(position in the test set, position in the training set) of images that are one picture, whatever its encoding.

    test [N, D], training [T, D]: unit embeddings; the latter are those of the training images at `positions`. Of each
    the most alike test image is looked at when its cosine is 0.9 or more: they are one picture when thumbnails of
    16 x 16 grey pixels correlate by 0.95, as they are or mirrored.
    """
    found = []
    for start in range(0, len(training), 256):
        scores = training[start : start + 256] @ test.T
        best = scores.argmax(axis=1)
        for row in np.flatnonzero(scores[np.arange(len(best)), best] >= _ALIKE).tolist():
            pair = int(best[row]), int(positions[start + row])
            one, other = _thumbnail(test_pixels(pair[0])), _thumbnail(training_pixels(pair[1]))
            if max(_correlation(one, other), _correlation(one, other[:, ::-1])) >= _SAME_PICTURE:
                found.append(pair)
    return found


def _thumbnail(face: NDArray[np.uint8]) -> NDArray[np.float64]:
    grey = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    return cv2.resize(grey, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float64)


def _correlation(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    one, other = one - one.mean(), other - other.mean()
    return float((one * other).sum() / max(np.sqrt((one**2).sum() * (other**2).sum()), 1e-12))


def shared_people(test: Vectors, training: Vectors) -> tuple[list[tuple[int, int, float]], float]:
    """([(test person, training person, cosine)], threshold): who is in both sets, by the centres of their embeddings.

    test [P, D], training [Q, D]: unit centres. Two people are one when each is the other's most alike, and their cosine
    is 6 standard deviations above the mean of all P x Q cosines, nearly all of which are of different people.
    """
    best_score, best = np.full(len(training), -2.0), np.zeros(len(training), np.int64)
    back_score, back = np.full(len(test), -2.0), np.zeros(len(test), np.int64)
    total = squares = 0.0
    for start in range(0, len(test), 2048):
        scores = test[start : start + 2048] @ training.T
        total += float(scores.sum(dtype=np.float64))
        squares += float((scores.astype(np.float64) ** 2).sum())
        back[start : start + 2048], back_score[start : start + 2048] = scores.argmax(1), scores.max(1)
        better = scores.max(0) > best_score
        best[better] = scores.argmax(0)[better] + start
        best_score = np.maximum(best_score, scores.max(0))
    mean = total / (len(test) * len(training))
    spread = np.sqrt(max(squares / (len(test) * len(training)) - mean**2, 0.0))
    threshold = mean + _SIGMAS * spread
    mutual = [(int(best[q]), q, float(best_score[q])) for q in range(len(training)) if back[best[q]] == q]
    return sorted((pair for pair in mutual if pair[2] >= threshold), key=lambda pair: -pair[2]), float(threshold)


def centres(vectors: Vectors, people: NDArray[np.int64]) -> Vectors:
    """Unit centres [people, D] of unit embeddings [N, D]; people int64 [N], numbered without holes."""
    order = np.argsort(people, kind="stable")
    starts = np.flatnonzero(np.diff(people[order], prepend=-1))
    sums = np.add.reduceat(vectors[order].astype(np.float64), starts)
    return (sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def shared_names(test: Sequence[str], training: Sequence[str]) -> list[str]:
    """Names of people that both sets have, in the test set's spelling; numbers are no names, and are left out."""
    known = {_plain(name) for name in training if is_name(name)}
    return [name for name in test if is_name(name) and _plain(name) in known]


def is_name(text: str) -> bool:
    """Whether an identity is called by a name, not by a number."""
    return any(letter.isalpha() for letter in text)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter.isalnum())
