#!/usr/bin/env python3
"""What is in a face set: counts, sizes, bytes, broken records, a histogram, and a sheet of faces to look at.

    python data/report.py datasets/ms1mv3                         # reads the heads of the records only
    python data/report.py datasets/ms1mv3 --check                 # decodes every image, and finds copies
    python data/report.py datasets/ms1mv3 --repair datasets/mended # and writes the set without what is broken

The output folder gets report.json, broken.csv, images_per_identity.png and faces.png, with --check copies.csv, too. The
exit status is 1 when --check finds broken records. RecFaceSet refuses a damaged set; this reads on behind the damage,
so it reads records itself. docs/data.md shows an example.
"""

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from config import PRESETS, READS, Config, ReportConfig
from data.face_set_writer import write_face_set
from data.face_sets import FaceSetError, only_set, property_line
from data.survey import Survey, choose_sample, decode, decode_images, survey_heads, why_broken
from data.tolerant_records import KINDS, NO_LABEL, FolderRecords, Place, Records, open_records
from utils.arrays import distinct
from utils.face_sheets import draw_contact_sheet, in_square
from utils.files import require_free, write_csv_atomic, write_text_atomic
from utils.plots import draw_curves, histogram_outline
from utils.processes import worker_count
from utils.progress import progress_bar
from utils.scripts import printable, readable_errors
from utils.settings import describe, parse_settings
from utils.text_files import is_whole_number

# The contact sheet: pixels of a face, faces of an identity.
TILE = 112
COLUMNS = 8

# Broken records on the screen; broken.csv has them all.
SHOWN = 20


@dataclass(frozen=True)
class Report:
    """What report.json holds."""

    set: str
    #: Whether every image was decoded. If not, `sizes` are of a random sample.
    checked: bool
    records: int
    #: Images that are not known to be broken; all numbers but `broken` and `without_image` are about them.
    images: int
    #: Header and identity records.
    without_image: int
    broken: int
    identities: int
    #: Images whose bytes one before them has; under_another_identity: those of them where that is another person.
    #: None where not every image was decoded.
    copies: dict[str, int] | None
    #: Names of the identities all of whose images are broken.
    identities_lost: list[str]
    #: min, median, mean, max.
    images_per_identity: dict[str, float]
    #: Images by width x height.
    sizes: dict[str, int]
    #: Images by what their first bytes say.
    kinds: dict[str, int]
    #: sum, and the min, median, mean, max of an image.
    image_bytes: dict[str, float]
    #: The first line of the file `property`; None without one.
    property: str | None
    remarks: list[str]


def make_report(path: Path, output: Path, options: ReportConfig, workers: int) -> tuple[Report, Records, Survey]:
    """Look through the set at `path` and write the files of the report into the folder `output`.

    Raises as `open_records` does, and FaceSetError for an `output` within a tree of images.
    """
    checked = options.check or bool(options.repair)
    records, remarks = open_records(path)
    if isinstance(records, FolderRecords) and output.resolve().is_relative_to(path.resolve()):
        raise FaceSetError(f"{output} is within the set, where its pictures would be faces: name another with --output")
    output.mkdir(parents=True, exist_ok=True)
    survey = survey_heads(records)
    if checked:
        decode_images(records, survey, survey.good, workers, "check")
    else:
        decode_images(records, survey, choose_sample(survey, options.sample, options.seed), 0, "sample")
    for name in ("faces.png", "images_per_identity.png", "copies.csv"):  # of an earlier report
        (output / name).unlink(missing_ok=True)
    if survey.good.any():
        _draw_faces(output / "faces.png", records, survey, options)
    per_identity = survey.per_identity()
    if per_identity[0].size:
        _draw_images_per_identity(output / "images_per_identity.png", per_identity[1], set_name(path))
    copies = survey.copies() if checked else None
    report = _summarise(path, records, survey, per_identity, copies, remarks)
    write_text_atomic(output / "report.json", json.dumps(asdict(report), indent=2) + "\n")
    write_broken(output / "broken.csv", records, survey)
    if copies is not None:
        write_copies(output / "copies.csv", records, survey, *copies)
    return report, records, survey


def _summarise(
    path: Path,
    records: Records,
    survey: Survey,
    per_identity: tuple[np.ndarray, np.ndarray],
    copies: tuple[np.ndarray, np.ndarray] | None,
    remarks: list[str],
) -> Report:
    good = survey.good
    labels, counts = per_identity
    known = distinct(survey.labels[survey.labels != NO_LABEL])
    kinds = np.bincount(survey.kinds[good], minlength=len(KINDS)).tolist()
    image_bytes = survey.image_bytes[good]
    stated = None if isinstance(records, FolderRecords) else property_line(Path(records.place(0).file))
    return Report(
        set=str(path),
        checked=copies is not None,
        records=len(records),
        images=int(good.sum()),
        without_image=int(((survey.labels == NO_LABEL) & ~survey.broken).sum()),
        broken=int(survey.broken.sum()),
        identities=labels.size,
        copies=None if copies is None else _count_copies(survey, *copies),
        identities_lost=[records.identity(label) for label in np.setdiff1d(known, labels, assume_unique=True).tolist()],
        images_per_identity=_spread(counts),
        sizes={f"{width}x{height}": count for (width, height), count in survey.shapes.most_common()},
        kinds={kind: count for kind, count in zip(KINDS, kinds, strict=True) if count},
        image_bytes={"sum": int(image_bytes.sum(dtype=np.int64)), **_spread(image_bytes)},
        property=stated,
        remarks=remarks + _compare_with_property(stated, labels.size, survey.shapes),
    )


def _count_copies(survey: Survey, copies: np.ndarray, first: np.ndarray) -> dict[str, int]:
    elsewhere = survey.labels[copies] != survey.labels[first]
    return {"images": copies.size, "under_another_identity": int(elsewhere.sum())}


def _spread(values: np.ndarray) -> dict[str, float]:
    if not values.size:
        return {}
    measures = {"min": values.min(), "median": np.median(values), "mean": values.mean(), "max": values.max()}
    return {name: round(value.item(), 1) for name, value in measures.items()}


def _compare_with_property(line: str | None, identities: int, shapes: Counter[tuple[int, int]]) -> list[str]:
    if line is None:
        return []
    stated = [text.strip() for text in line.split(",")]
    if len(stated) != 3 or not all(map(is_whole_number, stated)):
        return [f"property says {line!r} in place of identities,height,width"]
    stated_identities, height, width = map(int, stated)
    others = shapes.total() - shapes[width, height]
    remarks = []
    if stated_identities != identities:
        remarks.append(f"property says {stated_identities:,} identities, the images have {identities:,}")
    if others:
        remarks.append(f"property says {width}x{height}, {others:,} of {shapes.total():,} images have another size")
    return remarks


def write_broken(path: Path, records: Records, survey: Survey) -> None:
    """A line for each broken record: file, key, offset, identity where it is known, and what is wrong."""

    def line(i: int) -> list[object]:
        label = int(survey.labels[i])
        identity = "" if label == NO_LABEL else records.identity(label)
        return [*records.place(i), identity, why_broken(records, i)]

    header = [*Place._fields, "identity", "reason"]
    write_csv_atomic(path, header, (line(i) for i in np.flatnonzero(survey.broken).tolist()))


def write_copies(path: Path, records: Records, survey: Survey, copies: np.ndarray, first: np.ndarray) -> None:
    """A line for each image whose bytes one before it has: file, key, offset and identity of both."""

    def facts(i: int) -> list[object]:
        return [*records.place(i), records.identity(int(survey.labels[i]))]

    columns = [*Place._fields, "identity"]
    header = [*columns, *(f"first_{name}" for name in columns)]
    pairs = zip(copies.tolist(), first.tolist(), strict=True)
    write_csv_atomic(path, header, ([*facts(copy), *facts(original)] for copy, original in pairs))


def _draw_images_per_identity(path: Path, counts: np.ndarray, name: str) -> None:
    """A histogram. A few large identities would flatten it, so its last bar holds all beyond the 99th percentile."""
    top = max(20, int(np.percentile(counts, 99)))  # 20 bars or more: see histogram_outline
    width = -(-top // 50)
    edges = np.arange(0.5, top + width, width)
    xlabel = "images of an identity"
    if counts.max() > edges[-1]:
        xlabel += f" (last bar: {edges[-1] + 0.5:,.0f} to {counts.max():,})"
        edges = np.append(edges, edges[-1] + width)
    outline = histogram_outline(np.minimum(counts, edges[-1]), edges)
    legend = "identities" if width == 1 else f"identities (bars {width} wide)"
    title = f"{name}: {counts.size:,} identities, {counts.sum():,} images"
    draw_curves(path, {legend: outline}, xlabel, "identities", title)


def _draw_faces(path: Path, records: Records, survey: Survey, options: ReportConfig) -> None:
    """A row of faces for each of some random identities."""
    rng = np.random.default_rng(options.seed)
    labels, _ = survey.per_identity()
    tiles: list[np.ndarray] = []
    names = []
    for label in np.sort(rng.choice(labels, min(options.rows, labels.size), replace=False)).tolist():
        images = rng.permutation(np.flatnonzero(survey.good & (survey.labels == label)))
        faces = [in_square(face, TILE) for face in islice(_decodable(records, survey, images), COLUMNS)]
        tiles += faces + [np.full((TILE, TILE, 3), 255, np.uint8)] * (COLUMNS - len(faces))
        names.append(f"{records.identity(label)} ({images.size:,})")
    draw_contact_sheet(path, tiles, COLUMNS, "random identities (images of each)", names)


def _decodable(records: Records, survey: Survey, positions: np.ndarray) -> Iterator[np.ndarray]:
    for i in positions.tolist():
        try:
            yield decode(records, i)
        except (ValueError, OSError):
            survey.broken[i] = True


def repair(records: Records, survey: Survey, output: Path) -> None:
    """Write the images of `survey.good` in insightface's layout, bytes as they are, identity after identity.

    repair.csv in `output` says what became of every identity: its name, its label now (none: it lost all images),
    images kept and images broken. Raises FileExistsError when `output` is there and not empty, FaceSetError when no
    image is good.
    """
    labels, counts = np.unique(survey.labels[survey.labels != NO_LABEL], return_counts=True)
    kept = np.flatnonzero(survey.good)
    kept = kept[np.argsort(survey.labels[kept], kind="stable")]
    stops = np.searchsorted(survey.labels[kept], labels, side="right")
    if not kept.size:
        raise FaceSetError(f"{output} is not written: {records.place(0).file} has not one good image")
    image_size = survey.shapes.most_common(1)[0][0][1] if survey.shapes else 0
    images = np.diff(stops, prepend=0)
    new_labels: list[int | str] = []
    with write_face_set(output, image_size) as out:
        with progress_bar(kept.size, "image", "repair") as bar:
            for positions in np.split(kept, stops[:-1]):
                encoded = (records.encoded(i) for i in positions.tolist())
                new_labels.append(out.add_identity(encoded) if positions.size else "")
                bar.update(positions.size)
        names = map(records.identity, labels.tolist())
        write_csv_atomic(
            out.folder / "repair.csv",
            ("identity", "label", "images", "broken"),
            zip(names, new_labels, images.tolist(), (counts - images).tolist(), strict=True),
        )


def as_text(report: Report) -> str:
    """The report as a table for the screen."""
    sampled = "" if report.checked else f" (of {sum(report.sizes.values()):,} images, drawn at random)"
    rows = {
        "records": f"{report.records:,}",
        "images": f"{report.images:,}",
        "without image": f"{report.without_image:,} (header and identities)",
        "broken": f"{report.broken:,}" + ("" if report.checked else " (by their heads; --check decodes every image)"),
        "copies": _copies_text(report.copies),
        "identities": f"{report.identities:,}",
        "images per identity": _spread_text(report.images_per_identity),
        "width x height": _counts_text(report.sizes) + sampled,
        "kinds": _counts_text(report.kinds),
        "bytes of images": f"{report.image_bytes['sum']:,}",
        "bytes per image": _spread_text(report.image_bytes),
        "property": report.property or "none",
    }
    lines = [f"  {name:<21}{text}" for name, text in rows.items()]
    lines += [f"  note: {remark}" for remark in report.remarks]
    lost = report.identities_lost
    lines += [f"  every image of identity {identity} is broken" for identity in lost[:SHOWN]]
    lines += [f"  and of {len(lost) - SHOWN:,} more identities"] if len(lost) > SHOWN else []
    return "\n".join([report.set, *lines])


def _copies_text(copies: dict[str, int] | None) -> str:
    if copies is None:
        return "not known (--check compares all bytes)"
    if not copies["images"]:
        return "0"
    return f"{copies['images']:,}, {copies['under_another_identity']:,} of them under another identity"


def _spread_text(spread: dict[str, float]) -> str:
    return ", ".join(f"{name} {spread[name]:,.10g}" for name in ("min", "median", "mean", "max") if name in spread)


def _counts_text(counts: dict[str, int]) -> str:
    shown = 5
    texts = [f"{name}: {count:,}" for name, count in islice(counts.items(), shown)]
    return ", ".join(texts) + (f", {len(counts) - shown:,} others" if len(counts) > shown else "")


def broken_as_text(records: Records, survey: Survey) -> str:
    """A line for each of the first broken records, for the screen."""
    broken = np.flatnonzero(survey.broken).tolist()
    lines = [f"  {records.place(i)}: {why_broken(records, i)}\n" for i in broken[:SHOWN]]
    return "".join(lines) + (f"  and {len(broken) - SHOWN:,} more\n" if len(broken) > SHOWN else "")


def set_name(path: Path) -> str:
    """What to call a set: the name of its folder or, where that may hold several, of its `.rec`."""
    path = path.resolve()
    if path.suffix == ".rec" and path.stem != "train":
        return path.stem
    return path.parent.name if path.is_file() else path.name


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    with readable_errors("report", "the set is untouched; run the same command again"):
        config = parse_settings(Config, PRESETS, ("report", "common"), __doc__, argv, reads=READS["report"])
        print(describe(config, READS["report"]))
        options = config.report
        path = Path(options.set[0]) if options.set else only_set(config.data.root, "report.py A")
        output = Path(options.output or f"report-{set_name(path)}")
        if options.repair:
            require_free(options.repair)
        report, records, survey = make_report(path, output, options, worker_count(config.common.workers))
        print(printable(as_text(report)))
        print(printable(broken_as_text(records, survey)), end="")
        pictures = ", images_per_identity.png, faces.png" if report.images else ""
        copies = "" if report.copies is None else ", copies.csv"
        print(f"{output}: report.json, broken.csv{copies}{pictures}")
        if options.repair:
            repair(records, survey, Path(options.repair))
            print(f"{options.repair}: {report.images:,} images of {report.identities:,} identities; see its repair.csv")
    if options.check and report.broken and not options.repair:
        sys.exit(1)


if __name__ == "__main__":
    main()
