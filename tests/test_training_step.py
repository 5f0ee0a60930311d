"""One step of training: parts of a batch, loss scaling, clipping, and running out of memory."""

import copy
import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.heads import RowAdamW, RowOptimizer, RowSGD, create_head
from models.losses import create_loss
from utils.ranks import Ranks
from utils.training.optimizers import create_optimizer, parameter_groups
from utils.training.schedules import OptimizerName
from utils.training.step import StepOutput, TrainingStep

CLASSES, SIZE, FACES, LR, DECAY = 9, 6, 11, 0.05, 1e-2
HEADS: dict[str, dict[str, Any]] = {
    "dense": {"engine": "dense"},
    "blockwise": {"engine": "blockwise", "block": 4},
    "sub-centers": {"engine": "blockwise", "block": 4, "sub_centers": 3},
}


class Watched(nn.Sequential):
    """Notes how many faces it is given, and runs out of memory when they are more than `most`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.most = FACES
        self.seen: list[int] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append(len(input))
        output = super().forward(input)
        if len(input) > self.most:
            raise torch.OutOfMemoryError("made up")
        return output


class Parts:
    """What a step works on. Batch norms have frozen statistics, for those of parts are not those of the batch."""

    def __init__(
        self,
        head: str = "dense",
        micro_batch: int = FACES,
        clip: float = 1e9,
        precision: torch.dtype = torch.float32,
        scale: float | None = None,
        optimizer: OptimizerName = "sgd",
        loss: str = "arcface",
        shrinking: Callable[[str], object] | None = None,
        **options: Any,
    ) -> None:
        torch.manual_seed(0)
        convolution = nn.Conv2d(3, 4, 3, bias=False)
        self.network = Watched(convolution, nn.BatchNorm2d(4), nn.PReLU(4), nn.Flatten(), nn.Linear(36, SIZE))
        self.network[1].eval()
        rows: RowOptimizer = RowSGD(0.9, DECAY) if optimizer == "sgd" else RowAdamW(weight_decay=DECAY)
        self.head = create_head(
            create_loss(loss, scale=8.0), CLASSES, SIZE, rows, FACES, device=torch.device("cpu"),
            **{**HEADS[head], **options},
        )  # fmt: skip
        self.optimizer = create_optimizer(optimizer, parameter_groups(self.network, DECAY, decay_all=True), 0.9)
        self.scaler = torch.amp.GradScaler("cpu", enabled=scale is not None, init_scale=scale or 1.0)
        self.step = TrainingStep(
            self.network, self.head, self.optimizer, self.scaler, precision, clip, micro_batch, Ranks(), shrinking
        )

    def train(self, steps: int = 3) -> list[StepOutput]:
        return [self.step(*batch(step), step, LR) for step in range(steps)]

    def state(self) -> dict[str, Tensor]:
        gradients = {f"gradient.{name}": weight.grad for name, weight in self.network.named_parameters()}
        return copy.deepcopy({**self.network.state_dict(), **self.head.state_dict(prefix="head."), **gradients})


def batch(step: int) -> tuple[Tensor, Tensor]:
    """Faces and labels; the first four do not count, nor does one of the others."""
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(0, CLASSES, (FACES,), generator=generator)
    labels[:4], labels[7] = -1, -1
    return torch.randn(FACES, 3, 5, 5, generator=generator), labels


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, **(tolerance or {"rtol": 0.0, "atol": 0.0}), msg=name)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("micro_batch", [2, 4, 10])
def test_parts_add_up_to_the_batch(head: str, micro_batch: int) -> None:
    """Passes of parts, one of them without a face that counts, another shorter: gradients, update and numbers of one
    pass over the whole."""
    whole, parts = Parts(head), Parts(head, micro_batch)
    expected, reached = whole.train(), parts.train()
    assert_same(whole.state(), parts.state(), rtol=1e-4, atol=1e-6)
    for one, other in zip(expected, reached, strict=True):
        for name, value in one._asdict().items():
            found = getattr(other, name)
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6, equal_nan=True, msg=name)


def test_a_step_is_a_plain_one() -> None:
    """Loss, gradients and norm are those of autograd on network and head, and the update is SGD's."""
    parts = Parts(micro_batch=3)
    network, head = copy.deepcopy(parts.network), copy.deepcopy(parts.head)
    loss = head(network(batch(0)[0]), batch(0)[1], 0).loss
    loss.backward()
    output = parts.train(1)[0]
    torch.testing.assert_close(output.loss, loss.detach())
    gradients = torch.cat([weight.grad.flatten() for weight in network.parameters()])
    torch.testing.assert_close(output.gradient_norm, gradients.norm())
    for module, trained in ((network, parts.network), (head, parts.head)):
        for before, after in zip(module.parameters(), trained.parameters(), strict=True):
            torch.testing.assert_close(after, before - LR * (before.grad + DECAY * before), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("faces", "most", "sizes"), [(7, 3, [3, 2, 2]), (10, 4, [4, 3, 3]), (8, 8, [8]), (9, 4, [3] * 3)]
)
def test_parts_are_as_equal_as_can_be(faces: int, most: int, sizes: list[int]) -> None:
    """No part is left with a single face, on which batch norm cannot train, when there are enough for all."""
    parts = Parts(micro_batch=most)
    parts.network.train()
    inputs, labels = batch(0)
    parts.step(inputs[:faces], labels[:faces], 0, LR)
    assert parts.network.seen == sizes


@pytest.mark.parametrize("clip", [0.1, 1e3])
def test_the_gradient_is_clipped_by_its_norm(clip: float) -> None:
    """The network's gradient is scaled down to `clip` where it is longer; the head's never is."""
    free, clipped = Parts(), Parts(clip=clip)
    before = free.network.state_dict()["4.weight"].double().clone()
    norm = free.train(1)[0].gradient_norm.double()
    clipped.train(1)
    assert 0.1 < norm < 1e3
    gradient = free.network[4].weight.grad.double() * min(1.0, clip / float(norm))
    torch.testing.assert_close(clipped.network[4].weight.double(), before - LR * (gradient + DECAY * before))
    assert torch.equal(free.head.weight, clipped.head.weight)


@pytest.mark.parametrize("micro_batch", [FACES, 4])
@pytest.mark.parametrize("head", HEADS)
def test_loss_scaling_changes_nothing(head: str, micro_batch: int) -> None:
    """Scaled by a power of two and back: the same weights to the bit, network and head, and the same norms."""
    plain, scaled = Parts(head, micro_batch), Parts(head, micro_batch, scale=2.0**10)
    outputs = [parts.train() for parts in (plain, scaled)]
    assert_same(plain.state(), scaled.state())
    assert [float(output.gradient_norm) for output in outputs[0]] == [
        float(output.gradient_norm) for output in outputs[1]
    ]


@pytest.mark.parametrize("head", HEADS)
def test_an_overflow_in_the_network_skips_its_step(head: str) -> None:
    """A face that float16 cannot hold: the network rests, the scale is halved, the centres stay finite, and the step
    after trains again."""
    parts = Parts(head, precision=torch.float16, scale=2.0**8)
    before = copy.deepcopy(parts.network.state_dict())
    inputs, labels = batch(0)
    inputs[5] = 1e6
    output = parts.step(inputs, labels, 0, LR)
    assert output.loss.isnan()
    assert_same(before, parts.network.state_dict())
    assert parts.scaler.get_scale() == 2.0**7
    assert all(value.isfinite().all() for value in parts.head.state_dict().values())
    after = parts.step(*batch(1), 1, LR)
    assert after.loss.isfinite()
    assert not torch.equal(before["4.weight"], parts.network[4].weight)


@pytest.mark.parametrize("head", HEADS)
def test_a_scale_too_large_costs_the_network_a_step(head: str) -> None:
    """Gradients that overflow by the scale alone: the loss is known, the head learns, the network waits for a scale."""
    parts = Parts(head, precision=torch.float16, scale=2.0**60)
    before, centres = copy.deepcopy(parts.network.state_dict()), parts.head.weight.detach().clone()
    output = parts.train(1)[0]
    assert output.loss.isfinite()
    assert not output.gradient_norm.isfinite()
    assert_same(before, parts.network.state_dict())
    assert parts.head.weight.isfinite().all()
    assert not torch.equal(parts.head.weight, centres)
    assert parts.scaler.get_scale() == 2.0**59


@pytest.mark.parametrize(
    ("faces", "most", "half"), [(8, 8, 4), (8, 5, 2), (9, 5, 3), (8, 2, 0), (4, 4, 2), (3, 3, 0), (5, 5, 3), (5, 3, 0)]
)
def test_half_a_pass_is_enough_for_batch_norm_or_nothing(faces: int, most: int, half: int) -> None:
    """Half of the largest pass there is, not of the most allowed; none when a pass would be left with one face."""
    assert Parts(micro_batch=most).step.half_a_pass(faces) == half


@pytest.mark.parametrize("head", HEADS)
def test_out_of_memory_halves_the_parts(head: str) -> None:
    """A batch that does not fit is tried again in smaller parts, which later steps keep: said once, and the same run as
    with those parts from the start, to the bit."""
    said: list[str] = []
    retried, small = Parts(head, shrinking=said.append), Parts(head, micro_batch=3)
    retried.network.most = 4
    retried.train()
    small.train()
    assert retried.network.seen == [11, 6, *[3, 3, 3, 2] * 3]
    assert [line.split(":")[0] for line in said] == [
        "out of memory with 11 faces in a pass",
        "out of memory with 6 faces in a pass",
    ]
    assert_same(small.state(), retried.state())


@pytest.mark.parametrize(
    ("head", "options", "most"),
    [("dense", {}, 4), ("dense", {"shrinking": print}, 1), ("blockwise", {"shrinking": print}, 1)],
)
def test_out_of_memory_ends_the_step(head: str, options: dict[str, Any], most: int) -> None:
    """Where parts were set by hand, and where they would be too small for batch norm, running out is an error."""
    parts = Parts(head, **options)
    parts.network.most = most
    before = parts.state()
    with pytest.raises(torch.OutOfMemoryError):
        parts.train(1)
    assert min(parts.network.seen) >= 2
    assert_same(before, parts.state())


def fail_once(parts: Parts, attempt: int) -> None:
    """Let memory run out in the middle of the network's so-many-th backward pass, counted from 1."""
    passes = itertools.count(1)

    def fail(*_: object) -> None:
        if next(passes) == attempt:
            raise torch.OutOfMemoryError("made up")

    parts.network[1].register_full_backward_hook(fail)


TRIED_AGAIN = [
    ("dense", "arcface", {}),
    ("dense", "curricularface", {}),
    ("blockwise", "adaface", {}),
    ("sub-centers", "magface", {"sample_rate": 0.5}),
]


@pytest.mark.parametrize(("head", "loss", "options"), TRIED_AGAIN)
def test_out_of_memory_on_the_way_back(head: str, loss: str, options: dict[str, Any]) -> None:
    """The head has done its part, and may have updated the centres: the network alone is tried again, in halves, and
    all ends as if it had fitted."""
    said: list[str] = []
    whole, retried = (Parts(head, loss=loss, shrinking=said.append, **options) for _ in range(2))
    fail_once(retried, 1)
    expected, reached = whole.train(1)[0], retried.train(1)[0]
    assert said == ["out of memory with 11 faces in a pass: on with 6 (train.micro_batch)"]
    assert_same(whole.head.state_dict(), retried.head.state_dict())
    assert_same(whole.state(), retried.state(), rtol=1e-4, atol=1e-6)
    for name, value in expected._asdict().items():
        torch.testing.assert_close(getattr(reached, name), value, equal_nan=True, msg=name)
    assert retried.train(2)[1].loss.isfinite()


@pytest.mark.parametrize("attempt", [1, 2])
@pytest.mark.parametrize(("head", "loss", "options"), TRIED_AGAIN)
def test_out_of_memory_on_the_way_back_of_a_part(head: str, loss: str, options: dict[str, Any], attempt: int) -> None:
    """The first or a later part of several: all of them are tried again in smaller ones, and neither gradients nor the
    loss's statistics of the first try are left, to the bit."""
    said: list[str] = []
    small = Parts(head, micro_batch=3, loss=loss, **options)
    retried = Parts(head, micro_batch=6, loss=loss, shrinking=said.append, **options)
    fail_once(retried, attempt)
    small.train(2)
    retried.train(2)
    assert said == ["out of memory with 6 faces in a pass: on with 3 (train.micro_batch)"]
    assert_same(small.state(), retried.state())


def test_out_of_memory_twice_on_the_way_back() -> None:
    """Halves that do not fit either are halved again."""
    said: list[str] = []
    whole, retried = Parts("blockwise"), Parts("blockwise", shrinking=said.append)
    for attempt in (1, 2):
        fail_once(retried, attempt)
    whole.train(1)
    retried.train(1)
    assert [line.split(":")[0] for line in said] == [f"out of memory with {n} faces in a pass" for n in (11, 6)]
    assert_same(whole.state(), retried.state(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("block", "recovers"), [(1, True), (2, False)])
def test_centres_are_not_updated_twice(block: int, recovers: bool) -> None:
    """Out of memory in the head's own backward pass: tried again only as long as no block of centres has its update."""
    said: list[str] = []
    parts = Parts("blockwise", shrinking=said.append)
    real, blocks = parts.head.block_backward, itertools.count(1)  # type: ignore[operator]

    def fail(*arguments: Any) -> Any:
        if next(blocks) == block:
            raise torch.OutOfMemoryError("made up")
        return real(*arguments)

    parts.head.block_backward = fail  # type: ignore[assignment]
    with nullcontext() if recovers else pytest.raises(torch.OutOfMemoryError):
        parts.train(1)
    assert len(said) == recovers


def test_out_of_memory_without_end_on_the_way_back() -> None:
    """Halves are not tried for ever: the error ends the step before a pass has a single face."""
    said: list[str] = []
    parts = Parts("blockwise", shrinking=said.append)

    def fail(*_: object) -> None:
        assert len(parts.network.seen) < 20, "tried for ever"
        raise torch.OutOfMemoryError("made up")

    parts.network[1].register_full_backward_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        parts.train(1)
    assert [int(line.split()[-2]) for line in said] == [6, 3]
    assert min(parts.network.seen) >= 2


@pytest.mark.parametrize("micro_batch", [FACES, 4])
def test_a_batch_that_does_not_count_changes_nothing(micro_batch: int) -> None:
    """All of its faces are broken: no NaN gets into the weights, which do no more than decay."""
    parts = Parts(micro_batch=micro_batch)
    before = copy.deepcopy(parts.network.state_dict())
    inputs, labels = batch(0)
    output = parts.step(inputs, torch.full_like(labels, -1), 0, LR)
    assert output.loss == 0
    for name, value in parts.network.named_parameters():
        torch.testing.assert_close(value, before[name] * (1 - LR * DECAY), rtol=1e-5, atol=1e-7, msg=name)


def test_shares_of_parts_are_those_of_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank with broken faces in a part weighs its parts as the others do: by the faces of all of them."""
    parts = Parts(micro_batch=6)
    others = torch.tensor([1.0, 5.0])
    monkeypatch.setattr(parts.step.ranks, "sum", lambda counts: counts + others)
    labels = torch.tensor([-1, -1, -1, 0, 1, 2, 3, 4, 5, 6, -1])
    shares = [float(share) for _, _, share in parts.step._split(batch(0)[0], labels)]
    assert shares == pytest.approx([(3 + 1) / 13, (4 + 5) / 13])


def test_gradients_of_parts_are_exchanged_once() -> None:
    """By processes that share a step: with the last of its parts, not with each of them."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parts, exchanged = Parts(micro_batch=4), list[int]()
        network = nn.parallel.DistributedDataParallel(parts.network)

        def note(_: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
            exchanged.append(bucket.index())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        network.register_comm_hook(None, note)
        parts.step.network = network
        parts.train(1)
        assert len(parts.network.seen) == 3
        assert exchanged == [0]
    finally:
        dist.destroy_process_group()


def test_out_of_memory_in_a_head_of_one_pass_has_no_special_advice() -> None:
    """Smaller passes are what helps then, which the caller says; a head that adds up gradients needs something else."""
    for micro_batch, notes in ((FACES, 0), (4, 1)):
        parts = Parts("blockwise", micro_batch=micro_batch)

        def fail(*_: Any) -> None:
            raise torch.OutOfMemoryError("made up")

        parts.head.block_backward = fail  # type: ignore[assignment]
        with pytest.raises(torch.OutOfMemoryError) as caught:
            parts.train(1)
        assert len(getattr(caught.value, "__notes__", [])) == notes


def test_a_loss_knows_which_part_it_sees() -> None:
    """Random margins are each part's own, and statistics move as far in several parts as in one: see
    test_loss_statistics.py."""
    parts, seen = Parts(micro_batch=4), list[tuple[int, int]]()
    parts.head.register_forward_pre_hook(lambda head, _: seen.append((head.loss.part, head.loss.parts)))
    parts.train(1)
    parts.step.micro_batch = FACES
    parts.train(1)
    assert seen == [(0, 3), (1, 3), (2, 3), (0, 1)]
