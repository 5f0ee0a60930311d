"""TorchScript files go wherever their weights go: nothing of the machine that traced them is in them."""

from pathlib import Path

import pytest
import torch

from models.backbones import create_network
from utils.exporting.exportable import Exportable
from utils.exporting.torchscript import write_torchscript

META = torch.device("meta")


def meta_convolves() -> bool:
    """Whether the convolution of TorchScript runs on the stand-in for a card, which it does not in PyTorch 2.11."""
    faces, weight = torch.empty(1, 3, 8, 8, device=META), torch.empty(1, 3, 3, 3, device=META)
    options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1, False, False, False, False)
    try:
        torch._convolution(faces, weight, None, *options)
    except NotImplementedError:
        return False
    return True


@pytest.mark.skipif(not meta_convolves(), reason="this PyTorch has no convolution on the meta device")
@pytest.mark.parametrize(
    "network", ["demo", "r18", "ir18", "mbf", "mobilefacenet_y1", "mobilefacenet_xiaoccer", "vit_t", "edgeface_xxs"]
)
@pytest.mark.parametrize("half", [False, True])
def test_an_export_runs_on_another_device_than_it_was_traced_on(network: str, half: bool, tmp_path: Path) -> None:
    """Traced on the CPU, it is moved to a stand-in for a card: a tensor that stays behind cannot meet those there."""
    exportable = Exportable(create_network(network, 128, 112), "127.5", fold=half, half=half)
    write_torchscript(exportable, tmp_path / "a.pt", 112, {}, {})
    loaded = torch.jit.load(tmp_path / "a.pt")
    for module in loaded.modules():
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            module._c.setattr(name, value.detach().to(META))
    embeddings = loaded(torch.zeros(3, 3, 112, 112, device=META))
    assert (embeddings.device, tuple(embeddings.shape)) == (META, (3, 128))
