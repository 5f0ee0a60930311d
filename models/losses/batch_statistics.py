"""Means over the faces that count, without waiting for the device to know how many they are."""

import torch
from torch import Tensor


def counted_mean(values: Tensor, counted: Tensor) -> Tensor:
    """Mean of `values` ([B]) where `counted` (bool [B]); 0 where none is. Differentiable."""
    return torch.where(counted, values, 0.0).sum() / counted.sum().clamp_min(1)


def counted_std(values: Tensor, counted: Tensor) -> Tensor:
    """Their standard deviation, with Bessel's correction as in torch.std; 0 for one face or none."""
    squares = torch.where(counted, (values - counted_mean(values, counted)) ** 2, 0.0).sum()
    return (squares / (counted.sum() - 1).clamp_min(1)).sqrt()


def move_towards_(average: Tensor, value: Tensor, rate: float, parts: int, enough: Tensor) -> None:
    """`average` += `rate` * (`value` - `average`) in place, if `enough` (bool scalar) holds.

    Called for each of `parts` micro-batches, with a smaller rate, so that together they come to the same.
    """
    if parts > 1:
        rate = 1 - (1 - rate) ** (1 / parts)
    average += torch.where(enough, rate * (value - average), 0.0)
