"""Networks: insightface's parameter names and architecture, so that its checkpoints load and mean the same."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from config import Config
from models import NETWORKS, backbones, create_network
from models.backbones.iresnet import IResNet
from models.backbones.mobilefacenet import MobileFaceNet
from models.backbones.vit import VisionTransformer
from utils.settings import ConfigError, build
from utils.training.build_parts import build_network
from utils.training.flops import forward_flops

UNITS = {
    "r18": (2, 2, 2, 2),
    "r34": (3, 4, 6, 3),
    "r50": (3, 4, 14, 3),
    "r100": (3, 13, 30, 3),
    "r152": (3, 8, 36, 3),
    "r200": (6, 26, 60, 6),
}
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


# Millions of parameters and of multiply-adds, for embeddings of 512 numbers (mobilefacenet*, demo: 128) from 112x112.
# Parameters: EdgeFace's are in the table of its repository (otroshi/edgeface, README). MobileFaceNet's paper says "less
# than 1 million", which leaves out the slopes of the PReLUs (0.9956 without them). The others are counts of what the
# original code makes: arcface_torch/backbones of insightface, net.py of AdaFace, model_irse.py of face.evoLVe,
# core/model.py of Xiaoccer.
# Multiply-adds: insightface's (arcface_torch/README.md, tables 1 and 3), EdgeFace's (half the MFLOPs of the table),
# MobileFaceNet's (its paper; also arXiv:1908.09124, abstract), of mbf vinhtq115/arcface_repvgg's.
# What others published by other ways of counting is in test_published_figures.py. r152, ir34, ir50, ir152, ir200,
# ir_se*, evolve_ir152, evolve_ir_se50, mbf_large, vit_h and mobilefacenet_xiaoccer have no independent count
# there; the code of members of their families that have one makes them.
PUBLISHED: dict[str, tuple[float, float | None]] = {
    "r18": (24.03, 2600),
    "r34": (34.14, None),
    "r50": (43.59, 6300),
    "r100": (65.16, 12100),
    "r152": (70.77, None),
    "r200": (118.83, 23500),
    "ir18": (24.02, None),
    "ir34": (34.13, None),
    "ir50": (43.59, None),
    "ir101": (65.15, None),
    "ir152": (109.64, None),
    "ir200": (114.14, None),
    "ir_se50": (43.81, None),
    "ir_se101": (65.52, None),
    "ir_se152": (116.21, None),
    "ir_se200": (121.24, None),
    "evolve_ir50": (43.57, None),
    "evolve_ir101": (65.13, None),
    "evolve_ir152": (70.74, None),
    "evolve_ir_se50": (43.80, None),
    "evolve_ir_se101": (65.50, None),
    "evolve_ir_se152": (71.15, None),
    "mbf": (2.06, 437.55),
    "mbf_large": (6.31, None),
    "mobilefacenet": (1.00, 221),
    "mobilefacenet_y1": (1.00, 221),
    "mobilefacenet_xiaoccer": (1.00, None),
    "vit_t": (19.14, 1500),
    "vit_s": (76.02, 5700),
    "vit_b": (113.83, 11400),
    "vit_l": (255.68, 25300),
    "vit_h": (756.39, None),
    "vit_t_dp005_mask0": (19.14, 1500),
    "vit_s_dp005_mask_0": (76.02, 5700),
    "vit_b_dp005_mask_005": (113.83, 11400),
    "vit_l_dp005_mask_005": (255.68, 25300),
    "edgeface_xxs": (1.24, 94.72 / 2),
    "edgeface_xs_gamma_06": (1.77, 154.00 / 2),
    "edgeface_s_gamma_05": (3.65, 306.12 / 2),
    "edgeface_base": (18.23, 1398.83 / 2),
    "demo": (0.50, 34),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_parameters_and_operations_are_the_published_ones(name: str) -> None:
    """Every network has the size by which it is known: a wrong depth, width or stride would show."""
    parameters, operations = PUBLISHED[name]
    with torch.device("meta"):
        network = create_network(name, 128 if name == "demo" or name.startswith("mobilefacenet") else 512, 112)
        counted = forward_flops(network, 112) / 2e6
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.0051)
    if operations is not None:
        assert counted == pytest.approx(operations, rel=0.01)


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


def test_names() -> None:
    """The names that presets, saved runs and users know stay; each is of one network only."""
    assert list(NETWORKS) == list(PUBLISHED)


@pytest.mark.parametrize(
    ("name", "near"), [("r51", "r50"), ("vit", "vit_t"), ("edgeface_s", "edgeface_s_gamma_05"), ("resnet", None)]
)
def test_an_unknown_name_lists_the_known_ones(name: str, near: str | None) -> None:
    """A misspelt name is an error with what may be meant, all names, and how networks of timm are called."""
    with pytest.raises(ValueError, match=rf"^model\.network: there is no network '{name}'") as error:
        create_network(name, 512, 112)
    assert "there are r18, r34, r50" in str(error.value)
    assert all(known in str(error.value) for known in NETWORKS)
    assert "and timm:NAME for any of timm's" in str(error.value)
    if near:
        assert "did you mean" in str(error.value)
        assert near in str(error.value).partition(";")[0]


def test_a_new_network_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file with a table in the folder, and its name in the list of files: it can be made by name."""
    (tmp_path / "flatnet.py").write_text(
        "from torch import nn\n\n"
        "def make(embedding_size, image_size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(3 * image_size**2, embedding_size))\n\n"
        'NETWORKS = {"flat": make}\n'
    )
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    monkeypatch.setattr(backbones, "NETWORKS", backbones.collect((*backbones.FILES, "flatnet")))
    assert create_network("flat", 8, 4)(torch.zeros(2, 3, 4, 4)).shape == (2, 8)
    assert list(backbones.NETWORKS)[:-1] == list(NETWORKS)


def test_a_name_of_two_networks_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `r50` would hide the first: the error names file and name."""
    (tmp_path / "another.py").write_text('NETWORKS = {"r50": None}\n')
    monkeypatch.setattr(backbones, "__path__", [*backbones.__path__, str(tmp_path)])
    with pytest.raises(ValueError, match=r"models/backbones/another\.py: there is a network 'r50' already"):
        backbones.collect(("iresnet", "another"))


def test_options_reach_the_network_or_are_refused() -> None:
    """None is as published; a setting that a network does not have is an error, not ignored."""
    with torch.device("meta"):
        assert create_network("ir18", 8, 32).output_layer[1].p == 0.4  # type: ignore[union-attr, index]
        assert create_network("ir18", 8, 32, dropout=0.1).output_layer[1].p == 0.1  # type: ignore[union-attr, index]
        assert create_network("ir18", 8, 32, dropout=None).output_layer[1].p == 0.4  # type: ignore[union-attr, index]
        with pytest.raises(ValueError, match=r"model\.mask_ratio: the network r18 has no such option"):
            create_network("r18", 8, 32, mask_ratio=0.1)
        with pytest.raises(ValueError, match=r"model\.pretrained: the network mbf has no such option"):
            create_network("mbf", 8, 32, pretrained=True)


@pytest.mark.parametrize(
    ("settings", "kept", "drop_path"),
    [
        ({}, 32, 0.1),
        ({"model.drop_path": 0.0, "model.mask_ratio": 0.0}, 36, 0.0),
        ({"model.mask_ratio": 0.5, "model.drop_path": 0.3}, 18, 0.3),
    ],
)
def test_settings_reach_the_network(settings: dict[str, float], kept: int, drop_path: float) -> None:
    """Of 36 patches: below 0 is what is published, a tenth masked, and 0 is none."""
    config = build(Config, {"model.network": "vit_t", "data.image_size": 54, **settings})
    network = build_network(config, torch.device("cpu"))
    assert isinstance(network, VisionTransformer)
    assert network.kept == kept
    assert network.blocks[-1].drop_path.probability == pytest.approx(drop_path)  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["drop_path", "mask_ratio", "dropout"])
@pytest.mark.parametrize("value", [1.0, -2.0, float("nan")])
def test_impossible_probabilities_are_refused(name: str, value: float) -> None:
    """They are probabilities below 1."""
    with pytest.raises(ConfigError, match=rf"model\.{name}: must be"):
        build(Config, {f"model.{name}": value})


def test_the_documentation_has_every_network() -> None:
    """The table of docs/networks.md: all names in order, their parameters and multiply-adds as counted."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "networks.md").read_text()
    rows = [line.split("|")[1:4] for line in text.partition("\n## ")[0].splitlines() if line.startswith("| `")][1:]
    documented = {name.strip(" `"): (parameters.strip(), operations.strip()) for name, parameters, operations in rows}
    assert list(documented) == [*NETWORKS, "timm:NAME"]
    for name in ("r18", "ir_se50", "mbf_large", "mobilefacenet_xiaoccer", "vit_t", "edgeface_xs_gamma_06", "demo"):
        with torch.device("meta"):
            network = create_network(name, 128 if name == "demo" or name.startswith("mobilefacenet") else 512, 112)
            millions = forward_flops(network, 112) / 2e6
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        assert documented[name] == (f"{parameters:.2f}", f"{millions:,.0f}"), name
    for name, (parameters, _) in PUBLISHED.items():
        assert float(documented[name][0]) == pytest.approx(parameters, abs=0.0051), name
