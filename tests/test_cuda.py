"""What only a card can show: engines, step and whole runs there against those on the CPU. Skipped without one."""

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny_runs
from dataset_merge.matching import top_matches
from head_cases import blockwise, dense
from head_cases import train as train_head
from models.heads import BlockwiseHead, RowAdamW, RowOptimizer, RowSGD, create_head
from models.heads.blockwise import Chosen
from models.heads.fused_steps import FusedMaths, can_fuse
from models.losses import LOSSES, create_loss
from test_all_pairs import clustered
from train import train
from utils.checkpoints import BEST
from utils.compiling import CompiledNetwork
from utils.evaluation.all_pairs import all_pairs
from utils.evaluation.breakdown import breakdown_all_pairs
from utils.evaluation.columns import Groups
from utils.evaluation.hardest import hardest_of_all
from utils.evaluation.identity_counts import identity_counts
from utils.ranks import Ranks
from utils.training.cuda_graph import GraphedNetwork
from utils.training.ema import WeightAverage
from utils.training.host_copy import HostCopy, wait_for_copies
from utils.training.metrics import read_metrics
from utils.training.optimizers import create_optimizer, parameter_groups
from utils.training.schedules import OptimizerName
from utils.training.step import TrainingStep

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")

CUDA = torch.device("cuda")
FACES, CLASSES, SIZE = 16, 300, 32
#: Sums of float64 numbers in another order, over 20 steps.
CLOSE = {"rtol": 1e-7, "atol": 1e-8}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    """Each test with a compiler that has seen nothing; what a compiler cannot do is an error here."""
    torch.compiler.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*runs uncompiled")
        warnings.filterwarnings("error", "the head's kernels do not run here")
        yield


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name].cpu(), value.cpu(), **tolerance, msg=lambda text, at=name: f"{at}: {text}"
        )


@pytest.mark.parametrize("name", LOSSES)
def test_engines_on_a_card(name: str) -> None:
    """Every loss, dense and block by block: the numbers of the CPU, over 20 steps."""
    expected = train_head(dense(name))
    assert_same(train_head(dense(name).cuda()), expected, **CLOSE)
    assert_same(train_head(blockwise(name).cuda()), expected, **CLOSE)


@pytest.mark.parametrize(
    ("name", "sub_centers", "optimizer"),
    [
        ("arcface", 1, "sgd"),
        ("arcface", 3, "adamw"),
        ("curricularface", 1, "sgd"),
        ("sphereface", 1, "sgd"),
        ("softmax", 1, "sgd"),
    ],
)
def test_compiled_blocks_on_a_card(name: str, sub_centers: int, optimizer: str) -> None:
    """By the kernels that the compiler writes: the same numbers again, the last, shorter block's too."""
    head = blockwise(name, sub_centers, optimizer).cuda()
    head.compile_blocks()
    assert_same(train_head(head), train_head(dense(name, sub_centers, optimizer)), **CLOSE)


@pytest.mark.parametrize("compiled", [False, True])
def test_bfloat16_products_on_a_card(compiled: bool) -> None:
    """bfloat16 factors, float32 sums: loss and gradients within a percent of float32's on the CPU."""
    results = []
    faces = torch.randn(FACES, SIZE, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(FACES) * 7
    for device, matmul in ((torch.device("cpu"), None), (CUDA, torch.bfloat16)):
        head = create_head(
            create_loss("cosface"), CLASSES, SIZE, RowSGD(), FACES, device=device, engine="blockwise", block=128,
            matmul=matmul, compiled=compiled and matmul is not None, fused=False,
        )  # fmt: skip
        embeddings = faces.to(device, copy=True).requires_grad_()
        loss = head(embeddings, labels.to(device), 0).loss
        loss.backward()
        assert embeddings.grad is not None
        assert head.weight.grad is not None
        results.append((loss.detach().cpu(), embeddings.grad.cpu(), head.weight.grad.cpu()))
    for exact, rounded in zip(*results, strict=True):
        assert 0 < (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize(("name", "filter_above"), [("arcface", 0.0), ("arcface", 0.05), ("sphereface", 0.0)])
def test_kernels_on_a_card(name: str, filter_above: float, optimizer: str) -> None:
    """Our own kernels, in tiles as large as training has them, the last ones not full, next to the plain formulas with
    the same rounding of factors: two steps, so that updated centres are seen too."""
    faces, classes, size = 300, 5_000, 512
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, size, generator=generator).to(CUDA)
    given = torch.randn(2, faces, size, generator=generator).to(CUDA)
    labels = torch.randint(0, classes, (2, faces), generator=generator).to(CUDA)
    labels[:, 0] = -1
    results = []
    for compiled in (False, True):
        head = create_head(
            create_loss(name, filter_above=filter_above), classes, size, RowSGD() if optimizer == "sgd" else RowAdamW(),
            faces, device=CUDA, engine="blockwise", block=2_048, matmul=torch.bfloat16, compiled=compiled,
            centres=centres.clone(),
        )  # fmt: skip
        assert isinstance(head, BlockwiseHead)
        if compiled and not can_fuse(head.maths, size, CUDA):
            pytest.skip("this card has no kernels of ours")
        assert isinstance(head.maths, FusedMaths) == compiled
        head.lr = 0.1
        outcome = []
        for step in range(2):
            embeddings = given[step].clone().requires_grad_()
            output = head(embeddings, labels[step], step)
            output.loss.backward()
            head.update(step)
            outcome += [output.loss.detach(), embeddings.grad]
        results.append([*outcome, head.weight.detach() - centres, *head.optimizer_states()])
    for exact, found in zip(*results, strict=True):
        assert exact is not None
        assert found is not None
        assert found.isfinite().all()
        assert (found - exact).norm() < 0.01 * exact.norm()


def test_kernels_over_more_than_two_gigabytes() -> None:
    """Centres that 32 bits cannot address, in launches of as many as the copy engine is told of: the log sum exp over
    all, and the largest cosine, are those of blocks of 65,536; the last centre counts."""
    faces, size, classes = 64, 512, 3 * 2**20 + 7
    generator = torch.Generator(CUDA).manual_seed(0)
    unit = F.normalize(torch.randn(faces, size, generator=generator, device=CUDA))
    head = BlockwiseHead(
        create_loss("arcface"), classes, size, RowSGD(), faces, block=65_536, matmul=torch.bfloat16,
        centres=torch.randn(classes, size, generator=generator, device=CUDA),
    ).cuda()  # fmt: skip
    if not can_fuse(head.maths, size, CUDA):
        pytest.skip("this card has no kernels of ours")
    with torch.no_grad():
        head.weight[-1] = unit[0]
    head.fuse_blocks()
    assert 4 * size * head.forward_block < 2**31 < 4 * size * classes
    results = []
    for at_once in (head.forward_block, 65_536):
        total, best = torch.full((2, faces), -torch.inf, device=CUDA)
        none, scale = torch.full((faces,), -1, device=CUDA), torch.full((1, 1), 64.0, device=CUDA)
        for block in head.blocks(Chosen(None, classes, none), at_once):
            total, best = head.block_forward(
                head.maths.rounded(unit), block.centres, none, block.start, scale, None, total, best
            )
        results.append((total, best))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert results[0][1][0] > 0.99


class Step:
    """A training step of a small network on the card. Norms have frozen statistics: parts are not the whole."""

    def __init__(
        self,
        engine: str = "blockwise",
        optimizer: OptimizerName = "sgd",
        precision: torch.dtype = torch.bfloat16,
        micro_batch: int = FACES,
        compiled: bool = False,
        said: list[str] | None = None,
        wrap: Any = None,
    ) -> None:
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.PReLU(8), nn.Flatten(), nn.Linear(288, SIZE)
        self.network: nn.Module = nn.Sequential(*layers).to(CUDA, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.network[1].eval()  # type: ignore[index]
        rows: RowOptimizer = RowSGD() if optimizer == "sgd" else RowAdamW()
        self.head = create_head(
            create_loss("arcface", scale=16.0), CLASSES, SIZE, rows, FACES, device=CUDA, engine=engine, block=128,  # type: ignore[arg-type]
            compiled=compiled, matmul=torch.bfloat16 if precision == torch.bfloat16 else None,
        )  # fmt: skip
        self.optimizer = create_optimizer(optimizer, parameter_groups(self.network, 5e-4), 0.9)
        scaler = torch.amp.GradScaler("cuda", enabled=precision == torch.float16, init_scale=2.0**10)
        network = wrap(self.network) if wrap else self.network
        self.step = TrainingStep(
            network, self.head, self.optimizer, scaler, precision, 5.0, micro_batch, Ranks(),
            None if said is None else said.append,
        )  # fmt: skip

    def train(self, steps: int) -> Tensor:
        """The loss of each step."""
        return torch.stack([self.step(*batch(step), step, 0.05).loss for step in range(steps)])

    def state(self) -> dict[str, Tensor]:
        return {**self.network.state_dict(), **self.head.state_dict(prefix="head.")}


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    faces = torch.randn(FACES, 3, 8, 8, generator=generator).contiguous(memory_format=torch.channels_last)
    return faces.to(CUDA, non_blocking=True), torch.randint(0, CLASSES, (FACES,), generator=generator).to(
        CUDA, non_blocking=True
    )


@pytest.mark.parametrize(
    ("optimizer", "precision"),
    [
        ("sgd", torch.bfloat16),
        ("sgd", torch.float16),
        ("adamw", torch.bfloat16),
        ("adamw", torch.float16),
        ("muon", torch.bfloat16),
        ("muon", torch.float16),
    ],
)
@pytest.mark.parametrize("engine", ["dense", "blockwise"])
def test_a_step_never_waits(engine: str, optimizer: OptimizerName, precision: torch.dtype) -> None:
    """CUDA itself refuses what makes the host wait, from the third step on: the first ones make state."""
    made = Step(engine, optimizer, precision)
    average = WeightAverage(made.network, 0.9)
    made.train(2)
    given = [batch(step) for step in range(3)]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step, (inputs, labels) in enumerate(given):
            made.step(inputs, labels, 2 + step, 0.05)
            average.update(made.network, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(value.isfinite().all() for value in made.state().values())


def test_a_compiled_step_never_waits() -> None:
    """Nor does the compiled head."""
    made = Step(compiled=True)
    made.train(2)
    inputs, labels = batch(2)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        made.step(inputs, labels, 2, 0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_graphs_change_nothing(optimizer: OptimizerName, compiled: bool) -> None:
    """The network's passes replayed as CUDA graphs, compiled or not: losses and weights are
    those of launching kernels one by one, and capturing and replaying wait for nothing in a step."""

    said: list[str] = []

    def wrap(network: nn.Module) -> nn.Module:
        network = CompiledNetwork(network, said.append) if compiled else network
        return GraphedNetwork(network, torch.zeros_like(batch(0)[0]), torch.float32)

    plain = Step(optimizer=optimizer, precision=torch.float32)
    graphed = Step(optimizer=optimizer, precision=torch.float32, wrap=wrap)
    assert not said
    torch.testing.assert_close(graphed.train(4), plain.train(4), rtol=1e-4, atol=1e-4)
    assert_same(graphed.state(), plain.state(), rtol=1e-3, atol=1e-4)
    inputs, labels = batch(4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed.step(inputs, labels, 4, 0.05)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_out_of_memory_on_a_card() -> None:
    """The allocator's own error in a pass too large: the batch is tried again in halves, and the run is that of halves
    from the start."""
    said: list[str] = []
    retried, small = Step("dense", said=said), Step("dense", micro_batch=FACES // 2)

    def exhaust(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs[0]) > FACES // 2:
            torch.empty(2**46, dtype=torch.uint8, device=CUDA)

    retried.network.register_forward_pre_hook(exhaust)
    losses = retried.train(3), small.train(3)
    assert [line.split(":")[0] for line in said] == [f"out of memory with {FACES} faces in a pass"]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert_same(retried.state(), small.state(), rtol=1e-2, atol=1e-3)


def test_one_rank_over_nccl(tmp_path: Path) -> None:
    """DistributedDataParallel over nccl, compiled: the losses of the network alone."""
    alone = Step(precision=torch.float32).train(4)
    store = dist.FileStore(str(tmp_path / "store"), 1)
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", 0))
    try:
        for number in (torch.tensor(3), torch.tensor(3, device=CUDA)):  # as join_ranks has it: host over gloo
            dist.all_reduce(number)
            assert number.item() == 3
        said: list[str] = []

        def wrap(network: nn.Module) -> nn.Module:
            return nn.parallel.DistributedDataParallel(CompiledNetwork(network, said.append), [0])

        torch.testing.assert_close(Step(precision=torch.float32, wrap=wrap).train(4), alone, rtol=1e-3, atol=1e-3)
        assert not said
    finally:
        dist.destroy_process_group()


def test_state_goes_to_pinned_memory_and_back(tmp_path: Path) -> None:
    """Checkpoints: tensors of every kind and layout on the card, copied without waiting, written and read."""
    tensors = {
        "channels last": torch.randn(4, 3, 5, 5, device=CUDA).contiguous(memory_format=torch.channels_last),
        "half": torch.randn(1000, device=CUDA).bfloat16(),
        "rows": torch.randn(50_000, 512, device=CUDA)[7:40_000],  # of more than a chunk
        "count": torch.arange(3, device=CUDA),
    }
    copy = HostCopy()
    for _ in range(2):
        copy.take(tensors)
        wait_for_copies(tensors.values())
        copy.write(tmp_path / "state.safetensors")
        assert_same(load_file(tmp_path / "state.safetensors"), tensors, rtol=0, atol=0)
        tensors = {name: value + 1 for name, value in tensors.items()}


def test_all_pairs_on_a_card() -> None:
    """Every pass over all pairs of a set, in many blocks: what the CPU finds, as near as products in another order."""
    embeddings, labels = clustered(900, 120)
    groups, found = Groups("age", ("young", "old"), np.arange(900) % 2), []
    for device in ("cpu", CUDA):
        unit = F.normalize(embeddings).to(device)
        result = all_pairs(unit, labels, (1e-1, 1e-2), 256)
        counts = identity_counts(unit, labels, result, 256)
        hardest = hardest_of_all(unit, labels, 7, 256)
        rates = breakdown_all_pairs(unit, labels, groups, result.points, block=256)
        found.append((result, counts, hardest, rates))
    (here, counts, hardest, rates), (there, counts_there, hardest_there, rates_there) = found
    assert (there.genuine, there.impostor) == (here.genuine, here.impostor)
    assert (there.auc, there.eer) == pytest.approx((here.auc, here.eer), abs=1e-4)
    assert there.tar == pytest.approx(here.tar, abs=1e-3)
    assert there.threshold == pytest.approx(here.threshold, abs=1e-5)
    for sums in ((counts.genuine, counts_there.genuine), (counts.impostor, counts_there.impostor)):
        np.testing.assert_array_equal(*(each.sum(1) for each in sums))
    for one, other in zip(hardest, hardest_there, strict=True):
        np.testing.assert_allclose(one.scores, other.scores, atol=1e-5)
    for one_rate, other_rate in zip(rates.rates, rates_there.rates, strict=True):
        assert (one_rate.genuine, one_rate.impostor) == (other_rate.genuine, other_rate.impostor)


def test_top_matches_on_a_card() -> None:
    """Merging: the best of every identity, both ways, in many blocks."""
    first, second = (F.normalize(clustered(rows, rows)[0]) for rows in (700, 500))
    here = top_matches(first, second, 4, 0.2, 128)
    for one, other in zip(here, top_matches(first.to(CUDA), second.to(CUDA), 4, 0.2, 128), strict=True):
        torch.testing.assert_close(other.cosine.cpu(), one.cosine, rtol=0, atol=1e-5)
        assert (other.index.cpu() == one.index).float().mean() > 0.99


def configure(tiny_set: Path, runs: Path, **settings: object) -> Any:
    base = {"train__log_every": 1, "common__workers": 2, "common__device": "cuda"}
    return tiny_runs.configure(tiny_set, runs, **{**base, **settings})


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


@pytest.mark.parametrize("engine", ["dense", "blockwise"])
def test_a_run_on_a_card(tiny_set: Path, tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it, compiled, in float32 and in the precision of the card: the first losses are the CPU's, the last
    are lower; the compiler was not given up on."""
    settings = {"loss__engine": engine, "loss__block": 4 if engine == "blockwise" else 0}
    there = losses(train(configure(tiny_set, tmp_path, **settings, train__name="cpu", common__device="cpu")))
    single = losses(train(configure(tiny_set, tmp_path, **settings, train__name="single", train__precision="fp32")))
    half = losses(train(configure(tiny_set, tmp_path, **settings, train__name="half")))
    assert single[:4] == pytest.approx(there[:4], rel=1e-2)
    assert half[:2] == pytest.approx(there[:2], rel=0.1)
    assert min(half[-3:]) < half[0]
    assert "uncompiled" not in capsys.readouterr().out


def test_a_run_with_graphs(tiny_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The whole of it: the losses of a run without them."""
    plain = losses(train(configure(tiny_set, tmp_path, train__name="plain", train__precision="fp32")))
    settings = {"train__name": "graphs", "train__precision": "fp32", "train__cuda_graph": True}
    graphs = losses(train(configure(tiny_set, tmp_path, **settings)))
    assert graphs[:4] == pytest.approx(plain[:4], rel=1e-2)
    assert "no CUDA graph" not in capsys.readouterr().out


def test_a_run_on_a_card_goes_on(tiny_set: Path, tmp_path: Path) -> None:
    """From its checkpoint in the middle: the losses that the run had without the stop, as near as kernels repeat."""
    whole = train(configure(tiny_set, tmp_path, train__checkpoint_every=6, train__precision="fp32"))
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    newest = max((cut / "checkpoints").iterdir())
    shutil.rmtree(newest)
    before = losses(whole)
    train(configure(tiny_set, tmp_path, train__resume=str(cut), train__precision="fp32"))
    assert losses(cut) == pytest.approx(before, rel=1e-3)
    for name, value in load_file(whole / BEST).items():
        torch.testing.assert_close(load_file(cut / BEST)[name], value, rtol=1e-2, atol=1e-3, msg=name)
