"""The project's own settings: each with a comment, a flag, a range, and presets of them that build."""

import dataclasses
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import config
from models import NETWORKS
from utils import settings
from utils.settings import (
    ConfigError,
    build,
    field_comments,
    flatten,
    from_json,
    parse_settings,
    to_json,
)

SECTIONS = {name: hint for name, hint in get_type_hints(config.Config).items() if dataclasses.is_dataclass(hint)}
FIELDS = [f"{section}.{f.name}" for section, hint in SECTIONS.items() for f in fields(hint)]


#: The sections that each script calls its own.
SCRIPTS = [
    ("train", "common"),
    ("test", "common"),
    ("merge", "common"),
    ("prepare", "common"),
    ("drop_noisy", "common"),
]


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_comment(section: str) -> None:
    """The comment is the documentation and the help text: none may be missing, or be a stub."""
    comments = field_comments(SECTIONS[section])
    for f in fields(SECTIONS[section]):
        assert len(comments[f.name].split()) >= 3, f"{section}.{f.name}"
        assert comments[f.name].endswith("."), f"{section}.{f.name}"


def other_value(name: str) -> tuple[str, object]:
    """Text and value of `name` that differ from its default, valid by themselves."""
    section, field_name = name.split(".")
    default = getattr(getattr(config.Config(), section), field_name)
    hint = get_type_hints(SECTIONS[section])[field_name]
    if field_name == "t":
        return "auto", "auto"
    if name == "export.format":
        return "torchscript", "torchscript"  # other ones do not go with the rest
    if get_args(hint) and not isinstance(default, tuple):
        choice = next(choice for choice in get_args(hint) if choice != default)
        return choice, choice
    if isinstance(default, tuple):
        if get_args(hint)[0] is int:
            return "1,2", (1, 2)
        if field_name in ("breakdown", "quality"):
            return "a.csv:b,c.csv:d", ("a.csv:b", "c.csv:d")
        return ("a", ("a",)) if name in ("report.set", "export.model") else ("a,b", ("a", "b"))  # those take one
    if field_name == "micro_batch":
        return "16", "16"
    if isinstance(default, str):
        return "x_y", "x_y"
    if isinstance(default, int):
        value = 32 if field_name in ("image_size", "detector_size") else default + 1
        return str(value), value
    value = default / 2 if default else 0.1
    return str(value), value


@pytest.mark.filterwarnings("ignore:.* not used")
@pytest.mark.parametrize("plain", [True, False], ids=["plain names of own sections", "full names"])
@pytest.mark.parametrize("own", SCRIPTS, ids=lambda own: own[0])
def test_every_field_has_a_flag(own: tuple[str, ...], plain: bool) -> None:
    """Each script reaches each field of each section, its own ones by the plain name too, in both spellings."""
    for dashes in (True, False):
        argv, expected = [], {}
        for name in FIELDS:
            section, field_name = name.split(".")
            f = next(f for f in fields(SECTIONS[section]) if f.name == field_name)
            flag = field_name if plain and section in own else name
            flag = flag.replace("_", "-") if dashes else flag
            if isinstance(f.default, bool):
                expected[name] = not f.default
                argv += [f"--no-{flag}" if f.default else f"--{flag}"]
            elif section in own and f.metadata.get("positional"):
                expected[name] = ("a", "b")
                argv += ["a", "b"]
            else:
                text, expected[name] = other_value(name)
                argv += [f"--{flag}", text]
        assert flatten(parse_settings(config.Config, config.PRESETS, own, "", argv)) == expected


def test_short_names_of_flags() -> None:
    """The short names that the README uses: --r to prepare, --merge and --t to merge."""
    prepared = parse_settings(config.Config, config.PRESETS, ("prepare", "common"), "", ["--r", "set"])
    assert prepared.prepare.rec_data_path == "set"
    merged = parse_settings(config.Config, config.PRESETS, ("merge", "common"), "", ["--merge", "a,b", "--t", "0.7"])
    assert (merged.merge.sets, merged.merge.t) == (("a", "b"), 0.7)


@pytest.mark.parametrize("preset", config.PRESETS)
def test_every_preset_builds(preset: str) -> None:
    """A preset is valid, changes something, and asks for a network that exists."""
    built = build(config.Config, config.PRESETS[preset])
    assert built != config.Config()
    assert built.model.network in NETWORKS
    assert parse_settings(config.Config, config.PRESETS, ("train",), "", ["--preset", preset]) == built
    assert build(config.Config, from_json(to_json(built))) == built


def test_the_default_network_exists() -> None:
    """The defaults in the source are a valid configuration too."""
    assert config.Config().model.network in NETWORKS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("common.workers", -2),
        ("data.image_size", 15),
        ("model.embedding_size", 0),
        ("model.normalisation", "255"),
        ("loss.name", "arc"),
        ("loss.margin", -0.1),
        ("loss.margin", 1.6),
        ("loss.margin", float("nan")),
        ("loss.margin_warmup_epochs", -0.5),
        ("loss.scale", -1.0),
        ("loss.m1", 0.0),
        ("loss.m2", 1.6),
        ("loss.m3", -0.1),
        ("loss.lambda_min", -1.0),
        ("loss.h", 1.1),
        ("loss.norm_low", 0.0),
        ("loss.norm_high", 10.0),
        ("loss.margin_low", -0.1),
        ("loss.margin_high", 0.4),
        ("loss.penalty_weight", -1.0),
        ("loss.std", 0.3),
        ("loss.sub_centers", 0),
        ("loss.filter_above", 1.1),
        ("loss.sample_rate", 0.0),
        ("loss.sample_rate", 1.1),
        ("loss.engine", "sparse"),
        ("loss.block", -1),
        ("train.epochs", 0),
        ("train.batch_size", 0),
        ("train.lr", -0.1),
        ("train.lr", float("nan")),
        pytest.param("train.lr", 10**400, id="train.lr-beyond floats"),
        ("train.warmup_epochs", -1.0),
        ("train.warmup_epochs", 21.0),
        ("train.schedule", "linear"),
        ("train.schedule_power", 0.0),
        ("train.milestone_factor", 0.0),
        ("train.decay_epochs", -1.0),
        ("train.final_lr", 1.1),
        ("train.optimizer", "adam"),
        ("train.momentum", 1.0),
        ("train.backbone_lr", 0.0),
        ("train.ema", 1.0),
        ("train.weight_decay", -1e-4),
        ("train.gradient_clip", 0.0),
        ("train.precision", "fp8"),
        ("train.seed", -1),
        ("train.log_every", 0),
        ("train.verify_every", -1),
        ("train.checkpoint_every", -1),
        ("test.batch_size", 0),
        ("merge.batch_size", 0),
        ("merge.t", 1.1),
        ("merge.t", "high"),
        ("merge.wrong_joins", 0.0),
        ("merge.on_match", "merge"),
        ("pack.detector_threshold", 0.0),
        ("pack.detector_size", 100),
        ("pack.smallest_face", -1),
        ("pack_bin.smallest_face", -1),
        ("pack.face", "leftmost"),
        ("pack_bin.detector_threshold", 1.1),
        ("pack_bin.detector_size", 0),
    ],
)
def test_values_that_cannot_be(capsys: pytest.CaptureFixture[str], name: str, value: object) -> None:
    """Nonsense is refused by name, in a preset or file as well as on the command line, before anything runs."""
    with pytest.raises(ConfigError, match=f"^{name}: must "):
        build(config.Config, {name: value})
    with pytest.raises(SystemExit):
        parse_settings(config.Config, config.PRESETS, (), "", [f"--{name}={value}"])
    assert f"{name}: must " in capsys.readouterr().err


def test_the_range_of_the_margin_is_that_of_the_loss() -> None:
    """What multiplies an angle may be more than what is added to it, but never less than 1."""
    assert build(config.Config, {"loss.name": "sphereface", "loss.margin": 4.0}).loss.margin == 4
    with pytest.raises(ConfigError, match=r"^loss\.margin: must be 0 .* or from 1 to 8 for sphereface_r, got 0\.5$"):
        build(config.Config, {"loss.name": "sphereface_r", "loss.margin": 0.5})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train.milestones": (0, 3)}, r"train\.milestones: must be epochs from 1 on, rising, got \(0, 3\)"),
        ({"train.milestones": (5, 3)}, r"train\.milestones: must be epochs from 1 on, rising"),
        ({"train.schedule": "step"}, r"train\.milestones: must name the epochs"),
        (
            {"train.schedule": "wsd", "train.warmup_epochs": 4.0, "train.decay_epochs": 17.0},
            r"train\.decay_epochs: must not exceed the epochs after warm-up \(16\), got 17\.0",
        ),
    ],
)
def test_schedules_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    """Settings that make no schedule together are refused before anything runs, whichever they are."""
    with pytest.raises(ConfigError, match=f"^{message}"):
        build(config.Config, settings)


@pytest.mark.parametrize("name", FIELDS)
def test_values_of_another_type_are_refused(name: str) -> None:
    """No field takes None, which a hand-edited file might hold."""
    with pytest.raises(ConfigError, match=f"^{name}: must be "):
        build(config.Config, {name: None})


def test_settings_of_insightface_lead_to_some_that_there_are() -> None:
    """The table for those who come from its trainer: every flag in it is one of train.py."""
    text = (Path(__file__).resolve().parents[1] / "docs" / "training.md").read_text()
    table = text.partition("## Settings of insightface's trainer")[2].partition("\n## ")[0]
    named = set(re.findall(r"--[a-z][a-z0-9.-]*", table))
    parser = settings._parser(config.Config, config.PRESETS, ("train", "common"), "", config.READS["train"])
    assert len(named) > 15
    assert named <= {flag for action in parser._actions for flag in action.option_strings}
