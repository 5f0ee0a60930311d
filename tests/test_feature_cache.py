"""Kept features are those that would be computed, whatever happened to the file, and nothing is computed twice."""

import subprocess
import sys
import threading
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from counting_embedder import CountingEmbedder, Greys, wanted
from data.images import ImageError
from models import feature_cache
from models.embedding import embed_images
from models.feature_cache import HEADER
from ranks import run_on_ranks
from utils.files import partial_folder
from utils.ranks import Ranks

COUNT, BLOCK = 30, 4
PROGRAM = Path(__file__).with_name("killed_embedding.py")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_cache, "BLOCK", BLOCK)


def embed(embedder: CountingEmbedder, cache: Path | None, images: Greys | None = None, **options: bool) -> np.ndarray:
    arguments = {"mirror": False, "normalised": False, **options}
    mirror = arguments.pop("mirror")
    return embed_images(embedder, images or Greys(COUNT), 7, 0, mirror, "greys", cache=cache, **arguments)


def only_file(cache: Path) -> Path:
    files = list(cache.iterdir())
    assert len(files) == 1
    assert files[0].suffix == ".features"
    return files[0]


def test_the_second_call_computes_nothing(tmp_path: Path) -> None:
    """The same model and images: the same features, without the model."""
    np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path / "c"), wanted(COUNT))
    again = CountingEmbedder()
    np.testing.assert_array_equal(embed(again, tmp_path / "c"), wanted(COUNT))
    assert again.seen == 0
    only_file(tmp_path / "c")


def test_normalised_features_are_those_without_a_cache(tmp_path: Path) -> None:
    """With a cache or without, to the last bit; and features are not normalised when not asked for."""
    plain = embed(CountingEmbedder(), None, normalised=True)
    np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path, normalised=True), plain)
    np.testing.assert_allclose(np.linalg.norm(plain, axis=1), 1, atol=1e-6)
    features = embed(CountingEmbedder(), None)
    np.testing.assert_array_equal(features, wanted(COUNT))
    norms = np.linalg.norm(features.astype(np.float64), axis=1, keepdims=True)
    np.testing.assert_allclose(plain, features / norms, atol=1e-6)
    np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path), wanted(COUNT))  # the file kept the lengths


@pytest.mark.parametrize("change", ["embedder", "mirror", "images", "fewer"])
def test_whatever_decides_the_features_has_a_file_of_its_own(tmp_path: Path, change: str) -> None:
    """Another model, the mirror, other images: never the features of the first."""
    embed(CountingEmbedder(), tmp_path)
    other = CountingEmbedder("other" if change == "embedder" else "counting")
    images = {"images": Greys(COUNT, 1), "fewer": Greys(COUNT - 1)}.get(change)
    features = embed(other, tmp_path, images, mirror=change == "mirror")
    assert other.seen == len(features)
    expected = wanted(len(features), start=int(change == "images")) * (2 if change == "mirror" else 1)
    np.testing.assert_array_equal(features, expected)
    assert len(list(tmp_path.iterdir())) == 2


def run_processes(caches: list[Path], *limits: int) -> list[str]:
    """The statuses of the runs of killed_embedding.py, a line for each cache."""
    arguments = [",".join(map(str, caches)), ",".join(map(str, limits)), "mark"]
    done = subprocess.run([sys.executable, PROGRAM, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.splitlines()


def test_a_killed_call_is_gone_on_with(tmp_path: Path) -> None:
    """After kill -9, here three times, the next call embeds what is missing, and no block that was finished."""
    cache = tmp_path / "cache"
    assert run_processes([cache], 1, 9, 8, 0) == ["-9 -9 -9 0"]
    # In batches of 3, the one of death lost, the killed ones saw 3, 9 and 9 images and finished 0, 1 and 1 blocks of 4.
    assert (tmp_path / "mark").stat().st_size == 3 + 9 + 9 + (COUNT - 2 * BLOCK)
    untouched = CountingEmbedder()
    np.testing.assert_array_equal(embed(untouched, cache), wanted(COUNT))
    assert untouched.seen == 0
    only_file(cache)


def test_a_call_that_ended_before_the_file_had_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All blocks are made, and the file is not finished: the next call does that, and embeds nothing."""

    def full(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(feature_cache, "_finish", full)
        with pytest.raises(OSError, match="no space left"):
            embed(CountingEmbedder(), tmp_path)
    again = CountingEmbedder()
    np.testing.assert_array_equal(embed(again, tmp_path), wanted(COUNT))
    assert again.seen == 0
    only_file(tmp_path)


def test_two_processes_embed_once(tmp_path: Path) -> None:
    """The one that comes second waits, and takes what the first has made."""
    assert run_processes([tmp_path / "cache"], 0, 0) == ["0 0"]
    assert (tmp_path / "mark").stat().st_size == COUNT


@pytest.mark.parametrize("place", ["block", "sums", "header", "end"])
def test_a_damaged_file_is_found_out(tmp_path: Path, place: str) -> None:
    """A flipped bit anywhere, or a lost end: said, and made anew, of a finished file only the block that is damaged."""
    embed(CountingEmbedder(), tmp_path)
    path = only_file(tmp_path)
    data = bytearray(path.read_bytes())
    position = {"block": HEADER + 3 * 4 * BLOCK + 5, "sums": HEADER + 3 * 4 * COUNT + 1, "header": 20, "end": 0}[place]
    data[position] ^= 1
    path.write_bytes(data[:-3] if place == "end" else data)
    again = CountingEmbedder()
    with pytest.warns(UserWarning, match="is damaged: . of its 8 blocks are made anew"):
        np.testing.assert_array_equal(embed(again, tmp_path), wanted(COUNT))
    assert again.seen == (BLOCK if place == "block" else COUNT)
    assert zlib.crc32(path.read_bytes()) == zlib.crc32(make_elsewhere(tmp_path / "fresh").read_bytes())


def make_elsewhere(folder: Path) -> Path:
    embed(CountingEmbedder(), folder)
    return only_file(folder)


def test_unfinished_blocks_are_checked(tmp_path: Path) -> None:
    """A log that tells of blocks that did not reach the disk is not believed."""
    cache = tmp_path / "cache"
    assert run_processes([cache], 20) == ["-9"]
    path = make_elsewhere(tmp_path / "elsewhere")
    working = partial_folder(cache / path.name) / "features"
    data = bytearray(working.read_bytes())
    data[HEADER + 3] ^= 0x40
    working.write_bytes(data[: HEADER + 3 * 4 * BLOCK * 2 + 1])
    with (working.parent / "blocks.0").open("a") as log:
        log.write("5 3\nnonsense\n99999 3 1\n5 3 12")
    embedder = CountingEmbedder()
    np.testing.assert_array_equal(embed(embedder, cache), wanted(COUNT))
    assert embedder.seen == COUNT - BLOCK  # of the 4 blocks it had, one is left whole
    assert only_file(cache).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("text", [b"[" * 4_000, b'"dimension": -50', b'"dimension": 3e300', b'"dimension": true'])
def test_a_header_of_somebody_else(tmp_path: Path, text: bytes) -> None:
    """One whose checksum is right is damage, too, whatever it says."""
    embed(CountingEmbedder(), tmp_path)
    path = only_file(tmp_path)
    _, own = path.read_bytes()[:HEADER].rstrip().split(b" ", 1)
    changed = own.replace(b'"dimension": 3', text) if text.startswith(b'"') else text
    header = f"{zlib.crc32(changed):08x} ".encode() + changed
    path.write_bytes(header.ljust(HEADER - 1) + b"\n" + path.read_bytes()[HEADER:])
    with pytest.warns(UserWarning, match="is damaged: 8 of its 8 blocks are made anew"):
        np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path), wanted(COUNT))


@pytest.mark.parametrize("dimension", ["100000000", "1" + "0" * 18, "1" + "0" * 30, "9" * 5_000])
def test_a_log_of_giant_blocks(tmp_path: Path, dimension: str) -> None:
    """What it says of features takes no memory beyond their file's."""
    path = make_elsewhere(tmp_path)
    partial = partial_folder(path)
    partial.mkdir()
    path.rename(partial / "features")
    (partial / ".journal.json").write_text("{}")
    (partial / "blocks.0").write_text(f"1 {dimension} 0\n")
    tracemalloc.start()
    np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path), wanted(COUNT))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000


def test_all_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, synced: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A power cut leaves a finished file with all its bytes or none: synced are the file, and then its new name."""
    real_replace = Path.replace
    published: list[int] = []

    def replace(source: Path, target: Path) -> Path:
        if target.suffix == ".features":
            assert synced[source.stat().st_ino] == source.stat().st_size
            synced.clear()
            published.append(target.parent.stat().st_ino)
        return real_replace(source, target)

    monkeypatch.setattr(Path, "replace", replace)
    embed(CountingEmbedder(), tmp_path)
    assert published == list(synced)


def test_a_broken_image_names_itself_and_keeps_the_rest(tmp_path: Path) -> None:
    """The error is that of embedding without a cache; what was finished before it is kept."""
    images = Greys(COUNT)
    good, images._encoded[20] = images._encoded[20], b"no image"
    with pytest.raises(ImageError, match="grey 20"):
        embed(CountingEmbedder(), tmp_path, images)
    images._encoded[20] = good
    np.testing.assert_array_equal(embed(CountingEmbedder(), tmp_path, images), wanted(COUNT))


def test_large_features_are_mapped_and_the_file_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From MAPPED_FROM on the array is a map of the file, and writing to it does not change the file."""
    monkeypatch.setattr(feature_cache, "MAPPED_FROM", 1)
    features = embed(CountingEmbedder(), tmp_path)
    assert isinstance(features, np.memmap)
    features[:] = 0
    embedder = CountingEmbedder()
    np.testing.assert_array_equal(embed(embedder, tmp_path), wanted(COUNT))
    unit = embed(embedder, tmp_path, normalised=True)
    np.testing.assert_array_equal(unit, embed(CountingEmbedder(), None, normalised=True))
    assert embedder.seen == 0


def test_a_large_batch_is_cut_without_copies() -> None:
    """All features of a set may come as one batch: each block is a part of it, not cut from a copy of all the rest."""
    batch = np.arange(40, dtype=np.float32).reshape(20, 2)
    blocks = list(feature_cache._cut([batch], [4] * 5))
    assert all(np.shares_memory(block, batch) for block in blocks)
    np.testing.assert_array_equal(np.concatenate(blocks), batch)
    blocks = list(feature_cache._cut(np.split(batch, [3, 5, 11]), [4] * 5))
    assert [len(block) for block in blocks] == [4] * 5
    np.testing.assert_array_equal(np.concatenate(blocks), batch)


def test_positions_are_an_array(tmp_path: Path) -> None:
    """Of millions of images no list of their numbers, which would take more memory than small features."""
    asked = []

    def embed(positions: np.ndarray) -> list[np.ndarray]:
        asked.append(positions)
        return [wanted(COUNT)[positions]]

    np.testing.assert_array_equal(feature_cache.kept_features(tmp_path, "key", COUNT, embed, Ranks()), wanted(COUNT))
    assert isinstance(asked[0], np.ndarray)
    assert asked[0].tolist() == list(range(COUNT))


def embed_on_rank(cache: Path) -> list[tuple[torch.Tensor, int]]:
    """(features, images that this rank embedded) of many images, of few, and of the many once more."""
    feature_cache.BLOCK = BLOCK
    ranks, results = Ranks(torch.distributed.group.WORLD), []
    for count in (COUNT, 3, COUNT):
        embedder = CountingEmbedder()
        features = embed_images(embedder, Greys(count), 3, 0, False, "greys", ranks, cache, normalised=False)
        results.append((torch.from_numpy(features.copy()), embedder.seen))
    return results


def test_what_another_machine_made_may_be_seen_late(tmp_path: Path) -> None:
    """NFS shows a new folder, or a file under its name, up to a minute after they were made: no reason to take the disk
    for one that is not shared, after hours of embedding."""
    embed(CountingEmbedder(), tmp_path)
    path = only_file(tmp_path)
    elsewhere = path.rename(tmp_path / "not yet seen")
    threading.Timer(0.2, elsewhere.rename, [path]).start()
    np.testing.assert_array_equal(feature_cache._open(path, path.stem, COUNT), wanted(COUNT))
    threading.Timer(0.2, partial_folder(path).mkdir).start()
    assert feature_cache._make(path, [], COUNT, lambda positions: [], Ranks()) == 0


def test_ranks_share_the_work(tmp_path: Path) -> None:
    """Each rank writes its blocks, none of them twice; all get all, also with fewer blocks than ranks."""
    many, few, again = zip(*run_on_ranks(2, embed_on_rank, tmp_path), strict=True)
    for results, count in ((many, COUNT), (few, 3), (again, COUNT)):
        for features, _ in results:
            np.testing.assert_array_equal(features.numpy(), wanted(count))
    assert [seen for _, seen in many] == [16, 14]
    assert sorted(seen for _, seen in few) == [0, 3]
    assert [seen for _, seen in again] == [0, 0]
