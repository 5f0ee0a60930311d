"""The dense head against a plain implementation in float64, and the faces that do not count."""

import math

import pytest
import torch
from torch import Tensor

from models.heads import DenseHead
from models.margins import create_margin

CLASSES, SIZE, BATCH = 7, 5, 12


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


def make(name: str = "arcface", margin: float = 0.5, scale: float = 16.0, seed: int = 0):
    """A head, embeddings of many lengths, and labels of which two do not count."""
    generator = torch.Generator().manual_seed(seed)
    head = DenseHead(CLASSES, SIZE, create_margin(name, margin), scale)
    with torch.no_grad():
        head.weight.copy_(torch.randn(CLASSES, SIZE, generator=generator))
    lengths = torch.logspace(-2, 2, BATCH)[:, None]
    embeddings = (torch.randn(BATCH, SIZE, generator=generator) * lengths).requires_grad_()
    labels = torch.randint(0, CLASSES, (BATCH,), generator=generator)
    labels[[2, 9]] = -1
    return head, embeddings, labels


@pytest.mark.parametrize(("name", "margin"), [("arcface", 0.5), ("arcface", 1.5), ("cosface", 0.4), ("softmax", 0.0)])
@pytest.mark.parametrize("scale", [16.0, 64.0])
def test_loss_and_gradients_are_those_of_the_formula(name: str, margin: float, scale: float) -> None:
    """Loss, and gradients of embeddings and class centres, against float64 angles and autograd, both branches in."""
    head, embeddings, labels = make(name, margin, scale)
    loss = head(embeddings, labels).loss
    grad_embeddings, grad_weight = torch.autograd.grad(loss, [embeddings, head.weight])

    exact = embeddings.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    expected = plain_loss(*exact, labels, name, margin, scale)
    exact_embeddings, exact_weight = torch.autograd.grad(expected, exact)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for ours, formula in ((grad_embeddings, exact_embeddings), (grad_weight, exact_weight)):
        # Per row: embeddings of length 100 have gradients that are 10,000 times smaller than those of length 0.01.
        error = (ours.double() - formula).norm(dim=1)
        assert (error <= 1e-4 * formula.norm(dim=1) + 1e-9).all()


def test_both_branches_of_arcface_are_tested() -> None:
    """The set used above has faces on both sides of t + m = pi for the large margin."""
    head, embeddings, labels = make(margin=1.5)
    cosine = torch.nn.functional.cosine_similarity(embeddings[:, None], head.weight[None], dim=2)
    own = cosine[torch.arange(BATCH), labels][labels >= 0]
    past = torch.acos(own) + 1.5 > math.pi
    assert past.any()
    assert not past.all()


def test_faces_that_do_not_count_change_nothing() -> None:
    """A batch with faces of label -1 has the loss, the gradients and the share of hits of the batch without them."""
    head, embeddings, labels = make()
    with_ignored = head(embeddings, labels)
    grads = torch.autograd.grad(with_ignored.loss, [embeddings, head.weight])
    counted = labels >= 0
    without = head(embeddings[counted], labels[counted])
    expected = torch.autograd.grad(without.loss, [embeddings, head.weight])
    assert with_ignored.loss.item() == pytest.approx(without.loss.item(), rel=1e-6)
    assert with_ignored.correct.item() == pytest.approx(without.correct.item())
    assert (grads[0][~counted] == 0).all()
    for ours, other in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_no_face_counts() -> None:
    """A batch of labels -1 only has loss 0 and gradients 0, not NaN."""
    head, embeddings, labels = make()
    output = head(embeddings, torch.full_like(labels, -1))
    grads = torch.autograd.grad(output.loss, [embeddings, head.weight])
    assert (output.loss.item(), output.correct.item()) == (0.0, 0.0)
    assert all((grad == 0).all() for grad in grads)


def test_correct_is_the_share_nearest_to_their_own_centre() -> None:
    """Hits are counted on the cosines without margin: with it, no face would ever look right at first."""
    head = DenseHead(3, 3, create_margin("cosface", 0.9), 10.0)
    with torch.no_grad():
        head.weight.copy_(torch.eye(3))
    embeddings = torch.tensor([[2.0, 1.9, 0.0], [0.0, 5.0, 0.0], [0.0, 0.1, 0.2], [1.0, 0.0, 0.0]])
    output = head(embeddings, torch.tensor([0, 1, 1, -1]))
    assert output.correct.item() == pytest.approx(2 / 3)
    assert not output.correct.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_are_computed_in_float32(dtype: torch.dtype) -> None:
    """Under autocast, and with half embeddings, the loss is that of float32: s = 64 leaves no digits to lose."""
    head, embeddings, labels = make(scale=64.0)
    halves = embeddings.detach().to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        output = head(halves, labels)
    exact = head(halves.detach().float(), labels)
    assert output.loss.dtype == torch.float32
    assert output.loss.item() == exact.loss.item()
    output.loss.backward()
    assert halves.grad is not None
    assert halves.grad.dtype == dtype
    assert torch.isfinite(halves.grad).all()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32


def test_perfect_and_opposite_faces() -> None:
    """Embeddings exactly on their centre, and exactly opposite, give finite loss and gradients."""
    head, _, _ = make(scale=64.0)
    labels = torch.arange(CLASSES).repeat(2)
    embeddings = torch.cat([head.weight, -head.weight]).detach().requires_grad_()
    loss = head(embeddings, labels).loss
    grads = torch.autograd.grad(loss, [embeddings, head.weight])
    assert torch.isfinite(loss)
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_initial_centres_are_small_and_normal() -> None:
    """insightface's initialisation: deviation 0.01, float32, seeded by torch's generator."""
    torch.manual_seed(3)
    head = DenseHead(1000, 64, create_margin("arcface", 0.5), 64.0)
    assert head.weight.dtype == torch.float32
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert head.weight.mean().item() == pytest.approx(0, abs=2e-4)
    torch.manual_seed(3)
    assert torch.equal(head.weight, DenseHead(1000, 64, create_margin("arcface", 0.5), 64.0).weight)
