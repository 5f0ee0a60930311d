"""No setting is ignored without a word: those that were given and have no effect are named, and no others."""

import argparse
import re
import warnings
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import config
from conftest import ROOT
from utils import settings
from utils.settings import as_flags, flatten, parse_settings

SECTIONS = [section.name for section in fields(config.Config)]
FIELDS = list(flatten(config.Config()))


def warned(program: str, *argv: str, **more: Any) -> list[str]:
    """What a program says of the settings in `argv` that have no effect."""
    own = (config.READS[program][0], "common")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        parse_settings(config.Config, config.PRESETS, own, "", argv, reads=config.READS[program], **more)
    return [str(one.message) for one in said]


@pytest.mark.parametrize(
    ("program", "argv", "said"),
    [
        ("train", "--optimizer adamw --momentum 0.5", "train.momentum not used: train.optimizer is adamw"),
        ("train", "--milestones 10,16", "train.milestones not used: train.schedule is poly"),
        (
            "train",
            "--schedule constant --milestones 3 --final-lr 0.1",
            "train.milestones, train.final_lr not used: train.schedule is constant",
        ),
        ("train", "--schedule cosine --schedule-power 2", "train.schedule_power not used: train.schedule is cosine"),
        (
            "train",
            "--schedule step --milestones 9,12 --epochs 9",
            "train.milestones not used: train.epochs is 9",
        ),
        ("train", "--model.normalisation none", "model.normalisation not used: PROGRAM does not read it"),
        ("train", "--loss.m2 0.2", "loss.m2 not used: loss.name is arcface"),
        (
            "train",
            "--loss.name sphereface --loss.margin-warmup-epochs 2",
            "loss.margin_warmup_epochs not used: loss.name is sphereface",
        ),
        ("train", "--preset ms1mv3_r50 --loss.name combined", "loss.margin not used: loss.name is combined"),
        ("train", "--loss.engine dense --loss.block 9", "loss.block not used: loss.engine is dense"),
        ("train", "--resume runs/a --name b", "train.name not used: train.resume names the run, runs/a"),
        ("train", "--merge.t 0.5 --test.seed 3", "merge.t, test.seed not used: PROGRAM does not read them"),
        ("test", "--data.resize", "data.resize not used: PROGRAM does not read it"),
        ("test", "--no-cache --cache-folder a", "test.cache_folder not used: test.cache is off"),
        ("test", "--no-checks --training-set a", "test.training_set not used: test.checks is off"),
        ("merge", "a b --exclude-t 0.5", "merge.exclude_t not used: merge.exclude names no set"),
        (
            "merge",
            "a b --clean-outlier 0.5 --clean-mixed 0.4",
            "merge.clean_outlier, merge.clean_mixed not used: merge.clean is off",
        ),
        ("merge", "a --clean report --t 0.5", "merge.t not used: there is one set, and merge.within is off"),
        ("merge", "a b --decisions m --t 0.5", "merge.t not used: merge.decisions says who is joined"),
        (
            "merge",
            "a b --decisions m --duplicates bytes --model c",
            "merge.model not used: no faces are compared",
        ),
        ("prepare", "--r set --image-root a", "prepare.image_root not used: prepare.rec_data_path is no list"),
        ("pack", "--source a --seed 3", "pack.seed not used: pack.shuffle is off"),
        ("pack", "--source a --face central", "pack.face not used: pack.detector names no file"),
        ("pack", "--source a --quality 90", "pack.quality not used: nothing is aligned or resized: images keep"),
        ("pack", "--source a --device cpu", "common.device not used: PROGRAM does not read it"),
        ("pack_bin", "--detector a --other-sizes resize", "pack_bin.other_sizes not used: pack_bin.detector aligns"),
        ("pack_bin", "--seed 3", "pack_bin.seed not used: pack_bin.draw is 0"),
        ("report", "a --check --sample 9", "report.sample not used: all images are decoded"),
        ("export", "a --calibration b", "export.calibration not used: export.precision is fp32"),
    ],
)
def test_what_has_no_effect_is_said(program: str, argv: str, said: str) -> None:
    """A setting that was given and changes nothing, be it another choice's or another program's, is named: once, with
    the reason, and never refused."""
    (found,) = warned(program, *argv.split())
    assert found.startswith(said.replace("PROGRAM", argparse.ArgumentParser().prog))


def test_what_has_an_effect_is_not_said(tmp_path: Path) -> None:
    """No false alarm: presets in any program, though they carry settings of others; a run that goes on with what it was
    told of at its start; what only seems to be unused."""
    for program in config.READS:
        for preset in config.PRESETS:
            assert warned(program, "--preset", preset, *(["a", "b"] if program == "merge" else [])) == []
    assert warned("train", "--momentum", "0.5", saved=lambda _: {"train.optimizer": "adamw"}) != []
    saved = {"train.optimizer": "adamw", "train.momentum": 0.5, "train.name": "a", "train.resume": "runs/a"}
    assert warned("train", "--momentum", "0.5", "--resume", "runs/a", saved=lambda _: saved) == []
    assert warned("train", "--milestones", "3,5", saved=lambda _: {"train.milestones": [3, 5]}) == []
    (tmp_path / "list").write_text("")
    listed = ("--source", str(tmp_path / "list"), "--image-root", "a", "--quality", "90")
    assert warned("pack", *listed, "--detector", "b", "--other-sizes", "resize") == []
    assert warned("train", *as_flags(flatten(config.Config()))) == []
    assert warned("merge", "a", "--exclude", "b", "--exclude-t", "0.5", "--centre", "medoid") == []
    assert warned("merge", "a", "b", "--decisions", "m", "--clean", "report", "--model", "c") == []


def test_one_process_says_what_has_no_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several the first."""
    monkeypatch.setenv("RANK", "1")
    assert warned("train", "--milestones", "3") == []


@pytest.mark.parametrize(
    ("program", "file"),
    [
        ("train", "train.py"),
        ("train", "utils/training/build_parts.py"),
        ("train", "utils/training/build_step.py"),
        ("test", "all_pair_test.py"),
        ("merge", "dataset_merge/dataset_merge.py"),
        ("merge", "dataset_merge/merging.py"),
        ("prepare", "data/prepare_data.py"),
        ("pack", "data/pack_set.py"),
        ("pack_bin", "data/pack_bin.py"),
        ("report", "data/report.py"),
        ("export", "utils/export.py"),
        ("make_demo_set", "data/make_demo_set.py"),
    ],
)
def test_what_a_program_reads(program: str, file: str) -> None:
    """The table of what each program reads has all that it does: else it would say of a flag that it has no effect."""
    for name in config.READS[program]:
        assert name in SECTIONS or name in FIELDS, name
    text = (ROOT / file).read_text()
    read = {".".join(found) for found in re.findall(r"\bconfig\.([a-z_]+)\.([a-z_]+)", text)} & set(FIELDS)
    assert [name for name in read if not settings.is_read(name, config.READS[program])] == []
