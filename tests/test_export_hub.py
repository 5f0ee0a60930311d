"""What is uploaded: the model card, and torch.hub over this checkout."""

import json
import runpy
import shutil
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import all_pair_test
from config import Config
from models import NETWORKS, create_network, load_embedder
from models.losses import LOSSES
from tiny_exports import options
from tiny_runs import checkpoints
from utils import export as script
from utils.checkpoints import CheckpointError
from utils.exporting.facts import ModelFacts, publishable, set_name
from utils.exporting.model_card import model_card
from utils.settings import build, to_json

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def facts(**changes: Any) -> ModelFacts:
    settings = {
        "data": {"root": ["ms1mv3", "own|set"], "image_size": 112},
        "model": {"network": "r50", "embedding_size": 512},
        "loss": {"name": "arcface", "margin": 0.5, "scale": 64.0},
        "train": {"epochs": 20, "batch_size": 1024, "name": "x"},
    }
    known: dict[str, Any] = {
        "name": "x",
        "network": "r50",
        "embedding_size": 512,
        "image_size": 112,
        "parameters": 43_590_976,
        "settings": settings,
        "step": 101_000,
        "best_accuracy": 0.98,
        "tests": {"lfw": {"protocol": "10 folds", "accuracy": 0.9983, "std": 0.0021}},
        "mirror": True,
        "licence": "cc-by-nc-4.0",
    }
    return ModelFacts(**{**known, **changes})


def front_matter(card: str) -> dict[str, Any]:
    """The fields between the two lines of dashes; every value is JSON, which YAML contains."""
    _, lines, _ = card.split("---\n", 2)
    return {key: json.loads(value) for key, _, value in (line.partition(": ") for line in lines.splitlines())}


def test_front_matter_is_what_the_hub_reads() -> None:
    """Licence, tags and results under Hugging Face's names for them."""
    fields = front_matter(model_card(facts(), "model.safetensors", "fp32"))
    assert fields["license"] == "cc-by-nc-4.0"
    assert fields["library_name"] == "pytorch"
    assert "face-recognition" in fields["tags"]
    (index,) = fields["model-index"]
    assert index["results"][0]["dataset"]["name"] == "lfw"
    assert index["results"][0]["metrics"][0]["type"] == "accuracy"
    assert index["results"][0]["metrics"][0]["value"] == 0.9983
    assert front_matter(model_card(facts(licence="", tests={}), "w", "fp32"))["license"] == "unknown"
    assert "model-index" not in front_matter(model_card(facts(tests={}), "w", "fp32"))


def test_the_card_says_what_is_known_and_no_more() -> None:
    """Accuracies, settings and licence where there are any; else that there are none."""
    points = [
        {"far": 1e-4, "tar": 0.9646, "supported": True, "support": "good"},
        {"far": 1e-5, "tar": 0.25, "supported": True, "support": "weak", "interval": [0.125, 0.4275]},
        {"far": 1e-6, "tar": 0.5, "supported": False, "support": "none"},
    ]
    tests = {**facts().tests, "faces": {"protocol": "all pairs", "eer": 0.01, "auc": 0.99, "points": points}}
    card = model_card(facts(tests=tests), "model.safetensors", "fp32")
    assert "| lfw | 10 folds | accuracy | 99.830 % ± 0.210 % |" in card
    assert "| faces | all pairs | TAR at FAR 0.0001 | 96.460 % |" in card
    assert "| faces | all pairs | TAR at FAR 1e-05 | 25.000 % (few impostor pairs: 12.500 % to 42.750 %) |" in card
    assert "50.000 %" not in card  # too few impostor pairs to tell
    assert "best by its verification sets (98.000 % on average)" in card
    assert "with the mirror image added" in card
    assert "| `loss.margin` | 0.5 |" in card
    assert r"ms1mv3, own\|set |" in card
    assert "after 101,000 steps" in card
    untested = model_card(facts(tests={}), "w", "fp32")
    assert "reached 98.000 % on average" in untested
    unknown = model_card(facts(settings={}, tests={}, best_accuracy=None, step=None, licence=""), "w", "fp32")
    for sentence in ("Nothing was measured.", "how they were trained is not known here", "No licence was stated"):
        assert sentence in unknown
    elsewhere = {"model": {"network": "r50"}, "data": {"image_size": 112}}  # what a hub's file says of foreign weights
    assert "how they were trained is not known here" in model_card(facts(settings=elsewhere), "w", "fp32")
    for title in ("Accuracy", "Training", "How to use it", "Intended use and limits", "Licence"):
        assert f"\n## {title}\n" in unknown


def test_names_of_several_lines_stay_in_their_cells() -> None:
    """A set may be called anything: its table is one all the same."""
    card = model_card(facts(tests={"a\r\n|b\u2028c": {"protocol": "10\nfolds", "accuracy": 0.5}}), "w", "fp32")
    assert "\n| a \\|b c | 10 folds | accuracy | 50.000 % |\n" in card


def test_published_settings_name_no_folders() -> None:
    """Sets by their names, and nothing of the sections that describe the machine."""
    settings = {
        "common": {"runs": "/home/me/runs"},
        "data": {"root": ["/home/me/sets/ms1mv3", "/home/me/web/train.rec"], "verification": ["/home/me/lfw.bin"]},
        "train": {"init": "/home/me/backbone.pth", "lr": 0.1},
        "test": {"output": "/home/me/out"},
    }
    kept = publishable(settings)
    assert kept["data"] == {"root": ["ms1mv3", "web"], "verification": ["lfw"]}
    assert kept["train"] == {"init": "backbone.pth", "lr": 0.1}
    assert "/home" not in json.dumps(kept)
    assert publishable({"train": {"init": "/home/me/\udcff.pth"}})["train"] == {"init": "?.pth"}
    assert [set_name(path) for path in ("sets/v1.5", "a/b.rec", "a/b/")] == ["v1.5", "b", "b"]


def test_a_checkpoint_is_not_called_the_best(tiny_run: Path, tmp_path: Path) -> None:
    """The accuracy that its file states is the best of the run until then, which may be that of other weights."""
    (checkpoint, *_) = checkpoints(tiny_run)
    chosen = {}
    for name, path in (("run", tiny_run), ("checkpoint", checkpoint / "backbone.safetensors")):
        script.main([str(path), "--format", "hub", "--workers", "0", "--images", "4", "--output", str(tmp_path / name)])
        chosen[name] = "the training reached" in (tmp_path / name / "README.md").read_text()
    assert chosen == {"run": True, "checkpoint": False}


def test_an_export_of_an_export_keeps_what_is_known(tiny_run: Path, tmp_path: Path) -> None:
    """The model card itself says how to make an ONNX file of the folder; another licence that is said goes first."""
    run = Path(shutil.copytree(tiny_run, tmp_path / tiny_run.name))
    (run / "test").mkdir()
    sets = {"lfw": {"protocol": "10 folds", "accuracy": 0.9983, "std": 0.002}}
    (run / "test" / "results.json").write_text(json.dumps({"sets": sets, "mirror": True}))
    flags = ["--format", "hub", "--workers", "0", "--images", "4"]
    for source, output, licence in (
        (run, "hub", ["--licence", "mit"]),
        (tmp_path / "hub", "again", []),
        (tmp_path / "hub", "other", ["--licence", "bsd"]),
    ):
        script.main([str(source), *flags, "--output", str(tmp_path / output), *licence])
    cards = [(tmp_path / name / "README.md").read_text() for name in ("hub", "again", "other")]
    assert [front_matter(card)["license"] for card in cards] == ["mit", "mit", "bsd"]
    for card in cards:
        assert "| lfw | 10 folds | accuracy | 99.830 %" in card
        assert "with the mirror image added" in card


@pytest.mark.parametrize(
    ("settings", "loss", "rows"),
    [
        ({}, "arcface (margin 0.5, scale 64)", ("loss.margin` | 0.5", "loss.scale` | 64.0", "train.lr` | 0.02")),
        ({"loss.name": "combined", "train.batch_size": 1024}, "combined (m1 1, m2 0.3, m3 0.2, scale 64)",
         ("loss.m1` | 1.0", "loss.m3` | 0.2", "train.lr` | 0.1")),
        ({"loss.name": "elastic_arc", "loss.plus": True, "train.optimizer": "adamw", "train.batch_size": 256},
         "elastic_arc (margin 0.5, std 0.0175, scale 64, plus 1)", ("loss.std` | 0.0175", "train.lr` | 0.0005")),
        ({"loss.name": "softmax", "train.lr": 0.3}, "softmax", ("train.lr` | 0.3",)),
        ({"loss.margin_warmup_epochs": 4.0}, "arcface (margin 0.5, scale 64)", ("loss.margin_warmup_epochs` | 4.0",)),
        ({"loss.name": "cosface", "loss.margin": 0.4, "loss.scale": 32.0, "loss.filter_above": 0.4,
          "train.precision": "bf16"},
         "cosface (margin 0.4, scale 32, filter_above 0.4)", ("loss.margin` | 0.4", "train.precision` | bf16")),
    ],
)  # fmt: skip
def test_the_card_has_the_numbers_that_were_used(settings: dict[str, Any], loss: str, rows: tuple[str, ...]) -> None:
    """0 means "as published" in the settings: a reader wants the number, and only what the loss has."""
    run = publishable(json.loads(to_json(build(Config, settings))))
    known = facts(settings=run)
    card = model_card(known, "w", "fp32")
    assert known.metadata(False, "fp32")["loss"] == loss
    for row in rows:
        assert f"| `{row} |" in card
    shown = {line.split("`")[1].removeprefix("loss.") for line in card.splitlines() if line.startswith("| `loss.")}
    others = {"name", "sub_centers", "sample_rate"}
    others |= {"margin_warmup_epochs"} if "loss.margin_warmup_epochs" in settings else set()
    assert shown - others == {word.split()[0] for word in loss.partition("(")[2].split(",") if word}
    assert "| auto |" not in card
    assert known.settings == run  # what config.json has is what a run can be started from


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_can_be_described(name: str) -> None:
    """None has a setting under another name than that of its attribute."""
    run = json.loads(to_json(build(Config, {"loss.name": name})))
    assert facts(settings=run).loss.startswith(name)


def hub(entry: str, *arguments: Any, **options: Any) -> Any:
    return torch.hub.load(str(ROOT), entry, *arguments, source="local", **options)


def test_torch_hub_embedder(tiny_run: Path) -> None:
    """`embedder` of hubconf.py is load_embedder."""
    faces = torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embedder = hub("embedder", tiny_run, device="cpu")
    assert torch.equal(embedder.embed(faces), load_embedder(tiny_run, CPU).embed(faces))


def test_torch_hub_networks(tiny_run: Path, tmp_path: Path) -> None:
    """Every network is an entry by its name, with random weights or those of a file."""
    entries = runpy.run_path(str(ROOT / "hubconf.py"))
    public = {name for name, entry in entries.items() if callable(entry) and not name.startswith("_")}
    assert {"embedder", *NETWORKS} <= public
    assert all(entries[name].__doc__ for name in ("embedder", "r50"))
    network = hub("demo", embedding_size=16, image_size=32)
    assert not network.training
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 16)
    with pytest.raises(CheckpointError, match=r"weights of r18, 16-d, .*; it looks like demo, 16-d, .*network demo\. "):
        hub("r18", weights=tiny_run)
    other = create_network("demo", 16, 32)
    torch.save(other.state_dict(), tmp_path / "backbone.pth")
    for sizes in ({}, {"embedding_size": 16, "image_size": 32}):
        loaded = hub("demo", weights=tmp_path / "backbone.pth", **sizes)
        for name, value in other.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], value), name
    first = next(name for name, value in other.state_dict().items() if value.dim() == 4)
    turned = hub("demo", weights=tmp_path / "backbone.pth", colour="bgr")
    assert torch.equal(turned.state_dict()[first], other.state_dict()[first].flip(1))
    assert hub("demo", weights=tiny_run)(torch.zeros(2, 3, 32, 32)).shape == (2, 16)


def test_torch_hub_says_what_hides_our_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a program with a `models` package of its own ours cannot be imported: the message says so."""
    foreign = types.ModuleType("models")
    foreign.__file__ = "/elsewhere/models/__init__.py"
    monkeypatch.setitem(sys.modules, "models", foreign)
    with pytest.raises(ImportError, match="a package called 'models' is loaded already, from /elsewhere"):
        runpy.run_path(str(ROOT / "hubconf.py"))


def test_nothing_is_written_into_a_folder_to_upload(tmp_path: Path) -> None:
    """Following its model card, whoever tests it would upload pictures of faces with it."""
    folder, runs = tmp_path / "face-model", Path("runs")
    folder.mkdir()
    (folder / "model.safetensors").touch()
    settings = {"model": {"network": "demo", "embedding_size": 16}, "data": {"image_size": 32}}
    (folder / "config.json").write_text(json.dumps(settings))
    for model in (folder, folder / "model.safetensors"):
        assert all_pair_test.default_output(model, runs) == runs / "test-face-model"
        assert script.default_output(model, "face-model", options(), runs) == runs / "export-face-model/face-model.onnx"
    (folder / "model.safetensors").rename(folder / "best.safetensors")
    for model in (folder, folder / "best.safetensors"):
        assert all_pair_test.default_output(model, runs) == folder / "test"
