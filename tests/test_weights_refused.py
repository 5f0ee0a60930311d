"""Files of weights that are damaged, hold code or are none: refused with the reason, and nothing in them is run."""

import json
import pickle
import re
import sys
import zipfile
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from models import create_network
from models.weights import load, load_network
from models.weights.reading import read_checkpoint, strip_prefixes
from utils.checkpoints import CheckpointError


class Evil:
    """Would make a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("legacy", [False, True])
def test_harmless_notes_are_passed_over(tmp_path: Path, legacy: bool) -> None:
    """Accuracies as numpy's numbers and arrays, paths among the options: nothing of them is needed, or made."""
    network = create_network("demo", 16, 32)
    notes = {"acc": np.float64(0.5), "all": np.zeros((3, 2)), "names": np.array(["a", None]), "from": Path("a") / "b"}
    content = {"state_dict": network.state_dict(), **notes}
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=not legacy)
    loaded = load_network(tmp_path / "x.pth", image_size=32)
    for name, value in network.state_dict().items():
        assert torch.equal(loaded.network.state_dict()[name], value), name


def test_paths_of_another_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.13 calls the class of a path by another name: a checkpoint of there opens here."""
    state = create_network("demo", 16, 32).state_dict()
    path_of_there = type("PosixPath", (), {"__module__": "pathlib._local"})
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pathlib._local", SimpleNamespace(PosixPath=path_of_there))  # type: ignore[misc]
        torch.save({"state_dict": state, "from": path_of_there()}, tmp_path / "x.pth")
    assert load_network(tmp_path / "x.pth", image_size=32).name == "demo"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"x\.pth is no file of torch\.save: it is empty$"),
        (b"<!doctype html>", r"x\.pth is no file of torch\.save: it begins with b'<!doctype html>'$"),
        (b"hello world, this is text", r"is no file of torch\.save: it begins with b'hello"),
        (b"PK\x03\x04 cut off", r"x\.pth is damaged: it was not loaded\. torch said: RuntimeError PytorchStreamReader"),
        (b"\x80\x02", r"x\.pth is damaged: it was not loaded\. torch said: \w+Error"),
        (
            pickle.dumps({"a": Path}, 2),
            r"holds more than tensors \(pathlib\.(_local\.)?Path\): it was not loaded"
            r".*torch\.load\(FILE, 'cpu', weights_only=F",
        ),
    ],
)
def test_refusals_say_why(tmp_path: Path, content: bytes, message: str) -> None:
    """What is wrong with the file, without torch's page of advice and its codes for terminals."""
    (tmp_path / "x.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_network(tmp_path / "x.pth")
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("legacy", [False, True])
def test_any_damage_names_the_file(tmp_path: Path, legacy: bool) -> None:
    """Cut anywhere, or with one bit changed in any part that says how it is to be read: a file is read or refused."""
    path = tmp_path / "x.pth"
    torch.save({"a.weight": torch.ones(2)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    damaged = [content[:size] for size in range(0, len(content), 3)]
    for place in range(0, len(content), 2):
        damaged.append(content[:place] + bytes([content[place] ^ 1 << place // 2 % 8]) + content[place + 1 :])
    refused = 0
    for changed in damaged:
        path.write_bytes(changed)
        with suppress(CheckpointError):
            read_checkpoint(path)
            continue
        refused += 1
    assert refused > len(damaged) / 4


@pytest.mark.parametrize("kind", ["sparse", "meta"])
def test_tensors_that_are_no_plain_weights(tmp_path: Path, kind: str) -> None:
    """Right names and shapes alone fill no network."""
    state = create_network("demo", 16, 32).state_dict()
    changed = {
        name: value.to("meta") if kind == "meta" else value.to_sparse() if value.dim() == 2 else value
        for name, value in state.items()
    }
    torch.save(changed, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth: its tensors are no plain weights: Error"):
        load_network(tmp_path / "x.pth", "demo", image_size=32)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32, torch.bool])
def test_tensors_of_numbers_that_are_no_weights(tmp_path: Path, dtype: torch.dtype) -> None:
    """torch would fill a network with their real parts, or with whole numbers, without a word."""
    state = create_network("demo", 16, 32).state_dict()
    torch.save({name: value.to(dtype) for name, value in state.items()}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=rf"x\.pth: its tensors are no plain weights: \S+ is of {dtype}"):
        load_network(tmp_path / "x.pth", image_size=32)


@pytest.mark.parametrize("shape", [(), (0,), (20_000,)])
def test_embeddings_of_a_size_that_cannot_be(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """No numbers, or more than a network is made for, are a shape that does not fit, said before one is made."""
    state = create_network("demo", 16, 32).state_dict()
    last = [name for name, value in state.items() if value.dim()][-1]
    torch.save({**state, last: torch.zeros(shape)}, tmp_path / "x.pth")
    said = rf"x\.pth looks like demo, 512-d.*{last} {re.escape(str([*shape]))} where"
    with pytest.raises(CheckpointError, match=said):
        load_network(tmp_path / "x.pth", image_size=32)


def test_a_few_values_that_are_a_giant_matrix(tmp_path: Path) -> None:
    """What a file of a kilobyte says of shapes takes no terabytes of memory."""
    state = create_network("demo", 16, 32).state_dict()
    torch.save({**state, "head.1.weight": torch.zeros(1).expand(10**10, 128)}, tmp_path / "x.pth")
    said = r"x\.pth: head\.1\.weight is \[10000000000, 128\], of which the file of .* bytes has few"
    with pytest.raises(CheckpointError, match=said):
        load_network(tmp_path / "x.pth", image_size=32)


@pytest.mark.parametrize(
    ("network", "size", "message"),
    [
        ("vit_l", 8_190, r"does not hold the weights of vit_l\. missing: pos_embed, .*not the network's: a\.b$"),
        ("r18", 1_000, "IResNet needs an image size that is a multiple of 16, got 1000$"),
        ("rr18", 112, r"model\.network: there is no network 'rr18' \(did you mean r18"),
        ("x" * 100_000, 112, r"looks like none of the networks here; it begins with a\.b$"),
    ],
)
def test_settings_of_another_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: str, size: int, message: str
) -> None:
    """A network that the settings in a file name is compared with its weights, and not made for real unless they fit;
    a name that is none is said with the file, and not at any length."""
    monkeypatch.setattr(load, "create_network", pytest.fail)
    settings = {"model": {"network": network, "embedding_size": 512}, "data": {"image_size": size}}
    save_file({"a.b": torch.zeros(1)}, tmp_path / "x.safetensors", {"settings": json.dumps(settings)})
    with pytest.raises(CheckpointError, match=rf"x\.safetensors:? {message}"):
        load_network(tmp_path / "x.safetensors")


@pytest.mark.parametrize("inside", [{"w": torch.zeros(1)}, {}])
def test_dictionaries_that_many_hold(tmp_path: Path, inside: dict[str, Any]) -> None:
    """Each is looked through once, however many ways lead to it: 2^40 here."""
    for _ in range(40):
        inside = {"a": inside, "b": inside}
    torch.save(inside, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"looks like none of the networks here|is no state dict"):
        load_network(tmp_path / "x.pth")


def packed_again(path: Path, content: dict[str, Tensor], compression: int, copies: int) -> None:
    """What torch.save writes of `content`, in an archive made by another program, its values as often as told."""
    torch.save(content, path)
    with zipfile.ZipFile(path) as archive:
        members = {member: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for member, data in members.items():
            archive.writestr(member.filename, data)
        archive.filelist += [one for one in archive.filelist if "/data/" in one.filename] * (copies - 1)


@pytest.mark.parametrize(("compression", "copies"), [(zipfile.ZIP_DEFLATED, 1), (zipfile.ZIP_STORED, 9)])
def test_archives_that_become_several_times_their_size(tmp_path: Path, compression: int, copies: int) -> None:
    """A few megabytes would become gigabytes: compressed, or the same bytes as several tensors."""
    packed_again(tmp_path / "x.pth", {"a.weight": torch.zeros(10_000)}, compression, copies)
    with pytest.raises(CheckpointError, match=r"x\.pth has [\d,]+ bytes, which become [\d,]+: torch\.save writes no"):
        load_network(tmp_path / "x.pth")


def test_weights_that_were_packed_again_load(tmp_path: Path) -> None:
    """By a program that compresses, which makes little of weights."""
    packed_again(tmp_path / "x.pth", create_network("demo", 16, 32).state_dict(), zipfile.ZIP_DEFLATED, 1)
    assert load_network(tmp_path / "x.pth", image_size=32).name == "demo"


def test_dictionaries_that_hold_each_other(tmp_path: Path) -> None:
    """A checkpoint that is inside of itself is refused in words."""
    content: dict[str, Any] = {}
    content["model"] = content
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match=r"x\.pth is no state dict: its dictionaries hold each other"):
        load_network(tmp_path / "x.pth")


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "network"])
def test_nothing_in_a_file_is_run(tmp_path: Path, kind: str) -> None:
    """Whatever pickles more than tensors is refused, with what to do; Lightning's notes make no exception of code."""
    content: Any = {"state_dict": {"x": torch.zeros(1)}, "callbacks": Evil(tmp_path / "mark")}
    if kind == "pickle":
        (tmp_path / "x.ckpt").write_bytes(pickle.dumps(content))
    else:
        content = nn.Linear(2, 2) if kind == "network" else content
        torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=kind != "legacy")
    with pytest.raises(CheckpointError, match=r"x\.ckpt holds more than tensors.*save the weights alone"):
        load_network(tmp_path / "x.ckpt")
    assert not (tmp_path / "mark").exists()


def test_what_holds_no_tensors_says_what_it_holds(tmp_path: Path) -> None:
    """A dictionary without weights names its keys, anything else its type."""
    torch.save({"epoch": 3, "name": "x"}, tmp_path / "a.pth")
    torch.save([torch.zeros(2)], tmp_path / "b.pth")
    for file, message in (("a.pth", "a dictionary of 'epoch', 'name'"), ("b.pth", "but one list")):
        with pytest.raises(CheckpointError, match=message):
            load_network(tmp_path / file)


def test_prefixes_are_those_of_wrappers_only() -> None:
    """A network's own first name is left, unless all that there is stands under a wrapper's."""
    assert strip_prefixes({"module.conv.weight": 1, "module.fc.weight": 2}) == {"conv.weight": 1, "fc.weight": 2}
    assert strip_prefixes({"model.a.w": 1, "conv.w": 2}) == {"model.a.w": 1, "conv.w": 2}
    assert strip_prefixes({"body.a": 1, "body.b": 2}) == {"body.a": 1, "body.b": 2}


@pytest.mark.parametrize("new", [True, False])
def test_a_bin_of_torch_loads(tmp_path: Path, new: bool) -> None:
    """`pytorch_model.bin`, of torch before 1.6 too, whose files begin like a pickled verification set."""
    file = tmp_path / "pytorch_model.bin"
    torch.save({"fc.weight": torch.ones(2, 3)}, file, _use_new_zipfile_serialization=new)
    assert torch.equal(read_checkpoint(file).state["fc.weight"], torch.ones(2, 3))
