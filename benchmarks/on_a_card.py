#!/usr/bin/env python3
"""All that wants a card, in one go of twelve minutes: the CUDA tests, the demo, and the benchmarks.

    python benchmarks/on_a_card.py --output gpu          (or: make gpu)

What matters most comes first; each job has a time limit, shortly before which it is interrupted, as by Ctrl-C, so that
tests still say what failed; what it wrote until then is kept. OUTPUT gets a file for each, `summary.md`, which is
written anew after every one, and `log.txt` with what they said besides. Ends with status 1 if a job failed or was
interrupted. Nothing is installed or fetched: PyTorch, pytest and what training needs have to be there. Faces are drawn
ones, unless `--set` names a face set.
"""

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FACES = "faces"  # folder of drawn faces, in OUTPUT
GRACE = 10.0  # seconds at the end of a job's time for saying what it has to say


@dataclass(frozen=True)
class Job:
    """`command` follows the interpreter and writes its result, `file`, to the standard output; `seconds` at most."""

    file: str
    seconds: float
    command: list[str]


def jobs(output: Path, faces: Path | None) -> list[Job]:
    """In the order of what they are worth. Without `faces` the first one draws some, into `output`.

    All but the last end in time even if each takes as long as it may. Compiling r50 takes 80 s where nothing of it, or
    another batch size, was compiled before.
    """
    drawn, tests = output / FACES, ("cuda", "head_memory", "prefetch", "augment", "images_decoding", "merge_centres")
    # Enough images for the card to be what a step waits for, not the host that launches kernels.
    same = ["--set", str(faces or drawn), "--steps", "20"]
    step = ["benchmarks/train_step.py", *same, "--rounds", "3"]
    large = [*step, "--batch-size", "512", "--networks"]
    verifying = ["benchmarks/verifying.py", *same]
    head = ["benchmarks/heads.py", "--batch-size", "512", "--matmul", "bf16", "--classes"]
    engines = "dense,blockwise,peer 0.1,dense 0.1,blockwise 0.1,peer"
    pytest = ["-m", "pytest", "-q", "-rs"]
    if importlib.util.find_spec("xdist"):
        pytest += ["-n", str(max(1, min(7, (os.cpu_count() or 2) - 1)))]
    draw = ["data/make_demo_set.py", "--output", str(drawn), "--more", str(output / "more"), "--test-people", "2"]
    return [
        *([] if faces else [Job("faces.txt", 40, [*draw, "--more-people", "2"])]),
        Job("train_step_r50.md", 180, [*large, "r50"]),
        Job("train_step_r50_graph.md", 140, [*step, "--batch-size", "128", "--cuda-graph", "--networks", "r50"]),
        Job("tests.txt", 130, [*pytest, "-k", "card or cuda", *(f"tests/test_{name}.py" for name in tests)]),
        Job("heads.md", 90, [*head, "10000000,1000000", "--engines", engines]),
        Job("verifying.md", 70, [*verifying, "--batch-size", "512", "--images", "12000", "--rounds", "2"]),
        Job("demo.txt", 70, ["utils/demo.py", "--folder", str(output / "demo")]),
        Job("train_step.md", 90, [*large, "r18,mbf,r100"]),
    ]


def run(job: Job, output: Path, seconds: float) -> str:
    """Do `job` in `seconds` at most, its file and the log going into `output`; how it ended, in words."""
    began = time.monotonic()
    with (output / job.file).open("wb") as result, (output / "log.txt").open("ab") as log:
        log.write(f"\n== {job.file}: {' '.join(job.command)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            [sys.executable, *job.command],
            cwd=ROOT,
            stdout=result,
            stderr=log,
            start_new_session=True,
            # A shell that runs this in the background makes it, and what it starts, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            status = process.wait(seconds - min(GRACE, seconds / 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # alone: pytest waits for its workers
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(GRACE, seconds / 2))
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its own processes too
            process.wait()
            return f"stopped after {time.monotonic() - began:.0f} s"
    took = f"{time.monotonic() - began:.0f} s"
    return f"done in {took}" if status == 0 else f"failed with status {status} after {took}"


def run_all(todo: list[Job], output: Path, seconds: float) -> bool:
    """Do the jobs that `seconds` are enough for; whether all of these were done."""
    began, ends = time.monotonic(), dict[str, str]()
    for job in todo:
        left = seconds - (time.monotonic() - began)
        ends[job.file] = run(job, output, min(job.seconds, left)) if left > 5 else "left out: no time"
        print(f"{job.file}: {ends[job.file]}", flush=True)
        lines = "".join(f"| {file} | {end} |\n" for file, end in ends.items())
        (output / "summary.md").write_text(f"| file | |\n|---|---|\n{lines}")
    return not any(end.startswith(("failed", "stopped")) for end in ends.values())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("gpu"), help="folder for the results, made if needed")
    parser.add_argument("--minutes", type=float, default=12.0, help="for everything")
    parser.add_argument("--set", type=Path, help="face set to load JPEGs from; without it faces are drawn")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    if output.exists() and any(output.iterdir()):
        sys.exit(f"on_a_card: {output} is not empty: name another with --output, or remove it")
    output.mkdir(parents=True, exist_ok=True)
    faces = arguments.set.resolve() if arguments.set else None
    if not run_all(jobs(output, faces), output, 60 * arguments.minutes):
        sys.exit(1)


if __name__ == "__main__":
    main()
