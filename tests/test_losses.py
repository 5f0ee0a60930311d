"""Margin losses against plain float64 formulas by way of acos, face by face: values, gradients, ends, statistics."""

import math
from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from config import LossConfig
from models.losses import LOSSES, MarginLoss, Targets, create_loss
from models.losses.batch_statistics import move_towards_

#: What the papers and the authors' code have.
PUBLISHED: dict[str, dict[str, float]] = {
    "softmax": {},
    "normface": {"scale": 64},
    "sphereface": {"margin": 4, "lambda_base": 1000, "lambda_gamma": 0.12, "lambda_power": 1, "lambda_min": 5},
    "sphereface_r": {"margin": 1.5, "scale": 30},
    "cosface": {"margin": 0.35, "scale": 64},
    "arcface": {"margin": 0.5, "scale": 64},
    "combined": {"m1": 1, "m2": 0.3, "m3": 0.2, "scale": 64},
    "curricularface": {"margin": 0.5, "scale": 64, "rate": 0.01},
    "magface": {
        "scale": 64,
        "norm_low": 10,
        "norm_high": 110,
        "margin_low": 0.45,
        "margin_high": 0.8,
        "penalty_weight": 35,
    },
    "adaface": {"margin": 0.4, "h": 0.333, "scale": 64, "rate": 0.01},
    "elastic_arc": {"margin": 0.5, "std": 0.05, "scale": 64, "plus": False, "seed": 0},
    "elastic_cos": {"margin": 0.35, "std": 0.05, "scale": 64, "plus": False, "seed": 0},
}
#: Losses with options that change what is computed.
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in LOSSES),
    ("sphereface", {"lambda_base": 0, "lambda_min": 0}),
    ("sphereface", {"margin": 2.5, "lambda_base": 3, "lambda_gamma": 0.5, "lambda_power": 2, "lambda_min": 0.01}),
    ("sphereface_r", {"margin": 3.0, "scale": 8.0}),
    ("cosface", {"margin": 0.2, "scale": 8.0}),
    ("arcface", {"margin": 0.1}),
    ("arcface", {"margin": 1.0}),
    ("arcface", {"margin": 1.5, "scale": 16.0}),
    ("combined", {"m1": 0.9, "m2": 0.4, "m3": 0.15}),
    ("combined", {"m1": 3.5, "m2": 0.7, "m3": 0.1, "scale": 4.0}),
    ("curricularface", {"margin": 0.3, "scale": 10.0}),
    ("magface", {"scale": 16.0, "norm_low": 20.0, "norm_high": 60.0, "margin_high": 1.2, "penalty_weight": 3.0}),
    ("adaface", {"margin": 0.6, "h": 1.0, "scale": 12.0}),
    ("elastic_arc", {"std": 0.15, "seed": 7, "plus": True, "scale": 9.0}),
    ("elastic_cos", {"std": 0.15, "seed": 7, "plus": True, "scale": 9.0}),
]
IDS = [f"{name}{'+' if options else ''}{i}" for i, (name, options) in enumerate(CASES)]
every_case = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
every_loss = pytest.mark.parametrize("name", LOSSES)
STEP = 4


def make(name: str, **options: Any) -> MarginLoss:
    """The loss in float64, its statistics no longer those of the start."""
    loss = create_loss(name, **options).double()
    start = {"t": 0.25, "norm_mean": 30.0, "norm_std": 25.0}
    for key, buffer in loss.named_buffers():
        buffer.fill_(start[key])
    return loss


# --- the formulas, written plainly ------------------------------------------------------------------------------------


def falling(x: Tensor) -> Tensor:
    """cos x up to pi, and onwards by mirrored copies, each 2 lower than the last but one."""
    k = 0
    while x > (k + 1) * math.pi:
        k += 1
    return (-1) ** k * torch.cos(x) - 2 * k


def annealed(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    plain = max(o.lambda_min, o.lambda_base * (1 + o.lambda_gamma * (STEP + 1)) ** -o.lambda_power)
    return a * (falling(o.margin * t) + plain * c) / (1 + plain)


def held(a: Tensor, o: SimpleNamespace) -> Tensor:
    return a if o.norm_low < a < o.norm_high else 0 * a + (o.norm_low if a < o.norm_high else o.norm_high)


def by_magnitude(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    share = (held(a, o) - o.norm_low) / (o.norm_high - o.norm_low)
    return o.scale * falling(t + o.margin_low + share * (o.margin_high - o.margin_low))


def by_quality(c: Tensor, t: Tensor, a: Tensor, o: SimpleNamespace) -> Tensor:
    q = min(max(o.h * (a.item() - o.norm_mean) / (o.norm_std + 0.001), -1), 1)
    g_angle, g_add = -o.margin * q, o.margin * q + o.margin
    return o.scale * ((falling(t + g_angle) if t + g_angle > 0 else 1 + 0 * t) - g_add)


#: Logit of the own class of a face, from the product c, the angle t, the embedding's length a and all the options.
FORMULAS: dict[str, Callable[[Tensor, Tensor, Tensor, SimpleNamespace], Tensor]] = {
    "softmax": lambda c, t, a, o: a * c,
    "normface": lambda c, t, a, o: o.scale * torch.cos(t),
    "sphereface": annealed,
    "sphereface_r": lambda c, t, a, o: o.scale * torch.cos(o.margin * t if o.margin * t < math.pi else 0 * t + math.pi),
    "cosface": lambda c, t, a, o: o.scale * (torch.cos(t) - o.margin),
    "arcface": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "combined": lambda c, t, a, o: o.scale * (falling(o.m1 * t + o.m2) - o.m3),
    "curricularface": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "magface": by_magnitude,
    "adaface": by_quality,
    "elastic_arc": lambda c, t, a, o: o.scale * falling(t + o.margin),
    "elastic_cos": lambda c, t, a, o: o.scale * (torch.cos(t) - o.margin),
}


def drawn_margins(cosines: list[Tensor], o: SimpleNamespace) -> list[float]:
    """ElasticFace's margins of a batch whose faces all count."""
    margins = np.random.default_rng([o.seed, STEP, 3]).normal(o.margin, o.std, len(cosines)).tolist()
    if o.plus:
        farthest_first = sorted(range(len(cosines)), key=lambda i: cosines[i].item())
        for i, margin in zip(farthest_first, sorted(margins, reverse=True), strict=True):
            margins[i] = margin
    return margins


def reference(
    name: str, options: dict[str, Any], embeddings: Tensor, centres: Tensor, labels: Tensor, state: dict[str, float]
) -> Tensor:
    """The loss, a face and a class at a time. `state`: the statistics as they are used."""
    o = SimpleNamespace(**{"scale": None, "filter_above": 0, **PUBLISHED[name], **options, **state})
    if name != "softmax":
        centres = torch.stack([centre / centre.norm() for centre in centres])
    rows = [i for i, label in enumerate(labels.tolist()) if label >= 0]
    lengths = [embeddings[i].norm() for i in rows]
    products = [[embeddings[i] @ centre / a for centre in centres] for i, a in zip(rows, lengths, strict=True)]
    own = [row[labels[i]] for i, row in zip(rows, products, strict=True)]
    margins = drawn_margins(own, o) if name.startswith("elastic") else [getattr(o, "margin", 0)] * len(rows)
    losses = []
    for i, a, row, c, o.margin in zip(rows, lengths, products, own, margins, strict=True):
        target = FORMULAS[name](c, torch.acos(c), a, o)
        logits = []
        for label, product in enumerate(row):
            hard = name == "curricularface" and product > target / o.scale
            value = product * (o.t + product) if hard else product
            value = 0 * product if 0 < o.filter_above < product else value
            logits.append(target if label == labels[i] else (o.scale or a) * value)
        losses.append(torch.logsumexp(torch.stack(logits), 0) - target)
    loss = torch.stack(losses).mean()
    if name == "magface":
        g = [1 / held(a, o) + held(a, o) / o.norm_high**2 for a in lengths]
        loss = loss + o.penalty_weight * torch.stack(g).mean()
    return loss


def dense_loss(
    loss: MarginLoss, embeddings: Tensor, centres: Tensor, labels: Tensor, slopes: bool = False
) -> tuple[Tensor, Targets]:
    """What a head computes. `slopes`: take the gradient of the other classes from `others` instead of autograd."""
    counted, column = labels >= 0, labels.clamp_min(0)[:, None]
    norm = embeddings.norm(dim=1)
    products = F.normalize(embeddings) @ (F.normalize(centres) if loss.unit_centres else centres).T
    targets = loss.targets(products.gather(1, column)[:, 0], norm, counted, STEP)
    value, slope = loss.others(products, targets.bar)
    if slopes:
        value = value.detach() + (1 if slope is None else slope) * (products - products.detach())
    logits = (targets.scale.reshape(-1, 1) * value).scatter(1, column, targets.logits[:, None])
    mean = torch.where(counted, logits.logsumexp(1) - targets.logits, 0).sum() / counted.sum()
    return mean if targets.penalty is None else mean + targets.penalty, targets


def faces(nearest: float = 0.01, count: int = 14, size: int = 6, classes: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings, centres and labels (float64): of any angle to the own centre, from `nearest` to pi - `nearest`, of
    lengths from 3 to 130; two labels are -1."""
    torch.manual_seed(3)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, size, dtype=torch.float64)
    own = F.normalize(centres)[labels]
    across = torch.randn(count, size, dtype=torch.float64)
    across = F.normalize(across - (across * own).sum(1, keepdim=True) * own)
    angles = torch.linspace(nearest, math.pi - nearest, count, dtype=torch.float64)[:, None]
    lengths = torch.linspace(3, 130, count, dtype=torch.float64)[torch.randperm(count), None]
    labels[torch.tensor([2, 9])] = -1
    return lengths * (angles.cos() * own + angles.sin() * across), centres, labels


def gradients(value: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, retain_graph=True)


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


# --- faces that do not count, statistics ------------------------------------------------------------------------------


@every_case
def test_faces_that_do_not_count_influence_nothing(name: str, options: dict[str, Any]) -> None:
    """Whatever stands in their places: logits, penalty, statistics and gradients of the others stay the same."""
    generator = torch.Generator().manual_seed(0)
    counted = torch.tensor([True, False, True, True, False, True, False, True])
    seen = []
    for junk in (0.0, -1.0, 1.0, 0.37):
        cosine = torch.rand(8, generator=generator.manual_seed(1), dtype=torch.float64) * 2 - 1
        norm = torch.rand(8, generator=generator, dtype=torch.float64) * 100 + 5
        cosine = cosine.where(counted, junk).requires_grad_()
        norm = norm.where(counted, abs(junk) * 1e6).requires_grad_()
        loss = make(name, **options).train()
        targets = loss.targets(cosine, norm, counted, STEP)
        total = torch.where(counted, targets.logits, 0).sum() + (0 if targets.penalty is None else targets.penalty)
        slopes = torch.autograd.grad(total, (cosine, norm), allow_unused=True)
        assert all(slope is None or (slope[~counted] == 0).all() for slope in slopes)
        assert torch.isfinite(targets.logits).all()
        seen.append([targets.logits[counted], total, *(s[counted] for s in slopes if s is not None), *loss.buffers()])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=0)


Running = Callable[[dict[str, float], np.ndarray, np.ndarray], None]


def _curricular(state: dict[str, float], cosines: np.ndarray, norms: np.ndarray) -> None:
    del norms
    if len(cosines):
        state["t"] = 0.99 * state["t"] + 0.01 * float(np.mean(cosines))


def _ada(state: dict[str, float], cosines: np.ndarray, norms: np.ndarray) -> None:
    del cosines
    if len(norms):
        state["norm_mean"] = 0.99 * state["norm_mean"] + 0.01 * float(np.mean(norms))
    if len(norms) > 1:
        state["norm_std"] = 0.99 * state["norm_std"] + 0.01 * float(np.std(norms, ddof=1))


@pytest.mark.parametrize(
    ("name", "start", "running"),
    [
        ("curricularface", {"t": 0.0}, _curricular),
        ("adaface", {"norm_mean": 20.0, "norm_std": 100.0}, _ada),
    ],
)
def test_statistics(name: str, start: dict[str, float], running: Running) -> None:
    """They start as published, run over the faces that count of each training batch, this batch included, and nothing
    else moves them: no batch without faces, no evaluation."""
    rng = np.random.default_rng(0)
    loss, state = create_loss(name).double(), dict(start)
    assert {key: buffer.item() for key, buffer in loss.named_buffers()} == start
    for step in range(60):
        cosine, norm = rng.uniform(-1, 1, 8), rng.uniform(5, 60, 8)
        counted = rng.random(8) < (0.7, 0.0, 0.15)[step % 3]
        inputs = [torch.from_numpy(x) for x in (cosine, norm, counted)]
        loss.eval().targets(*inputs, step)
        loss.train().targets(*inputs, step)
        running(state, cosine[counted], norm[counted])
        assert {key: buffer.item() for key, buffer in loss.named_buffers()} == pytest.approx(state, rel=1e-12)
    assert all(abs(state[key] - start[key]) > 1e-3 for key in start)


def test_statistics_are_used_with_the_batch_in_them() -> None:
    """As in the authors' code: t and the lengths of a step are those after its update."""
    embeddings, centres, labels = faces()
    for name in ("curricularface", "adaface"):
        loss = make(name).train()
        value, _ = dense_loss(loss, embeddings, centres, labels)
        state = {key: buffer.item() for key, buffer in loss.named_buffers()}
        assert state != {key: buffer.item() for key, buffer in make(name).named_buffers()}
        expected = reference(name, {}, embeddings, centres, labels, state)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)


@every_loss
def test_state_is_saved_and_restored(name: str) -> None:
    """A resumed loss goes on with its statistics; the losses without any have no state at all."""
    embeddings, centres, labels = faces()
    loss = create_loss(name).double()
    for _ in range(3):
        dense_loss(loss, embeddings, centres, labels)
    saved = loss.state_dict()
    assert set(saved) == {"curricularface": {"t"}, "adaface": {"norm_mean", "norm_std"}}.get(name, set())
    restored = create_loss(name).double()
    restored.load_state_dict(saved)
    values = [dense_loss(one, embeddings, centres, labels)[0].item() for one in (loss, restored)]
    assert values[0] == values[1]
    fresh = dense_loss(create_loss(name).double(), embeddings, centres, labels)[0].item()
    assert (fresh != values[0]) == bool(saved)


@every_loss
def test_forward_twice_backward_twice(name: str) -> None:
    """Statistics that move on do not spoil the backward pass of the batch before (gradient accumulation)."""
    embeddings, centres, labels = (x.requires_grad_(x.is_floating_point()) for x in faces())
    loss = make(name).train()
    first, second = (dense_loss(loss, scale * embeddings, centres, labels)[0] for scale in (1.0, 0.5))
    alone = gradients(dense_loss(make(name).train(), embeddings, centres, labels)[0], embeddings)[0]
    torch.testing.assert_close(gradients(first, embeddings)[0], alone, rtol=0, atol=0)
    assert torch.isfinite(gradients(second, embeddings)[0]).all()


@every_case
def test_nothing_waits_for_the_device(name: str, options: dict[str, Any]) -> None:
    """On tensors without values, anything that needs one on the host is an error."""
    loss = create_loss(name, **options, filter_above=0.3).to("meta").train()
    cosine = torch.empty(8, device="meta", requires_grad=True)
    targets = loss.targets(cosine, cosine.abs(), cosine.bool(), STEP)
    value, _ = loss.others(torch.empty(8, 5, device="meta", requires_grad=True), targets.bar)
    (value.sum() + targets.logits.sum()).backward()
    assert cosine.grad is not None


# --- random margins ---------------------------------------------------------------------------------------------------


def margins_of(name: str, step: int, count: int, dtype: torch.dtype = torch.float64, **options: Any) -> Tensor:
    """The margins that the faces of a batch have, all at 90 degrees."""
    cosine = torch.zeros(count, dtype=dtype)
    values = create_loss(name, **options).targets(cosine, cosine, torch.ones(count, dtype=torch.bool), step)
    margins = -values.logits / 64
    return margins.asin() if name == "elastic_arc" else margins


@pytest.mark.parametrize(("name", "mean"), [("elastic_arc", 0.5), ("elastic_cos", 0.35)])
def test_elastic_margins(name: str, mean: float) -> None:
    """Normal with the published mean and deviation; the same for the same seed and step, others for others."""
    margins = margins_of(name, 5, 20_000)
    assert margins.mean().item() == pytest.approx(mean, abs=0.002)
    assert margins.std().item() == pytest.approx(0.05, rel=0.03)
    assert ((margins - mean).abs() < 0.05).double().mean().item() == pytest.approx(0.683, abs=0.015)
    torch.testing.assert_close(margins_of(name, 5, 20_000), margins, rtol=0, atol=0)
    torch.testing.assert_close(margins_of(name, 5, 100), margins[:100], rtol=0, atol=0)
    torch.testing.assert_close(margins_of(name, 5, 100, torch.float32), margins[:100].float(), rtol=0, atol=1e-6)
    for step, seed in ((6, 0), (5, 1), (0, 5)):
        assert (margins_of(name, step, 100, seed=seed) != margins[:100]).all()


@pytest.mark.parametrize("name", ["elastic_arc", "elastic_cos"])
def test_elastic_plus_gives_the_largest_margin_to_the_farthest_face(name: str) -> None:
    """The margins drawn for the faces that count, by rank of their angles; equal angles or none counted are no harm."""
    loss = create_loss(name, plus=True)
    plain = create_loss(name, std=loss.std)
    cosine = torch.tensor([0.3, 9.0, -0.2, 0.9, -9.0, 0.1, 0.1])
    counted = torch.tensor([True, False, True, True, False, True, True])
    drawn = plain.margins(cosine, counted, 3)[counted]
    given = loss.margins(cosine, counted, 3)[counted]
    assert not torch.equal(drawn, given)
    assert sorted(drawn.tolist()) == sorted(given.tolist())
    by_angle = given[cosine[counted].argsort(descending=True, stable=True)]
    assert by_angle.tolist() == sorted(given.tolist())
    assert torch.isfinite(loss.margins(cosine, counted & False, 3)).all()


def test_elastic_deviations() -> None:
    """As published with and without plus; a given one wins, 0 means as published."""
    found = [create_loss(name, plus=plus).std for name in ("elastic_arc", "elastic_cos") for plus in (False, True)]
    assert found == [0.05, 0.0175, 0.05, 0.025]
    assert create_loss("elastic_arc", std=0.1, plus=True).std == 0.1
    assert create_loss("elastic_cos", std=0.0).std == 0.05


# --- by name ----------------------------------------------------------------------------------------------------------


@every_loss
def test_published_defaults(name: str) -> None:
    """Without options, and with None for any of them, a loss is the published one; the defaults of the settings are
    the same, 0 standing for None."""
    expected = PUBLISHED[name]
    settings = {
        key: value or None if key in ("margin", "scale") else value for key, value in asdict(LossConfig()).items()
    }
    del settings["name"]
    for loss in (create_loss(name), create_loss(name, **dict.fromkeys(expected)), create_loss(name, **settings)):
        assert type(loss) is LOSSES[name]
        assert {key: getattr(loss, key) for key in expected} == expected
        assert loss.filter_above == 0


@every_loss
def test_options_reach_the_loss(name: str) -> None:
    """Each option of a loss arrives in it; those of other losses are ignored."""
    options = {key: value / 2 + 0.25 for options in PUBLISHED.values() for key, value in options.items()}
    loss = create_loss(name, **options, filter_above=0.5)
    assert {key: getattr(loss, key) for key in PUBLISHED[name]} == {key: options[key] for key in PUBLISHED[name]}
    assert loss.filter_above == 0.5


def test_names() -> None:
    """The setting `loss.name` offers every loss there is; another name is an error that lists them."""
    assert set(get_args(get_type_hints(LossConfig)["name"])) == set(LOSSES) == set(PUBLISHED)
    with pytest.raises(ValueError, match=r"loss\.name: there is no loss 'arc'; there are softmax, normface"):
        create_loss("arc")


@pytest.mark.parametrize("name", ["adaface", "curricularface"])
def test_losses_with_statistics_know_of_parts(name: str) -> None:
    """The same faces, in one pass or again in each of three, move every statistic as far."""
    norm, cosine = torch.tensor([5.0, 9.0, 30.0]), torch.tensor([0.3, 0.1, 0.9])
    found = []
    for parts in (1, 3):
        loss = create_loss(name)
        loss.parts = parts
        for loss.part in range(parts):
            loss.targets(cosine, norm, torch.ones(3, dtype=torch.bool), 0)
        found.append(list(loss.buffers()))
    torch.testing.assert_close(*found)
    assert found[0][0] != next(create_loss(name).buffers())


def test_parts_of_a_batch_move_statistics_as_the_batch_does() -> None:
    """A batch that takes four passes: four equal values move a running mean as far as one does."""
    whole, by_parts = torch.tensor(1.0), torch.tensor(1.0)
    move_towards_(whole, torch.tensor(3.0), 0.01, 1, torch.tensor(True))
    for _ in range(4):
        move_towards_(by_parts, torch.tensor(3.0), 0.01, 4, torch.tensor(True))
    assert by_parts.item() == pytest.approx(whole.item(), rel=1e-6)


@pytest.mark.parametrize("name", ["elastic_arc", "elastic_cos"])
def test_each_part_of_a_batch_draws_margins_of_its_own(name: str) -> None:
    """Two passes of one step: other margins in each, the same again when the step is repeated."""
    loss = create_loss(name)
    cosine, counted = torch.zeros(8), torch.ones(8, dtype=torch.bool)
    draws = []
    for loss.part in (0, 1, 0):
        draws.append(loss.margins(cosine, counted, 5))
    assert torch.equal(draws[0], draws[2])
    assert not torch.isclose(draws[0], draws[1]).any()
