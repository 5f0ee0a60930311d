"""TorchScript files as embedders: the numbers of the network, and errors that name the file."""

import warnings
from pathlib import Path

import pytest
import torch

from models.embedders import InputSpec, NetworkEmbedder, TorchScriptEmbedder, load_embedder
from models.embedders.torchscript import EXTRA_FILE
from models.weights.reading import is_torchscript
from utils.checkpoints import CheckpointError

CPU = torch.device("cpu")
SIZE = 16


@pytest.fixture
def faces() -> torch.Tensor:
    return torch.randint(0, 256, (7, SIZE, SIZE, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def embedder() -> NetworkEmbedder:
    """A network of one layer, whose features tell left from right and the colours apart."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * SIZE * SIZE, 5))
    return NetworkEmbedder(network.eval(), SIZE, CPU, "linear")


def save_script(network: torch.nn.Module, path: Path, **extra: str) -> Path:
    """A TorchScript file, as others write them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, SIZE, SIZE)), path, _extra_files=extra)
    return path


def test_torchscript_is_the_network(embedder: NetworkEmbedder, faces: torch.Tensor, tmp_path: Path) -> None:
    """A `.pt` with a program in it is told from a state dict by its content, and embeds as the network does."""
    path = save_script(embedder.network, tmp_path / "net.pt")
    torch.save(embedder.network.state_dict(), tmp_path / "state.pt")
    assert is_torchscript(path)
    assert not is_torchscript(tmp_path / "state.pt")
    (tmp_path / "x.pt").write_bytes(b"nothing")
    assert not is_torchscript(tmp_path / "x.pt")
    loaded = load_embedder(path, "cpu", image_size=SIZE)
    assert isinstance(loaded, TorchScriptEmbedder)
    torch.testing.assert_close(loaded.embed(faces), embedder.embed(faces))
    bgr = load_embedder(path, "cpu", image_size=SIZE, colour="bgr", normalisation="128")
    wanted = NetworkEmbedder(embedder.network, SIZE, CPU, "x", inputs=InputSpec("128", "bgr"))
    torch.testing.assert_close(bgr.embed(faces), wanted.embed(faces))
    assert len({loaded.fingerprint, bgr.fingerprint, load_embedder(path, "cpu", image_size=SIZE).fingerprint}) == 2


class _Pair(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


class _Sum(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum()


class _Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


class _Complex(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).to(torch.complex64)


class _Sparse(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3)).to_sparse()


@pytest.mark.parametrize("network", [_Pair(), _Sum(), _Two(), _Complex(), _Sparse()])
def test_torchscript_that_gives_no_embeddings(network: torch.nn.Module, faces: torch.Tensor, tmp_path: Path) -> None:
    """Somebody else's program, a detector say, is refused with its name, whatever it gives or takes."""
    path = tmp_path / "x.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(network).save(str(path))
    loaded = load_embedder(path, CPU, image_size=faces.shape[1])
    with pytest.raises(CheckpointError, match=r"x\.pt.* faces"):
        loaded.embed(faces)


def test_torchscript_says_what_went_wrong_in_it(tmp_path: Path, faces: torch.Tensor) -> None:
    """Its first line says only that something did; the cause is in the last."""
    path = tmp_path / "x.pt"
    with warnings.catch_warnings(action="ignore"):
        torch.jit.trace(torch.nn.Conv2d(3, 4, SIZE).half(), torch.zeros(1, 3, SIZE, SIZE).half()).save(str(path))
    loaded = load_embedder(path, CPU, image_size=SIZE)
    with pytest.raises(CheckpointError, match=r"gives no embeddings of 7 faces: RuntimeError: .*[Hh]alf"):
        loaded.embed(faces)


def test_torchscript_that_was_cut(tmp_path: Path) -> None:
    """It names itself, not what the system says of a place before its beginning."""
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(torch.nn.Flatten()).save(str(tmp_path / "x.pt"))
    content = (tmp_path / "x.pt").read_bytes()
    for size in range(0, len(content), 100):
        (tmp_path / "x.pt").write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=r"x\.pt"):
            load_embedder(tmp_path / "x.pt", CPU)


def test_torchscript_says_what_it_expects(embedder: NetworkEmbedder, faces: torch.Tensor, tmp_path: Path) -> None:
    """The size and the input that an export wrote into the file hold; damaged files name themselves."""
    stated = '{"image_size": 16, "inputs": {"normalisation": "none", "colour": "bgr"}}'
    path = save_script(embedder.network, tmp_path / "net.pt", **{EXTRA_FILE: stated})
    loaded = load_embedder(path, "cpu")
    wanted = NetworkEmbedder(embedder.network, SIZE, CPU, "x", inputs=InputSpec("none", "bgr"))
    torch.testing.assert_close(loaded.embed(faces), wanted.embed(faces))
    broken = save_script(embedder.network, tmp_path / "broken.pt", **{EXTRA_FILE: '{"inputs": {"colour": "grey"}}'})
    with pytest.raises(CheckpointError, match=r"broken\.pt is no TorchScript file that can be used: colour must be"):
        load_embedder(broken, "cpu")
