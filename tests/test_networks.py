"""Networks: insightface's parameter names and architecture, so that its checkpoints load and mean the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import NETWORKS, create_network
from models.backbones.iresnet import IResNet
from models.backbones.mobilefacenet import MobileFaceNet

UNITS = {"r18": (2, 2, 2, 2), "r34": (3, 4, 6, 3), "r50": (3, 4, 14, 3), "r100": (3, 13, 30, 3), "r200": (6, 26, 60, 6)}
Shapes = dict[str, tuple[int, ...]]


def norm(name: str, channels: int) -> Shapes:
    values = dict.fromkeys((f"{name}.{v}" for v in ("weight", "bias", "running_mean", "running_var")), (channels,))
    return {**values, f"{name}.num_batches_tracked": ()}


def iresnet_shapes(units: tuple[int, ...], embedding_size: int, grid: int) -> Shapes:
    """What insightface's `backbone.pth` of an IResNet holds."""
    shapes: Shapes = {"conv1.weight": (64, 3, 3, 3), **norm("bn1", 64), "prelu.weight": (64,)}
    inputs = 64
    for layer, (count, width) in enumerate(zip(units, (64, 128, 256, 512), strict=True), 1):
        for i in range(count):
            unit = f"layer{layer}.{i}"
            shapes |= {**norm(f"{unit}.bn1", inputs), f"{unit}.conv1.weight": (width, inputs, 3, 3)}
            shapes |= {**norm(f"{unit}.bn2", width), f"{unit}.prelu.weight": (width,)}
            shapes |= {f"{unit}.conv2.weight": (width, width, 3, 3), **norm(f"{unit}.bn3", width)}
            if i == 0:
                shapes |= {f"{unit}.downsample.0.weight": (width, inputs, 1, 1), **norm(f"{unit}.downsample.1", width)}
            inputs = width
    shapes |= {**norm("bn2", 512), "fc.weight": (embedding_size, 512 * grid**2), "fc.bias": (embedding_size,)}
    return {**shapes, **norm("features", embedding_size)}


def mobilefacenet_shapes(embedding_size: int, grid: int) -> Shapes:
    """What insightface's checkpoint of `mbf` holds: blocks (1, 4, 6, 2), scale 2."""
    shapes: Shapes = {}

    def conv(name: str, inputs: int, outputs: int, kernel: int, groups: int = 1, prelu: bool = True) -> None:
        nonlocal shapes
        shapes[f"{name}.layers.0.weight"] = (outputs, inputs // groups, kernel, kernel)
        shapes |= norm(f"{name}.layers.1", outputs)
        if prelu:
            shapes[f"{name}.layers.2.weight"] = (outputs,)

    def unit(name: str, inputs: int, outputs: int, width: int) -> None:
        conv(f"{name}.layers.0", inputs, width, 1)
        conv(f"{name}.layers.1", width, width, 3, groups=width)
        conv(f"{name}.layers.2", width, outputs, 1, prelu=False)

    conv("layers.0", 3, 128, 3)
    conv("layers.1", 128, 128, 3, groups=64)
    stages = [(128, 128, 128, 4, 128), (128, 256, 256, 6, 256), (256, 256, 512, 2, 256)]
    for stage, (inputs, outputs, width, residuals, residual_width) in enumerate(stages):
        unit(f"layers.{2 + 2 * stage}", inputs, outputs, width)
        for i in range(residuals):
            unit(f"layers.{3 + 2 * stage}.layers.{i}", outputs, outputs, residual_width)
    conv("conv_sep", 256, 512, 1)
    conv("features.layers.0", 512, 512, grid, groups=512, prelu=False)
    shapes["features.layers.2.weight"] = (embedding_size, 512)
    return {**shapes, **norm("features.layers.3", embedding_size)}


def shapes_of(network: nn.Module) -> Shapes:
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize("name", UNITS)
def test_iresnet_has_the_keys_of_insightface(name: str) -> None:
    """Every key and shape of a published checkpoint, no more and no less: it loads strictly."""
    with torch.device("meta"):
        assert shapes_of(create_network(name, 512, 112)) == iresnet_shapes(UNITS[name], 512, 7)
        assert shapes_of(create_network(name, 256, 64)) == iresnet_shapes(UNITS[name], 256, 4)


def test_mobilefacenet_has_the_keys_of_insightface() -> None:
    """The same for `mbf`."""
    with torch.device("meta"):
        assert shapes_of(create_network("mbf", 512, 112)) == mobilefacenet_shapes(512, 7)
        assert shapes_of(create_network("mbf", 128, 48)) == mobilefacenet_shapes(128, 3)


@pytest.mark.parametrize(
    ("name", "millions"),
    [("r18", 24.03), ("r34", 34.14), ("r50", 43.59), ("r100", 65.16), ("r200", 118.83), ("mbf", 2.06)],
)
def test_parameter_counts(name: str, millions: float) -> None:
    """The sizes by which these networks are known, for 512 numbers from 112 pixels."""
    with torch.device("meta"):
        network = create_network(name, 512, 112)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions


# --- the same function ------------------------------------------------------------------------------------------------


def randomise(network: nn.Module) -> dict[str, Tensor]:
    """Random norms and slopes, so that no part of the state dict could be left out unseen; returns it."""
    torch.manual_seed(0)
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
                for values, low in ((module.weight, 0.5), (module.bias, -0.5), (module.running_mean, -0.5)):
                    values.uniform_(low, low + 1)
                module.running_var.uniform_(0.5, 2)
            elif isinstance(module, nn.PReLU):
                module.weight.uniform_(0.1, 0.4)
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
    network.eval()
    return network.state_dict()


def apply_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    mean, var, weight, bias = (state[f"{name}.{v}"] for v in ("running_mean", "running_var", "weight", "bias"))
    return F.batch_norm(x, mean, var, weight, bias, eps=1e-5)


def test_iresnet_computes_what_insightface_computes() -> None:
    """A plain walk over the state dict: where norms, strides, slopes and shortcuts are."""
    network = IResNet(18, embedding_size=16, image_size=32)
    state = randomise(network)
    faces = torch.rand(2, 3, 32, 32) * 2 - 1
    x = F.conv2d(faces, state["conv1.weight"], padding=1)
    x = F.prelu(apply_norm(state, "bn1", x), state["prelu.weight"])
    for layer in range(1, 5):
        for i in range(2):
            unit, stride = f"layer{layer}.{i}", 2 if i == 0 else 1
            y = F.conv2d(apply_norm(state, f"{unit}.bn1", x), state[f"{unit}.conv1.weight"], padding=1)
            y = F.prelu(apply_norm(state, f"{unit}.bn2", y), state[f"{unit}.prelu.weight"])
            y = F.conv2d(y, state[f"{unit}.conv2.weight"], stride=stride, padding=1)
            y = apply_norm(state, f"{unit}.bn3", y)
            if i == 0:
                x = F.conv2d(x, state[f"{unit}.downsample.0.weight"], stride=2)
                x = apply_norm(state, f"{unit}.downsample.1", x)
            x = x + y
    x = apply_norm(state, "bn2", x).flatten(1)
    expected = apply_norm(state, "features", F.linear(x, state["fc.weight"], state["fc.bias"]))
    with torch.no_grad():
        torch.testing.assert_close(network(faces), expected, rtol=1e-4, atol=1e-4)


def test_mobilefacenet_computes_what_insightface_computes() -> None:
    """The same walk for `mbf`: strides, groups, which units add their input, and no slope after projections."""
    network = MobileFaceNet(embedding_size=16, image_size=32)
    state = randomise(network)
    faces = torch.rand(2, 3, 32, 32) * 2 - 1

    def conv(name: str, x: Tensor, stride: int = 1, groups: int = 1, padding: int = 0) -> Tensor:
        x = F.conv2d(x, state[f"{name}.layers.0.weight"], stride=stride, padding=padding, groups=groups)
        x = apply_norm(state, f"{name}.layers.1", x)
        slope = state.get(f"{name}.layers.2.weight")
        return x if slope is None else F.prelu(x, slope)

    def unit(name: str, x: Tensor, stride: int) -> Tensor:
        x = conv(f"{name}.layers.0", x)
        return conv(f"{name}.layers.2", conv(f"{name}.layers.1", x, stride, groups=x.shape[1], padding=1))

    x = conv("layers.0", faces, stride=2, padding=1)
    x = conv("layers.1", x, groups=64, padding=1)
    for stage, residuals in enumerate((4, 6, 2)):
        x = unit(f"layers.{2 + 2 * stage}", x, stride=2)
        for i in range(residuals):
            x = x + unit(f"layers.{3 + 2 * stage}.layers.{i}", x, stride=1)
    x = conv("features.layers.0", conv("conv_sep", x), groups=512).flatten(1)
    expected = apply_norm(state, "features.layers.3", F.linear(x, state["features.layers.2.weight"]))
    with torch.no_grad():
        torch.testing.assert_close(network(faces), expected, rtol=1e-4, atol=1e-4)


# --- in use -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("image_size", "embedding_size"), [(112, 512), (64, 128), (16, 32)])
@pytest.mark.parametrize("name", ["r18", "mbf", "demo"])
def test_faces_to_embeddings(name: str, image_size: int, embedding_size: int) -> None:
    """Any size that is a multiple of 16 gives float32 embeddings of the length asked for, in either memory layout."""
    network = create_network(name, embedding_size, image_size).eval()
    faces = torch.rand(2, 3, image_size, image_size) * 2 - 1
    with torch.no_grad():
        embeddings = network(faces)
        channels_last = network(faces.contiguous(memory_format=torch.channels_last))
    assert embeddings.shape == (2, embedding_size)
    assert embeddings.dtype == torch.float32
    # Against the length of the whole: before training, activations are large and single numbers cancel.
    assert (embeddings - channels_last).norm() < 1e-3 * embeddings.norm()


@pytest.mark.parametrize("name", ["r18", "mbf"])
def test_other_image_sizes_are_refused(name: str) -> None:
    """A size that does not halve four times is an error at once, with the size, not a shape error later."""
    with torch.device("meta"):
        for size in (100, 120, 17):
            with pytest.raises(ValueError, match=f"multiple of 16, got {size}"):
                create_network(name, 512, size)


def test_unknown_network() -> None:
    """A misspelt name is an error that lists the names there are."""
    with pytest.raises(ValueError, match=r"model\.network: there is no network 'r51'; there are r18, .*mbf, demo"):
        create_network("r51", 512, 112)


@pytest.mark.parametrize("name", ["r18", "mbf", "demo"])
def test_every_parameter_learns(name: str) -> None:
    """Each parameter gets a gradient, so none is dead; only the features' scale of IResNet is fixed, at 1."""
    torch.manual_seed(0)
    network = create_network(name, 32, 32)
    network(torch.randn(4, 3, 32, 32)).square().sum(1).sqrt().sum().backward()
    fixed = {n for n, p in network.named_parameters() if not p.requires_grad}
    assert fixed == ({"features.weight"} if name == "r18" else set())
    if fixed:
        assert (network.get_parameter("features.weight") == 1).all()
    for parameter_name, parameter in network.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().max() > 0, parameter_name
            assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", ["r18", "mbf"])
def test_embeddings_are_float32_under_autocast(name: str) -> None:
    """Half precision ends before the last layers, so embeddings are float32 and not rounded to bfloat16."""
    network = create_network(name, 64, 32).eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        embeddings = network(torch.randn(2, 3, 32, 32))
    assert embeddings.dtype == torch.float32
    assert (embeddings != embeddings.bfloat16().float()).any()


def test_names_are_those_of_the_config() -> None:
    """The networks are the ones that the setting's comment and the presets speak of."""
    assert list(NETWORKS) == ["r18", "r34", "r50", "r100", "r200", "mbf", "demo"]
