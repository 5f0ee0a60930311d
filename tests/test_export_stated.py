"""What a file says of its model: told in its card where it can be, and with the file's name where it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from models import create_network
from utils.checkpoints import CheckpointError
from utils.exporting.model_card import model_card
from utils.exporting.source import load_source


def card_of(folder: Path, settings: dict[str, Any], **metadata: str) -> str:
    """The model card of `x.safetensors` in `folder`, which says this of itself, beside what its network needs."""
    data = {**settings.get("data", {}), "image_size": 32}
    settings = {**settings, "model": {"network": "demo", "embedding_size": 16}, "data": data}
    file = folder / "x.safetensors"
    save_file(create_network("demo", 16, 32).state_dict(), file, {**metadata, "settings": json.dumps(settings)})
    facts = load_source(file, "auto", "", 0, 112, "").facts
    assert facts.metadata(False, "fp32")["network"] == "demo"
    return model_card(facts, file.name, "fp32")


@pytest.mark.parametrize(
    "sets",
    [
        5,
        {"x": 5},
        {"x": {"accuracy": "high"}},
        {"x": {"accuracy": float("nan")}},
        {"x": {"eer": float("inf")}},
        {"x": {"std": None}},
        {"x": {"points": 3}},
        {"x": {"points": [3]}},
        {"x": {"points": [{"far": 0.1}]}},
        {"x": {"points": [{"far": 0.1, "tar": 0.5, "interval": 7}]}},
        {"x": {"points": [{"far": 0.1, "tar": 0.5, "interval": ["a", "b"]}]}},
    ],
)
def test_numbers_that_are_none_are_not_quoted(tmp_path: Path, sets: Any) -> None:
    """Texts, and what no number is, come on no model card, and are no reason not to export."""
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "results.json").write_text(json.dumps({"sets": sets}))
    with pytest.warns(UserWarning, match=r"results\.json, or report\.json beside it, is damaged"):
        assert "Nothing was measured." in card_of(tmp_path, {})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": 7}, "loss: must have settings by name, got 7"),
        ({"train": [1]}, r"train: must have settings by name, got \[1\]"),
        ({"data": {"root": 5}}, "data.root: must be a tuple of texts, got 5"),
        ({"data": {"verification": "abc"}}, "data.verification: must be a tuple of texts, got 'abc'"),
        ({"loss": {"name": ["a"]}}, r"loss.name: must be a text, got \('a',\)"),
        ({"loss": {"margin": 0.5}}, "loss.name: is not there"),
        ({"loss": {"name": "arcface", "scale": "x" * 100_000}}, "loss.scale: must be a number, got 'x{200,300}$"),
        ({"loss": {"name": "arcface", "margin": 10**400}}, "loss.margin: must be a number"),
        ({"loss": {"name": "elastic_arc", "std": float("nan")}}, "loss.std: must be a number, got nan"),
        ({"train": {"lr": 0, "optimizer": "sgd", "batch_size": "x"}}, "train.batch_size: must be a whole number"),
        ({"train": {"lr": 0, "optimizer": "sgd", "batch_size": -4}}, "train.batch_size: must be above 0"),
        ({"train": {"name": {}}}, "train.name: must be a text"),
    ],
)
def test_settings_that_are_none_name_their_file(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    """Whatever a file says of its training, in the words of a setting, not in those of the program."""
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: in its settings, {message}"):
        card_of(tmp_path, settings)


def test_settings_of_other_versions_are_shown(tmp_path: Path) -> None:
    """A loss, an optimizer or a field that are not known here, and fields that are not there."""
    settings = {"loss": {"name": "newface", "bend": "x"}, "train": {"lr": 0, "optimizer": "newopt", "epochs": "many"}}
    card = card_of(tmp_path, settings)
    for row in ("| `loss.name` | newface |", "| `train.optimizer` | newopt |", "| `train.epochs` | many |"):
        assert row in card


@pytest.mark.parametrize("accuracy", ["nan", "inf", "-1e400"])
def test_an_accuracy_that_is_no_number(tmp_path: Path, accuracy: str) -> None:
    """Python takes it for one."""
    with pytest.raises(CheckpointError, match=f"x.safetensors: its metadata have '{accuracy}' for best_accuracy"):
        card_of(tmp_path, {}, best_accuracy=accuracy, mirror_added="false", accuracy='{"lfw": NaN}')
    assert "NaN" not in card_of(tmp_path, {}, mirror_added="false", accuracy='{"lfw": NaN}')
