"""The head's kernels, computed step by step on the CPU: run by test_head_kernels.py in a process of its own.

The interpreter has no bfloat16 products, so that all is float32 here.
"""

import itertools
import os
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from models.heads import BlockwiseHead, DenseHead, RowAdamW, RowOptimizer, RowSGD
from models.heads.block_steps import BlockMaths
from models.heads.fused_steps import FusedMaths, Tile, Tiles
from models.losses import MarginLoss, create_loss
from utils.ranks import Ranks
from utils.training.optimizers import create_optimizer, parameter_groups
from utils.training.step import TrainingStep

assert os.environ["TRITON_INTERPRET"] == "1"  # read when the kernels are first used

FACES, CLASSES, SIZE, STEPS = 20, 75, 40, 6
SGD = RowSGD(0.9, 1e-2)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several of them in every direction, the last ones not full."""
    tile = Tile(16, 16, 16, 4, 2)
    monkeypatch.setattr(FusedMaths, "tiles", Tiles(tile, tile, tile))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=5e-4, atol=1e-5)  # a centre without a length has gradients of 1e12


@pytest.mark.parametrize("filter_above", [0.0, 0.2])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize(("faces", "classes"), [(FACES, 1), (FACES, 37), (FACES, 150), (9, 37)])
def test_a_block(faces: int, classes: int, learns: bool, filter_above: float) -> None:
    """What each kernel gives of one block, next to what BlockMaths does: own classes in it, before and after it, and
    none; a face without a length; a centre without one; a running sum that has something already, and one without; one
    tile of faces and several."""
    torch.manual_seed(0)
    unit, centres = torch.nn.functional.normalize(torch.randn(faces, SIZE)), torch.randn(classes, SIZE)
    unit[2], centres[classes // 2] = 0, 0
    place, start = torch.randint(0, classes + 40, (faces,)), torch.tensor(20)
    place[0] = -1
    scale = torch.rand(faces, 1) * 20 if learns else torch.full((1, 1), 16.0)
    scale[-1] *= 0 if learns else 1
    total, best = torch.full((2, faces), -torch.inf)
    total[3], best[3] = 2.0, 0.5
    momentum, lr = torch.randn(classes, SIZE), torch.tensor(0.1)
    loss = create_loss("arcface", filter_above=filter_above)
    d_own, d_others, d_unit = torch.randn(faces), torch.rand(faces), torch.randn(faces, SIZE)
    results = []
    for kind in (BlockMaths, FusedMaths):
        maths = kind(loss, 1, None, SGD)
        given = unit, centres.clone(), place, start, scale, None
        sums = maths.forward(*given, total, best)
        still, d_faces, d_scale = maths.backward(*given, sums[0].clamp_min(0), d_own, d_others, d_unit, d_own)
        without = maths.backward(*given, sums[0].clamp_min(0), d_own, d_others, d_unit, None)
        assert without[2] is None
        copy = still.clone() if isinstance(still, Tensor) else still
        gradient, state = maths.gradient(copy, given[1]), momentum.clone()
        maths.update(still, given[1], [state], [lr])
        assert d_scale is not None
        results.append([*sums, d_faces, d_scale, without[1], gradient, given[1], state])
    for exact, found in zip(*results, strict=True):
        close(found, exact)


@pytest.mark.parametrize("block", [1, 2])
def test_centres_are_not_updated_twice(block: int) -> None:
    """Out of memory on the way back: the step may be made again only as long as no block of centres has its update.
    It takes that from the versions of centres and momentum, which kernels of our own have to count up themselves."""
    said: list[str] = []
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, SIZE))
    head = BlockwiseHead(create_loss("arcface"), CLASSES, SIZE, SGD, FACES, block=33)
    head.fuse_blocks()
    real, blocks = head.block_backward, itertools.count(1)

    def fail(*arguments: Any) -> Any:
        if next(blocks) == block:
            raise torch.OutOfMemoryError("made up")
        return real(*arguments)

    head.block_backward = fail
    optimizer = create_optimizer("sgd", parameter_groups(network, 0.0), 0.9)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    step = TrainingStep(network, head, optimizer, scaler, torch.float32, 5.0, FACES, Ranks(), said.append)
    with nullcontext() if block == 1 else pytest.raises(torch.OutOfMemoryError):
        step(torch.randn(FACES, 3, 2, 2), torch.arange(FACES), 0, 0.1)
    assert len(said) == (block == 1)


def others(maths: BlockMaths, unit: Tensor, centres: Tensor, scale: float) -> Tensor:
    """The log sum exp over all of `centres`, of which none is the own one."""
    nothing, none = torch.full((2, len(unit)), -torch.inf), torch.full((len(unit),), -1)
    return maths.forward(unit, centres, none, torch.tensor(0), torch.full((1, 1), scale), None, *nothing)[0]


@pytest.mark.parametrize(("filter_above", "scale"), [(0.3, 150.0), (0.9, 256.0)])
def test_logits_far_below_the_best_cosine(filter_above: float, scale: float) -> None:
    """A filtered class has the largest cosine, and its exponential is out of float32's range of those that are left.
    So is that of the filter: neither the sum nor a gradient is lost, or becomes infinite."""
    unit = torch.nn.functional.normalize(torch.randn(FACES, SIZE, generator=torch.Generator().manual_seed(0)))
    nothing, given = torch.zeros(FACES), (torch.full((FACES,), -1), torch.tensor(0), torch.full((1, 1), scale), None)
    results = []
    for kind in (BlockMaths, FusedMaths):
        maths = kind(create_loss("arcface", filter_above=filter_above), 1, None, SGD)
        log_others = others(maths, unit, unit.clone(), scale)
        raw, d_unit, _ = maths.backward(
            unit, unit.clone(), *given, log_others, nothing, torch.ones(FACES), torch.zeros_like(unit), None
        )
        results.append([log_others, d_unit, maths.gradient(raw, unit)])
    for exact, found in zip(*results, strict=True):
        assert exact.isfinite().all()
        torch.testing.assert_close(found, exact, rtol=5e-4, atol=1e-3)  # gradients are of the size of the scale


def test_an_exploded_centre_is_seen() -> None:
    """Else a run would go on, and the class would be left out."""
    centres = torch.randn(CLASSES, SIZE)
    centres[CLASSES // 2] = torch.nan
    maths = FusedMaths(create_loss("arcface"), 1, None, SGD)
    assert others(maths, torch.nn.functional.normalize(torch.randn(FACES, SIZE)), centres, 16.0).isnan().all()


@pytest.mark.parametrize("faces", [1, 3])
@pytest.mark.parametrize("name", ["arcface", "sphereface"])
def test_hardly_any(name: str, faces: int) -> None:
    """A face or three and two classes: all faces have one, some, or none."""
    torch.manual_seed(0)
    classes = 2
    centres = torch.randn(classes, SIZE)
    fused = BlockwiseHead(create_loss(name), classes, SIZE, SGD, faces, centres=centres.clone())
    fused.fuse_blocks()
    reference = DenseHead(create_loss(name), classes, SIZE, SGD, centres=centres.clone())
    for labels in ([0], [-1]) if faces == 1 else ([0, 1, 0], [0, -1, 1], [-1] * 3):
        given, results = torch.randn(faces, SIZE), []
        for head in (reference, fused):
            head.lr, embeddings = 0.1, given.clone().requires_grad_()
            loss = head(embeddings, torch.tensor(labels), 0).loss
            loss.backward()
            head.update(0)
            assert embeddings.grad is not None
            results.append((loss.detach(), embeddings.grad, head.weight.detach()))
        for exact, found in zip(*results, strict=True):
            assert exact.isfinite().all()
            close(found, exact)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("optimizer", [SGD, RowAdamW(weight_decay=0.1)])
@pytest.mark.parametrize("name", ["arcface", "sphereface", "adaface"])
def test_a_head(name: str, optimizer: RowOptimizer, fused: bool, sample_rate: float) -> None:
    """Some steps of training: loss, gradients and state are those of the dense head; with sampling, those of the same
    sample block by block. Losses whose scale learns, and whose gradients wait for `update`, too."""
    if name != "arcface" and not (fused and sample_rate == 1):
        pytest.skip("differs in nothing that sampling or waiting changes")
    torch.manual_seed(0)
    centres = torch.randn(CLASSES, SIZE)

    def blockwise(loss: MarginLoss) -> BlockwiseHead:
        return BlockwiseHead(
            loss,
            CLASSES,
            SIZE,
            optimizer,
            FACES,
            block=33,
            sample_rate=sample_rate,
            fused=fused,
            centres=centres.clone(),
        )

    head = blockwise(create_loss(name))
    head.fuse_blocks()
    reference = (
        DenseHead(create_loss(name), CLASSES, SIZE, optimizer, centres=centres.clone())
        if sample_rate == 1
        else blockwise(create_loss(name))
    )
    for step in range(STEPS):
        faces, labels = 10 * torch.randn(FACES, SIZE), torch.randint(0, CLASSES, (FACES,))
        labels[step] = -1
        embeddings = [faces.clone().requires_grad_() for _ in range(2)]
        outputs = []
        for one, given in zip((head, reference), embeddings, strict=True):
            one.lr = 0.05
            outputs.append(one(given, labels, step))
            outputs[-1].loss.backward()
            one.update(step)
        close(outputs[0].loss.detach(), outputs[1].loss.detach())
        assert outputs[0].correct == outputs[1].correct
        gradients = [given.grad for given in embeddings]
        assert gradients[0] is not None
        assert gradients[1] is not None
        close(gradients[0], gradients[1])
    state, expected = head.state_dict(), reference.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-4, msg=lambda text, at=key: f"{at}: {text}")
