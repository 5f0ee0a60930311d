"""Weights of others load as they are, under whatever wrapper, into their network; or it is said why not."""

import copy
import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import create_network, load_embedder
from models.backbones import NETWORKS
from models.weights import load_network, load_weights
from models.weights.recognition import Recognised, Shapes, expected_shapes, recognise
from test_backbones_keys import edgeface_shapes, ir_shapes, mbf_shapes, vit_shapes
from test_networks import UNITS, iresnet_shapes
from utils.checkpoints import CheckpointError, Progress, save_backbone
from utils.exporting.source import load_source

PUBLISHED: dict[str, Shapes] = {
    **{name: iresnet_shapes(UNITS[name], 512, 7) for name in UNITS},
    **{f"ir{depth}": ir_shapes(depth, False, "tface", 512, 49) for depth in (18, 50, 101)},
    "ir_se50": ir_shapes(50, True, "tface", 512, 49),
    "evolve_ir50": ir_shapes(50, False, "evolve", 512, 49),
    "evolve_ir_se50": ir_shapes(50, True, "evolve", 512, 49),
    "mbf": mbf_shapes((1, 4, 6, 2), 2, 512),
    "mbf_large": mbf_shapes((2, 8, 12, 4), 4, 512),
    "vit_t": vit_shapes(256, 12, 512, 144),
    "vit_b": vit_shapes(512, 24, 512, 144),
    "edgeface_xs_gamma_06": edgeface_shapes((32, 64, 100, 192), (3, 3, 9, 3), 4, 0.6, 512),
}


def state_of(shapes: Shapes) -> dict[str, Tensor]:
    """Weights of these shapes, each of a value of its own, that take no room in a file."""
    return {
        name: torch.tensor(i if name.endswith("num_batches_tracked") else 0.5 + 1e-4 * i).expand(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }


def small_ir(seed: int = 0) -> nn.Module:
    """An ir18 with 32 numbers from 32x32 faces, whose statistics are no others'."""
    torch.manual_seed(seed)
    network = create_network("ir18", 32, 32)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
    return network.eval()


FACES = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def features(file: Path, **options: Any) -> np.ndarray:
    return load_embedder(file, "cpu", network="ir18", image_size=32, **options).features(FACES, False).numpy()


def expected(network: nn.Module, colour: str = "rgb") -> np.ndarray:
    """What the network gives for FACES, in the colour order that it was trained on."""
    pixels = FACES.flip(3) if colour == "bgr" else FACES
    with torch.no_grad():
        return network((pixels.permute(0, 3, 1, 2).float() - 127.5) / 127.5).numpy()


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_weights_are_told_apart(name: str) -> None:
    """By the keys and shapes of the published checkpoints alone; the hint of another network leads nowhere else."""
    known = recognise(PUBLISHED[name], ("r50", *NETWORKS), 112)
    assert known is not None
    assert (known.network, known.embedding_size, known.image_size) == (name, 512, 112)


@pytest.mark.filterwarnings("ignore:.*taken for RGB")
@pytest.mark.parametrize("name", ["r18", "mbf", "vit_t", "evolve_ir50", "edgeface_xs_gamma_06"])
def test_published_files_load_unchanged(tmp_path: Path, name: str) -> None:
    """A file with the published keys and shapes fills the network, each weight in its place, without any flag."""
    state = state_of(PUBLISHED[name])
    torch.save(state, tmp_path / "backbone.pth")
    loaded = load_network(tmp_path / "backbone.pth")
    assert (loaded.name, loaded.embedding_size, loaded.image_size) == (name, 512, 112)
    for key, value in loaded.network.state_dict().items():
        torch.testing.assert_close(value, state[key].to(value.dtype), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "size", "dimension"),
    [
        ("r18", 112, 512),
        ("r18", 112, 128),
        ("r18", 224, 512),
        ("r18", 96, 256),
        ("r18", 288, 512),
        ("ir18", 16, 8),
        ("mbf", 320, 32),
        ("mobilefacenet_xiaoccer", 224, 128),
        ("vit_t", 54, 512),
        ("vit_t", 80, 16),
        ("vit_t", 224, 512),
        ("vit_t", 400, 16),
    ],
)
def test_sizes_are_told_from_the_shapes(name: str, size: int, dimension: int) -> None:
    """The size of the faces and of the embeddings, whatever is hinted; old files, without counters, too."""
    shapes = expected_shapes(name, dimension, size)
    old = {key: shape for key, shape in shapes.items() if not key.endswith("num_batches_tracked")}
    for found in (shapes, old):
        for hint in (112, 64):
            assert recognise(found, NETWORKS, hint) == Recognised(name, dimension, size)


def test_a_size_among_several_with_the_same_weights(tmp_path: Path) -> None:
    """What a vision transformer sees are whole patches: the size that is said holds where it fits."""
    shapes = expected_shapes("vit_t", 512, 54)
    assert recognise(shapes, ("vit_t",), 60) == Recognised("vit_t", 512, 60)
    assert recognise(shapes, ("vit_t",), 63) == Recognised("vit_t", 512, 54)
    assert recognise(expected_shapes("vit_t", 512, 112), ("vit_t",), 110) == Recognised("vit_t", 512, 110)


WRAPPERS: dict[str, Any] = {
    "plain": lambda state: state,
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled": lambda state: prefixed(state, "_orig_mod."),
    "compiled DataParallel": lambda state: prefixed(state, "_orig_mod.module."),
    "face.evoLVe": lambda state: prefixed(state, "module."),
    "net_state_dict": lambda state: {"epoch": 3, "net_state_dict": state},
    "state_dict": lambda state: {"state_dict": prefixed(state, "module."), "optimizer": optimizer(), "arch": "ir18"},
    "model": lambda state: {"optimizer_state_dict": optimizer(), "model": state, "best": 0.5},
    "backbone": lambda state: {"backbone": state, "head": {"weight": torch.zeros(10, 32)}},
    "nested": lambda state: {"checkpoint": {"model": {"state_dict": prefixed(state, "backbone.")}}},
    "backbone and head": lambda state: {
        "state_dict": {**prefixed(state, "backbone."), "head.weight": torch.zeros(10, 32)}
    },
    "backbone and loss function": lambda state: {**prefixed(state, "backbone."), "loss_fn.weight": torch.zeros(10, 32)},
    "model and arcface head": lambda state: {**prefixed(state, "model."), "arcface_head.kernel": torch.zeros(32, 10)},
    "head first": lambda state: {"ArcMargin": {"weight": torch.zeros(10, 32)}, "mobilefacenet": state},
    "mean of the inputs": lambda state: {**state, "args": {"mean": torch.zeros(3)}},
    "average": lambda state: {"state_dict": zeroed(state), "ema_state_dict": state},
    "average of timm": lambda state: {"state_dict": zeroed(state), "state_dict_ema": prefixed(state, "module.")},
    "average of a module": lambda state: {"model": zeroed(state), "model_ema": {"decay": 0.9, "module": state}},
    "average without counters": lambda state: {
        "state_dict": {**zeroed(state), "head.weight": torch.zeros(10, 32)},
        "ema": {name: value for name, value in state.items() if "num_batches" not in name},
    },
    "average without statistics": lambda state: {
        "model": state,
        "ema": {name: value for name, value in zeroed(state).items() if "running" not in name},
    },
    "old": lambda state: {name: value for name, value in state.items() if "num_batches" not in name},
    "half": lambda state: {name: value.half() if value.is_floating_point() else value for name, value in state.items()},
}


def zeroed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(value) for name, value in state.items()}


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in state.items()}


def optimizer() -> dict[str, Any]:
    """Tensors that are no weights, among them more than the network has."""
    return {"state": {i: {"momentum_buffer": torch.zeros(1)} for i in range(300)}, "param_groups": [{"lr": 0.1}]}


@pytest.mark.filterwarnings("ignore:.*taken for RGB")
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("legacy", [False, True])
def test_wrappers(tmp_path: Path, wrapper: str, legacy: bool) -> None:
    """Whatever holds the network, in torch's format of today and in that of before 1.6, its embeddings are its own."""
    network = small_ir()
    content = WRAPPERS[wrapper](network.state_dict())
    torch.save(content, tmp_path / "x.pth.tar", _use_new_zipfile_serialization=not legacy)
    tolerance = 0.1 if wrapper == "half" else 1e-5
    np.testing.assert_allclose(features(tmp_path / "x.pth.tar"), expected(network), rtol=tolerance, atol=tolerance)


class ModelCheckpoint:
    """A stand-in for Lightning's callback, which old checkpoints name among their notes."""


ModelCheckpoint.__module__ = "pytorch_lightning.callbacks.model_checkpoint"


def lightning(state: Mapping[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A checkpoint as AdaFace's training writes it with Lightning 1.4, with a class and a namespace in it."""
    for part in ("pytorch_lightning", "pytorch_lightning.callbacks", ModelCheckpoint.__module__):
        module = ModuleType(part)
        monkeypatch.setitem(sys.modules, part, module)
    monkeypatch.setattr(module, "ModelCheckpoint", ModelCheckpoint, raising=False)
    return {
        "epoch": 25,
        "pytorch-lightning_version": "1.4.4",
        "state_dict": {**prefixed(state, "model."), "head.kernel": torch.zeros(32, 9), "head.t": torch.zeros(1)},
        "callbacks": {ModelCheckpoint: {"best_model_score": torch.tensor(0.9)}},
        "optimizer_states": [optimizer()],
        "hyper_parameters": Namespace(arch="ir_18"),
    }


def test_adaface(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its Lightning checkpoints load without Lightning, and see BGR as they were trained on, unless told otherwise."""
    network = small_ir()
    with monkeypatch.context() as patch:
        torch.save(lightning(network.state_dict(), patch), tmp_path / "adaface.ckpt")
    for colour, order in (("auto", "bgr"), ("rgb", "rgb"), ("bgr", "bgr")):
        found = features(tmp_path / "adaface.ckpt", colour=colour)
        np.testing.assert_allclose(found, expected(network, order), rtol=1e-4, atol=1e-5)
    assert np.abs(expected(network) - expected(network, "bgr")).max() > 0.1  # the order matters


def test_training_goes_on_from_weights_for_bgr(tmp_path: Path) -> None:
    """`train.init` of an AdaFace checkpoint gives a network for the RGB that training feeds."""
    network, other = small_ir(), small_ir(1)
    content = {"state_dict": {**prefixed(network.state_dict(), "model."), "head.kernel": torch.zeros(32, 9)}}
    torch.save(content, tmp_path / "adaface.ckpt")
    load_weights(other, tmp_path / "adaface.ckpt", "ir18")
    np.testing.assert_allclose(expected(other), expected(network, "bgr"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "text", "order"),
    [
        ("model.yaml", "input_size: [3, 112, 112]\ncolor_space: 'BGR'\nname: 'ir18'\n", "bgr"),
        ("model.yaml", "color_space: RGB\n", "rgb"),
        ("config.json", '{"conf": {"color_space": "BGR", "name": "ir18"}}', "bgr"),
    ],
)
def test_cvlface(tmp_path: Path, config: str, text: str, order: str) -> None:
    """Its networks take the colours that the configuration beside the weights says."""
    network = small_ir()
    (tmp_path / config).write_text(text)
    if config == "config.json":
        save_file(prefixed(network.state_dict(), "model.net."), tmp_path / "model.safetensors")
    else:
        torch.save(prefixed(network.state_dict(), "net."), tmp_path / "model.pt")
    file = next(tmp_path.glob("model.[ps][ta]*"))
    np.testing.assert_allclose(features(file), expected(network, order), rtol=1e-4, atol=1e-5)


def test_cvlface_without_its_configuration_is_warned_of(tmp_path: Path) -> None:
    """Nobody can know the order then: it is said what is taken, and what to do."""
    network = small_ir()
    torch.save(prefixed(network.state_dict(), "net."), tmp_path / "model.pt")
    with pytest.warns(UserWarning, match=r"taken for RGB; put its model\.yaml there, or say --model\.colour"):
        np.testing.assert_allclose(features(tmp_path / "model.pt"), expected(network), rtol=1e-4, atol=1e-5)


def test_the_order_of_evolve_and_treb1en_is_doubted(tmp_path: Path) -> None:
    """The same names, but one trained on RGB, the other on BGR: said, unless the caller says which."""
    torch.manual_seed(0)
    network = create_network("evolve_ir50", 32, 32).eval()
    torch.save(network.state_dict(), tmp_path / "model.pth")
    with pytest.warns(
        UserWarning, match=r"model\.pth is face\.evoLVe's.*taken for RGB; say --model\.colour rgb or bgr"
    ):
        np.testing.assert_allclose(features(tmp_path / "model.pth"), expected(network), rtol=1e-3, atol=1e-4)
    other = copy.deepcopy(network)
    with pytest.warns(UserWarning, match="nothing in it says which"):
        load_weights(other, tmp_path / "model.pth", "evolve_ir50")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = features(tmp_path / "model.pth", colour="bgr")
        load_weights(other, tmp_path / "model.pth", "evolve_ir50", colour="bgr")
    np.testing.assert_allclose(found, expected(network, "bgr"), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(expected(other), expected(network, "bgr"), rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="brg"):
        load_weights(other, tmp_path / "model.pth", "evolve_ir50", colour="brg")


@pytest.mark.parametrize("prefix", ["", "model."])
def test_ir_weights_without_notes_are_doubted(tmp_path: Path, prefix: str) -> None:
    """AdaFace's network saved alone has the names of TFace's, and takes BGR: not taken for RGB in silence."""
    network = small_ir()
    torch.save(prefixed(network.state_dict(), prefix), tmp_path / "model.pth")
    with pytest.warns(UserWarning, match=r"model\.pth is TFace's.*or AdaFace's.*say --model\.colour rgb or bgr"):
        np.testing.assert_allclose(features(tmp_path / "model.pth"), expected(network), rtol=1e-4, atol=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = features(tmp_path / "model.pth", colour="bgr")
        torch.save(create_network("r18", 32, 32).state_dict(), tmp_path / "insightface.pth")
        features(tmp_path / "insightface.pth")
    np.testing.assert_allclose(found, expected(network, "bgr"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beside", ["head.weight", "arcface_head.kernel"])
def test_ir_weights_beside_a_head_are_doubted_too(tmp_path: Path, beside: str) -> None:
    """What their colours are is asked of the network, however it was found."""
    content = {**prefixed(small_ir().state_dict(), "model."), beside: torch.zeros(10, 32)}
    torch.save(content, tmp_path / "x.pth")
    with pytest.warns(UserWarning, match="taken for RGB"):
        load_network(tmp_path / "x.pth", image_size=32)


def test_two_networks_in_a_file_are_not_chosen_from(tmp_path: Path) -> None:
    """Which of them is meant has to be said by saving it alone."""
    both = {**prefixed(small_ir().state_dict(), "model."), **prefixed(small_ir(1).state_dict(), "backbone.")}
    torch.save(both, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="looks like none of the networks here"):
        load_network(tmp_path / "x.pth", image_size=32)


def test_bgr_is_turned_around_under_a_networks_own_prefix(tmp_path: Path) -> None:
    """EdgeFace's own names begin with `model.`: the first convolution is found all the same in a file of ours."""
    torch.manual_seed(0)
    network = create_network("edgeface_xxs", 32, 32).eval()
    settings = '{"model": {"network": "edgeface_xxs", "embedding_size": 32}, "data": {"image_size": 32}}'
    save_backbone(tmp_path / "x.safetensors", network, settings, Progress(1, 0.5))
    found = features(tmp_path / "x.safetensors", colour="bgr")
    np.testing.assert_allclose(found, expected(network, "bgr"), rtol=1e-3, atol=1e-4)
    assert np.abs(found - expected(network)).max() > 1e-2


@pytest.mark.filterwarnings("ignore:.*taken for RGB")
def test_safetensors_with_notes_of_others(tmp_path: Path) -> None:
    """`settings` that are no JSON, or lack what a network is made with, are somebody else's: the weights load by their
    names.
    """
    network = small_ir()
    ours = '{"model": {"network": "ir18", "embedding_size": "32"}, "data": {"image_size": 32}}'
    for text in ("lr=0.1", "[1]", "{}", '{"model": {}}', '{"model": {"network": "ir18"}, "data": []}', ours):
        save_file(network.state_dict(), tmp_path / "x.safetensors", {"settings": text})
        np.testing.assert_allclose(features(tmp_path / "x.safetensors"), expected(network), rtol=1e-4, atol=1e-5)
        assert load_source(tmp_path / "x.safetensors", "auto", "ir18", 32, 32, "").facts.settings == {}


def test_names_of_y1_that_are_not_all_there(tmp_path: Path) -> None:
    """mxnet's names without the last matrix are no y1: an error about the names, not a crash."""
    names = ("conv_1_conv2d_weight", "pre_fc1_bias", "fc1_gamma")
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="looks like none of the networks here; it begins with conv_1_conv2d_wei"):
        load_network(tmp_path / "x.pth")


def test_a_mismatch_says_what_differs_and_what_it_looks_like(tmp_path: Path) -> None:
    """Names that are missing, too many, of another shape; and the network that comes nearest."""
    state = state_of(PUBLISHED["r18"])
    state["extra.weight"] = torch.zeros(3)
    state["layer1.0.bn1.weight"] = torch.zeros(7)
    del state["layer4.1.bn3.bias"]
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(CheckpointError) as caught:
        load_network(tmp_path / "x.pth", "r50")
    message = str(caught.value)
    assert "x.pth looks like r18, 512-d, but does not fit it" in message
    assert "missing: layer4.1.bn3.bias;" in message
    assert "not the network's: extra.weight;" in message
    assert "of another shape: layer1.0.bn1.weight [7] where [64] is wanted" in message


def test_first_weights_of_another_network_are_named(tmp_path: Path) -> None:
    """`train.init` with weights of another network says of which, and the setting that would fit."""
    torch.save(small_ir().state_dict(), tmp_path / "x.pth")
    with torch.device("meta"):
        module = create_network("r18", 32, 32)
    with pytest.raises(
        CheckpointError, match=r"not hold the weights of r18, 32-d, .*; it looks like ir18, 32-d, .* ir18\. missi"
    ):
        load_weights(module, tmp_path / "x.pth", "r18")


@pytest.mark.parametrize(
    ("dimension", "size", "flags"),
    [
        (512, 112, "--model.embedding-size 32 --data.image-size 48"),
        (32, 112, "--data.image-size 48"),
        (512, 48, "--model.embedding-size 32"),
    ],
)
def test_first_weights_of_another_size_are_told_by_it(tmp_path: Path, dimension: int, size: int, flags: str) -> None:
    """The network's name was right: the settings that differ are named, and no others."""
    torch.save(create_network("demo", 32, 48).state_dict(), tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"it looks like demo, 32-d, for faces of 48x48: say {flags}\. "):
        load_weights(create_network("demo", dimension, size), tmp_path / "x.pth", "demo")


def test_programs_are_no_first_weights(tmp_path: Path) -> None:
    """ONNX and TorchScript files embed, but start no training: said as that, with no advice to unpickle them."""
    (tmp_path / "x.onnx").write_bytes(b"weights of a kind")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.zeros(1, 2)), tmp_path / "x.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, kind in (("x.onnx", "an ONNX file"), ("x.pt", "a TorchScript file")):
            with pytest.raises(CheckpointError, match=rf"{name} is {kind}, a finished program.*name the weights"):
                load_weights(small_ir(), tmp_path / name, "ir18")


def test_weights_of_nothing_known(tmp_path: Path) -> None:
    """They say how they begin."""
    torch.save({f"strange.{i}": torch.zeros(1) for i in range(9)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"looks like none of the networks here; it begins with strange\.0, "):
        load_network(tmp_path / "x.pth")
