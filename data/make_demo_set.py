#!/usr/bin/env python3
"""Write the demo sets: procedural faces in the exact layout of insightface's sets, for trying the program.

    python data/make_demo_set.py --output demo/set --more demo/more

OUTPUT gets `train.rec`, `train.idx`, `property` and `demo.bin` (pairs of people who are not in training). MORE is a
second training set, to merge with the first: half of its people are in the first set too, in other pictures. Both get
`identities.csv` (which drawn person each label is) and `people.png`. The same settings give the same bytes.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, READS, Config, DemoConfig
from data.face_set_writer import FaceSetWriter, write_face_set
from data.images import decode_rgb
from data.synthetic_faces import draw_jpeg
from data.verification_bin import write_bin
from utils.face_sheets import draw_contact_sheet
from utils.files import require_free, write_text_atomic
from utils.processes import map_unordered, worker_count
from utils.progress import progress_bar
from utils.scripts import readable_errors
from utils.settings import ConfigError, parse_settings

IMAGE_SIZE = 112
# Where the numbers of drawn people begin who are not in the first training set.
FIRST_TEST_PERSON = 1_000_000
FIRST_NEW_PERSON = 2_000_000
PAIRS_PER_PERSON = 10  # of each kind
PEOPLE_SHOWN, SHOTS_SHOWN = 12, 10

Album = dict[int, list[bytes]]  # person to JPEG images


def set_folders(demo: DemoConfig) -> tuple[Path, Path]:
    """Where the two sets go."""
    folder = Path(demo.folder)
    return Path(demo.output) if demo.output else folder / "set", Path(demo.more) if demo.more else folder / "more"


def draw_people(people: Sequence[int], shots: range, seed: int, workers: int, title: str) -> Album:
    """JPEG images of each of `people`, the pictures numbered `shots`."""
    return draw_albums([(people, shots)], seed, workers, title)[0]


def draw_albums(parts: Sequence[tuple[Sequence[int], range]], seed: int, workers: int, title: str) -> list[Album]:
    """An album for each (people, numbers of their pictures); all are drawn by the same processes."""
    tasks = [(part, person, shots, seed) for part, (people, shots) in enumerate(parts) for person in people]
    drawn = {}
    with progress_bar(sum(len(people) * len(shots) for people, shots in parts), "image", title) as bar:
        for part, person, images in map_unordered(_draw_person, tasks, workers, _nothing):
            drawn[part, person] = images
            bar.update(len(images))
    return [{person: drawn[part, person] for person in people} for part, (people, _) in enumerate(parts)]


def _draw_person(task: tuple[int, int, range, int]) -> tuple[int, int, list[bytes]]:
    part, person, shots, seed = task
    return part, person, [draw_jpeg(person, shot, seed, IMAGE_SIZE) for shot in shots]


def _nothing() -> None:
    """Drawing needs no set-up in a worker."""


def add_people(out: FaceSetWriter, album: Album) -> None:
    """Add every person as an identity, with the table of who is who and a contact sheet beside them."""
    lines = ["label,person"]
    for person, images in album.items():
        lines.append(f"{out.add_identity(images)},{person}")
    write_text_atomic(out.folder / "identities.csv", "\n".join(lines) + "\n")
    shown = [images[:SHOTS_SHOWN] for images in list(album.values())[:PEOPLE_SHOWN]]
    cells = [decode_rgb(image, "a drawn face") for images in shown for image in images]
    title = f"demo set, drawn by a program: {len(shown)} of {len(album)} people, a row each"
    draw_contact_sheet(out.folder / "people.png", cells, len(shown[0]), title)


def make_pairs(album: Album, seed: int) -> tuple[list[bytes], list[bool]]:
    """Verification pairs, the two kinds in turn: (images, two a pair; same person or not)."""
    rng = np.random.default_rng(seed)
    people = list(album)
    images, same = [], []
    for _ in range(PAIRS_PER_PERSON):
        for person in people:
            shots = album[person]
            a, b = rng.choice(len(shots), 2, replace=False)
            other = album[int(rng.choice([p for p in people if p != person]))]
            images += [shots[a], shots[b], shots[a], other[rng.integers(len(other))]]
            same += [True, False]
    return images, same


def make_sets(output: Path, more: Path, demo: DemoConfig, workers: int) -> None:
    """Write both sets. Raises FileExistsError when a folder is there and not empty, ConfigError when one lies in the
    other."""
    one, other = output.resolve(), more.resolve()
    if one.is_relative_to(other) or other.is_relative_to(one):
        raise ConfigError(f"demo.more: {more} and {output} are one folder, or one lies in the other: name two")
    require_free(more)
    known = range(demo.people)
    strangers = range(FIRST_TEST_PERSON, FIRST_TEST_PERSON + demo.test_people)
    overlap = demo.more_people // 2
    again = [*known[:overlap], *range(FIRST_NEW_PERSON, FIRST_NEW_PERSON + demo.more_people - overlap)]
    shots, other_shots = range(demo.shots), range(demo.shots, 2 * demo.shots)
    # Both appear at the end: what is interrupted leaves neither.
    with write_face_set(output, IMAGE_SIZE) as out, write_face_set(more, IMAGE_SIZE) as second:
        parts = ((known, shots), (strangers, shots), (again, other_shots))
        train, test, others = draw_albums(parts, demo.seed, workers, "draw people")
        add_people(out, train)
        write_bin(out.folder / "demo.bin", *make_pairs(test, demo.seed))
        add_people(second, others)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("make_demo_set", "nothing was written"):
        config = parse_settings(Config, PRESETS, ("demo", "common"), __doc__, argv, reads=READS["make_demo_set"])
        output, more = set_folders(config.demo)
        make_sets(output, more, config.demo, worker_count(config.common.workers))
    print(f"{output}, {more}: drawn faces, for trying the program, not for results about real ones")


if __name__ == "__main__":
    main()
