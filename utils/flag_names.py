"""Suggestions for unknown flags: names of other programs, fields of other sections, likely typos."""

import argparse
import difflib
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any

#: Fields, and what arcface_torch, timm, torchvision, Lightning and others call them.
_CALLED: dict[str, str] = {
    "activation-checkpointing": "grad-checkpointing gradient-checkpointing",
    "angle": "threshold",
    "batch-size": "b batch bs total-batch-size train-batch-size",
    "decode": "dali",
    "detector": "model",
    "detector-threshold": "threshold",
    "device": "accelerator cpu cuda devices gpu gpu-id gpus",
    "ema": "ema-decay model-ema model-ema-decay",
    "embedding-size": "embedding-dim emb-size feat-dim",
    "epochs": "epoch max-epochs num-epoch num-epochs",
    "filter-above": "interclass-filtering-threshold",
    "gradient-clip": "clip-grad clip-grad-norm gradient-clip-val",
    "image-size": "img-size input-size size",
    "init": "finetune initial-checkpoint pretrained weights",
    "log-every": "frequent log-interval print-freq",
    "lr": "base-lr learning-rate",
    "margin": "m margin-list",
    "micro-batch": "accumulate-grad-batches gradient-acc grad-accum-steps",
    "milestones": "lr-milestones lr-steps",
    "model": "checkpoint ckpt ckpt-path network pretrained weights",
    "name": "exp-name experiment output run-name",
    "network": "arch backbone model",
    "optimizer": "opt optim",
    "output": "out output-dir save-dir",
    "pairs": "input list",
    "precision": "amp bf16 fp16",
    "rec-data-path": "data data-dir data-path dataset input rec root set source",
    "resume": "checkpoint ckpt ckpt-path resume-from resume-from-checkpoint",
    "root": "data data-dir data-path dataset rec set source train-data",
    "runs": "checkpoint-dir log-dir out output output-dir save-dir",
    "scale": "s",
    "schedule": "lr-scheduler sched scheduler",
    "set": "data data-dir data-path dataset input rec root source",
    "sets": "bin data data-dir data-path dataset datasets input rec root set source target val-targets",
    "source": "data data-dir dataset input root set",
    "t": "sim threshold",
    "verification": "eval val val-targets",
    "verify-every": "eval-every eval-interval verbose",
    "wandb": "wandb-project",
    "warmup-epochs": "lr-warmup-epochs warmup warmup-epoch",
    "weight-decay": "wd",
    "workers": "j num-workers nthreads threads",
}
#: What other trainers have to be told, and this project knows.
_KNOWN: dict[str, str] = {
    "local-rank": "each process gets its number from torchrun",
    "num-classes": "identities are counted in the set",
    "num-image": "images are counted in the set",
    "save-all-states": "the whole state is always saved",
}
#: What is named first on a command line, by what reads it: what is meant by an argument without a flag.
_INPUTS = ("pack.source", "pack_bin.pairs", "prepare.rec_data_path", "drop_noisy.run", "data.root")


class Several(argparse.Action):
    """Stores the value of a flag that takes several, separated by commas."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, *_: Any) -> None:
        setattr(namespace, self.dest, values)


def what_was_meant(
    argument: str,
    arguments: Sequence[str],
    actions: Sequence[argparse.Action],
    presets: Container[str],
    readable: Callable[[str], bool],
) -> str:
    """The error for `argument`, one of all `arguments`, which is no setting, with the parser's `actions` that may be
    meant. `readable` tells which settings the script reads: others would be accepted and have no effect.
    """
    said = f"there is no setting {argument}"
    name = argument.partition("=")[0]
    preset = Path(name).name.removesuffix(".py")  # insightface's trainer is given configs/NAME
    for ending, flags in (("", ""), ("_onegpu", " --batch-size 128")):
        if preset.endswith(ending) and preset.removesuffix(ending) in presets:
            return f"{said} (did you mean --preset {preset.removesuffix(ending)}{flags}?)"
    if name.endswith(".py") or name.startswith("configs/"):
        return f"{said} (docs/training.md has a table of what the fields of insightface's configs are called here)"
    if not name.startswith("-"):
        return f"{said}{_of_plain(argument, arguments, actions, readable)}"
    known = [flag for action in actions if readable(action.dest) for flag in action.option_strings]
    bare = name.lstrip("-").lower()
    if bare in _KNOWN:
        return f"{said}, nor need of it: {_KNOWN[bare]}"
    if meant := _called_so(bare, known):
        own = [flag for flag in meant if flag != "--data.root"] or meant  # a flag of the script's own is nearer
        return f"{said} (did you mean {' or '.join(own)}?)"
    if of_section := [flag for flag in known if flag.startswith(f"{name}.")]:
        return f"{said}, but {', '.join(of_section[:3])}{', ...' if len(of_section) > 3 else ''}"
    if elsewhere := _called_so(bare, [flag for action in actions for flag in action.option_strings]):
        return f"{said} here: {elsewhere[0].removeprefix('--').replace('-', '_')} is another program's"
    close = difflib.get_close_matches(name, known, n=1)
    return f"{said} (did you mean {close[0]}?)" if close else said


def _called_so(name: str, known: Sequence[str]) -> list[str]:
    """The flags of the fields called `name`, here or in other programs; of fields of one name the first."""
    fields = [name, *(field for field, names in _CALLED.items() if name in names.split())]
    flags = ([flag for flag in known if flag == f"--{field}" or flag.endswith(f".{field}")] for field in fields)
    return [found[0] for found in flags if found]


def _of_plain(
    argument: str, arguments: Sequence[str], actions: Sequence[argparse.Action], readable: Callable[[str], bool]
) -> str:
    """The same for an argument without a flag: one value too many of the flag before it, or what the script reads."""
    before = [flag for flag in arguments[: arguments.index(argument)] if flag.startswith("-")][-1:]
    for action in actions:
        if before and before[0] in action.option_strings:
            if isinstance(action, argparse.BooleanOptionalAction):
                off = next(flag for flag in action.option_strings if flag.startswith("--no-"))
                return f": {action.option_strings[0]} takes no value, it is off by {off}"
            if isinstance(action, Several):
                return f": several values of {before[0]} are separated by commas"
    meant = next((name for name in _INPUTS if readable(name)), "")
    flag = next((action.option_strings[0] for action in actions if action.dest == meant), "")
    return f" (did you mean {flag} {argument}?)" if flag else ""
