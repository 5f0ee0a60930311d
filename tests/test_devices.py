"""Device and precision: found without a setting, refused with a reason."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from utils.devices import describe_precision, full_precision, pick_device, pick_precision, set_float32_products


def test_auto_takes_cuda_when_there_is_a_card() -> None:
    """GPU or CPU without a setting."""
    assert pick_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device("cpu").type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_a_missing_card_is_an_error() -> None:
    """Asked for CUDA, the program never quietly computes on the CPU."""
    with pytest.raises(ValueError, match=r"common\.device: 'cuda' asked for"):
        pick_device("cuda")


@pytest.mark.parametrize("name", ["mps", "meta", "abacus"])
def test_other_devices_are_refused(name: str) -> None:
    """Only what the program is tested on: CPU and CUDA."""
    with pytest.raises(ValueError, match=rf"common\.device: must be auto, cpu, cuda .*'{name}'"):
        pick_device(name)


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_precision_is_what_the_card_is_good_at(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 from Ampere on, float16 before, float32 on the CPU; a setting overrides all of it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert pick_precision("auto", torch.device("cuda")) == dtype
    assert pick_precision("auto", torch.device("cpu")) == torch.float32
    assert pick_precision("fp32", torch.device("cuda")) == torch.float32
    assert pick_precision("tf32", torch.device("cuda")) == torch.float32


@pytest.fixture
def backends(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, ...]]:
    """Where torch keeps how a card multiplies float32, and a made-up card of Ampere's kind."""
    found = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    all_backends = *found, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before, allowed = [backend.fp32_precision for backend in all_backends], torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    yield found
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(all_backends, before, strict=True):
        backend.fp32_precision = precision
    torch.backends.cudnn.allow_tf32 = allowed  # else torch.export, in a later test, finds that old and new way differ


def test_float32_on_a_card_is_what_was_asked_for(backends: tuple[Any, ...]) -> None:
    """Convolutions and matrix products alike, and said: IEEE unless tf32 is asked for, whatever torch's default."""
    card = torch.device("cuda")
    for name, kept, words in (("tf32", "tf32", "TF32"), ("fp32", "ieee", "IEEE"), ("auto", "ieee", "IEEE")):
        backends[1].fp32_precision = "tf32"
        set_float32_products(name, card)
        assert [backend.fp32_precision for backend in backends] == [kept, kept]
        assert describe_precision(torch.float32, card) == f"float32 ({words} products)"
        # The compiler asks in the old way when it tries which kernel is fastest; torch raises where the two differ.
        assert torch.get_float32_matmul_precision() == {"tf32": "high", "ieee": "highest"}[kept]
        assert torch.backends.cuda.matmul.allow_tf32 == (kept == "tf32")
        assert torch.backends.cudnn.allow_tf32 == (kept == "tf32")
    assert describe_precision(torch.bfloat16, card) == "bfloat16"
    assert describe_precision(torch.float32, torch.device("cpu")) == "float32"


@pytest.mark.usefixtures("backends")
def test_tf32_is_for_cards_that_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that would do nothing is refused."""
    with pytest.raises(ValueError, match=r"train\.precision: cpu .* has no tf32"):
        set_float32_products("tf32", torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(ValueError, match=r"train\.precision: a card .* has no tf32"):
        set_float32_products("tf32", torch.device("cuda"))


def test_full_precision_restores_what_was_set() -> None:
    """Quoted scores are computed in float32, and a user's own TF32 setting survives."""
    backend = torch.backends.cuda.matmul
    before = backend.fp32_precision
    try:
        backend.fp32_precision = "tf32"
        with torch.autocast("cpu", torch.bfloat16), full_precision(torch.device("cpu")):
            assert backend.fp32_precision == "ieee"
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
        assert backend.fp32_precision == "tf32"
    finally:
        backend.fp32_precision = before


def test_each_process_has_a_card_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Card by card as torchrun counts a machine's processes; never two on one card, never one that is not there."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cuda:2", "cpu")] == [
        "cuda:0",
        "cuda:0",
        "cuda:2",
        "cpu",
    ]
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert [str(pick_device(name)) for name in ("auto", "cuda", "cpu")] == ["cuda:3", "cuda:3", "cpu"]
    assert chosen == [0, 0, 2, 3, 3]
    with pytest.raises(ValueError, match="8 processes cannot share 'cuda:1'"):
        pick_device("cuda:1")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "device_count", lambda: 1)
        assert str(pick_device("auto")) == "cuda:0", "a launcher that lets each see its own card alone"
        patch.setenv("TORCHELASTIC_RUN_ID", "x")
        with pytest.raises(ValueError, match="card 3 is wanted, but there are 1 here, counted from 0: lower --nproc"):
            pick_device("auto")
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(ValueError, match="card 4 is wanted, but there are 4 here, counted from 0: lower --nproc"):
        pick_device("auto")
