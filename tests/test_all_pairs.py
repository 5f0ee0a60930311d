"""The all-pairs test against a full matrix of scores, sorted, and against scikit-learn's ROC."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import brentq
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_on_ranks
from utils.evaluation import all_pairs as module
from utils.evaluation import pair_blocks, threshold_search
from utils.evaluation.all_pairs import AllPairsResult, all_pairs
from utils.evaluation.pair_blocks import Block, PairBlocks
from utils.evaluation.threshold_search import BINS, _keys, _narrowed, first_search
from utils.ranks import Ranks

RATES = (0.9, 0.5, 0.3, 1e-1, 1e-2, 1e-3, 1e-4, 1e-6)


def clustered(images: int, people: int, dim: int = 32, noise: float = 0.6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images in random order around their person's centre, of any length; a fifth are people with one image."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, people, (images,), generator=generator)
    labels[: images // 5] = torch.arange(people, people + images // 5)
    labels = labels[torch.randperm(images, generator=generator)]
    centres = torch.randn(int(labels.max()) + 1, dim, generator=generator)
    embeddings = centres[labels] + noise * torch.randn(images, dim, generator=generator)
    return embeddings * (0.1 + 10 * torch.rand(images, 1, generator=generator)), labels


def tied(images: int, people: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of 16 entries of -1 and 1 in 24 places: scores are exact multiples of 1/16, thousands of pairs at each."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, people, size=images)
    signs = random.choice([-1.0, 1.0], size=(people, 24))[labels] * random.choice([1, 1, 1, -1], size=(images, 24))
    for row in signs:
        row[random.choice(24, size=8, replace=False)] = 0
    return torch.from_numpy(signs).float(), torch.from_numpy(labels)


def near_zero(images: int, people: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Nearly orthogonal people: impostor scores of either sign from 0 and 1e-38 up to 1e-3, in one or two wide bins."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, people, size=images)
    tiny = 10.0 ** random.uniform(-38, -3, size=(images, people)) * random.choice(
        [-1.0, 0.0, 1.0], size=(images, people)
    )
    tiny[np.arange(images), labels] = 1.0
    return torch.from_numpy(tiny).float(), torch.from_numpy(labels)


def full_scores(embeddings: Tensor, labels: Tensor, block: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Genuine and impostor scores of the whole N x N matrix, sorted.

    The matrix is made of products of the same shapes, because those of other shapes may round otherwise.
    """
    order = labels.argsort(stable=True)
    vectors = embeddings.double()[order]
    unit = (vectors / vectors.norm(dim=1, keepdim=True)).float()
    scores = torch.cat(
        [torch.cat([rows @ columns.T for columns in unit.split(block)], 1) for rows in unit.split(block)]
    )
    upper = torch.ones_like(scores, dtype=torch.bool).triu(1)
    same = labels[order][:, None] == labels[order][None, :]
    return tuple(np.sort(scores[upper & kind].numpy()) for kind in (same, ~same))  # type: ignore[return-value]


def equal_error_rate(genuine: NDArray, impostor: NDArray) -> float:
    far, tar, _ = roc_curve(*truth_and_scores(genuine, impostor), drop_intermediate=False)
    return float(brentq(lambda rate: 1 - rate - np.interp(rate, far, tar), 0, 1, xtol=1e-12))


def truth_and_scores(genuine: NDArray, impostor: NDArray) -> tuple[NDArray, NDArray]:
    return np.repeat([1, 0], [len(genuine), len(impostor)]), np.concatenate([genuine, impostor])


def check_against_full_sort(
    embeddings: Tensor, labels: Tensor, block: int
) -> tuple[AllPairsResult, NDArray[np.float32], NDArray[np.float32]]:
    """Everything that must be exact: counts, thresholds, rates and histograms."""
    result = all_pairs(embeddings, labels, RATES, block)
    genuine, impostor = full_scores(embeddings, labels, block)
    assert (result.genuine, result.impostor) == (len(genuine), len(impostor))
    assert result.far == RATES
    for rate, tar, threshold in zip(RATES, result.tar, result.threshold, strict=True):
        expected = impostor[::-1][int(rate * len(impostor))]
        assert threshold == expected
        assert tar == np.count_nonzero(genuine > expected) / len(genuine)
    for counts, scores in ((result.genuine_counts, genuine), (result.impostor_counts, impostor)):
        np.testing.assert_array_equal(counts, np.histogram(scores.clip(-1, 1), result.edges)[0])
    return result, genuine, impostor


@pytest.mark.parametrize("make", [clustered, tied, near_zero])
@pytest.mark.parametrize("block", [37, 64, 100, 300, 2048])
def test_exact_to_the_last_pair(make: Callable[[int, int], tuple[Tensor, Tensor]], block: int) -> None:
    """Protects the thresholds and rates: equal, not close, to those of a full sort, for blocks that divide N or not."""
    check_against_full_sort(*make(300, 20), block)


def test_larger_set_in_blocks_without_genuine_pairs() -> None:
    """Protects the short cut for blocks whose people do not meet, and EER and AUC to 1e-6 on a million pairs."""
    result, genuine, impostor = check_against_full_sort(*clustered(1500, 150, noise=0.9), 200)
    assert result.auc == pytest.approx(roc_auc_score(*truth_and_scores(genuine, impostor)), abs=1e-6)
    # Where the error rates meet a bin has one score or two: they are the resolution of the exact curve, too.
    assert result.eer == pytest.approx(equal_error_rate(genuine, impostor), abs=1 / len(genuine) + 1 / len(impostor))


@pytest.mark.parametrize("seed", range(3))
def test_auc_and_eer_with_ties(seed: int) -> None:
    """Protects half credit for ties and the straight line between points of the ROC, as scikit-learn has them."""
    result, genuine, impostor = check_against_full_sort(*tied(200, 12, seed), 2048)
    assert result.auc == pytest.approx(roc_auc_score(*truth_and_scores(genuine, impostor)), abs=1e-12)
    assert result.eer == pytest.approx(equal_error_rate(genuine, impostor), abs=1e-9)


def test_identical_images_score_one_and_opposite_ones_minus_one() -> None:
    """Protects the outermost bins: rounding may put scores beyond 1 and -1, and they must be counted there."""
    vectors = torch.randn(40, 127, generator=torch.Generator().manual_seed(0))
    embeddings = torch.cat([vectors, vectors, -vectors, -vectors])
    labels = torch.cat([torch.arange(40), torch.arange(40), torch.arange(40, 80), torch.arange(40)])
    result, genuine, impostor = check_against_full_sort(embeddings, labels, 50)
    assert max(genuine.max(), impostor.max()) > 1  # the case is there
    assert min(genuine.min(), impostor.min()) < -1
    assert result.genuine_counts.sum() == result.genuine
    assert result.impostor_counts.sum() == result.impostor


def test_thresholds_at_the_lower_end() -> None:
    """Protects searches that end in the lowest bin, some of whose scores are below -1 by rounding."""
    # A fifth, rounded to float32, is too large: 25 squares of it are more than 1.
    labels = torch.arange(60) % 2
    embeddings = (1.0 - 2.0 * labels)[:, None] * torch.ones(60, 25)
    _, _, impostor = check_against_full_sort(embeddings, labels, 2048)
    assert impostor[len(impostor) // 10] < -1  # the case is there


def test_keys_follow_the_order_of_floats() -> None:
    """Protects the radix search: keys rise with the scores, neighbours are 1 apart, and -0 is the same score as 0."""
    scores = torch.tensor([-np.inf, -1.0, -0.5, -1e-3, -1e-38, 0.0, 1e-38, 1e-3, 0.5, 1.0, np.inf])
    keys = _keys(scores)
    assert (keys.diff() > 0).all()
    assert torch.equal(_keys(torch.nextafter(scores[1:-1], torch.tensor(np.inf))), keys[1:-1] + 1)
    assert _keys(torch.tensor([-0.0])) == _keys(torch.tensor([0.0]))


def test_collapsed_embeddings_do_not_pass() -> None:
    """Protects against a perfect mark for a model that maps every image to one point: no score is above another."""
    result = all_pairs(torch.ones(30, 4), torch.arange(30) // 2, (0.1, 0.01))
    assert result.tar == (0.0, 0.0)
    assert result.threshold == (1.0, 1.0)
    assert result.auc == pytest.approx(0.5)
    assert result.eer == pytest.approx(0.5)


def test_perfect_separation() -> None:
    """Protects the other end: all genuine pairs above all impostors, each kind in a bin of its own."""
    result = all_pairs(torch.eye(10).repeat_interleave(3, 0), torch.arange(10).repeat_interleave(3), (0.5, 1e-6))
    assert result.tar == (1.0, 1.0)
    assert result.threshold == (0.0, 0.0)
    assert result.auc == 1.0
    assert result.eer == pytest.approx(0.0, abs=1e-12)
    assert [point.supported for point in result.points] == [True, False]


def test_supported_needs_one_over_far_impostors() -> None:
    """Protects against quoting rates that a set is too small for; exactly 1 / FAR impostor pairs are enough."""
    labels = torch.cat([torch.zeros(10), torch.ones(10)]).long()  # 100 impostor pairs
    result = all_pairs(clustered(20, 2)[0], labels, (0.02, 0.01, 0.0099))
    assert [point.supported for point in result.points] == [True, True, False]


def test_rank_is_that_of_the_decimal_far() -> None:
    """Protects the rank from binary fractions: 0.29 x 100 impostors is rank 29, although 0.29 * 100 < 29 in floats."""
    labels = torch.cat([torch.zeros(10), torch.ones(10)]).long()
    embeddings = clustered(20, 2)[0]
    impostor = full_scores(embeddings, labels, 2048)[1]
    assert impostor[::-1][28] != impostor[::-1][29]
    assert all_pairs(embeddings, labels, (0.29,)).threshold[0] == impostor[::-1][29]


def test_order_of_rows_and_scale_do_not_matter() -> None:
    """Protects the sort by person and the normalisation: exact scores give equal results in any order and length."""
    embeddings, labels = tied(150, 9)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(3))
    plain, shuffled = all_pairs(embeddings, labels), all_pairs(4 * embeddings[order].double(), labels[order].int())
    assert (plain.tar, plain.threshold, plain.eer, plain.auc) == (
        shuffled.tar,
        shuffled.threshold,
        shuffled.eer,
        shuffled.auc,
    )


def test_roc_agrees_with_the_rates() -> None:
    """Protects the curve for plotting: it runs from no to all pairs and meets the exact point at a threshold's bin."""
    result, genuine, impostor = check_against_full_sort(*clustered(300, 20), 2048)
    far, tar = result.roc()
    edges = result.edges[:-1][::-1]
    for index in (100, 5000, 8000, 12000):
        assert far[index] == np.count_nonzero(impostor >= edges[index]) / len(impostor)
        assert tar[index] == np.count_nonzero(genuine >= edges[index]) / len(genuine)
    assert (np.diff(far) >= 0).all()
    assert (far[-1], tar[-1]) == (1.0, 1.0)


class LargestTensor(TorchDispatchMode):
    """Notes the largest tensor, in bytes, that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("images", [1000, 4000])
def test_memory_does_not_grow_with_the_number_of_pairs(images: int) -> None:
    """Protects the stated bound: no tensor is larger than its block, its embeddings or the histograms call for."""
    embeddings, labels = clustered(images, images // 4, dim=8)
    block = 500
    with LargestTensor() as largest:
        all_pairs(embeddings, labels, block=block)
    assert largest.bytes <= max(8 * block**2, 8 * embeddings.numel(), 2 * 4 * threshold_search._KEPT)
    assert largest.bytes >= 4 * block**2  # the watcher sees the blocks


def test_full_precision_inside_and_settings_restored_outside() -> None:
    """Protects the scores from a training loop's autocast and reduced matmul precision, and the loop from this test."""
    embeddings, labels = clustered(200, 20)
    plain = all_pairs(embeddings, labels)
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = all_pairs(embeddings, labels)
            assert (embeddings @ embeddings.T).dtype == torch.bfloat16
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.cuda.matmul.fp32_precision, torch.backends.mkldnn.matmul.fp32_precision = before
    assert (inside.tar, inside.threshold) == (plain.tar, plain.threshold)


def test_embeddings_of_a_model_in_training() -> None:
    """Protects callers that pass embeddings with gradients: they are left as they are and no graph is built."""
    embeddings, labels = clustered(60, 6)
    before = embeddings.clone()
    result = all_pairs(embeddings.requires_grad_(), labels)
    assert result.tar == all_pairs(before, labels).tar
    assert torch.equal(embeddings.detach(), before)


def test_progress_shows_each_pass(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Protects the progress bar: silent unless asked for, then one for each pass, run to its end."""
    embeddings, labels = clustered(100, 10)
    all_pairs(embeddings, labels, block=50)
    assert capsys.readouterr().err == ""
    all_pairs(embeddings, labels, (1e-2,), block=50, progress=True)
    assert capsys.readouterr().err.count("3/3") == 1
    monkeypatch.setattr(threshold_search, "_KEPT", 0)
    all_pairs(embeddings, labels, (1e-2,), block=50, progress=True)
    shown = capsys.readouterr().err
    assert "thresholds" in shown
    assert shown.count("3/3") == 2


class Passes:
    """Counts the passes over all pairs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        original = PairBlocks.each

        def each(blocks: PairBlocks, work: Callable[..., None], title: str) -> None:
            self.count += 1
            original(blocks, work, title)

        monkeypatch.setattr(PairBlocks, "each", each)


@pytest.mark.parametrize("make", [clustered, tied, near_zero])
def test_a_sample_saves_the_second_pass(
    make: Callable[[int, int], tuple[Tensor, Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects the speed on large sets, and exactness of thresholds found among the scores that a sample chose."""
    monkeypatch.setattr(threshold_search, "_KEPT", 400_000)  # fewer than there are pairs
    embeddings, labels = make(1000, 60)
    passes = Passes(monkeypatch)
    result = all_pairs(embeddings, labels, (1e-2, 1e-3, 1e-4, 1e-6), 200)
    assert passes.count == 1
    _, impostor = full_scores(embeddings, labels, 200)
    assert result.threshold == tuple(impostor[::-1][int(rate * len(impostor))] for rate in result.far)


@pytest.mark.parametrize("wrong", [[], [(-np.inf, -0.9)], [(0.5, np.inf)], [(-np.inf, 0.25), (0.5, 0.75)]])
@pytest.mark.parametrize("kept", [0, 1000, 1 << 22])
def test_a_sample_that_misses_costs_time_only(
    wrong: list[tuple[float, float]], kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Protects exactness when thresholds lie outside of what was kept, or more scores lie there than there is room."""
    monkeypatch.setattr(threshold_search, "_KEPT", kept)
    monkeypatch.setattr(module, "promising", lambda *_: wrong)
    check_against_full_sort(*clustered(300, 20), 100)


def test_a_sample_without_impostors() -> None:
    """Protects sets of few people, whose sample may have no impostor pair at all."""
    labels = torch.zeros(3000, dtype=torch.int64)
    labels[17] = 1
    embeddings = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    result = all_pairs(embeddings, labels, (1e-2,))
    scores = torch.nn.functional.cosine_similarity(embeddings[17], embeddings[labels == 0]).sort(descending=True).values
    assert result.threshold[0] == pytest.approx(float(scores[29]), abs=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_share_the_blocks(threads: int) -> None:
    """Protects the counts when several threads add to them, and the number of threads that torch is left with."""
    embeddings, labels = clustered(400, 30)
    alone = all_pairs(embeddings, labels, RATES, 50)
    torch.set_num_threads(threads)
    together = all_pairs(embeddings, labels, RATES, 50)
    assert torch.get_num_threads() == threads
    assert (together.tar, together.threshold, together.eer, together.auc) == (
        alone.tar,
        alone.threshold,
        alone.eer,
        alone.auc,
    )
    np.testing.assert_array_equal(together.impostor_counts, alone.impostor_counts)


def test_an_error_in_a_thread_is_raised() -> None:
    """Protects against a count without some blocks: what fails in a thread fails the test."""
    torch.set_num_threads(3)
    blocks = PairBlocks(*clustered(100, 10), block=20)

    def fail(block: Block, thread: int) -> None:
        if block.rows.start == 40:
            raise ArithmeticError("broken")

    with pytest.raises(ArithmeticError, match="broken"):
        blocks.each(fail, "")
    assert torch.get_num_threads() == 3


def measured_by_a_rank() -> Tensor:
    """Thresholds and rates of one of several processes: all scores kept, those that a sample chose, and none."""
    embeddings, labels = clustered(400, 30)
    found = []
    for kept in (1 << 22, 40_000, 0):
        threshold_search._KEPT = kept
        result = all_pairs(embeddings, labels, RATES, 50, ranks=Ranks(torch.distributed.group.WORLD))
        found.append([*result.tar, *result.threshold, result.eer, result.auc, result.impostor_counts.sum()])
    return torch.tensor(found)


def test_ranks_share_the_blocks() -> None:
    """Protects the test under torchrun: any rank has the numbers of a process alone, by whichever way."""
    alone = all_pairs(*clustered(400, 30), RATES, 50)
    expected = torch.tensor([*alone.tar, *alone.threshold, alone.eer, alone.auc, alone.impostor])
    for found in run_on_ranks(2, measured_by_a_rank):
        assert torch.equal(found, expected.expand(3, -1))


def test_points_say_how_well_they_are_supported() -> None:
    """Protects what tables print: a rate of 1 / impostors is supported weakly, a tenth of it not at all."""
    labels = torch.cat([torch.zeros(10), torch.ones(10)]).long()  # 100 impostor pairs
    points = all_pairs(clustered(20, 2)[0], labels, (0.1, 0.01, 0.001)).points
    assert [point.support for point in points] == ["good", "weak", "none"]
    assert [point.far for point in points] == [0.1, 0.01, 0.001]


@pytest.mark.parametrize("noise", [0.5, 1.5])
def test_bounds_of_auc_and_eer_hold(noise: float) -> None:
    """Protects the stated errors of the two numbers that are not exact, on a set where they are not tiny."""
    result, genuine, impostor = check_against_full_sort(*clustered(800, 60, noise=noise), 512)
    error = abs(result.auc - roc_auc_score(*truth_and_scores(genuine, impostor)))
    assert error <= result.auc_bound <= 1e-4
    # The exact curve has steps of its own.
    steps = 1 / len(genuine) + 1 / len(impostor)
    assert abs(result.eer - equal_error_rate(genuine, impostor)) <= result.eer_bound + steps <= 1e-3


def test_other_scores_in_the_second_pass_are_noticed() -> None:
    """Protects "exact": a device that does not repeat its products bit for bit must fail, not give a near result."""
    counts = np.zeros(BINS, dtype=np.int64)
    counts[BINS // 2 + 7] = 5
    search = first_search(counts, counts, 2)
    with pytest.raises(RuntimeError, match="other scores in the second pass"):
        _narrowed(search, np.array([0, 5]), np.array([0, 4]))


@pytest.mark.parametrize(
    ("embeddings", "labels", "arguments", "message"),
    [
        (torch.ones(4), torch.arange(4), {}, r"\[N, D\]"),
        (torch.ones(4, 2, dtype=torch.int64), torch.arange(4), {}, "must be floats"),
        (torch.ones(4, 2), torch.arange(5), {}, "4 embeddings need as many labels"),
        (torch.ones(4, 2), torch.ones(4, 1).long(), {}, "4 embeddings need as many labels"),
        (torch.ones(4, 2), torch.ones(4), {}, "labels must be integers"),
        (torch.ones(4, 2), torch.arange(4), {"block": -1}, "block must be at least 1"),
        (torch.ones(4, 2), torch.arange(4), {"far": (0.1, 0.0)}, "not at 0.0"),
        (torch.ones(4, 2), torch.arange(4), {"far": (1.0,)}, "not at 1.0"),
        (torch.ones(4, 2), torch.arange(4), {}, "no genuine pairs"),
        (torch.ones(0, 2), torch.arange(0), {}, "no genuine pairs"),
        (torch.ones(4, 2), torch.zeros(4).long(), {}, "no impostor pairs"),
    ],
)
def test_refuses_what_cannot_be_measured(embeddings: Tensor, labels: Tensor, arguments: dict, message: str) -> None:
    """Protects callers from a number without meaning."""
    with pytest.raises(ValueError, match=message):
        all_pairs(embeddings, labels, **arguments)


@pytest.mark.parametrize(
    ("value", "message"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0, "zero norm")]
)
def test_names_the_bad_row(value: float, message: str) -> None:
    """Protects against NaN scores, which no threshold orders; the message says where to look."""
    embeddings, labels = clustered(50, 5)
    embeddings[17] = value
    with pytest.raises(ValueError, match=f"embedding row 17 .*{message}"):
        all_pairs(embeddings, labels)


def test_rows_are_normalised_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of large sets no copy in float64: no tensor is larger than the embeddings, and parts do not show."""
    embeddings, labels = clustered(300, 20, dim=2000)
    whole = PairBlocks(embeddings, labels).vectors
    monkeypatch.setattr(pair_blocks, "_ROWS_AT_ONCE", 64)
    with LargestTensor() as largest:
        blocks = PairBlocks(embeddings, labels)
    assert largest.bytes == 4 * embeddings.numel()
    assert torch.equal(blocks.vectors, whole)


def test_blocks_are_not_listed() -> None:
    """Of N images there are N^2 / (2 block^2) blocks: they are gone through without a list of them."""
    embeddings, labels = clustered(2000, 20, dim=4)
    tracemalloc.start()
    try:
        blocks = PairBlocks(embeddings, labels, block=2)
        seen = 0

        def count(block: Block, thread: int) -> None:
            nonlocal seen
            seen += 1
            if seen == 10:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            blocks.each(count, "few of them")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 8 << 20  # there are 500,500
