"""IJB-B and IJB-C, 1:1 and 1:N, in the layout that insightface's tools read.

    ROOT/loose_crop/                            images, each with room around the face
    ROOT/meta/ijbX_name_5pts_score.txt          image, x and y of five landmarks, detector score
    ROOT/meta/ijbX_face_tid_mid.txt             image, template, media; the same images in the same order
    ROOT/meta/ijbX_template_pair_label.txt      template, template, 1 if they are of one person
    ROOT/meta/ijbX_1N_gallery_G1.csv, ..._G2    template, subject, ... with a header (IJB-B: also called S1, S2)
    ROOT/meta/ijbX_1N_probe_mixed.csv           the same for the probes

The protocols are those of C. Whitelam et al., "IARPA Janus Benchmark-B" (2017), and B. Maze et al., "IARPA Janus
Benchmark-C" (2018). Published numbers take their TAR at the nearest point of the ROC, and their TPIR from both
galleries joined, over scores and not over probes: both are here under their own names, beside the usual definitions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.align import TEMPLATE_SIZE, align
from data.images import ImageError, decode_rgb, encode_png
from data.images_fingerprint import files_digest
from utils.evaluation.curves import FAR_POINTS, Roc, TarAtFar, roc, split_scores, tar_at_far, tar_at_nearest_roc_point
from utils.evaluation.identification import Identification, identify
from utils.evaluation.templates import Templates
from utils.regular_files import read_regular_file
from utils.text_files import is_whole_number, read_rows, read_whole_numbers

_PAIRS_AT_ONCE = 1 << 16
_WHOLE = 2.0**53  # float64 has all whole numbers below


class IjbError(ValueError):
    """A file of the set is not as it should be; the message names file and line."""


class IjbImages:
    """The faces of the set as EncodedImages, aligned from their landmarks when they are read.

    landmarks: float64 [N, 5, 2], x and y. size: of the aligned faces, pixels.
    """

    def __init__(self, folder: Path, names: list[str], landmarks: NDArray[np.float64], source: Path, size: int) -> None:
        self.names, self.landmarks = names, landmarks
        self._folder, self._source, self._size = folder, source, size

    def __len__(self) -> int:
        return len(self.names)

    def encoded(self, i: int) -> bytes:
        """The aligned face, PNG. Raises ImageError for a file that is not there or broken."""
        try:
            stored = read_regular_file(self._folder / self.names[i])
        except OSError as error:
            raise ImageError(f"{self.describe(i)}: {error.strerror or error}") from None
        return encode_png(align(decode_rgb(stored, self.describe(i)), self.landmarks[i], self._size, shrink=False))

    def fingerprint(self) -> str:
        """See data/images_fingerprint.py."""
        return files_digest(self, [self._folder / name for name in self.names], self.names, self.landmarks, self._size)

    def describe(self, i: int) -> str:
        return f"{self._source}, line {i + 1}: {self._folder / self.names[i]}"


@dataclass(frozen=True, eq=False)
class Enrolment:
    """Templates and whose they are: templates, subjects int64 [T]; each template once."""

    name: str
    templates: NDArray[np.int64]
    subjects: NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Ijb:
    """The set. N images, P pairs of templates.

    name: `IJB-B` or `IJB-C`. templates, media: int64 [N]. scores: float32 [N], the detector's. pairs: int64 [P, 2],
    template ids. same: bool [P]. galleries: G1 and G2, and probes None, without files for 1:N.
    """

    name: str
    images: IjbImages
    templates: NDArray[np.int64]
    media: NDArray[np.int64]
    scores: NDArray[np.float32]
    pairs: NDArray[np.int64]
    same: NDArray[np.bool_]
    galleries: tuple[Enrolment, ...]
    probes: Enrolment | None


def open_ijb(root: Path | str, size: int = TEMPLATE_SIZE) -> Ijb:
    """Open the set in the folder `root`; faces are aligned to size x size pixels.

    Raises IjbError for a file that is missing, and with the line for one that is damaged or contradicts another.
    """
    root = Path(root)
    meta = root / "meta"
    kinds = [kind for kind in ("ijbb", "ijbc") if (meta / f"{kind}_face_tid_mid.txt").is_file()]
    if len(kinds) != 1:
        found = "both sets" if kinds else "neither"
        raise IjbError(f"{meta}: expected ijbb_face_tid_mid.txt or ijbc_face_tid_mid.txt, found {found}")
    prefix = kinds[0]
    names_file = _existing(meta / f"{prefix}_name_5pts_score.txt")
    media_file = meta / f"{prefix}_face_tid_mid.txt"
    names, numbers = _read_names(names_file, 11)
    same_names, places = _read_names(media_file, 2)
    for line, (name, other) in enumerate(zip(names, same_names, strict=False), 1):
        if name != other:
            raise IjbError(f"{media_file}, line {line}: image {other!r}, where {names_file.name} has {name!r}")
    if len(names) != len(same_names):
        raise IjbError(f"{media_file} has {len(same_names)} lines, {names_file.name} has {len(names)}")
    partial = (places != np.floor(places)) | (np.abs(places) >= _WHOLE)
    if partial.any():
        line = int(partial.any(axis=1).argmax())
        raise IjbError(f"{media_file}, line {line + 1}: template and media must be whole numbers, found {places[line]}")
    templates, media = places.astype(np.int64).T
    pairs_file = _existing(meta / f"{prefix}_template_pair_label.txt")
    pairs = _read_numbers(pairs_file, 3)
    wrong = ~np.isin(pairs[:, 2], (0, 1))
    if wrong.any():
        raise IjbError(f"{pairs_file}, line {int(wrong.argmax()) + 1}: {pairs[wrong.argmax(), 2]} is no label, 1 or 0")
    known = np.unique(templates)
    unknown = ~np.isin(pairs[:, :2], known).all(axis=1)
    if unknown.any():
        raise IjbError(
            f"{pairs_file}, line {int(unknown.argmax()) + 1}: a template that {media_file.name} has no image of"
        )
    galleries = [
        _read_enrolment(file, letter_and_number, known)
        for letter_and_number in ("G1", "G2")
        if (file := _either(meta, prefix, letter_and_number)) is not None
    ]
    probe_file = meta / f"{prefix}_1N_probe_mixed.csv"
    probes = _read_enrolment(probe_file, "probes", known) if probe_file.is_file() else None
    if bool(galleries) != (probes is not None):
        raise IjbError(f"{meta}: 1:N needs both galleries ({prefix}_1N_gallery_G1.csv, ...) and {probe_file.name}")
    for gallery in galleries:
        if probes is not None and not np.isin(probes.subjects, gallery.subjects).any():
            raise IjbError(f"{probe_file}: no probe is of a subject of gallery {gallery.name}")
    landmarks = numbers[:, :10].reshape(-1, 5, 2)
    return Ijb(
        name=f"IJB-{prefix[-1].upper()}",
        images=IjbImages(root / "loose_crop", names, landmarks, names_file, size),
        templates=templates,
        media=media,
        scores=numbers[:, 10].astype(np.float32),
        pairs=pairs[:, :2],
        same=pairs[:, 2] == 1,
        galleries=tuple(galleries),
        probes=probes,
    )


def _existing(file: Path) -> Path:
    if not file.is_file():
        raise IjbError(f"{file} does not exist")
    return file


def _either(meta: Path, prefix: str, name: str) -> Path | None:
    """The file of a gallery under one of its two names."""
    files = [meta / f"{prefix}_1N_gallery_{letter}{name[1]}.csv" for letter in "GS"]
    return next((file for file in files if file.is_file()), None)


def _read_names(path: Path, count: int) -> tuple[list[str], NDArray[np.float64]]:
    """Lines of an image's name and `count` numbers: the names, and float64 [lines, count]."""
    names, numbers = [], []
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != count + 1:
                raise IjbError(f"{path}, line {number}: {len(fields)} columns, expected a name and {count} numbers")
            try:
                values = [float(field) for field in fields[1:]]
            except ValueError as error:
                raise IjbError(f"{path}, line {number}: {error}") from None
            if not np.isfinite(values).all():
                raise IjbError(f"{path}, line {number}: a number is not finite")
            names.append(fields[0])
            numbers.append(values)
    if not names:
        raise IjbError(f"{path} is empty")
    return names, np.array(numbers)


def _read_numbers(path: Path, columns: int) -> NDArray[np.int64]:
    """Lines of whole numbers, int64 [lines, columns]; many millions of them."""
    if not path.stat().st_size:
        raise IjbError(f"{path} is empty")
    try:
        numbers = read_whole_numbers(path)
    except (ValueError, UnicodeDecodeError):
        numbers = np.empty((0, 0), np.int64)
    if numbers.shape[1] == columns:
        return numbers
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            fields = line.split()
            if len(fields) != columns or not all(field.lstrip("-").isdecimal() for field in fields):
                raise IjbError(f"{path}, line {number}: {line.strip()!r}, expected {columns} whole numbers")
    raise IjbError(f"{path} is damaged: a number in it is too large")


def _read_enrolment(path: Path, name: str, known: NDArray[np.int64]) -> Enrolment:
    """A CSV with a header, whose first columns are template and subject; a template has a line for each image."""
    subject_of: dict[int, int] = {}
    has_images = set(known.tolist())
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = read_rows(file, path, IjbError)
        next(rows, None)
        for line, row in rows:
            _enrol(row, subject_of, has_images, f"{path}, line {line}")
    if not subject_of:
        raise IjbError(f"{path} has no templates")
    templates = np.array(list(subject_of), np.int64)
    return Enrolment(name, templates, np.array(list(subject_of.values()), np.int64))


def _enrol(row: list[str], subject_of: dict[int, int], has_images: set[int], where: str) -> None:
    """Add the template and subject of a row."""
    numbers = [cell.strip() for cell in row[:2]]
    if len(numbers) < 2 or not all(map(is_whole_number, numbers)):
        raise IjbError(f"{where}: expected the numbers of a template and a subject, found {','.join(row)[:200]!r}")
    template, subject = map(int, numbers)
    if subject_of.setdefault(template, subject) != subject:
        raise IjbError(f"{where}: template {template} is of subject {subject}, before of {subject_of[template]}")
    if template not in has_images:
        raise IjbError(f"{where}: template {template} has no images")


@dataclass(frozen=True, eq=False)
class IjbVerification:
    """1:1 results. nearest: TAR by the protocol's own rule; ranked: by rank. genuine, impostor: numbers of pairs."""

    nearest: tuple[TarAtFar, ...]
    ranked: tuple[TarAtFar, ...]
    auc: float
    eer: float
    genuine: int
    impostor: int
    roc: Roc


def pair_scores(templates: Templates, pairs: NDArray[np.integer]) -> NDArray[np.float32]:
    """The cosine of each pair of templates, float32 [P], a part at a time. pairs: [P, 2], template ids."""
    rows = templates.rows(pairs)
    scores = np.empty(len(rows), np.float32)
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        part = rows[start : start + _PAIRS_AT_ONCE]
        scores[start : start + len(part)] = np.einsum(
            "pd,pd->p", templates.vectors[part[:, 0]], templates.vectors[part[:, 1]]
        )
    return scores


def ijb_verification(
    templates: Templates, pairs: NDArray[np.integer], same: NDArray[np.bool_], far: Sequence[float] = FAR_POINTS
) -> IjbVerification:
    """The 1:1 protocol: pairs [P, 2] of template ids, same bool [P]."""
    genuine, impostor = split_scores(pair_scores(templates, pairs), same)
    curve = roc(genuine, impostor)
    return IjbVerification(
        nearest=tar_at_nearest_roc_point(genuine, impostor, far),
        ranked=tar_at_far(genuine, impostor, far),
        auc=curve.auc,
        eer=curve.eer,
        genuine=len(genuine),
        impostor=len(impostor),
        roc=curve,
    )


@dataclass(frozen=True, eq=False)
class IjbIdentification:
    """1:N results.

    per_gallery: by the gallery's name; probes of the other gallery's people are the non-mated. joined: all probes in
    both galleries together, as published numbers have it; its `over_scores` is their TPIR.
    """

    per_gallery: dict[str, Identification]
    joined: Identification


def ijb_identification(
    templates: Templates, ijb: Ijb, ranks: int = 20, fpir: Sequence[float] = (0.01, 0.1)
) -> IjbIdentification:
    """The 1:N protocol. Raises IjbError for a set without its files."""
    if ijb.probes is None:
        raise IjbError(f"{ijb.name}: its meta folder has no galleries and probes, so there is no 1:N test")
    queries = templates.vectors[templates.rows(ijb.probes.templates)]

    def search(templates_of: NDArray[np.int64], subjects: NDArray[np.int64], joined: bool) -> Identification:
        entries = templates.vectors[templates.rows(templates_of)]
        assert ijb.probes is not None
        return identify(queries, ijb.probes.subjects, entries, subjects, ranks, fpir, over_scores=joined)

    galleries = ijb.galleries
    return IjbIdentification(
        {gallery.name: search(gallery.templates, gallery.subjects, False) for gallery in galleries},
        search(
            np.concatenate([gallery.templates for gallery in galleries]),
            np.concatenate([gallery.subjects for gallery in galleries]),
            True,
        ),
    )
