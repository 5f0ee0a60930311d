"""What a network of any family must be able to do: sizes, layouts, precisions, exports, compilers, recomputation."""

import copy
from pathlib import Path

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from models import create_network
from models.backbones import ir, iresnet
from models.backbones.ir import SqueezeExcitation
from models.recompute import recompute_blocks
from small_networks import SMALL
from utils.training.flops import forward_flops
from utils.training.optimizers import parameter_groups

PIXELS = 32
# Those with blocks, of networks that differ in numbers alone one.
RECOMPUTED = [name for name in SMALL if name not in ("demo", "mbf_large", "mobilefacenet_y1")]
CONVOLUTIONAL = [name for name in SMALL if name.startswith(("iresnet", "ir", "evolve", "mbf", "mobile", "demo"))]


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """IResNets and IRs of depth 18 have two units in their first stage, one in the others: all kinds that there are."""
    monkeypatch.setitem(iresnet._BLOCKS, 18, (2, 1, 1, 1))
    monkeypatch.setitem(ir._UNITS, 18, (2, 1, 1, 1))


def small(name: str, size: int | tuple[int, int] = PIXELS, embedding_size: int = 16) -> nn.Module:
    """A network whose norms, slopes and layer scales are random, so that no part of it is without effect."""
    torch.manual_seed(0)
    network = SMALL[name](embedding_size, size)
    with torch.no_grad():
        for key, value in network.named_parameters():
            if value.ndim <= 1 and value.requires_grad:
                value.uniform_(0.1, 0.6)
            elif key.endswith("mask_token"):
                value.uniform_(-1, 1)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, SqueezeExcitation):
                module.fc1.weight.abs_()  # of its few hidden channels, some must be above 0
    return network


def faces(size: int | tuple[int, int] = PIXELS, number: int = 3, seed: int = 1) -> Tensor:
    shape = (size, size) if isinstance(size, int) else size
    return torch.rand(number, 3, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def close(found: Tensor, expected: Tensor, relative: float = 1e-5) -> bool:
    """Within `relative` of the length of the whole."""
    return bool((found - expected).norm() <= relative * expected.norm())


@pytest.mark.parametrize("size", [112, 96, 128, (112, 96), 224])
@pytest.mark.parametrize("name", SMALL)
def test_other_sizes(name: str, size: int | tuple[int, int]) -> None:
    """Any size that can work gives float32 embeddings of the length asked for, faces that are not square too."""
    with torch.device("meta" if not name.startswith("timm") else "cpu"):
        network = SMALL[name](24, size).eval()
        pixels = torch.zeros(2, 3, *((size, size) if isinstance(size, int) else size))
        with torch.no_grad():
            embeddings = network(pixels)
    assert embeddings.shape == (2, 24)
    assert embeddings.dtype == torch.float32


@pytest.mark.parametrize("size", [100, 17, 8, (112, 100)])
@pytest.mark.parametrize("name", CONVOLUTIONAL)
def test_sizes_that_do_not_halve_four_times_are_refused(name: str, size: int | tuple[int, int]) -> None:
    """An error at once, with the size, not a shape error later."""
    wrong = size if isinstance(size, int) else 100
    with torch.device("meta"), pytest.raises(ValueError, match=f"image size that is a multiple of 16, got {wrong}"):
        SMALL[name](16, size)


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("vit_t", 8, "a vision transformer needs images of 9 pixels or more, got 8x8"),
        ("edgeface_xxs", 31, "EdgeFace needs images of 32 pixels or more, got 31x31"),
        ("mobilefacenet_xiaoccer", 128, "this MobileFaceNet needs an image size that is a multiple of 112, got 128"),
        ("timm:convnext_atto", 16, r"timm:convnext_atto cannot take faces of 16x16 pixels"),
    ],
)
def test_sizes_that_cannot_work_are_refused(name: str, size: int, message: str) -> None:
    """The same for the others."""
    with pytest.raises(ValueError, match=message):
        create_network(name, 16, size)


@pytest.mark.parametrize("name", SMALL)
def test_channels_last_is_kept(name: str) -> None:
    """Every convolution gets and gives channels last when the network does, so nothing is turned over on the way; the
    numbers are those of the other layout."""
    network = small(name).eval()
    last = copy.deepcopy(network).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    turned: list[str] = []

    def look(path: str, *tensors: Tensor) -> None:
        if not all(x.stride(1) == 1 or x.shape[2:] == (1, 1) for x in tensors):
            turned.append(path)

    for path, module in last.named_modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, inputs, output, path=path: look(path, inputs[0], output))
    with torch.no_grad():
        expected = network(faces())
        found = last(faces().contiguous(memory_format=torch.channels_last))
    assert turned == []
    assert close(found, expected)


@pytest.mark.parametrize("name", SMALL)
def test_embeddings_are_float32_under_autocast(name: str) -> None:
    """Half precision ends before the last layers: float32 that is not rounded, near that of full precision."""
    network = small(name).eval()
    with torch.no_grad():
        full = network(faces())
        with torch.autocast("cpu", dtype=torch.bfloat16):
            half = network(faces())
    assert half.dtype == torch.float32
    assert (half != half.bfloat16().float()).any()
    assert not torch.equal(half, full), "autocast reached the network"
    assert close(half, full, 0.05)


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns(name: str) -> None:
    """Each parameter that is to learn gets a gradient, so that ranks wait for none in vain."""
    network = small(name)
    network(faces(number=8)).square().sum(1).sqrt().sum().backward()
    for key, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, key
            assert torch.isfinite(parameter.grad).all(), key
            assert parameter.grad.abs().max() > 0, key
    fixed = {key for key, parameter in network.named_parameters() if not parameter.requires_grad}
    assert fixed == {"iresnet": {"features.weight"}, "mobilefacenet_y1": {"linear1.bn.weight"}}.get(name, set())


@pytest.mark.parametrize(
    ("name", "precision"),
    [("iresnet", torch.float32), *((name, torch.bfloat16) for name in RECOMPUTED)],
)
def test_recomputed_blocks_change_nothing(name: str, precision: torch.dtype) -> None:
    """Embeddings, gradients and statistics are equal to the bit, masks and dropped branches the same."""
    plain = small(name)
    recomputing = copy.deepcopy(plain)
    assert recompute_blocks(recomputing) >= 2
    for seed in (1, 2):
        embeddings = []
        for network in (plain, recomputing):
            torch.manual_seed(seed)
            with torch.autocast("cpu", precision, enabled=precision != torch.float32):
                embeddings.append(network(faces(number=4, seed=seed)))
            (embeddings[-1] * torch.linspace(-1, 1, 64).view(4, 16)).sum().backward()
        assert torch.equal(*embeddings)
    for (key, one), other in zip(plain.named_parameters(), recomputing.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None), key
        assert one.grad is None or other.grad is None or torch.equal(one.grad, other.grad), key
    for key, value in plain.state_dict().items():
        assert torch.equal(value, recomputing.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        ("iresnet", True),
        ("ir_se", False),
        ("mbf", False),
        ("vit", True),
        ("vit", False),
        ("edgeface_gamma", True),
        ("timm_convolutions", False),
    ],
)
def test_the_whole_network_compiles(name: str, recompute: bool) -> None:
    """One graph in training, without a break, with the same embeddings; the blocks computed anew too."""
    network = small(name)
    expected = copy.deepcopy(network)
    if recompute:
        recompute_blocks(network)
    torch._dynamo.reset()
    compiled = torch.compile(network, backend="eager", fullgraph=True)
    torch.manual_seed(5)
    found = compiled(faces())
    torch.manual_seed(5)
    assert close(found, expected(faces()))
    torch._dynamo.reset()


def run_onnx(path: Path, inputs: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


@pytest.mark.parametrize("name", SMALL)
def test_onnx_gives_the_same_embeddings(name: str, tmp_path: Path) -> None:
    """Exported with two faces and any batch, run by onnxruntime with five."""
    network = small(name).eval()
    torch.onnx.export(
        network,
        (faces(number=2),),
        str(tmp_path / "network.onnx"),
        dynamo=False,
        input_names=["input"],
        dynamic_axes={"input": {0: "batch"}},
    )
    with torch.no_grad():
        expected = network(faces(number=5))
    assert close(run_onnx(tmp_path / "network.onnx", faces(number=5)), expected)


@pytest.mark.parametrize("name", SMALL)
def test_only_weights_of_layers_decay(name: str) -> None:
    """Norms, slopes, biases, positions, tokens, temperatures and layer scales rest; matrices and kernels do not."""
    with torch.device("cpu" if name.startswith("timm") else "meta"):
        network = SMALL[name](16, PIXELS)
    decaying = {key for group in parameter_groups(network, 0.1) if group["weight_decay"] for key, _ in group["params"]}
    layers = {f"{path}.weight" for path, module in network.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    assert decaying == layers


def test_operations_are_counted_without_values() -> None:
    """On the meta device as on the CPU, attention included, for faces of any shape."""
    for name in ("vit", "edgeface", "ir_se"):
        on_cpu = forward_flops(SMALL[name](16, (48, 64)), (48, 64))
        with torch.device("meta"):
            assert forward_flops(SMALL[name](16, (48, 64)), (48, 64)) == on_cpu > 0
