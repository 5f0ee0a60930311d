"""Margins against their formulas in float64: values, gradients, the ends at cos = +-1, and past pi - m."""

import math

import pytest
import torch
from torch import Tensor

from models.margins import ArcFace, CosFace, Margin, NoMargin, create_margin

MARGINS = [0.1, 0.3, 0.5, 1.0, 1.5]
# Well inside (-1, 1), where acos has a bounded slope.
INNER = torch.linspace(-0.999, 0.999, 4001, dtype=torch.float64)


def arcface_formula(cosine: Tensor, margin: float) -> Tensor:
    """cos(t + m) by way of the angle, mirrored at -1 once t + m has passed pi."""
    shifted = torch.acos(cosine) + margin
    return torch.where(shifted <= math.pi, torch.cos(shifted), -2 - torch.cos(shifted))


def gradient(function, cosine: Tensor) -> Tensor:
    cosine = cosine.clone().requires_grad_()
    (slope,) = torch.autograd.grad(function(cosine).sum(), cosine)
    return slope


@pytest.mark.parametrize("margin", MARGINS)
def test_arcface_is_the_formula(margin: float) -> None:
    """Value and gradient are those of cos(acos(c) + m), over both branches."""
    ours = ArcFace(margin)
    torch.testing.assert_close(ours(INNER), arcface_formula(INNER, margin), rtol=0, atol=1e-12)
    expected = gradient(lambda c: arcface_formula(c, margin), INNER)
    torch.testing.assert_close(gradient(ours, INNER), expected, rtol=1e-9, atol=1e-9)
    assert (torch.acos(INNER) + margin > math.pi).any(), "the second branch must be among the points"


def test_arcface_known_values() -> None:
    """A few angles by hand: t = 0, 60 and 90 degrees, the turning point, and t = pi."""
    margin = 0.5
    cosine = torch.tensor([1.0, 0.5, 0.0, math.cos(math.pi - margin), -1.0], dtype=torch.float64)
    expected = [math.cos(0.5), math.cos(math.pi / 3 + 0.5), -math.sin(0.5), -1.0, -2 + math.cos(0.5)]
    assert ArcFace(margin)(cosine).tolist() == pytest.approx(expected, abs=2e-6)
    assert ArcFace()(cosine).tolist() == ArcFace(0.5)(cosine).tolist(), "0.5 is the published margin"


@pytest.mark.parametrize("margin", MARGINS)
def test_arcface_rises_with_the_cosine_and_has_no_jump(margin: float) -> None:
    """A better angle always earns a better logit, past pi - m too, and a small step never a big one."""
    # Steps of equal angle, so that the slope in the angle, at most 1, bounds every step.
    angles = torch.linspace(0, math.pi, 20_001, dtype=torch.float64)
    values = ArcFace(margin)(torch.cos(angles))
    steps = values[:-1] - values[1:]
    assert (steps > -1e-15).all()
    inner = (angles[:-1] > 1e-3) & (angles[1:] < math.pi - 1e-3) & ((angles[:-1] + margin - math.pi).abs() > 1e-3)
    assert (steps[inner] > 0).all()
    assert steps.max() <= (angles[1] - angles[0]) * 1.001 + 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [ArcFace(0.5), ArcFace(0.0), ArcFace(1.5), CosFace(0.4), NoMargin()])
def test_finite_at_the_ends(margin: Margin, dtype: torch.dtype) -> None:
    """At cos = +-1, next to it, and a rounding error beyond it, neither value nor gradient is NaN or infinite."""
    one = torch.ones(1, dtype=dtype)
    near = [torch.nextafter(one, 0 * one), torch.nextafter(one, 2 * one), one, one - 1e-6, one + 1e-6]
    cosine = torch.cat([sign * value for value in near for sign in (1, -1)])
    values, slopes = margin(cosine), gradient(margin, cosine)
    assert values.dtype == dtype
    assert torch.isfinite(values).all()
    assert torch.isfinite(slopes).all()
    assert (slopes.abs() < 1.1e6).all()
    assert (values <= 1 + 1e-5).all()


def test_float32_keeps_its_digits_near_one() -> None:
    """Well-trained faces have cosines close to 1, where 1 - c * c would lose half of the digits."""
    angles = torch.linspace(0.02, 0.3, 1000, dtype=torch.float64)
    cosine = torch.cos(angles).float()
    exact = arcface_formula(cosine.double(), 0.5)
    assert (ArcFace(0.5)(cosine).double() - exact).abs().max() < 2e-7


def test_cosface_and_softmax() -> None:
    """cos t - m and cos t, with slope 1 everywhere."""
    torch.testing.assert_close(CosFace(0.35)(INNER), INNER - 0.35, rtol=0, atol=0)
    torch.testing.assert_close(NoMargin(0.35)(INNER), INNER, rtol=0, atol=0)
    assert CosFace()(torch.zeros(1)).item() == pytest.approx(-0.4)
    for margin in (CosFace(0.35), NoMargin()):
        assert (gradient(margin, INNER) == 1).all()


@pytest.mark.parametrize(("name", "kind"), [("arcface", ArcFace), ("cosface", CosFace), ("softmax", NoMargin)])
def test_margins_by_name(name: str, kind: type) -> None:
    """The names of the setting `loss.name` are these formulas, with the margin given."""
    created = create_margin(name, 0.2)
    assert type(created) is kind
    torch.testing.assert_close(created(INNER), kind(0.2)(INNER))


def test_arcface_without_margin_is_softmax() -> None:
    """A margin of 0 changes nothing."""
    torch.testing.assert_close(ArcFace(0.0)(INNER), INNER, rtol=0, atol=1e-15)
