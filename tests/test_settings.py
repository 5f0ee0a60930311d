"""Settings: which value wins, what the command line takes, and that mistakes name their field."""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

import config
from utils.settings import (
    ConfigError,
    as_flags,
    build,
    check_types,
    describe,
    field_comments,
    flatten,
    from_json,
    parse_settings,
    require,
    to_json,
)


@dataclass(frozen=True)
class Oven:
    """The oven."""

    # Degrees, 0 % to 100 % of
    # what it can do.
    heat: float = 180.0
    # Trays (at once).
    trays: int = 1
    # Whether the fan runs.
    fan_on: bool = True
    # What it is called.
    name: str = ""
    # How it heats.
    mode: Literal["top", "both"] = "both"
    # What is in it.
    content: tuple[str, ...] = field(default=(), metadata={"aliases": ("--bake",)})
    # Minutes when it rings.
    rings: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "oven")
        require(self.heat <= 100 * self.trays + 200, "oven.heat", f"is too much for {self.trays} trays")


@dataclass(frozen=True)
class Shop:
    """The shop."""

    # Rolls for sale.
    rolls: tuple[str, ...] = field(default=(), metadata={"positional": True})
    # Trays on show.
    trays: int = 3

    def __post_init__(self) -> None:
        check_types(self, "shop")


@dataclass(frozen=True)
class Bakery:
    """A configuration of two sections."""

    oven: Oven = Oven()
    shop: Shop = Shop()


PRESETS: dict[str, dict[str, Any]] = {"big": {"oven.trays": 9, "oven.heat": 300}, "wrong": {"oven.colour": "red"}}


def parse(*argv: str, own: tuple[str, ...] = ("oven",), **more: Any) -> Bakery:
    return parse_settings(Bakery, PRESETS, own, "Bakes.", argv, **more)


def error_of(capsys: pytest.CaptureFixture[str], *argv: str, **more: Any) -> str:
    """What the command line says about `argv`, which it must refuse as argparse does."""
    with pytest.raises(SystemExit) as stopped:
        parse(*argv, **more)
    assert stopped.value.code == 2
    return capsys.readouterr().err


# --- precedence -------------------------------------------------------------------------------------------------------


def test_flags_go_before_preset_before_defaults() -> None:
    """Each source wins over the next, field by field."""
    assert parse() == Bakery()
    assert parse("--preset", "big").oven == Oven(trays=9, heat=300)
    assert parse("--trays", "2", "--preset", "big", "--heat", "350").oven == Oven(trays=2, heat=350.0)
    assert parse("--preset", "big", "--oven.trays=4").oven == Oven(trays=4, heat=300)


def test_saved_settings_lie_below_flags_and_preset() -> None:
    """Resuming starts from what a run saved, knows all settings when it looks for it, and lets the flags win."""
    asked = []

    def saved(settings: Any) -> dict[str, Any]:
        asked.append(dict(settings))
        return {"oven.name": "old", "oven.trays": 5, "oven.heat": 111.0}

    resumed = parse("--name", "new", saved=saved)
    assert asked == [{**flatten(Bakery()), "oven.name": "new"}]
    assert resumed.oven == Oven(name="new", trays=5, heat=111.0)
    with pytest.warns(UserWarning, match=r"--preset big changes what the run was begun with: oven.* 9 \(it was 5\)"):
        assert parse("--preset", "big", saved=saved).oven == Oven(name="old", trays=9, heat=300)
    with warnings.catch_warnings(action="error"):
        parse("--preset", "big", "--trays", "9", "--heat", "300", saved=saved)
        parse("--preset", "big", saved=lambda _: {"oven.trays": 9, "oven.heat": 300.0, "oven.name": "old"})


def test_values_are_checked_once_all_are_in() -> None:
    """Values that only fit together are accepted together, in whatever order they come."""
    assert parse("--heat", "900", "--trays", "7").oven.heat == 900.0
    assert build(Bakery, {"oven.heat": 900, "oven.trays": 7}).oven.trays == 7


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--fan_on", "--fan-on", "--oven.fan_on", "--oven.fan-on"])
def test_underscores_are_dashes(flag: str) -> None:
    """Both spellings of a flag are in use, with and without its section; values keep their underscores."""
    assert parse(flag).oven.fan_on is True
    assert parse(flag.replace("fan", "no-fan", 1) if "oven." not in flag else "--no-oven.fan-on").oven.fan_on is False
    assert parse("--oven.name", "a_b").oven.name == parse("--name=a_b").oven.name == "a_b"


def test_own_sections_need_no_prefix(capsys: pytest.CaptureFixture[str]) -> None:
    """`--trays` is that of the script's own section; other sections keep theirs."""
    assert parse("--trays", "2", "--shop.trays", "8") == Bakery(Oven(trays=2), Shop(trays=8))
    assert parse("--trays", "2", own=("shop",)).shop.trays == 2
    assert "there is no setting --heat (did you mean --oven.heat?)" in error_of(capsys, "--heat", "1", own=("shop",))


@pytest.mark.parametrize(
    ("argv", "value"),
    [
        (["--heat", "1e2"], ("heat", 100.0)),
        (["--trays", "12"], ("trays", 12)),
        (["--mode", "top"], ("mode", "top")),
        (["--content", "a,b,"], ("content", ("a", "b"))),
        (["--bake", "a"], ("content", ("a",))),
        (["--content", ""], ("content", ())),
        (["--rings", "8,14"], ("rings", (8, 14))),
        (["--rings", ""], ("rings", ())),
    ],
)
def test_text_becomes_the_type_of_the_field(argv: list[str], value: tuple[str, Any]) -> None:
    """Numbers, choices and lists come out as their fields declare them."""
    found = getattr(parse(*argv).oven, value[0])
    assert found == value[1]
    assert type(found) is type(value[1])


@pytest.mark.parametrize(
    "argv",
    [
        ["rye", "spelt", "--shop.trays", "1"],
        ["--shop.trays", "1", "rye", "spelt"],
        ["rye", "--shop.trays", "1", "spelt"],
    ],
)
def test_positional_field(argv: list[str]) -> None:
    """Arguments without a flag fill the field that asks for them, wherever the flags stand."""
    assert parse(*argv, own=("shop",)).shop == Shop(rolls=("rye", "spelt"), trays=1)
    assert parse(own=("shop",)).shop.rolls == ()
    assert parse("--shop.rolls", "rye,spelt").shop.rolls == ("rye", "spelt")


def test_plain_arguments_beside_their_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """`--rolls rye spelt` would be one of them and not say which; one plain argument may hold several."""
    assert parse("rye,spelt", "oat", own=("shop",)).shop.rolls == ("rye", "spelt", "oat")
    assert "there is no setting false: a flag that is" in error_of(capsys, "--oven.fan-on", "false", own=("shop",))
    said = error_of(capsys, "--shop.rolls", "rye", "spelt", own=("shop",))
    assert "shop.rolls is named by a flag and by spelt: name all in one way" in said
    said = error_of(capsys, "--shop.rolls", "rye", "--traus", "3", own=("shop",))
    assert "there is no setting --traus" in said, "3 is its value, no roll"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--traus", "3"], "there is no setting --traus (did you mean --trays?)"),
        (["--oven.traus=3"], "there is no setting --oven.traus=3 (did you mean --oven.trays?)"),
        (["--xyz"], "there is no setting --xyz\n"),
        (["--tray", "3"], "there is no setting --tray "),
        (["bread"], "there is no setting bread"),
        (["--trays", "many"], "--trays/--oven.trays: must be a whole number, got 'many'"),
        (["--trays", "1.5"], "--trays/--oven.trays: must be a whole number, got '1.5'"),
        (["--heat", "hot"], "--heat/--oven.heat: must be a number, got 'hot'"),
        (["--rings", "8,noon"], "--rings/--oven.rings: must be a whole number, got 'noon'"),
        (["--mode", "fan"], "oven.mode: must be one of top, both, got 'fan'"),
        (["--heat", "5000"], "oven.heat: is too much for 1 trays"),
        (["--preset", "huge"], "--preset: invalid choice: 'huge'"),
        (["--preset", "wrong"], "oven.colour: there is no such setting"),
    ],
)
def test_mistakes_on_the_command_line(capsys: pytest.CaptureFixture[str], argv: list[str], message: str) -> None:
    """An unknown flag (abbreviations are) or a wrong value ends with a message that names it."""
    assert message in error_of(capsys, *argv)


@pytest.mark.parametrize(
    ("argv", "meant"),
    [
        (["--image-size", "96"], "(did you mean --data.image-size?)"),
        (["--min-images=2"], "(did you mean --data.min-images?)"),
        (["--set", "faces"], "(did you mean --data.root?)"),
        (
            ["--loss", "cosface"],
            "there is no setting --loss, but --loss.name, --loss.margin, --loss.margin-warmup-epochs, ...\n",
        ),
        (["configs/ms1mv3_r50.py"], "(did you mean --preset ms1mv3_r50?)"),
        (["--model", "r50"], "(did you mean --model.network?)"),  # a section, too
        (["./t"], "there is no setting ./t (did you mean --data.root ./t?)\n"),
        (["--learning_rate", "0.1"], "(did you mean --lr?)"),
        (["--bs=64"], "(did you mean --batch-size?)"),
        (["-b", "64"], "(did you mean --batch-size?)"),
        (["--output", "work"], "(did you mean --name or --runs?)"),
        (["--backbone", "r50"], "(did you mean --model.network?)"),
        (["--network", "r50"], "(did you mean --model.network?)"),
        (["--margin", "0.4"], "(did you mean --loss.margin?)"),
        (["--num-workers", "4"], "(did you mean --workers?)"),
        (["--data", "faces"], "(did you mean --data.root?)"),
        (["--fp16"], "(did you mean --precision?)"),
        (["--resume-from", "runs/a"], "(did you mean --resume?)"),
        (["--weights", "a.pt"], "(did you mean --init?)"),
        (["--pretrained", "a.pt"], "(did you mean --model.pretrained or --init?)"),
        (["--gpu", "0"], "(did you mean --device?)"),
        (["--exclude-t", "0.5"], "there is no setting --exclude-t here: merge.exclude_t is another program's\n"),
        (["--frozen", "conv1", "bn1"], "no setting bn1: several values of --frozen are separated by commas\n"),
        (["--cuda-graph", "true"], "no setting true: --cuda-graph takes no value, it is off by --no-cuda-graph\n"),
        (["configs/nobody_r50"], "no setting configs/nobody_r50 (docs/training.md has a table of what the fields of"),
        (["configs/ms1mv3_r50_onegpu.py"], "(did you mean --preset ms1mv3_r50 --batch-size 128?)"),
        (["--num-classes", "9"], "no setting --num-classes, nor need of it: identities are counted in the set\n"),
        (["--save_all_states"], "no setting --save-all-states, nor need of it: the whole state is always saved\n"),
        (["--local-rank=0"], "no setting --local-rank=0, nor need of it: each process gets its number from torchrun\n"),
        (["--total-batch-size", "9"], "(did you mean --batch-size?)"),
        (["--margin-list", "1,0,0.4"], "(did you mean --loss.margin?)"),
        (["--dali"], "(did you mean --data.decode?)"),
        (["--verbose", "2000"], "(did you mean --verify-every?)"),
        (["my_r50.py"], "no setting my_r50.py (docs/training.md has a table of what the fields of insightface's"),
    ],
)
def test_what_was_meant(capsys: pytest.CaptureFixture[str], argv: list[str], meant: str) -> None:
    """Of several sections that have the field, one that this script reads is named, not the most alike spelling
    (`--pack.image-size`, which training would ignore); so are the names that other trainers have. A section's name and
    insightface's configs lead on."""
    with pytest.raises(SystemExit):
        parse_settings(config.Config, config.PRESETS, ("train", "common"), "", argv, reads=config.READS["train"])
    assert meant in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "sections", "argv", "meant"),
    [
        ("test", ("test", "common"), ["--dataset", "a"], "(did you mean --test.sets?)"),
        ("prepare", ("prepare", "common"), ["--data-dir", "a"], "(did you mean --rec-data-path?)"),
        ("report", ("report", "common"), ["--rec", "a"], "(did you mean --report.set?)"),
        ("merge", ("merge", "common"), ["--merge", "a,b", "--threshold", "0.5"], "--threshold (did you mean --t?)"),
    ],
)
def test_a_set_is_meant_by_the_flag_of_the_script(
    capsys: pytest.CaptureFixture[str], script: str, sections: tuple[str, ...], argv: list[str], meant: str
) -> None:
    """Not `--data.root`, which these scripts look at for a default only."""
    with pytest.raises(SystemExit):
        parse_settings(config.Config, {}, sections, "", argv, reads=config.READS[script])
    assert meant in capsys.readouterr().err


def test_no_guess_at_what_another_program_has(capsys: pytest.CaptureFixture[str]) -> None:
    """`--learning-rate` of a merge is not --clean-outlier, the most alike spelling."""
    with pytest.raises(SystemExit):
        parse_settings(config.Config, {}, ("merge", "common"), "", ["--learning-rate=1"], reads=config.READS["merge"])
    assert "no setting --learning-rate=1 here: train.lr is another program's\n" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"oven": 3}'])
def test_what_is_no_saved_settings(text: str) -> None:
    """Broken JSON, and JSON of something else, is an error in words."""
    with pytest.raises(ConfigError, match="these are no saved settings"):
        from_json(text)


def test_a_path_with_a_comma(tmp_path: Path) -> None:
    """A text that is a path is one, commas or not; all else is split, names included that are too long for a path."""
    (tmp_path / "a,b").mkdir()

    def root(text: str) -> tuple[str, ...]:
        return parse_settings(config.Config, {}, ("train",), "Trains", ["--data.root", text]).data.root

    assert root(f"{tmp_path}/a,b") == (f"{tmp_path}/a,b",)
    assert root(f"{tmp_path}/a,{tmp_path}/b") == (f"{tmp_path}/a", f"{tmp_path}/b")
    assert len(root(",".join(["x"] * 500))) == 500


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--runs=~/x`, which no shell expands, presets, saved settings and the defaults in the source, lists too, are in
    the user's home, for what looks for a run to resume as well; the name of nobody's home is a name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    asked = []

    def saved(settings: Any) -> dict[str, Any]:
        asked.append(settings["oven.name"])
        return {}

    assert parse("--name=~/a", "--content", "~/b,c,@~/d", saved=saved).oven == Oven(
        name=f"{tmp_path}/a", content=(f"{tmp_path}/b", "c", f"@{tmp_path}/d")
    )
    assert asked == [f"{tmp_path}/a"]
    assert parse("--name=~nobody-of-this-name/a").oven.name == "~nobody-of-this-name/a"
    assert build(Bakery, {"oven.content": ["~"]}).oven.content == (str(tmp_path),)

    @dataclass(frozen=True)
    class Edited:
        """With a default of the user's own."""

        name: str = "~/x"

    @dataclass(frozen=True)
    class Small:
        """One section."""

        edited: Edited = Edited()

    assert build(Small, {}).edited.name == f"{tmp_path}/x"


def test_help_is_the_comments(capsys: pytest.CaptureFixture[str]) -> None:
    """--help shows for each field the comment above it and its default, per cent signs included."""
    with pytest.raises(SystemExit) as stopped:
        parse("--help")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Degrees, 0 % to 100 % of what it can do. [180.0]" in text
    assert "Trays (at once). [1]" in text
    assert "What it is called. ['']" in text
    assert "Bakes." in text


def test_help_of_a_script_that_reads_a_part(capsys: pytest.CaptureFixture[str]) -> None:
    """It shows no fields that the script does not read, nor titles of sections without any; the flags are taken."""
    with pytest.raises(SystemExit):
        parse("--help", reads=("oven.heat", "oven.trays"))
    text = capsys.readouterr().out
    assert "--oven.heat" in text
    assert "--oven.trays" in text
    assert "fan" not in text
    assert "shop" not in text.lower()
    assert "Fields of the other programs" in text
    with pytest.warns(UserWarning, match="does not read"):
        assert parse("--shop.trays", "4", reads=("oven",)).shop.trays == 4


def test_field_comments() -> None:
    """Lines of a comment are joined; a field takes only what is right above it."""
    assert field_comments(Oven)["heat"] == "Degrees, 0 % to 100 % of what it can do."
    assert field_comments(Shop) == {"rolls": "Rolls for sale.", "trays": "Trays on show."}


# --- building ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["oven.colour", "cellar.heat", "oven", "", "oven.heat.max", "Oven.heat", "oven.__doc__"]
)
def test_build_refuses_what_is_no_setting(name: str) -> None:
    """A name that no section has is an error with that name, never a silent nothing."""
    with pytest.raises(ConfigError, match="there is no such setting") as error:
        build(Bakery, {name: 1})
    assert str(error.value).startswith(f"{name}: ")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("oven.heat", "180", "must be a number, got '180'"),
        ("oven.heat", True, "must be a number, got True"),
        ("oven.trays", 1.0, "must be a whole number, got 1.0"),
        ("oven.trays", False, "must be a whole number, got False"),
        ("oven.trays", None, "must be a whole number, got None"),
        ("oven.fan_on", 1, "must be true or false, got 1"),
        ("oven.name", 3, "must be a text, got 3"),
        ("oven.mode", "fan", "must be one of top, both, got 'fan'"),
        ("oven.content", "bread", "must be a tuple of texts, got 'bread'"),
        ("oven.content", [1], r"must be a tuple of texts, got \(1,\)"),
        ("oven.rings", ["8"], r"must be a tuple of whole numbers, got \('8',\)"),
        ("oven.rings", [8, True], r"must be a tuple of whole numbers, got \(8, True\)"),
        ("oven.rings", 8, "must be a tuple of whole numbers, got 8"),
    ],
)
def test_build_refuses_values_of_another_type(name: str, value: object, message: str) -> None:
    """A preset or a saved file with a wrong type is an error that names field, expectation and value."""
    with pytest.raises(ConfigError, match=rf"^{name}: {message}$"):
        build(Bakery, {name: value})


def test_json_round_trip() -> None:
    """What a run saves is what it used, tuples included, and readable as one object a section."""
    baked = Bakery(Oven(heat=150.5, content=("a", "b"), fan_on=False, mode="top", rings=(8, 14)), Shop(rolls=("ä",)))
    text = to_json(baked)
    assert build(Bakery, from_json(text)) == baked
    assert json.loads(text)["oven"]["content"] == ["a", "b"]
    assert build(Bakery, flatten(baked)) == baked


def test_describe_shows_the_settings_asked_for() -> None:
    """Sections, or single ones; a line each, empty values visible."""
    assert describe(Bakery(), ("shop.trays", "oven.name")).split() == ["oven.name", "''", "shop.trays", "3"]
    assert describe(Bakery(), ("shop",)).split() == ["shop.rolls", "''", "shop.trays", "3"]
    assert describe(Bakery(Oven(rings=(8, 14))), ("oven",)).split()[-2:] == ["oven.rings", "8,14"]


def test_flags_say_the_same_as_settings() -> None:
    """What one script hands to another on its command line arrives unchanged, lists of numbers included."""
    baked = Bakery(Oven(content=("a", "b"), fan_on=False, rings=(8, 14)), Shop(rolls=("rye",)))
    assert parse(*as_flags(flatten(baked))) == baked
