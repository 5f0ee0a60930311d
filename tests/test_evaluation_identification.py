"""Identification and templates against loops in float64, and IJB sets made in the layout of the real ones."""

import csv
import json
import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from data.align import TEMPLATE, align
from data.images import ImageError, decode_rgb, encode_jpeg
from data.loading import DecodedFaces
from utils.evaluation import identification
from utils.evaluation.columns import Tables
from utils.evaluation.curves import tar_at_far, tar_at_nearest_roc_point
from utils.evaluation.identification import gallery_split, identify, identify_people
from utils.evaluation.ijb import IjbError, ijb_identification, ijb_verification, open_ijb, pair_scores
from utils.evaluation.measure import Options, measure
from utils.evaluation.report_json import numbers
from utils.evaluation.templates import image_features, pool_templates
from utils.evaluation.test_sets import open_test_set
from utils.ranks import Ranks

FPIR = (0.01, 0.1, 0.3)


def faces(people: int, images: int, seed: int = 0, dim: int = 12) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Embeddings of any length around their person's centre, in random order."""
    random = np.random.default_rng(seed)
    labels = random.permutation(np.arange(people * images) % people) * 7 + 3
    centres = random.normal(size=(people * 7 + 3, dim))
    return (centres[labels] + random.normal(size=(len(labels), dim))) * random.uniform(0.1, 9, (len(labels), 1)), labels


def slow_identify(
    probes: NDArray, probe_people: NDArray, gallery: NDArray, gallery_people: NDArray
) -> tuple[list[float], list[float], list[float]]:
    """One probe after another: CMC of 20 ranks, DIR at each FPIR, and the same as insightface's IJB tools have it."""
    ranks, own_scores, others_best, found_first, all_others = [], [], [], [], []
    for probe, person in zip(probes, probe_people, strict=True):
        best: dict[int, float] = {}
        for entry, name in zip(gallery, gallery_people, strict=True):
            score = float(probe @ entry / np.linalg.norm(probe) / np.linalg.norm(entry))
            best[int(name)] = max(score, best.get(int(name), -2.0))
        own = best.pop(int(person), None)
        all_others += best.values()
        if own is None:
            others_best.append(max(best.values()))
        else:
            ranks.append(sum(score >= own for score in best.values()))
            own_scores.append(own)
            found_first.append(ranks[-1] == 0)
    cmc = [float(np.mean([rank <= k for rank in ranks])) for k in range(20)]
    own, first = np.array(own_scores), np.array(found_first)
    open_set = []
    for rate in FPIR if others_best else ():
        threshold = sorted(others_best, reverse=True)[int(rate * len(others_best) + 1e-9)]
        open_set.append(float(np.mean(first & (own > threshold))))
    published = [
        float(np.mean(own > sorted(all_others, reverse=True)[int(np.ceil(rate * len(probes) - 1e-9)) - 1]))
        for rate in FPIR
    ]
    return cmc, open_set, published


@pytest.mark.parametrize("entries", [1, 3])
@pytest.mark.parametrize("block", [7, 2048])
def test_identification_equals_a_loop(entries: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects every number of the search, with one gallery image a person and several, in blocks or at once."""
    monkeypatch.setattr(identification, "_BLOCK", block)
    embeddings, labels = faces(30, 6, dim=5)
    people = np.unique(labels)
    enrolled = np.concatenate([np.flatnonzero(labels == person)[:entries] for person in people[:20]])
    probes = np.setdiff1d(np.arange(len(labels)), enrolled)
    arguments = embeddings[probes], labels[probes], embeddings[enrolled], labels[enrolled]
    found = identify(*arguments, fpir=FPIR, over_scores=True)
    cmc, open_set, published = slow_identify(*arguments)
    assert (found.gallery, found.mated, found.non_mated) == (20, 120 - len(enrolled), 60)
    np.testing.assert_allclose(found.cmc, cmc, atol=1e-12)
    assert [point.dir for point in found.open_set] == pytest.approx(open_set, abs=1e-12)
    assert [point.dir for point in found.over_scores] == pytest.approx(published, abs=1e-12)
    assert (found.rank(1), found.rank(5), found.rank(20)) == (found.cmc[0], found.cmc[4], found.cmc[19])
    for rank in (0, 21):
        with pytest.raises(ValueError, match=rf"rank {rank}: only those from 1 to 20"):
            found.rank(rank)
    assert 0 < found.rank(1) < 1  # the case tells something
    assert [point.support for point in found.open_set] == ["none", "weak", "good"]
    assert "non-mated probes" in found.open_set[0].note


def test_collapsed_embeddings_find_nobody() -> None:
    """Protects against a perfect mark for a model that maps every image to one point."""
    found = identify(np.ones((4, 3)), np.arange(4), np.ones((3, 3)), np.arange(3), 2, (0.5,))
    assert found.cmc.tolist() == [0, 0]
    assert found.open_set[0].dir == 0


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_split_of_a_set(seed: int | None) -> None:
    """Protects the stated split: one entry for each person of several images, people with one as strangers."""
    labels = np.array([5, 2, 5, 9, 2, 5, 1])
    split = gallery_split(labels, seed)
    assert sorted(labels[split.gallery].tolist()) == [2, 5]
    assert split.non_mated.tolist() == [3, 6]
    assert sorted(np.concatenate(split).tolist()) == list(range(7))
    if seed is None:
        assert split.gallery.tolist() == [0, 1]
    assert all((gallery_split(labels, seed)[i] == split[i]).all() for i in range(3))


def test_a_seed_draws_other_entries() -> None:
    """Protects the seed: it chooses the gallery images, and with them the probes."""
    embeddings, labels = faces(40, 5)
    entries = {tuple(gallery_split(labels, seed).gallery) for seed in range(5)}
    assert len(entries) == 5
    found = identify_people(embeddings, labels, seed=3, fpir=(0.1,))
    assert (found.gallery, found.mated, found.non_mated, found.open_set) == (40, 160, 0, ())


def test_progress_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """A million probes take long: a bar of them, where it is asked for."""
    embeddings, labels = faces(40, 5)
    identify_people(embeddings, labels)
    assert capsys.readouterr().err == ""
    identify_people(embeddings, labels, progress=True)
    assert re.search(r"identification: 100%.* 160/160", capsys.readouterr().err)


def test_memory_of_unit_rows() -> None:
    """Protects the stated memory: 4 bytes a number for the probes, without a copy in float64 on the way."""
    vectors = np.random.default_rng(0).standard_normal((2000, 512), np.float32)
    tracemalloc.start()
    try:
        unit = identification._unit(vectors, np.arange(2000), "probe")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 1.2 * vectors.nbytes
    exact = vectors / np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_array_equal(unit, exact.astype(np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.ones((2, 3)), np.arange(3), np.ones((2, 3)), np.arange(2)), "with n people"),
        ((np.ones((2, 3)), np.arange(2), np.zeros((0, 3)), np.arange(0)), "gallery is empty"),
        ((np.ones((2, 3)), np.arange(2), np.zeros((2, 3)), np.arange(2)), "gallery row 0 .*zero norm"),
        ((np.full((2, 3), np.nan), np.arange(2), np.ones((2, 3)), np.arange(2)), "probe row 0 is not finite"),
        ((np.ones((2, 3)), np.arange(2), np.ones((2, 3)), np.arange(7, 9)), "no probe is of a person"),
    ],
)
def test_refuses_what_cannot_be_searched(arguments: tuple, message: str) -> None:
    """Protects callers from a number without meaning."""
    with pytest.raises(ValueError, match=message):
        identify(*arguments)
    with pytest.raises(ValueError, match="nobody can be identified"):
        gallery_split(np.arange(5))


def slow_templates(features: NDArray, templates: NDArray, media: NDArray) -> dict[int, NDArray]:
    """Template by template and media by media."""
    vectors = {}
    for template in np.unique(templates):
        total = np.zeros(features.shape[1])
        for number in np.unique(media[templates == template]):
            total += features[(templates == template) & (media == number)].astype(np.float64).mean(axis=0)
        vectors[int(template)] = total / np.linalg.norm(total)
    return vectors


def test_templates_equal_a_loop() -> None:
    """Protects pooling, with media of several images and media numbers that come again elsewhere."""
    random = np.random.default_rng(0)
    plain = random.normal(size=(300, 70)).astype(np.float32)
    scores, templates, media = random.random(300), random.integers(5, 60, 300) * 3, random.integers(0, 4, 300)
    features = plain.astype(np.float64) * scores[:, None]
    found = pool_templates(image_features(plain, scores), templates, media)
    expected = slow_templates(features, templates, media)
    assert found.ids.tolist() == list(expected)
    np.testing.assert_allclose(found.vectors, list(expected.values()), atol=1e-6)
    assert found.rows(np.array([found.ids[4], found.ids[0]])).tolist() == [4, 0]
    with pytest.raises(ValueError, match="template 4 has no images"):
        found.rows(np.array([4]))


def test_features_that_cannot_be_pooled() -> None:
    """Protects templates from NaN and from features without direction; the message says which."""
    plain = np.ones((3, 2), np.float32)
    plain[1] = np.nan
    with pytest.raises(ValueError, match="template 8 has no direction"):
        pool_templates(plain, np.array([9, 8, 9]), np.array([0, 0, 0]))
    plain[1] = 0
    with pytest.raises(ValueError, match="template 8 has no direction"):
        pool_templates(plain, np.array([9, 8, 9]), np.array([0, 0, 0]))


def loose_crop(person: int, shot: int) -> NDArray[np.uint8]:
    """A drawn loose crop, 150 x 130: smooth, so that aligned faces can be compared after JPEG."""
    random = np.random.default_rng([person, shot])
    y, x = np.mgrid[:150, :130] / 150
    waves = [127 + 60 * np.sin(a * x + b * y + c) for a, b, c in random.uniform(0, 9, (3, 3))]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_ijb(root: Path, prefix: str, crops: list[bytes], people: NDArray, letter: str = "G") -> NDArray[np.float64]:
    """A set in the real layout: two images a media, two media a template; returns the landmarks."""
    random = np.random.default_rng(1)
    (root / "meta").mkdir(parents=True)
    (root / "loose_crop").mkdir()
    landmarks = TEMPLATE * 1.1 + [5, 12] + random.uniform(-3, 3, (len(crops), 5, 2))
    names, places = [], []
    template_of: dict[int, list[int]] = {}
    for i, (crop, person) in enumerate(zip(crops, people, strict=True)):
        (root / "loose_crop" / f"{i + 1}.jpg").write_bytes(crop)
        points = " ".join(f"{value:.3f}" for value in landmarks[i].ravel())
        names.append(f"{i + 1}.jpg {points} {0.5 + i % 5 / 10:.4f}")
        places.append(f"{i + 1}.jpg {100 + i // 4} {i // 2 % 3}")
        template_of.setdefault(int(person), [])
        if 100 + i // 4 not in template_of[int(person)]:
            template_of[int(person)].append(100 + i // 4)
    owners = {template: person for person, templates in template_of.items() for template in templates}
    pairs = [(a, b, int(owners[a] == owners[b])) for a in owners for b in owners if a < b]
    meta = root / "meta"
    (meta / f"{prefix}_name_5pts_score.txt").write_text("\n".join(names) + "\n")
    (meta / f"{prefix}_face_tid_mid.txt").write_text("\n".join(places) + "\n")
    (meta / f"{prefix}_template_pair_label.txt").write_text("".join(f"{a} {b} {same}\n" for a, b, same in pairs))
    half = len(template_of) // 2
    for number, enrolled in ((1, list(template_of)[:half]), (2, list(template_of)[half:])):
        write_csv(meta / f"{prefix}_1N_gallery_{letter}{number}.csv", [(template_of[p][0], p) for p in enrolled])
    write_csv(
        meta / f"{prefix}_1N_probe_mixed.csv", [(t, p) for p, templates in template_of.items() for t in templates[1:]]
    )
    return np.round(landmarks, 3)


def write_csv(path: Path, rows: list[tuple[int, int]]) -> None:
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["TEMPLATE_ID", "SUBJECT_ID", "FILENAME"])
        for template, subject in rows:
            out.writerows([(template, subject, f"img/{template}_{line}.jpg") for line in range(2)])


PEOPLE = np.arange(96) // 12


@pytest.fixture(params=[("ijbc", "G"), ("ijbb", "S")], ids=["IJB-C", "IJB-B"])
def small_ijb(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, NDArray[np.float64]]:
    """8 people of 3 templates, one of them enrolled."""
    crops = [encode_jpeg(loose_crop(int(person), i), 98) for i, person in enumerate(PEOPLE)]
    prefix, letter = request.param
    return tmp_path / "set", write_ijb(tmp_path / "set", prefix, crops, PEOPLE, letter)


def test_ijb_layout_is_read(small_ijb: tuple[Path, NDArray[np.float64]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the reader: numbers, pairs, galleries under either name, and faces aligned by the aligner when read."""
    root, landmarks = small_ijb
    ijb = open_ijb(root)
    assert ijb.name == ("IJB-C" if (root / "meta" / "ijbc_face_tid_mid.txt").exists() else "IJB-B")
    np.testing.assert_array_equal(ijb.images.landmarks, landmarks)
    np.testing.assert_array_equal(ijb.templates, 100 + np.arange(96) // 4)
    np.testing.assert_array_equal(ijb.media, np.arange(96) // 2 % 3)
    np.testing.assert_allclose(ijb.scores, 0.5 + np.arange(96) % 5 / 10)
    assert ijb.pairs.shape == (24 * 23 // 2, 2)
    assert ijb.same.sum() == 8 * 3
    assert [gallery.name for gallery in ijb.galleries] == ["G1", "G2"]
    assert [gallery.subjects.tolist() for gallery in ijb.galleries] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert ijb.probes is not None
    assert ijb.probes.templates.tolist() == [101 + 3 * person + i for person in range(8) for i in range(2)]
    decoded = DecodedFaces(ijb.images, np.zeros(96), 112).__getitems__([0, 50]).faces
    for face, i in zip(decoded, (0, 50), strict=True):
        stored = decode_rgb((root / "loose_crop" / f"{i + 1}.jpg").read_bytes(), "")
        np.testing.assert_array_equal(face, align(stored, landmarks[i]))
    ijb.images.landmarks[0] = TEMPLATE * 3  # a large face is aligned as published, as published numbers are
    large = decode_rgb(ijb.images.encoded(0), "")
    first = decode_rgb((root / "loose_crop" / ijb.images.names[0]).read_bytes(), "")
    np.testing.assert_array_equal(large, align(first, TEMPLATE * 3, shrink=False))
    assert not np.array_equal(large, align(first, TEMPLATE * 3))
    ijb.images.landmarks[0] = landmarks[0]
    assert decode_rgb(open_ijb(root, 64).images.encoded(3), "").shape == (64, 64, 3)
    monkeypatch.setattr("data.images_fingerprint.EXACT_BYTES", 0)  # as of large sets
    before = ijb.images.fingerprint()
    assert open_ijb(root).images.fingerprint() == before
    ijb.images.landmarks[1, 0, 0] += 1e-9
    assert ijb.images.fingerprint() != before, "faces that are aligned otherwise are other images"


def test_ijb_numbers_equal_loops(small_ijb: tuple[Path, NDArray[np.float64]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects 1:1 and 1:N from end to end, by float64 loops over pairs and probes."""
    ijb = open_ijb(small_ijb[0])
    random = np.random.default_rng(4)
    features = random.normal(size=(8, 6))[PEOPLE] + 2.5 * random.normal(size=(96, 6))
    weighted = features * ijb.scores[:, None].astype(np.float64)
    expected = slow_templates(weighted, ijb.templates, ijb.media)
    pooled = pool_templates(image_features(features, ijb.scores), ijb.templates, ijb.media)
    scores = np.array([expected[a] @ expected[b] for a, b in ijb.pairs.tolist()])
    monkeypatch.setattr("utils.evaluation.ijb._PAIRS_AT_ONCE", 50)
    np.testing.assert_allclose(pair_scores(pooled, ijb.pairs), scores, atol=1e-6)
    found = ijb_verification(pooled, ijb.pairs, ijb.same, (0.1, 0.01))
    assert (found.genuine, found.impostor) == (24, 252)
    genuine, impostor = scores[ijb.same], scores[~ijb.same]
    for points, rule in ((found.nearest, tar_at_nearest_roc_point), (found.ranked, tar_at_far)):
        expected_points = rule(genuine, impostor, (0.1, 0.01))
        assert [point.tar for point in points] == [point.tar for point in expected_points]
    searched = ijb_identification(pooled, ijb, 20, FPIR)
    probes = ijb.probes
    assert probes is not None
    queries = np.array([expected[template] for template in probes.templates.tolist()])
    for gallery in (*ijb.galleries, None):
        templates = gallery.templates if gallery else np.concatenate([one.templates for one in ijb.galleries])
        subjects = gallery.subjects if gallery else np.concatenate([one.subjects for one in ijb.galleries])
        entries = np.array([expected[template] for template in templates.tolist()])
        cmc, open_set, published = slow_identify(queries, probes.subjects, entries, subjects)
        one = searched.per_gallery[gallery.name] if gallery else searched.joined
        np.testing.assert_allclose(one.cmc, cmc, atol=1e-12)
        assert [point.dir for point in one.open_set] == pytest.approx(open_set)
        if not gallery:
            assert [point.dir for point in one.over_scores] == pytest.approx(published)


def test_an_ijb_set_whose_highest_score_is_of_two_people_has_a_report(
    small_ijb: tuple[Path, NDArray[np.float64]],
) -> None:
    """The nearest point of the ROC to a low FAR is then the one that accepts nothing, at an infinite score, which JSON
    has no number for."""
    test_set = open_test_set(small_ijb[0], "set")
    features = np.random.default_rng(4).normal(size=(96, 6)).astype(np.float32)
    features[0:4] = features[12:16] = 1  # a template of one person and one of another
    options = Options(16, 0, False, None, 0, 0, False, 0)
    measured = measure(features, torch.device("cpu"), "model", test_set, Tables(), options, Ranks())
    assert measured is not None
    points = json.loads(json.dumps(numbers(test_set, measured, False), allow_nan=False))["nearest_points"]
    assert [point["threshold"] for point in points][-1] is None
    assert points[-1]["tar"] == 0


def test_ijb_of_real_faces(face_data: Path, tmp_path: Path) -> None:
    """Protects the way of landmarks from the file to the aligner: real photos come out as aligned by hand."""
    with (face_data / "lfw_raw" / "landmarks.csv").open() as file:
        rows = list(csv.reader(file))[1:17]
    photos = sorted((face_data / "lfw_raw").rglob("*.jpg"))
    by_name = {photo.name: photo for photo in photos}
    crops = [by_name[Path(row[0]).name].read_bytes() for row in rows]
    write_ijb(tmp_path / "set", "ijbc", crops, np.arange(16) // 8)
    points = np.array([[float(value) for value in row[2:12]] for row in rows]).reshape(-1, 5, 2)
    lines = [f"{i + 1}.jpg {' '.join(map(str, one.ravel()))} 0.9" for i, one in enumerate(points)]
    (tmp_path / "set" / "meta" / "ijbc_name_5pts_score.txt").write_text("\n".join(lines))
    ijb = open_ijb(tmp_path / "set")
    for i, row in enumerate(rows):
        face = decode_rgb(ijb.images.encoded(i), "")
        np.testing.assert_array_equal(face, align(decode_rgb(crops[i], ""), points[i]), err_msg=row[0])


def replaced(file: str, line: int, text: str, encoding: str = "utf-8") -> Callable[[Path], None]:
    def change(meta: Path) -> None:
        lines = (meta / file).read_text().splitlines()
        lines[line - 1] = text
        (meta / file).write_text("\n".join(lines), encoding=encoding)

    return change


NAMES, PLACES, LABELS = "ijbc_name_5pts_score.txt", "ijbc_face_tid_mid.txt", "ijbc_template_pair_label.txt"
POINTS = " ".join(["1.0"] * 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced(NAMES, 3, "3.jpg 1 2 3"), rf"{NAMES}, line 3: 4 columns"),
        (replaced(NAMES, 3, f"3.jpg {POINTS} high"), rf"{NAMES}, line 3: could not convert"),
        (replaced(NAMES, 3, f"3.jpg {POINTS} nan"), rf"{NAMES}, line 3: a number is not finite"),
        (replaced(PLACES, 5, "7.jpg 101 2"), rf"{PLACES}, line 5: image '7.jpg', where .* has '5.jpg'"),
        (lambda meta: (meta / PLACES).write_text("1.jpg 1 1\n"), "has 1 lines, .* has 96"),
        (lambda meta: (meta / PLACES).write_text(""), "is empty"),
        (replaced(LABELS, 9, "100 101"), rf"{LABELS}, line 9: '100 101', expected 3 whole numbers"),
        (replaced(LABELS, 9, "100 x 1"), rf"{LABELS}, line 9"),
        (replaced(LABELS, 9, "100 101 2"), rf"{LABELS}, line 9: 2 is no label"),
        (replaced(LABELS, 9, "100 999 1"), rf"{LABELS}, line 9: a template that"),
        (lambda meta: (meta / LABELS).write_text(""), f"{LABELS} is empty"),
        (replaced(LABELS, 9, "100 101 99999999999999999999"), f"{LABELS} is damaged"),
        (lambda meta: (meta / LABELS).unlink(), f"{LABELS} does not exist"),
        (replaced("ijbc_1N_gallery_G1.csv", 3, "100,x,a"), "gallery_G1.csv, line 3: expected the numbers"),
        (replaced("ijbc_1N_gallery_G1.csv", 3, "100,77,a"), "gallery_G1.csv, line 3: template 100 is of subject 77"),
        (replaced("ijbc_1N_probe_mixed.csv", 3, "5,1,a"), "probe_mixed.csv, line 3: template 5 has no images"),
        (replaced("ijbc_1N_gallery_G1.csv", 3, f"100,{10**19},a"), "gallery_G1.csv, line 3: expected the numbers"),
        (replaced("ijbc_1N_gallery_G1.csv", 3, "x" * 200_000), "gallery_G1.csv, line 3: field larger than"),
        (replaced("ijbc_1N_gallery_G1.csv", 3, "100,\xff,a", "latin1"), "gallery_G1.csv, line 3: expected the numbers"),
        (replaced(NAMES, 3, f"\xff.jpg {POINTS}", "latin1"), rf"{NAMES}, line 3: 11 columns"),
        (replaced(PLACES, 5, "5.jpg 101.5 2"), rf"{PLACES}, line 5: template and media must be whole numbers"),
        (replaced(PLACES, 5, "5.jpg 1e30 2"), rf"{PLACES}, line 5: template and media must be whole numbers"),
        (lambda meta: (meta / "ijbc_1N_probe_mixed.csv").unlink(), "1:N needs both galleries"),
        (lambda meta: write_csv(meta / "ijbc_1N_probe_mixed.csv", [(101, 0)]), "mixed.csv: no probe .* gallery G2"),
        (lambda meta: (meta / "ijbb_face_tid_mid.txt").write_text(""), "found both sets"),
        (lambda meta: (meta / PLACES).unlink(), "found neither"),
    ],
)
def test_damaged_ijb_sets_are_named(change: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    """Protects users with a damaged or mixed-up copy: file and line, and what is wrong there."""
    write_ijb(tmp_path, "ijbc", [b""] * 96, PEOPLE)
    change(tmp_path / "meta")
    with pytest.raises(IjbError, match=message):
        open_ijb(tmp_path)


def test_missing_images_and_galleries(tmp_path: Path) -> None:
    """Protects sets that are there in part: an image that is missing is named, and 1:1 works without 1:N."""
    write_ijb(tmp_path, "ijbc", [b""] * 96, PEOPLE)
    for gallery in (tmp_path / "meta").glob("*gallery*.csv"):
        gallery.unlink()
    with pytest.raises(IjbError, match="1:N needs both galleries"):
        open_ijb(tmp_path)
    (tmp_path / "meta" / "ijbc_1N_probe_mixed.csv").unlink()
    (tmp_path / "loose_crop" / "5.jpg").unlink()
    ijb = open_ijb(tmp_path)
    assert (ijb.galleries, ijb.probes) == ((), None)
    message = rf"{NAMES}, line 5: .*5.jpg: No such file"
    with pytest.raises(ImageError, match=message):
        ijb.images.encoded(4)
    faces = DecodedFaces(ijb.images, np.zeros(len(ijb.images)), 112, tolerant=True)
    (told,) = faces.__getitems__([4]).broken  # as of any broken image, and not by a worker's traceback
    assert re.search(message, told)
    pooled = pool_templates(np.random.default_rng(0).normal(size=(96, 4)), ijb.templates, ijb.media)
    with pytest.raises(IjbError, match="no galleries and probes"):
        ijb_identification(pooled, ijb)


def test_a_probe_at_the_threshold_is_not_identified() -> None:
    """DIR counts scores strictly above that of the non-mated probe: one that is as similar is turned away with it."""
    gallery, people = np.eye(2), np.array([0, 1])
    probes = np.array([[0.8, 0.6], [0.6, 0.8], [0.8, 0.6]])
    (point,) = identify(probes, np.array([0, 1, 7]), gallery, people, fpir=(0.1,)).open_set
    assert (point.dir, point.non_mated) == (0.0, 1)
    probes[1] = [0.5, np.sqrt(0.75)]
    assert identify(probes, np.array([0, 1, 7]), gallery, people, fpir=(0.1,)).open_set[0].dir == 0.5
