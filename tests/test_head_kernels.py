"""The head's own kernels: what they compute, without a card, and when they are taken."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from models.heads import BlockwiseHead, RowSGD
from models.heads.block_steps import BlockMaths
from models.heads.blockwise import Chosen
from models.heads.fused_steps import ON_CHIP, FusedMaths, Tile, can_fuse
from models.losses import LOSSES, create_loss
from utils.compiling import Compiled
from utils.ranks import Ranks

CUDA = torch.device("cuda")


def test_kernels_compute_what_blocks_do() -> None:
    """Each kernel, and heads that train with them, against the plain formulas; the kernels run in an interpreter, which
    has to be chosen before they are defined: in a process of its own."""
    pytest.importorskip("triton", minversion="3.8")  # interpreters before it fail with NumPy 2.4
    program = Path(__file__).with_name("interpreted_kernels.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", program],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=program.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert " passed" in done.stdout


def compile_for(capability: int, kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """`kernel` for cards of a compute capability (90: Hopper), as a launch with these arguments has it compiled."""
    from triton import compile as compile_kernel
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.tools.tensor_descriptor import TensorDescriptor

    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64"}
    signature, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = arguments[place] if place < len(arguments) else None
        if isinstance(value, TensorDescriptor):
            signature[name] = f"tensordesc<{names[value.base.dtype]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[name], aligned[place,] = f"*{names[value.dtype]}", [["tt.divisibility", 16]]
        elif value is not None:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
        else:
            signature[name] = "constexpr"
    constants = {(kernel.arg_names.index(name),): value for name, value in options.items() if name in signature}
    rest = {name: value for name, value in options.items() if name not in signature}
    return compile_kernel(ASTSource(kernel, signature, constants, aligned), GPUTarget("cuda", capability, 32), rest)


@pytest.mark.parametrize("matmul", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("faces", "filter_above", "learns"), [(512, 0.0, False), (512, 0.4, True), (64, 0.0, False)])
def test_kernels_compile_for_cards(
    faces: int,
    filter_above: float,
    learns: bool,
    matmul: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Every kernel, as it is launched, is what the compiler for cards takes, which no interpreter tells, and needs no
    more shared memory than `can_fuse` asks for: seen without a card, for Hopper's and Blackwell's."""
    kernels = pytest.importorskip("models.heads.kernels")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: object) -> Any:
            return lambda *arguments, **options: launched.append((self.kernel, arguments, options))

    for kernel in ("log_sum_exp", "gradients_of_products", "sgd_step"):
        monkeypatch.setattr(kernels, kernel, Recorded(getattr(kernels, kernel)))
    loss = create_loss("arcface", filter_above=filter_above)
    FusedMaths(loss, 1, matmul, RowSGD()).attempt(faces, torch.ones(1, 512))
    assert len(launched) == 3
    for kernel, arguments, options in launched:
        own = {name: learns for name in ("SCALE_STRIDE", "LEARNS") if name in options}
        for capability in (90, 100):
            assert compile_for(capability, kernel, arguments, {**options, **own}).metadata.shared <= ON_CHIP


def test_tiles_fit_small_batches() -> None:
    """No half of a tile is computed for nothing; 64 rows are what a card multiplies at least."""
    tile = Tile(256, 128, 64, 8, 3)
    assert [tile.for_rows(faces).rows for faces in (1, 64, 65, 128, 129, 512)] == [64, 64, 128, 128, 256, 256]
    assert tile.for_rows(1)[1:] == tile[1:]


def test_kernels_that_do_not_run_are_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton cannot compile them, as without a card, a warning says why and torch.compile has its turn."""
    monkeypatch.setattr("models.heads.blockwise.can_fuse", lambda *_: True)
    head = BlockwiseHead(create_loss("arcface"), 40, 32, RowSGD(), 8, block=16)
    with pytest.warns(UserWarning, match="the head's kernels do not run here"):
        head.compile_blocks("eager")
    assert not isinstance(head.maths, FusedMaths)
    assert isinstance(head.block_forward, Compiled)
    embeddings = torch.randn(8, 32, requires_grad=True)
    head(embeddings, torch.arange(8), 0).loss.backward()
    assert embeddings.grad is not None


def test_blocks_are_what_a_card_can_launch() -> None:
    """A grid has 65,535 tiles at most in the direction of classes: a block of all, as the engine dense has it with
    sampling or on several cards, is done in several."""
    head = BlockwiseHead(create_loss("arcface"), 40, 32, RowSGD(), 8, block=10_000_000)
    head.fuse_blocks()
    for tile in (head.maths.tiles.backward.columns, head.maths.tiles.update.rows):  # type: ignore[attr-defined]
        assert head.block <= 65_535 * tile
    assert head.block > 4_000_000
    head = BlockwiseHead(create_loss("arcface"), 40, 512, RowSGD(), 8, block=10_000_000)
    head.fuse_blocks()
    assert 2**31 - 4 * 512 <= 4 * 512 * head.block < 2**31, "more bytes are no int, which Triton counts them in"
    head = BlockwiseHead(create_loss("arcface"), 40, 32, RowSGD(), 4096, block=10_000_000)
    head.fuse_blocks()
    assert 2**31 - 2 * 4096 * 16 <= 2 * 4096 * head.block < 2**31, "so it is with the gradients of products"


def test_forward_is_one_pass() -> None:
    """Over all classes of the rank, also over none; not over sampled ones, which would be copied all at once."""
    for sample_rate, classes, at_once in ((1.0, 40, 40), (0.5, 40, 16), (1.0, 3, 1)):
        ranks = cast(Ranks, SimpleNamespace(rank=0, size=4 if classes == 3 else 1))
        head = BlockwiseHead(
            create_loss("arcface"), classes, 32, RowSGD(), 8, block=16, sample_rate=sample_rate, ranks=ranks
        )
        head.fuse_blocks()
        assert (head.block, head.forward_block) == (16, at_once)
        assert head.maths.most_classes(32, 8)[0] == 2**31 // 128 - 1  # type: ignore[attr-defined]
    assert len(head.held) == 0
    assert list(head.blocks(Chosen(None, 0, torch.zeros(8)), head.forward_block)) == []


def test_running_out_of_memory_is_no_reason_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch.compile makes needs more: the error says so at once."""

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr("models.heads.blockwise.can_fuse", lambda *_: True)
    monkeypatch.setattr(FusedMaths, "attempt", fail)
    with pytest.raises(torch.OutOfMemoryError):
        BlockwiseHead(create_loss("arcface"), 40, 32, RowSGD(), 8).compile_blocks()


def maths(name: str = "arcface", sub_centers: int = 1, matmul: torch.dtype | None = torch.bfloat16) -> BlockMaths:
    return BlockMaths(create_loss(name), sub_centers, matmul, RowSGD())


def test_which_heads_have_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses with a margin for the own class alone, on cards with the memory for it on chip; never on a CPU."""
    card = SimpleNamespace(major=9, shared_memory_per_block_optin=232448)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    assert {name for name in LOSSES if not can_fuse(maths(name), 512, CUDA)} == {"softmax", "curricularface"}
    assert not can_fuse(maths(), 512, torch.device("cpu"))
    assert not can_fuse(maths(sub_centers=3), 512, CUDA)
    assert not can_fuse(maths(matmul=None), 512, CUDA)
    assert not can_fuse(maths(), 100, CUDA)
    card.shared_memory_per_block_optin = 101376
    assert not can_fuse(maths(), 512, CUDA)
    card.shared_memory_per_block_optin, card.major = 232448, 8
    assert not can_fuse(maths(), 512, CUDA)
