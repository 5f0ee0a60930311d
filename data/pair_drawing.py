"""Pairs for a verification set, drawn from folders of people."""

import random
from collections.abc import Iterator
from math import isqrt
from pathlib import Path

from data.face_sets import FaceSetError, FolderFaceSet, images_by_identity
from data.pair_lists import COLUMNS
from utils.files import write_csv_atomic

# Of two people are drawn again when their images were a pair before; after so many tries there are too few of them.
_TRIES = 1000

#: Positions of two images, the smaller one first.
Positions = tuple[int, int]


def draw_pairs(images: Path, count: int, seed: int, output: Path) -> None:
    """Write a list (CSV) of `count` pairs of one person and `count` of two, in turn, from `images/<person>/<image>`.

    No pair comes twice. Each person with two images has a pair of one person before any has a second one; of two
    people, all are equally likely. Raises FaceSetError when there are not so many pairs, FileExistsError when `output`
    is there.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists: pack it without --draw, or name another list to write")
    faces, rng = FolderFaceSet(images), random.Random(seed)
    people = [positions.tolist() for positions in images_by_identity(faces)]
    same = _of_one(people, count, rng)
    if len(same) < count:
        raise FaceSetError(f"{images} has only {len(same):,} pairs of images of one person, {count:,} are asked for")
    if len(people) < 2:
        raise FaceSetError(f"{images} has one person, {faces.identities[0]}: pairs of two people need a second one")
    different = _of_two(people, count, rng)
    if len(different) < count:
        raise FaceSetError(f"{images} has too few images for {count:,} pairs of two people")
    rows = (
        (faces.relative_file(a), faces.relative_file(b), flag)
        for pairs in zip(same, different, strict=True)
        for (a, b), flag in zip(pairs, (1, 0), strict=True)
    )
    write_csv_atomic(output, COLUMNS, rows)


def _of_one(people: list[list[int]], count: int, rng: random.Random) -> list[Positions]:
    """`count` pairs of one person, or all there are, a round over the people after the other."""
    there_are = [len(images) * (len(images) - 1) // 2 for images in people]
    rounds = next((n for n in range(1, count) if sum(min(n, pairs) for pairs in there_are) >= count), count)
    drawn = [
        [_pair(images, number) for number in rng.sample(range(pairs), min(rounds, pairs))]
        for images, pairs in zip(people, there_are, strict=True)
    ]
    found: list[Positions] = []
    for n in range(rounds):
        of_round = [pairs[n] for pairs in drawn if n < len(pairs)]
        found += rng.sample(of_round, len(of_round))
    return found[:count]


def _pair(images: list[int], number: int) -> Positions:
    """Pair `number` of some images; they are numbered (0, 1), (0, 2), (1, 2), (0, 3) ..."""
    second = (1 + isqrt(1 + 8 * number)) // 2
    return images[number - second * (second - 1) // 2], images[second]


def _of_two(people: list[list[int]], count: int, rng: random.Random) -> list[Positions]:
    """`count` pairs of two people; fewer where no new one is found."""

    def tries() -> Iterator[Positions]:
        for _ in range(_TRIES):
            a, b = (rng.choice(images) for images in rng.sample(people, 2))
            yield min(a, b), max(a, b)

    found: dict[Positions, None] = {}
    while len(found) < count:
        new = next((pair for pair in tries() if pair not in found), None)
        if new is None:
            break
        found[new] = None
    return list(found)
