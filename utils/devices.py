"""Where to compute, and in which precision."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def pick_device(name: str) -> torch.device:
    """The device of the setting `common.device`; `auto` is CUDA when there is a card, else the CPU.

    Of several processes that torchrun started on a machine, each gets the card of its number (`LOCAL_RANK`); of those
    that another launcher started, the one that it sees, if it sees only one. Raises ValueError for any but CPU and CUDA
    devices, and for a CUDA card that is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"common.device: must be auto, cpu, cuda or cuda:NUMBER, got {name!r}")
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(f"common.device: {name!r} asked for, but torch sees no CUDA card")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1 and device.index is not None:
        raise ValueError(f"common.device: {processes} processes cannot share {name!r}: leave it at auto")
    number = int(os.environ.get("LOCAL_RANK", "0")) if processes > 1 else device.index or 0
    cards = torch.cuda.device_count()
    if processes > 1 and cards == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        number = 0  # srun --gpus-per-task=1 hides the others' cards
    if number >= cards:
        raise ValueError(
            f"common.device: card {number} is wanted, but there are {cards} here, counted from 0"
            + (": lower --nproc-per-node" if processes > 1 else "")
        )
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


def is_ampere_or_newer(device: torch.device) -> bool:
    """Whether it is a CUDA card that computes in bfloat16 and in TF32: of the Ampere generation, or a later one."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """The dtype to autocast to, from the setting `train.precision`; float32 means no autocast.

    `auto`: bfloat16 on CUDA cards that compute in it (Ampere and later), float16 on older ones, float32 on the CPU.
    `tf32` is float32 too, see `set_float32_products`.
    """
    if name != "auto":
        return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[name]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if is_ampere_or_newer(device) else torch.float16


def set_float32_products(name: str, device: torch.device) -> None:
    """Let convolutions and matrix products of float32 numbers use TF32, whose factors have 10 bits, on `device` or not:
    the former for the setting train.precision `tf32`. torch's default is TF32 for convolutions only.

    Raises ValueError for `tf32` where there is none: before Ampere, and on the CPU.
    """
    if name == "tf32" and not is_ampere_or_newer(device):
        raise ValueError(f"train.precision: {describe_device(device)} has no tf32; take fp32")
    if device.type != "cuda":
        return
    # First the old way, of which parts of the compiler still ask, and which fail where the two differ.
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    for backend in _cuda_backends():
        backend.fp32_precision = "tf32" if name == "tf32" else "ieee"


def describe_precision(dtype: torch.dtype, device: torch.device) -> str:
    """What the network computes in, in words; for float32 on a card, how products round."""
    name = str(dtype).removeprefix("torch.")
    if dtype != torch.float32 or device.type != "cuda":
        return name
    return name + (" (TF32 products)" if _cuda_backends()[0].fp32_precision == "tf32" else " (IEEE products)")


def _cuda_backends() -> tuple[Any, ...]:
    return (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]


def describe_device(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    return f"{device} ({torch.get_num_threads()} threads)"


def autocast(device: torch.device, precision: torch.dtype) -> torch.autocast:
    """Autocast to `precision`; none if that is float32.

    Weights in `precision` are not cached: each is used once a step, and a CUDA graph must not capture a cached one.
    """
    return torch.autocast(device.type, precision, enabled=precision != torch.float32, cache_enabled=False)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Compute in float32 on `device`: no TF32 on CUDA, no bfloat16 products on the CPU, no autocast."""
    cpu: tuple[Any, ...] = (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv)  # type: ignore[attr-defined]
    backends = (*_cuda_backends(), *cpu)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
