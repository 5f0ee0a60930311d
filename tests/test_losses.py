"""Margin losses against plain float64 formulas by way of acos, face by face: values, gradients, ends."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from loss_formulas import (
    STEP,
    dense_loss,
    every_case,
    every_loss,
    faces,
    gradients,
    make,
    reference,
)
from models.losses import MarginLoss, create_loss


def curve(loss: MarginLoss, cosine: Tensor, norm: float = 40.0) -> Tensor:
    """Logits of the own class over `cosine` for embeddings of length `norm`, the scale divided out; no statistics."""
    was, loss.training = loss.training, False
    targets = loss.targets(cosine, torch.full_like(cosine, norm), torch.ones_like(cosine, dtype=torch.bool), STEP)
    loss.training = was
    return targets.logits / targets.scale


# --- value and gradient -----------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize(("nearest", "filter_above", "close"), [(0.01, 0, 1e-7), (0.01, 0.2, 1e-7), (1e-4, 0, 1e-5)])
def test_is_the_formula(name: str, options: dict[str, Any], nearest: float, filter_above: float, close: float) -> None:
    """Value and gradient, of embeddings and of centres, are those of the formula, next to cos = +-1 and past pi - m
    too; faces without a label count for nothing."""
    embeddings, centres, labels = (x.requires_grad_(x.is_floating_point()) for x in faces(nearest))
    left_out = labels < 0
    if name.startswith("elastic"):  # its reference takes all faces to count
        labels = labels.clamp_min(0)
    options = {**options, "filter_above": filter_above}
    loss = make(name, **options).eval()
    state = {key: buffer.item() for key, buffer in loss.named_buffers()}
    value, _ = dense_loss(loss, embeddings, centres, labels)
    expected = reference(name, options, embeddings, centres, labels, state)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-9)
    ours, theirs = (gradients(result, embeddings, centres) for result in (value, expected))
    torch.testing.assert_close(ours, theirs, rtol=close, atol=1e-9)
    assert (ours[0][left_out] == 0).all() or name.startswith("elastic")


@every_case
@pytest.mark.parametrize("filter_above", [0.0, 0.2])
def test_closed_slopes_give_the_gradient_of_autograd(name: str, options: dict[str, Any], filter_above: float) -> None:
    """A backward pass written with the slopes of `others` ends in the same gradients as autograd through them."""
    embeddings, centres, labels = (x.requires_grad_(x.is_floating_point()) for x in faces())
    loss = make(name, **options, filter_above=filter_above).eval()
    value, _ = dense_loss(loss, embeddings, centres, labels)
    by_slopes, _ = dense_loss(loss, embeddings, centres, labels, slopes=True)
    assert by_slopes.item() == value.item()
    for ours, theirs in zip(
        gradients(by_slopes, embeddings, centres), gradients(value, embeddings, centres), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precision(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Embeddings of a network in any precision, brought to float32 as heads do, give the exact loss of their values."""
    embeddings, centres, labels = faces(nearest=0.1)  # a cosine of float32 says little of smaller angles
    labels = labels.where(labels >= 0, 0)
    embeddings = embeddings.to(dtype).requires_grad_()
    centres = centres.float().requires_grad_()
    loss = make(name, **options).eval()
    state = {key: buffer.item() for key, buffer in loss.named_buffers()}
    loss = loss.float()
    value, targets = dense_loss(loss, embeddings.float(), centres, labels)
    assert value.dtype == targets.logits.dtype == targets.scale.dtype == torch.float32
    exact = [x.detach().double().requires_grad_() for x in (embeddings, centres)]
    expected = reference(name, options, *exact, labels, state)
    assert value.item() == pytest.approx(expected.item(), rel=2e-6)
    ours, theirs = gradients(value, embeddings, centres), gradients(expected, *exact)
    assert ours[0].dtype == dtype
    own_rounding = {torch.float32: 0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    for got, want, rounding in zip(ours, theirs, (own_rounding, 0), strict=True):
        error = (got.double() - want).abs()
        smallest = 2**-24 if got.dtype == torch.float16 else 0
        assert (error <= rounding * want.abs() + 1e-4 * want.abs().max() + smallest).all()


def test_float32_keeps_its_digits_near_one() -> None:
    """Well-trained faces have cosines close to 1, where 1 - c * c would lose half of the digits."""
    cosine = torch.linspace(0.003, 0.3, 1000, dtype=torch.float64).cos().float()
    angle = cosine.double().acos()
    formulas = {"arcface": torch.cos(angle + 0.5), "combined": torch.cos(angle + 0.3) - 0.2}
    formulas["sphereface_r"] = torch.cos(1.5 * angle)
    for name, exact in formulas.items():
        assert (curve(create_loss(name), cosine).double() - exact).abs().max() < 2e-7, name


# --- the whole range of angles ----------------------------------------------------------------------------------------

#: Loss, options, length of the embeddings, steepest slope in the angle.
CURVES: list[tuple[str, dict[str, Any], float, float]] = [
    ("softmax", {}, 40, 1),
    ("normface", {}, 40, 1),
    ("sphereface", {"lambda_base": 0, "lambda_min": 0}, 40, 4),
    ("sphereface", {"margin": 1.0, "lambda_base": 0, "lambda_min": 0}, 40, 1),
    ("sphereface", {}, 40, 1.01),
    ("sphereface_r", {}, 40, 1.5),
    ("cosface", {}, 40, 1),
    *(("arcface", {"margin": margin}, 40, 1) for margin in (0.1, 0.3, 0.5, 1.0, 1.5)),
    ("combined", {}, 40, 1),
    ("combined", {"m1": 4.0, "m2": 1.5}, 40, 4),
    ("curricularface", {}, 40, 1),
    *(("magface", {}, norm, 1) for norm in (3, 40, 200)),
    *(("adaface", {}, norm, 1) for norm in (1, 20, 30, 60, 300)),
    ("elastic_arc", {"std": 1e-15}, 40, 1),
    ("elastic_cos", {"std": 1e-15}, 40, 1),
]


@pytest.mark.parametrize(("name", "options", "norm", "steepest"), CURVES)
def test_rises_with_the_cosine_and_has_no_jump(
    name: str, options: dict[str, Any], norm: float, steepest: float
) -> None:
    """A better angle never earns a worse logit, from 0 to pi, and a small step never makes a big one."""
    # Steps of equal angle, so that the slope in the angle bounds every step.
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    values = curve(make(name, **options), torch.cos(angles), norm)
    steps = values[:-1] - values[1:]
    assert (steps > -1e-14).all()
    assert steps.max() <= (angles[1] - angles[0]) * steepest * 1.001 + 2e-6 * steepest
    if name == "sphereface_r":
        flat = angles[:-1] > math.pi / 1.5
        assert (steps[flat].abs() < 1e-12).all()
        steps = steps[~flat][:-1]
    if name == "adaface" and norm > 30:
        steps = steps[angles[:-1] > 0.4]
    # Level only where the slope passes through 0: at the ends, and where the angle with its margin is a multiple of pi.
    assert (steps < 1e-9).sum() <= 12


@pytest.mark.parametrize(
    ("name", "options", "turn"),
    [
        ("arcface", {"margin": 0.5}, math.pi - 0.5),
        ("curricularface", {"margin": 0.5}, math.pi - 0.5),
        ("combined", {"m1": 2.0, "m2": 0.3}, math.pi - 0.15),
        ("combined", {"m1": 2.0, "m2": 0.3}, math.pi / 2 - 0.15),
        ("sphereface", {"lambda_base": 0, "lambda_min": 0}, math.pi / 2),
        ("sphereface_r", {}, math.pi / 1.5),
        ("adaface", {"margin": 0.5, "h": 1.0}, math.pi - 0.5),
    ],
)
def test_the_slope_has_no_jump_where_the_formula_turns(name: str, options: dict[str, Any], turn: float) -> None:
    """Where t and its margin come to a multiple of pi, value and slope are the same from either side."""
    loss = make(name, **options)
    cosine = torch.tensor([turn - 1e-6, turn + 1e-6], dtype=torch.float64).cos().requires_grad_()
    values = curve(loss, cosine, norm=1.0)
    (slopes,) = gradients(values.sum(), cosine)
    assert values[0].item() == pytest.approx(values[1].item(), abs=2e-5)
    assert slopes.abs().max() < 1e-4
    assert values[0].item() == pytest.approx(round(values[0].item() + getattr(loss, "m3", 0)), abs=0.2001)


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_at_the_ends(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """At cos = +-1, next to it, and a rounding error beyond it, neither value nor gradient is NaN or infinite."""
    one = torch.ones(1, dtype=dtype)
    near = [torch.nextafter(one, 0 * one), torch.nextafter(one, 2 * one), one, one - 1e-6, one + 1e-6]
    cosine = torch.cat([sign * value for value in near for sign in (1, -1)]).requires_grad_()
    loss = make(name, **options).to(dtype)
    norm = torch.full_like(cosine, 50).requires_grad_()
    targets = loss.targets(cosine, norm, torch.ones(10, dtype=torch.bool), STEP)
    slopes, lengths = torch.autograd.grad(targets.logits.sum(), (cosine, norm), allow_unused=True)
    assert targets.logits.dtype == dtype
    assert torch.isfinite(targets.logits).all()
    assert torch.isfinite(slopes).all()
    assert lengths is None or torch.isfinite(lengths).all()
    values = (targets.logits / targets.scale).detach()
    assert (values <= 1 + 1e-5).all()
    steepest = (targets.scale.max() * 8e6).item()
    assert (slopes.abs() < steepest).all()
    others, slope = loss.others(cosine.detach()[None], None if targets.bar is None else targets.bar[:1])
    assert torch.isfinite(others).all()
    assert slope is None or torch.isfinite(slope).all()


# --- values by hand ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "degrees", "norm", "logit"),
    [
        ("softmax", {}, 60, 3.0, 1.5),
        ("normface", {}, 60, 9.0, 32.0),
        ("sphereface", {"lambda_base": 0, "lambda_min": 0}, 60, 2.0, -3.0),  # 4 x 60 = 240: -cos 240 - 2 = -1.5
        ("sphereface", {"lambda_base": 0, "lambda_min": 0}, 180, 1.0, -7.0),
        ("sphereface", {"lambda_min": 1000}, 60, 2.0, 2 * (-1.5 + 500) / 1001),
        ("sphereface_r", {}, 60, 9.0, 0.0),
        ("sphereface_r", {}, 90, 9.0, -21.213203),
        ("sphereface_r", {}, 150, 9.0, -30.0),
        ("cosface", {}, 60, 9.0, 9.6),
        ("arcface", {}, 0, 9.0, 56.165284),  # 64 cos 0.5
        ("arcface", {}, 60, 9.0, 1.510182),
        ("arcface", {}, 90, 9.0, -30.683234),  # -64 sin 0.5
        ("arcface", {}, 180, 9.0, -71.834716),  # 64 (cos 0.5 - 2)
        ("combined", {}, 60, 9.0, 1.391374),
        ("combined", {"m1": 3.0, "m2": 0.0, "m3": 0.5}, 90, 9.0, -160.0),  # 64 (-cos 270 - 2 - 0.5)
        ("curricularface", {}, 180, 9.0, -71.834716),
        ("magface", {}, 90, 60.0, -37.446226),  # m = 0.45 + 0.35 / 2: -64 sin 0.625
        ("magface", {}, 90, 5.0, -27.837952),  # -64 sin 0.45
        ("magface", {}, 90, 500.0, -45.910790),  # -64 sin 0.8
        ("adaface", {}, 60, 30.0, 6.4),  # a face of mean length: 64 (0.5 - 0.4)
        ("adaface", {"h": 1.0}, 60, 999.0, 64 * (math.cos(math.pi / 3 - 0.4) - 0.8)),
        ("adaface", {"h": 1.0}, 60, 1e-3, 64 * math.cos(math.pi / 3 + 0.4)),
        ("adaface", {"h": 1.0}, 10, 999.0, 64 * (1 - 0.8)),
        ("elastic_arc", {"std": 1e-15}, 90, 9.0, -30.683234),
        ("elastic_cos", {"std": 1e-15}, 60, 9.0, 9.6),
    ],
)
def test_known_values(name: str, options: dict[str, Any], degrees: float, norm: float, logit: float) -> None:
    """Angles whose logit anyone can work out. (AdaFace: mean 30, deviation 25.)"""
    cosine, norms = torch.tensor([math.cos(math.radians(degrees))]).double(), torch.tensor([norm]).double()
    loss = make(name, **options).eval()
    assert loss.targets(cosine, norms, torch.tensor([True]), STEP).logits.item() == pytest.approx(logit, abs=2e-4)


def test_annealing_of_sphereface() -> None:
    """lambda: 1000 / (1 + 0.12 i) with i from 1, and 5 from i = 1659 on."""
    loss = create_loss("sphereface")
    assert loss.annealing(0) == pytest.approx(892.857143)
    assert loss.annealing(1657) == pytest.approx(5.001, abs=1e-4)
    assert loss.annealing(1658) == loss.annealing(10**9) == 5


def test_magface_penalty() -> None:
    """35 times the mean of 1 / a + a / 110^2, lengths held within 10 and 110; nothing when no face counts."""
    loss = create_loss("magface")
    norm = torch.tensor([60.0, 2.0, 500.0, 1e30])
    counted = torch.tensor([True, True, True, False])
    expected = 35 * (1 / 60 + 60 / 12100 + 1 / 10 + 10 / 12100 + 1 / 110 + 110 / 12100) / 3
    assert loss.targets(norm * 0, norm, counted, 0).penalty.item() == pytest.approx(expected)
    assert loss.targets(norm * 0, norm, counted & False, 0).penalty.item() == 0


def test_magface_lengthens_easy_faces() -> None:
    """The gradient goes through the length: of two faces, the one near its centre gains from a longer embedding."""
    loss = create_loss("magface", penalty_weight=60.0)
    norm = torch.tensor([50.0, 50.0], requires_grad=True)
    targets = loss.targets(torch.tensor([0.95, 0.3]), norm, torch.tensor([True, True]), 0)
    (slopes,) = gradients(F.softplus(25 - targets.logits).mean() + targets.penalty, norm)
    assert slopes[0] < 0 < slopes[1]


def test_adaface_has_no_gradient_through_the_length() -> None:
    """As published; otherwise an embedding would shrink to lower its margin."""
    loss = create_loss("adaface")
    cosine, norm = torch.tensor([0.3, 0.9], requires_grad=True), torch.tensor([5.0, 30.0], requires_grad=True)
    logits = loss.targets(cosine, norm, torch.tensor([True, True]), 0).logits.sum()
    assert torch.autograd.grad(logits, (cosine, norm), allow_unused=True)[1] is None


# --- the other classes ------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("filter_above", [0.0, 0.3])
def test_slopes_of_others(name: str, filter_above: float) -> None:
    """Value by its plain definition, slope by autograd, for cosines on either side of every bound."""
    loss = make(name, filter_above=filter_above)
    cosine = torch.linspace(-1, 1, 101, dtype=torch.float64).repeat(3, 1).requires_grad_()
    bar = torch.tensor([-1.5, 0.105, 0.905], dtype=torch.float64)
    value, slope = loss.others(cosine, bar)
    for i, row in enumerate(cosine.tolist()):
        for j, c in enumerate(row):
            expected = c * (0.25 + c) if name == "curricularface" and c > bar[i] else c
            expected = 0.0 if 0 < filter_above < c else expected
            assert value[i, j].item() == pytest.approx(expected, abs=1e-15)
    (by_autograd,) = gradients(value.sum(), cosine)
    closed = torch.ones_like(cosine) if slope is None else slope
    assert not closed.requires_grad or slope is None
    torch.testing.assert_close(closed.detach(), by_autograd, rtol=0, atol=1e-12)
    assert (slope is None) == (name != "curricularface" and filter_above == 0)


def test_curricularface_compares_with_the_margin() -> None:
    """The bar is cos(t + m), past pi its continuation, so that no class is easier for a face that is wholly wrong."""
    cosine = torch.tensor([0.5, -1.0], dtype=torch.float64, requires_grad=True)
    targets = make("curricularface").eval().targets(cosine, cosine * 0, torch.tensor([True, True]), 0)
    assert targets.bar is not None
    assert targets.bar.tolist() == pytest.approx([math.cos(math.pi / 3 + 0.5), math.cos(0.5) - 2], abs=1e-6)
    assert not targets.bar.requires_grad


@every_loss
def test_only_softmax_leaves_the_centres_as_they_are(name: str) -> None:
    """Its products are x . w itself; of all others, cosines."""
    assert create_loss(name).unit_centres == (name != "softmax")


def test_softmax_is_cross_entropy() -> None:
    """Of a linear layer without bias."""
    embeddings, centres, labels = faces()
    value, _ = dense_loss(create_loss("softmax"), embeddings, centres, labels)
    expected = F.cross_entropy(embeddings @ centres.T, labels, ignore_index=-1)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("arcface", {"margin": 0.0}),
        ("cosface", {"margin": 0.0}),
        ("combined", {"m2": 0.0, "m3": 0.0}),
        ("sphereface_r", {"margin": 1.0}),
        ("sphereface", {"margin": 1.0, "lambda_base": 0.0, "lambda_min": 0.0}),
        ("adaface", {"margin": 0.0}),
    ],
)
def test_no_margin_is_normface(name: str, options: dict[str, Any]) -> None:
    """A margin that does nothing changes nothing."""
    cosine = torch.linspace(-0.999, 0.999, 4001, dtype=torch.float64)
    torch.testing.assert_close(curve(create_loss(name, **options), cosine), cosine, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "options", "same"),
    [
        ("combined", {"m1": 1.0, "m2": 0.5, "m3": 0.0}, "arcface"),
        ("combined", {"m1": 1.0, "m2": 0.0, "m3": 0.35}, "cosface"),
        ("magface", {"margin_low": 0.5, "margin_high": 0.5}, "arcface"),
        ("adaface", {"margin": 0.35, "h": 0.0}, "cosface"),
    ],
)
def test_losses_that_contain_others(name: str, options: dict[str, Any], same: str) -> None:
    """With such options one loss becomes another."""
    cosine = torch.linspace(-0.999, 0.999, 4001, dtype=torch.float64)
    ours, theirs = curve(create_loss(name, **options), cosine), curve(create_loss(same), cosine)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
