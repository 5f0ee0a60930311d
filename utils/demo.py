#!/usr/bin/env python3
"""The whole path on the embedded demo set: prepare, train, test and merge, with the commands that a user would give.

    python utils/demo.py        (or: make demo)

Writes everything into one folder, `demo/`, and ends with a summary.
"""

import csv
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import PRESETS, READS, Config
from utils.files import lock_file, remove
from utils.interrupts import Stopped
from utils.scripts import readable_errors
from utils.settings import ConfigError, as_flags, build, flatten, is_read, parse_settings
from utils.training.metrics import read_metrics

PRESET = ("--preset", "demo")
MARKER = ".made_by_the_demo"
#: The demo says itself where its parts go, and sums them all up.
FIXED = (
    *("demo.output", "demo.more", "common.runs", "data.root", "data.verification", "train.name", "train.resume"),
    *("test.sets", "test.model", "test.output", "merge.sets", "merge.output", "merge.model", "merge.dry_run"),
    *("merge.decisions", "merge.within"),
)


@contextmanager
def start_afresh(folder: Path) -> Iterator[None]:
    """Make `folder` empty, and have it alone within the block; one that the demo did not make is left as it is.

    Raises FileExistsError for such a one, BusyError when another demo writes there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    marker = folder / MARKER
    if not marker.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} exists and was not made by the demo: move it, or name another with --folder")
    with marker.open("a") as file:
        lock_file(file.fileno(), marker, folder, wait=False)
        for path in folder.iterdir():
            if path.name != MARKER:  # which stays: without it nobody could start afresh
                remove(path)
        yield


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP, unless they are ignored, as by nohup, end the block as Ctrl-C does, so that what was started
    ends with it."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped("stopped; run it again to start afresh", 128 + number)

    heeded = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(*scripts: Sequence[object]) -> None:
    """Show and run scripts of this project, each with its arguments, at the same time; what the first says is seen at
    once, what others say when those before are done. Stops the demo when one fails."""
    commands = [[str(part) for part in script] for script in scripts]
    show(commands[0])
    with ExitStack() as stack:
        running = []
        for number, (script, *arguments) in enumerate(commands):
            said = stack.enter_context(tempfile.TemporaryFile("w+")) if number else None
            command = [sys.executable, str(ROOT / script), *arguments]
            process = subprocess.Popen(command, stdout=said, stderr=said)
            stack.callback(end, process)
            running.append((process, said))
        for number, (process, said) in enumerate(running):
            code = process.wait()
            if said is not None:
                show(commands[number])
                said.seek(0)
                shutil.copyfileobj(said, sys.stdout)
            if code:
                sys.exit(f"demo: {commands[number][0]} failed with code {code}")


def end(process: subprocess.Popen) -> None:
    """Kill it if it still runs."""
    process.kill()
    process.wait()


def show(command: Sequence[str]) -> None:
    """The command line, as a user would give it."""
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)


def count_joins(merged: Path, first: Path, second: Path) -> tuple[int, int, int]:
    """(rightly joined, wrongly joined, people who are in both sets), by the table of who was drawn."""
    people = [
        {row["label"]: row["person"] for row in csv.DictReader((folder / "identities.csv").open())}
        for folder in (first, second)
    ]
    in_both = len(set(people[0].values()) & set(people[1].values()))
    joined = [row for row in csv.DictReader((merged / "merge.csv").open()) if row["decision"] == "joined"]
    right = sum(people[1][row["label"]] == people[0][row["match_label"]] for row in joined)
    return right, len(joined) - right, in_both


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: settings are those of the preset `demo`, flags override them, for all of the scripts."""
    given = list(sys.argv[1:] if argv is None else argv)
    with readable_errors("demo", "run it again to start afresh"):
        config = parse_settings(Config, PRESETS, ("demo", "common"), __doc__, [*PRESET, *given])
        preset = flatten(build(Config, PRESETS["demo"]))
        overrides = {name: value for name, value in flatten(config).items() if value != preset[name]}
        if fixed := next((name for name in FIXED if name in overrides), None):
            raise ConfigError(f"{fixed}: the demo sets it itself; its folder is chosen with --folder")
        folder = Path(config.demo.folder)
        with ended_by_signals(), start_afresh(folder):
            run_all(folder, overrides)


def run_all(folder: Path, overrides: dict[str, Any]) -> None:
    """Run the four jobs with their own command lines, with settings that differ from the preset's, then sum up."""
    began = time.monotonic()
    first, second, merged, runs = (folder / name for name in ("set", "more", "merged", "runs"))
    trained = runs / "demo"

    def script(path: str, name: str) -> list[str]:
        """The script with those settings that it reads."""
        return [path, *as_flags({one: value for one, value in overrides.items() if is_read(one, READS[name])})]

    run([*script("data/make_demo_set.py", "make_demo_set"), "--output", first, "--more", second])
    run([*script("data/prepare_data.py", "prepare"), "--rec_data_path", first, "--output", folder / "images"])
    run([*script("train.py", "train"), *PRESET, "--data.root", first, "--runs", runs, "--name", "demo"])
    merge = ("--merge", f"{first},{second}", "--output", merged, "--model", trained, "--runs", runs)
    run(
        [*script("all_pair_test.py", "test"), *PRESET, first / "demo.bin", second, "--model", trained, "--runs", runs],
        [*script("dataset_merge/dataset_merge.py", "merge"), *PRESET, *merge],
    )

    verified = {line["step"]: 100 * line["verify/demo"] for line in read_metrics(trained) if "verify/demo" in line}
    before = f"{verified[0]:.1f} %" if 0 in verified else "not measured"
    results = json.loads((trained / "test" / "results.json").read_text())
    right, wrong, in_both = count_joins(merged, first, second)
    print(f"""
The four jobs ran in {time.monotonic() - began:.0f} s, on faces drawn by a program: enough to try it, no more.

  accuracy on unseen people   {before} untrained, {100 * results["sets"]["demo"]["accuracy"]:.1f} % trained
  merge                       {right} of {in_both} people in both sets joined, {wrong} joined wrongly
  the people                  {first / "people.png"}
  folders of images           {folder / "images"}
  model                       {trained / "best.safetensors"}
  logs                        {trained / "metrics.jsonl"}, or: tensorboard --logdir {runs}
  pictures                    {trained / "loss.png"}, {trained / "accuracy.png"},
                              {trained / "test" / "roc.png"}
  report of the test          {trained / "test" / "report.html"}
  merged set                  {merged}, how it came about: {merged / "report.html"}

Another demo empties {folder} first: keep elsewhere what is to stay.

Next: put a set's train.rec, train.idx and its .bin files into a folder and
  . .venv/bin/activate
  python train.py --preset ms1mv3_r50 --data.root FOLDER      (python train.py --help lists all settings)
""")


if __name__ == "__main__":
    main()
