"""Learning-rate schedules against their formulas."""

import numpy as np
import pytest

from utils.schedules import linear_decay


def test_without_warmup_it_is_the_published_recipe() -> None:
    """insightface's recipe: peak x (1 - i / steps)."""
    np.testing.assert_allclose(linear_decay(1000, 0, 0.1), 0.1 * (1 - np.arange(1000) / 1000), rtol=1e-12)


@pytest.mark.parametrize(("steps", "warmup"), [(10, 3), (10, 10), (1, 0), (1, 1)])
def test_warmup_climbs_to_the_peak_and_the_fall_follows(steps: int, warmup: int) -> None:
    """The peak is reached once, after the warm-up; every rate is positive and none exceeds the peak."""
    rates = linear_decay(steps, warmup, 0.5)
    assert rates.shape == (steps,)
    assert rates.max() == rates[max(0, warmup - 1)] == 0.5
    assert (rates > 0).all()
    assert (np.diff(rates[:warmup]) > 0).all()
    assert (np.diff(rates[warmup:]) < 0).all()
