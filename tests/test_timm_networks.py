"""Networks of timm as this project's: their input, sizes, options, weights, and errors that say what is missing."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from models.backbones import create_network
from models.weights import create_with_weights, load_network
from models.weights.load import load_weights
from test_backbones_function import faces
from utils.checkpoints import CheckpointError


def test_networks_of_timm_get_what_they_were_trained_on() -> None:
    """Pixels with the mean and deviation of its weights; the classifier gives the embedding."""
    network = create_network("timm:resnet10t", 24, 64).eval()
    peer = network.model
    assert isinstance(peer, nn.Module)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(network(faces(64)), peer(((faces(64) + 1) / 2 - mean) / std), rtol=1e-4, atol=1e-5)
    assert all(key.startswith("model.") for key in network.state_dict())


def test_transformers_of_timm_are_made_for_the_size() -> None:
    """Positions for 7x6 patches of 112x96 pixels, not for the 224 that the network is known with."""
    network = create_network("timm:vit_tiny_patch16_224", 24, (112, 96))
    assert network.get_parameter("model.pos_embed").shape[1] == 1 + 7 * 6


def test_options_of_timm_networks() -> None:
    """Stochastic depth and dropout are passed on; what the network does not know is an error that names it."""
    network = create_network("timm:vit_tiny_patch16_224", 8, 32, drop_path=0.2, dropout=0.3)
    rates = {type(module).__name__: getattr(module, "drop_prob", None) for module in network.modules()}
    assert rates["DropPath"] == pytest.approx(0.2)
    assert any(isinstance(module, nn.Dropout) and module.p == 0.3 for module in network.modules())
    with pytest.raises(ValueError, match=r"timm:vgg11 does not know one of the options drop_path_rate"):
        create_network("timm:vgg11", 8, 64, drop_path=0.2)


@pytest.mark.parametrize("name", ["convnext_ato", "convnextv2_tinny"])
def test_an_unknown_network_of_timm_lists_near_ones(name: str) -> None:
    """Names are many and hard to remember."""
    with pytest.raises(
        ValueError, match=rf"model\.network: timm [\d.]+ has no network '{name}'; did you mean convnext"
    ):
        create_network(f"timm:{name}", 8, 64)


def test_timm_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then the error says what to install, and other networks work."""
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"model\.network: timm:resnet10t needs the package timm: pip install timm"):
        create_network("timm:resnet10t", 8, 64)
    assert create_network("demo", 8, 32)(faces()).shape == (2, 8)


def test_missing_weights_of_timm_are_said() -> None:
    """A network for which there are no weights to begin with."""
    with pytest.raises(ValueError, match=r"timm:resnet18\.none cannot be made with its weights"):
        create_network("timm:resnet18.none", 8, 64, pretrained=True)


@pytest.mark.parametrize(("name", "size"), [("coat_tiny", 224), ("crossvit_9_240", 240)])
def test_networks_with_features_of_several_scales(name: str, size: int) -> None:
    """Their head takes a list of features."""
    network = create_network(f"timm:{name}", 8, size).eval()
    with torch.no_grad():
        assert network(faces(size)[:1]).shape == (1, 8)


def test_a_network_that_cannot_take_112_pixels_loads_at_its_own_size(tmp_path: Path) -> None:
    """Whether its name is said in the settings, or weights begin another run; where another size of embedding is wanted
    the difference is named."""
    network = create_network("timm:efficientformerv2_s0", 16, 224)
    torch.save(network.state_dict(), tmp_path / "x.pth")
    loaded = load_network(tmp_path / "x.pth", "timm:efficientformerv2_s0", 0, 224)
    assert (loaded.name, loaded.embedding_size, loaded.image_size) == ("timm:efficientformerv2_s0", 16, 224)
    made = create_with_weights("timm:efficientformerv2_s0", tmp_path / "x.pth", image_size=224)
    for other in (loaded.network, made):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in network.state_dict().items())
    larger = create_network("timm:efficientformerv2_s0", 32, 224)
    with pytest.raises(CheckpointError, match=r"of another shape: .*head.*\[16, \d+\] where \[32, \d+\] is wanted"):
        load_weights(larger, tmp_path / "x.pth", "timm:efficientformerv2_s0")
