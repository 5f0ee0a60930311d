"""The engines of the head: the dense one against a plain formula, all others against the dense one."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from head_cases import (
    BATCH,
    CLASSES,
    CLOSE,
    LR,
    OPTIMIZERS,
    SAMPLED,
    SIZE,
    STEPS,
    batch,
    blockwise,
    dense,
    sample_once,
    train,
)
from head_cases import train_every_loss as train_every_loss_on_a_rank
from models.heads import BlockwiseHead, DenseHead, Engine, Head, RowAdamW, RowSGD, automatic_block, create_head
from models.heads.classes import CLASSES_PER_DRAW, initial_centres
from models.heads.sampling import sample_classes, sampled_count
from models.losses import LOSSES, create_loss
from ranks import run_on_ranks
from utils.ranks import share_of

ENGINES = ["dense", "blockwise"]
CPU = torch.device("cpu")


def make(engine: str, classes: int = CLASSES, size: int = SIZE, name: str = "arcface", **options: float) -> Head:
    """A float32 head with centres that point everywhere."""
    loss = create_loss(name, **options)
    head = create_head(loss, classes, size, RowSGD(0.9, 0.0), BATCH, device=CPU, engine=engine, block=4)  # type: ignore[arg-type]
    with torch.no_grad():
        head.weight.copy_(torch.randn(classes, size, generator=torch.Generator().manual_seed(5)))
    return head


def faces(size: int = SIZE, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Embeddings of many lengths, and labels of which one does not count."""
    embeddings, labels = batch(0)
    return embeddings[:, :size].to(dtype).requires_grad_(), labels


def plain_loss(embeddings: Tensor, weight: Tensor, labels: Tensor, name: str, margin: float, scale: float) -> Tensor:
    """Mean margin softmax loss, face by face, from angles."""
    losses = []
    for embedding, label in zip(embeddings, labels.tolist(), strict=True):
        if label < 0:
            continue
        cosine = torch.stack([embedding @ row / (embedding.norm() * row.norm()) for row in weight])
        own = cosine[label]
        if name == "arcface":
            angle = torch.acos(own) + margin
            own = torch.cos(angle) if angle <= math.pi else -2 - torch.cos(angle)
        elif name == "cosface":
            own = own - margin
        others = [scale * cosine[j] for j in range(len(weight)) if j != label]
        losses.append(torch.logsumexp(torch.stack([scale * own, *others]), 0) - scale * own)
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("name", "margin"), [("arcface", 0.5), ("arcface", 1.5), ("cosface", 0.4), ("normface", None)])
@pytest.mark.parametrize("scale", [16.0, 64.0])
def test_the_dense_head_is_the_formula(name: str, margin: float | None, scale: float) -> None:
    """Loss, and gradients of embeddings and class centres, in float32, against float64 angles and autograd."""
    head = make("dense", name=name, margin=margin, scale=scale)
    embeddings, labels = faces()
    loss = head(embeddings, labels, 0).loss
    ours = torch.autograd.grad(loss, [embeddings, head.weight])
    exact = embeddings.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    expected = plain_loss(*exact, labels, name, margin or 0.0, scale)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for gradient, formula in zip(ours, torch.autograd.grad(expected, exact), strict=True):
        # Per row: embeddings of length 100 have gradients that are 1,000 times smaller than those of length 0.1.
        error = (gradient.double() - formula).norm(dim=1)
        assert (error <= 1e-4 * formula.norm(dim=1) + 1e-9).all()


@pytest.mark.parametrize("sub_centers", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_blocks_change_nothing(name: str, sub_centers: int) -> None:
    """Every loss, block by block with updates on the spot: loss, hits, gradients, centres, momentum and statistics are
    those of the dense head, over 20 steps."""
    expected, ours = train(dense(name, sub_centers)), train(blockwise(name, sub_centers))
    assert expected.keys() == ours.keys()
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    assert (expected["losses"].diff() != 0).all()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_any_block_and_optimizer(optimizer: str, fused: bool, block: int) -> None:
    """Blocks of one class or of all, updates at once or later, SGD or AdamW: the same weights."""
    lr = LR[optimizer]
    expected = train(dense("cosface", 1, optimizer), lr=lr)
    ours = train(blockwise("cosface", 1, optimizer, block=block, fused=fused), lr=lr)
    for key, value in expected.items():
        torch.testing.assert_close(ours[key], value, **CLOSE)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_row_optimizers_are_torchs(optimizer: str) -> None:
    """Momentum, decay and bias correction are those of torch.optim, over 20 steps."""
    head = dense("arcface", 1, optimizer)
    start = head.weight.detach().clone().requires_grad_()
    ours, settings = OPTIMIZERS[optimizer], {"lr": LR[optimizer], "weight_decay": OPTIMIZERS[optimizer].weight_decay}
    if isinstance(ours, RowSGD):
        reference: torch.optim.Optimizer = torch.optim.SGD([start], momentum=ours.momentum, **settings)
    else:
        reference = torch.optim.AdamW([start], betas=ours.betas, eps=ours.eps, **settings)
    for step in range(STEPS):
        start.grad = torch.randn(start.shape, generator=torch.Generator().manual_seed(step), dtype=start.dtype)
        head.weight.grad, head.lr = start.grad.clone(), LR[optimizer]
        reference.step()
        head.update(step)
    torch.testing.assert_close(head.weight.detach(), start.detach(), rtol=1e-12, atol=1e-12)


def test_what_is_not_set_of_a_row_optimizer_is_as_published() -> None:
    """Betas and eps are no settings: they are torch's, as the network's AdamW has them."""
    torchs = torch.optim.AdamW([torch.zeros(1, requires_grad=True)]).defaults
    assert (RowAdamW().betas, RowAdamW().eps) == (torchs["betas"], torchs["eps"]) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize("sample_rate", [1.0, 0.5])
def test_gradients_add_up_until_the_update(sample_rate: float) -> None:
    """Gradient accumulation: two half batches, halved, then one update, equal the gradient of the mean; centres that no
    half sampled keep value and momentum to the bit."""
    head = blockwise("cosface", fused=False, sample_rate=sample_rate)
    head.lr = 0.1
    with torch.no_grad():
        head.momentum.fill_(1.0)
    before = head.weight.detach().clone()
    embeddings, labels = batch(0)
    half = BATCH // 2
    gradient, seen = torch.zeros_like(before), torch.zeros(CLASSES, dtype=torch.bool)
    for part in (slice(0, half), slice(half, BATCH)):
        (head(embeddings[part], labels[part], 0).loss / 2).backward()
        alone = blockwise("cosface", fused=False, sample_rate=sample_rate)
        (alone(embeddings[part], labels[part], 0).loss / 2).backward()
        assert alone.weight.grad is not None
        gradient += alone.weight.grad
        chosen = alone.choose(labels[part], 0).classes
        seen[slice(None) if chosen is None else chosen] = True
    head.update(0)
    momentum = 0.9 + gradient + 1e-2 * before
    expected = torch.where(seen[:, None], before - 0.1 * momentum, before)
    torch.testing.assert_close(head.weight.detach(), expected, **CLOSE)
    assert torch.equal(head.momentum[~seen], torch.ones_like(head.momentum[~seen]))
    assert seen.all() == (sample_rate == 1.0)


@pytest.fixture(scope="module", params=[(2, 6), (3, 5)], ids=["2 ranks", "3 ranks, the last batch short"])
def trained_on_ranks(request: pytest.FixtureRequest) -> list[dict[str, dict[str, Tensor]]]:
    """Every loss trained on several processes, the classes split unevenly among them."""
    ranks, batch_size = request.param
    return run_on_ranks(ranks, train_every_loss_on_a_rank, batch_size)


def test_ranks_change_nothing(trained_on_ranks: list[dict[str, dict[str, Tensor]]]) -> None:
    """Classes spread over processes, every loss: loss, gradients, and after 20 steps centres, momentum and statistics
    are those of the dense head on the whole batch."""
    for name in LOSSES:
        for sub_centers in (1, 3):
            expected = train(dense(name, sub_centers))
            parts = [part[f"{name} {sub_centers}"] for part in trained_on_ranks]
            for key, value in expected.items():
                if key in ("weight", "momentum"):
                    whole = torch.cat([part[key] for part in parts])
                elif key == "gradients":
                    whole = torch.cat([part[key] for part in parts], dim=1)
                else:
                    for part in parts[1:]:
                        assert torch.equal(part[key], parts[0][key]), f"{name}: ranks disagree about {key}"
                    whole = parts[0][key]
                torch.testing.assert_close(whole, value, **CLOSE, msg=lambda text, at=(name, key): f"{at}: {text}")


def test_sampled_softmax_is_the_softmax_over_the_sample() -> None:
    """PartialFC on two processes: the loss and the updates are those of a softmax over the sampled classes alone, own
    classes among them; other centres and their momentum stay as they are; ranks draw differently."""
    parts = run_on_ranks(2, sample_once, 0.7)
    classes = torch.cat([part["classes"] for part in parts])
    embeddings, labels = (part[:SAMPLED] for part in batch(0))
    assert set(labels[labels >= 0].tolist()) <= set(classes.tolist())
    assert [len(part["classes"]) for part in parts] == [8, 8]
    small = DenseHead(create_loss("arcface"), len(classes), SIZE, OPTIMIZERS["sgd"]).double()
    start = dense("arcface").weight.detach()
    with torch.no_grad():
        small.weight.copy_(start[classes])
    place = torch.full((CLASSES,), -1).index_put((classes,), torch.arange(len(classes)))
    embeddings.requires_grad_()
    small.lr = LR["sgd"]
    output = small(embeddings, torch.where(labels >= 0, place[labels], -1), 0)
    output.loss.backward()
    small.update(0)
    assert embeddings.grad is not None
    torch.testing.assert_close(parts[0]["losses"][0], output.loss.detach(), **CLOSE)
    gradients = torch.cat([part["gradients"][0] for part in parts])
    torch.testing.assert_close(gradients, embeddings.grad, **CLOSE)
    weight, momentum = (torch.cat([part[key] for part in parts]) for key in ("weight", "momentum"))
    torch.testing.assert_close(weight, start.index_put((classes,), small.weight.detach()), **CLOSE)
    torch.testing.assert_close(momentum, torch.zeros_like(start).index_put((classes,), small.momentum), **CLOSE)


def test_sampling() -> None:
    """Own classes always, the rest uniformly, ascending, none twice; decided by its key alone."""
    own = torch.tensor([5, -1, 5, 99])
    first = sample_classes(own, 100, 10, (0, 0, 0))
    assert torch.equal(first, sample_classes(own, 100, 10, (0, 0, 0)))
    assert not torch.equal(first, sample_classes(own, 100, 10, (0, 1, 0)))
    assert not torch.equal(first, sample_classes(own, 100, 10, (0, 0, 1)))
    counts = torch.zeros(100)
    for step in range(2000):
        classes = sample_classes(own, 100, 10, (0, step, 0))
        assert len(classes) == 10
        assert (classes.diff() > 0).all()
        counts[classes] += 1
    assert (counts[[5, 99]] == 2000).all()
    others = counts[[i for i in range(100) if i not in (5, 99)]]
    assert others.sum() == 8 * 2000
    # 8 of 98: the deviation of a count is 12, and five of them will hardly ever be passed.
    assert (others - 8 * 2000 / 98).abs().max() < 5 * math.sqrt(2000 * 8 / 98 * 90 / 98)


def test_sampled_count() -> None:
    """The share asked for, but room for the batch, and never more than there are."""
    assert [sampled_count(1000, 0.1, 64), sampled_count(1000, 0.01, 64), sampled_count(50, 0.1, 64)] == [100, 64, 50]


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 30])
def test_every_class_is_held_once(ranks: int) -> None:
    """Any number of classes on any number of ranks, even more ranks than classes; shares differ by one at most."""
    held = [share_of(CLASSES, rank, ranks) for rank in range(ranks)]
    assert [i for part in held for i in part] == list(range(CLASSES))
    assert max(map(len, held)) - min(map(len, held)) <= 1


def test_initial_centres_depend_on_seed_and_class_alone() -> None:
    """Normal with deviation 0.01; the same centre for a class however they are split; no two alike."""
    classes = 2 * CLASSES_PER_DRAW + 100
    whole = initial_centres(range(classes), 2, 16, seed=3)
    assert whole.dtype == torch.float32
    assert whole.std().item() == pytest.approx(0.01, rel=0.02)
    assert whole.mean().item() == pytest.approx(0, abs=1e-4)
    for ranks in (2, 3, 5):
        parts = [initial_centres(share_of(classes, rank, ranks), 2, 16, seed=3) for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), whole)
    assert not torch.isclose(initial_centres(range(classes), 2, 16, seed=4), whole).all(1).any()
    assert len(whole.unique(dim=0)) == len(whole)


@pytest.mark.parametrize("engine", ENGINES)
def test_faces_that_do_not_count_change_nothing(engine: str) -> None:
    """A batch with faces of label -1 has the loss, the gradients and the share of hits of the batch without them."""
    results = []
    embeddings, labels = faces()
    for keep in (torch.arange(BATCH), torch.nonzero(labels >= 0)[:, 0]):
        head, part = make(engine), embeddings.detach()[keep].requires_grad_()
        head.lr = 0.1
        output = head(part, labels[keep], 0)
        output.loss.backward()
        head.update(0)
        assert part.grad is not None
        results.append((output.loss, output.correct, part.grad[labels[keep] >= 0], head.weight.detach()))
        assert (part.grad[labels[keep] < 0] == 0).all()
    for with_them, without in zip(*results, strict=True):
        torch.testing.assert_close(with_them, without)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_no_face_counts(engine: str, name: str) -> None:
    """A batch of labels -1 only has loss 0 and gradients 0, not NaN, and leaves the statistics alone."""
    head = make(engine, name=name)
    before = {key: value.clone() for key, value in head.loss.state_dict().items()}
    embeddings, labels = faces()
    output = head(embeddings, torch.full_like(labels, -1), 0)
    output.loss.backward()
    assert (output.loss.item(), output.correct.item()) == (0.0, 0.0)
    assert embeddings.grad is not None
    assert (embeddings.grad == 0).all()
    assert all(torch.equal(value, before[key]) for key, value in head.loss.state_dict().items())


@pytest.mark.parametrize("engine", ENGINES)
def test_correct_is_the_share_nearest_to_their_own_centre(engine: str) -> None:
    """Hits are counted on the cosines without margin: with it, no face would ever look right at first."""
    head = make(engine, 3, 3, "cosface", margin=0.9)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    embeddings = torch.tensor([[2.0, 1.9, 0.0], [0.0, 5.0, 0.0], [0.0, 0.1, 0.2], [1.0, 0.0, 0.0]])
    output = head(embeddings, torch.tensor([0, 1, 1, -1]), 0)
    assert output.correct.item() == pytest.approx(2 / 3)
    assert not output.correct.requires_grad


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_computed_in_float32(engine: str, dtype: torch.dtype) -> None:
    """Under autocast, and with half embeddings, the loss is that of float32: s = 64 leaves no digits to lose."""
    head = make(engine)
    embeddings, labels = faces(dtype=dtype)
    with torch.autocast("cpu", dtype=dtype):
        output = head(embeddings, labels, 0)
    exact = head(embeddings.detach().float(), labels, 0)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == exact.loss.item()
    head.lr = 0.1
    output.loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad.dtype == dtype
    assert torch.isfinite(embeddings.grad).all()
    assert head.weight.dtype == torch.float32


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", LOSSES)
def test_perfect_and_opposite_faces(engine: str, name: str) -> None:
    """Embeddings exactly on their centre, and exactly opposite, give finite loss, gradients and updates."""
    head = make(engine, name=name)
    labels = torch.arange(CLASSES).repeat(2)
    embeddings = torch.cat([head.weight, -head.weight]).detach().clone().requires_grad_()
    head.lr = 0.1
    loss = head(embeddings, labels, 0).loss
    loss.backward()
    head.update(0)
    assert torch.isfinite(loss)
    assert embeddings.grad is not None
    assert torch.isfinite(embeddings.grad).all()
    assert torch.isfinite(head.weight).all()


def test_a_pass_with_all_classes_beside_a_sampled_one() -> None:
    """A batch in passes of eight and seven faces, of eight classes: the first has all, the second a sample. What the
    first gave a class that is not in the sample is not lost."""
    head = BlockwiseHead(create_loss("arcface"), 8, SIZE, RowSGD(0.9, 0.0), 8, block=4, sample_rate=0.5, fused=False)
    for count in (8, 7):
        head(batch(0)[0][:count, :SIZE], torch.arange(count), 0).loss.backward()
    assert head.weight.grad is not None
    assert head.weight.grad.any(1).all()
    before, head.lr = head.weight.detach().clone(), 0.1
    head.update(0)
    assert (head.weight != before).any(1).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
@pytest.mark.parametrize("loss_name", ["arcface", "adaface", "sphereface", "softmax"])
def test_an_overflow_in_the_network_stays_there(engine: str, bad: float, loss_name: str) -> None:
    """One embedding that is not finite, or too long to have a length: the loss says so, its gradient is NaN (a gradient
    scaler skips the step), and the centres and what the loss keeps stay finite."""
    head = make(engine, name=loss_name)
    embeddings, labels = faces()
    with torch.no_grad():
        embeddings[4, 1] = bad
    head.lr = 0.1
    loss = head(embeddings, labels, 0).loss
    loss.backward()
    head.update(0)
    assert loss.isnan()
    assert embeddings.grad is not None
    assert embeddings.grad[4].isnan().all()
    assert head.weight.isfinite().all()
    assert head.momentum.isfinite().all()
    assert all(buffer.isfinite().all() for buffer in head.loss.buffers())


def test_bfloat16_products_come_close() -> None:
    """Products of bfloat16 numbers summed in float32: loss and gradients within a percent of float32's."""
    plain, fast = (
        blockwise("cosface", fused=False).float(),
        blockwise("cosface", fused=False, matmul=torch.bfloat16).float(),
    )
    results = []
    for head in (plain, fast):
        embeddings, labels = faces()
        loss = head(embeddings, labels, 0).loss
        loss.backward()
        results.append((loss.detach(), embeddings.grad, head.weight.grad))
    for exact, rounded in zip(*results, strict=True):
        assert exact is not None
        assert rounded is not None
        assert 0 < (rounded - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("engine", ["dense", "blockwise"])
def test_a_head_starts_from_given_centres(engine: Engine) -> None:
    """`centres` in place of those that the seed draws."""
    centres = torch.arange(12.0).reshape(4, 3)
    head = create_head(
        create_loss("arcface"), 4, 3, RowSGD(), 8, device=torch.device("cpu"), engine=engine, centres=centres.clone()
    )
    assert torch.equal(head.weight, centres)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "sparse"}, "engine: must be one of auto, dense, blockwise, got 'sparse'"),
        ({"sample_rate": 0}, "sample_rate: must be above 0 and at most 1, got 0"),
        ({"centres": torch.zeros(3, 8)}, r"centres: expected \[10, 8\], got \[3, 8\]"),
        (
            {"engine": "blockwise", "sub_centers": 2, "centres": torch.zeros(10, 8)},
            r"expected \[20, 8\], got \[10, 8\]",
        ),
    ],
)
def test_a_head_that_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    """A misspelt engine is not another one, and centres of other classes do not train in silence."""
    with pytest.raises(ValueError, match=message):
        create_head(create_loss("arcface"), 10, 8, RowSGD(), BATCH, device=CPU, **options)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_label_beyond_the_classes_makes_the_loss_nan(engine: str) -> None:
    """Labels that are off by one would otherwise train on nothing, and the run would look well."""
    head = make(engine)
    embeddings, labels = faces()
    labels = torch.where(torch.arange(len(labels)) == 1, CLASSES, labels)
    output = head(embeddings, labels, 0)
    assert output.loss.isnan()
    output.loss.backward()
    assert embeddings.grad is not None
    assert embeddings.grad[1].isnan().all()


def test_a_batch_larger_than_the_head_was_made_for() -> None:
    """On several ranks batches have to fit; on one they may be of any size."""
    embeddings, labels = batch(0)
    assert torch.isfinite(blockwise("arcface", batch_size=4)(embeddings, labels, 0).loss)


@pytest.mark.parametrize("engine", ENGINES)
def test_one_class_is_refused(engine: str) -> None:
    """A softmax over one class has nothing to learn, and no finite gradient."""
    with pytest.raises(ValueError, match="two classes or more"):
        make(engine, classes=1)


def test_create_head() -> None:
    """The plain head only where it can serve: alone, without sampling, and where its logits are few."""

    def create(**options: Any) -> Head:
        return create_head(create_loss("arcface"), 1000, SIZE, RowSGD(), BATCH, device=CPU, **options)

    assert isinstance(create(), DenseHead)
    assert isinstance(create(engine="dense", block=32), DenseHead)
    for options, block in (
        ({"block": 32}, 32),
        ({"engine": "blockwise"}, automatic_block(BATCH, CPU)),
        ({"engine": "dense", "sample_rate": 0.5}, 1000),
    ):
        head = create(**options)
        assert isinstance(head, BlockwiseHead)
        assert head.block == block


def test_create_head_for_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The blockwise head, which has kernels there, however few the classes; the plain one when it is asked for."""
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, _: module)  # without one
    for engine, kind in (("auto", BlockwiseHead), ("dense", DenseHead)):
        options: dict[str, Any] = {"device": torch.device("cuda"), "engine": engine}
        assert isinstance(create_head(create_loss("arcface"), 10, SIZE, RowSGD(), BATCH, **options), kind)


def test_automatic_blocks() -> None:
    """Large batches get smaller blocks, GPUs larger ones; the products are about 2 MiB and 128 MiB."""
    assert automatic_block(128, CPU) == 4096
    assert automatic_block(128, torch.device("cuda")) == 262_144
    assert automatic_block(100_000, CPU) == 256
