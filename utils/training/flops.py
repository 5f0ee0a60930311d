"""Floating-point operations of a network, and how many a second a device reaches."""

import math
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm

from models.backbones.sizes import ImageSize, height_and_width


def forward_flops(network: nn.Module, image_size: ImageSize, training: bool = False) -> int:
    """Floating-point operations of convolutions and matrix products, attention's too, for one face; a multiply-add
    counts as two. With `training` of a face that is trained on, of which some networks leave a part out.

    A network on torch.device("meta") costs neither time nor memory to count.
    """
    from torch.utils.flop_counter import FlopCounterMode  # brings Triton

    device = next(network.parameters()).device
    modes = [(module, module.training) for module in network.modules()]
    for module, _ in modes:
        module.training = training and not isinstance(module, _BatchNorm)  # which wants two faces, and keeps statistics
    try:
        # As products: not every version of torch counts the attention that is fused on the CPU.
        with (
            FlopCounterMode(display=False) as counter,
            torch.no_grad(),
            sdpa_kernel(SDPBackend.MATH),
            torch.random.fork_rng([device] if device.type == "cuda" else []),
        ):
            network(torch.zeros(1, 3, *height_and_width(image_size), device=device))
    finally:
        for module, mode in modes:
            module.training = mode
    return int(counter.get_total_flops())


def quick_matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """`matmul_flops_per_s` in a fraction of a second, too small on a CPU to be quoted."""
    return matmul_flops_per_s(device, dtype, *((4096, 20) if device.type == "cuda" else (512, 4)))


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype, size: int = 4096, repeats: int = 20) -> float:
    """What `device` reaches in products of square matrices of `size` rows, which MFU is measured by."""
    left = torch.randn(size, size, device=device).to(dtype)
    right = torch.randn(size, size, device=device).to(dtype)
    return 2 * size**3 / _fastest(lambda: left @ right, repeats, 3, device)


def copy_bytes_per_s(device: torch.device) -> float:
    """Bytes read and written a second when a large tensor is copied."""
    on_card = device.type == "cuda"
    source = torch.zeros(2**28 if on_card else 2**26, dtype=torch.uint8, device=device)
    repeats = 20 if on_card else 1  # a card copies it in less than the host takes to ask for it and to wait
    target = source.clone()
    return 2 * len(source) / _fastest(lambda: target.copy_(source), repeats, 5, device)


def _fastest(work: Callable[[], object], repeats: int, rounds: int, device: torch.device) -> float:
    """Seconds that `work` takes on `device`, in the best of some rounds of `repeats`."""
    best = math.inf
    for _ in range(rounds):
        _wait(device)
        began = time.perf_counter()
        for _ in range(repeats):
            work()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best / repeats


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
