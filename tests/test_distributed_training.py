"""Training on several processes, as torchrun starts them, here over gloo on the CPU."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from data.face_set_writer import write_face_set
from models import create_network
from tiny_faces import tiny_face
from train import CHECKPOINTS
from utils.checkpoints import BEST
from utils.training.metrics import read_metrics
from utils.training.saved_checkpoints import checkpoint_folders

ROOT = Path(__file__).resolve().parents[1]
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
FLAGS = {
    "common.device": "cpu",
    "common.workers": 0,
    "data.image-size": 32,
    "model.network": "demo",
    "model.embedding-size": 16,
    "loss.scale": 16.0,
    "batch-size": 12,
    "epochs": 3,
    "lr": 0.05,
    "log-every": 1,
}


def flags(tiny_set: Path, runs: Path, name: str, **settings: object) -> list[str]:
    """Of a run on 48 faces, 4 steps an epoch. Batch norms are frozen: their statistics are of a rank's faces alone."""
    network = create_network("demo", 16, 32)
    norms = ",".join(name for name, module in network.named_modules() if isinstance(module, NORMS))
    chosen = {
        **FLAGS, "common.runs": runs, "data.root": tiny_set, "name": name, "frozen": norms,
        **{key.replace("__", ".").replace("_", "-"): value for key, value in settings.items()},
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in chosen.items()]


def start(ranks: int, arguments: list[str], *options: str, program: Path = ROOT / "train.py") -> subprocess.Popen[str]:
    """`train.py`, or another `program` that trains, on so many processes."""
    torchrun = ["--standalone", f"--nproc-per-node={ranks}", *options]
    return launch(torchrun if ranks > 1 else [], arguments, program)


def launch(torchrun: list[str], arguments: list[str], program: Path = ROOT / "train.py") -> subprocess.Popen[str]:
    """`program` by torchrun with these options of its own; without any alone."""
    launcher = ["-m", "torch.distributed.run", *torchrun] if torchrun else []
    command = [sys.executable, *launcher, str(program), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def finish(process: subprocess.Popen[str]) -> str:
    """What it printed; it has to end well."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return output


def losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def state(run: Path) -> dict[str, Tensor]:
    """All that is saved of the end, what ranks had parts of put together."""
    checkpoint = checkpoint_folders(run / CHECKPOINTS)[-1]
    parts = [load_file(file) for file in sorted(checkpoint.glob("rows-*.safetensors"))]
    rows = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return load_file(checkpoint / "whole.safetensors") | load_file(checkpoint / "backbone.safetensors") | rows


def assert_same_run(one: Path, other: Path) -> None:
    """Equal up to the order in which float32 numbers are added."""
    assert losses(one) == pytest.approx(losses(other), rel=2e-4)
    expected, reached = state(one), state(other)
    assert expected.keys() == reached.keys()
    for name, value in expected.items():
        torch.testing.assert_close(reached[name].float(), value.float(), rtol=1e-2, atol=1e-3, msg=name)


@pytest.fixture(scope="module")
def alone(tiny_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the others have to equal: one process, no torchrun."""
    runs = tmp_path_factory.mktemp("alone")
    finish(start(1, flags(tiny_set, runs, "alone")))
    return runs / "alone"


def test_two_processes_train_what_one_does(tiny_set: Path, tmp_path: Path, alone: Path) -> None:
    """Same global batch, same faces, flips and augmentations, same loss, same verification: the same run, written once;
    parts of a batch that add up change nothing either."""
    output = finish(start(2, flags(tiny_set, tmp_path, "two", micro_batch=4)))
    assert output.count("48 images of 6 identities") == 1, "only the first process speaks"
    assert_same_run(alone, tmp_path / "two")
    verified = [[line["verify/tiny"] for line in read_metrics(run) if "verify/tiny" in line] for run in
                (alone, tmp_path / "two")]  # fmt: skip
    assert verified[0] == pytest.approx(verified[1], abs=0.05)
    assert len(verified[0]) == 3
    assert (tmp_path / "two" / BEST).exists()


def test_a_run_goes_on_with_other_numbers_of_processes(tiny_set: Path, tmp_path: Path, alone: Path) -> None:
    """Begun by three, stopped in the middle of an epoch by SIGTERM, taken up by two, finished by one."""
    run = tmp_path / "elastic"
    first = start(3, flags(tiny_set, tmp_path, "elastic", checkpoint_every=2, epochs=3, profile=0))
    wait_for(lambda: len(checkpoint_folders(run / CHECKPOINTS)) > 0, first)
    first.send_signal(signal.SIGTERM)
    _, errors = first.communicate(timeout=120)
    assert errors.count("train: stopped and saved at step") == 1, "by the first process alone"
    stopped_at = len(losses(run))
    finish(start(2, ["--resume", str(run)]))
    assert 0 < stopped_at <= 12
    assert_same_run(alone, run)
    longer = finish(start(1, ["--resume", str(run), "--epochs", "4"]))
    assert "from step 12" in longer
    assert len(losses(run)) == 16


def test_torchrun_restarts_a_run_after_a_process_died(tiny_set: Path, tmp_path: Path, alone: Path) -> None:
    """kill -9 of one of two processes: torchrun starts both again, and they go on from the last checkpoint."""
    run = tmp_path / "restarted"
    arguments = [*flags(tiny_set, tmp_path, "restarted", checkpoint_every=1), "--resume", "auto"]
    process = start(2, arguments, "--max-restarts=2")
    wait_for(lambda: len(checkpoint_folders(run / CHECKPOINTS)) > 0, process)
    os.kill(trainers(process)[-1], signal.SIGKILL)
    output = finish(process)
    assert "from step" in output, "it was killed too late to show anything"
    assert_same_run(alone, run)


@pytest.mark.parametrize("killed", [0, 1])
def test_two_machines_go_on_after_a_process_of_one_died(
    tiny_set: Path, tmp_path: Path, alone: Path, killed: int
) -> None:
    """Two torchruns that meet, as on two machines: that of the dead process counts a restart, the other does not."""
    run = tmp_path / "restarted"
    arguments = [*flags(tiny_set, tmp_path, "restarted", checkpoint_every=1), "--resume", "auto"]
    meet = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=7", meet, "--max-restarts=3"]
    machines = [launch(options, arguments) for _ in range(2)]
    try:
        wait_for(lambda: len(checkpoint_folders(run / CHECKPOINTS)) > 0, machines[0])
        (dead,) = [pid for machine in machines for pid in trainers(machine) if rank_of(pid) == killed]
        os.kill(dead, signal.SIGKILL)
        outputs = [finish(machine) for machine in machines]
    finally:
        for machine in machines:
            machine.kill()  # those that it started end then
    assert sum("from step" in output for output in outputs) == 1, "it was killed too late to show anything"
    assert_same_run(alone, run)


def test_a_run_goes_on_in_smaller_passes_after_one_process_ran_out_of_memory(
    tiny_set: Path, tmp_path: Path, alone: Path
) -> None:
    """train.micro_batch=auto: one of two processes cannot have six faces in a pass. torchrun starts both again, twice;
    both take two at a time at last, and the run is that of one process."""
    arguments = [*flags(tiny_set, tmp_path, "exhausted"), "--resume", "auto"]
    output = finish(start(2, arguments, "--max-restarts=2", program=ROOT / "tests" / "exhausted_training.py"))
    limit = tmp_path / "exhausted" / "micro_batch.txt"
    assert limit.read_text() == "2\n"
    assert [line for line in output.splitlines() if "ran out of memory" in line] == [
        f"{faces} faces in a pass at most: more ran out of memory before (micro_batch.txt in the run's folder)"
        for faces in (3, 2)
    ]
    assert_same_run(alone, tmp_path / "exhausted")


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({}, "Passes have 3 faces from now on: start it again with --resume auto --name ended"),
        ({"micro_batch": 6}, "Lower train.micro_batch, or train.batch_size"),
    ],
)
def test_out_of_memory_on_one_of_several_processes_says_how_to_go_on(
    tiny_set: Path, tmp_path: Path, settings: dict[str, int], advice: str
) -> None:
    """Without restarts: how to start it again. A size that was set stays as it is. The other process has nothing to say
    of the connection that broke."""
    arguments = flags(tiny_set, tmp_path, "ended", **settings)
    process = start(2, arguments, program=ROOT / "tests" / "exhausted_training.py")
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert f"train: CUDA out of memory. {advice}\n" in errors
    assert (tmp_path / "ended" / "micro_batch.txt").exists() == (not settings)
    assert_clean(errors)


def test_a_signal_to_one_process_stops_all_and_the_first_ends_its_record(tiny_set: Path, tmp_path: Path) -> None:
    """The one with less to do at the end must not leave first: torchrun would end the others, which still say where the
    run stands and draw its pictures."""
    run = tmp_path / "signalled"
    process = start(2, flags(tiny_set, tmp_path, "signalled", epochs=1000))
    wait_for(lambda: len(checkpoint_folders(run / CHECKPOINTS)) > 0, process)
    os.kill(trainers(process)[-1], signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert "train: stopped and saved at step" in errors
    assert (run / "loss.png").exists()


def test_processes_whose_torchrun_was_killed_save_and_end(tiny_set: Path, tmp_path: Path) -> None:
    """kill -9 of torchrun, by a system out of memory, say: nobody else would end them, and they hold the cards."""
    run = tmp_path / "orphaned"
    process = start(2, flags(tiny_set, tmp_path, "orphaned", epochs=1000))
    wait_for(lambda: len(checkpoint_folders(run / CHECKPOINTS)) > 0, process)
    process.kill()
    _, errors = process.communicate(timeout=60)  # until both have let go of the pipe
    assert "train: stopped and saved at step" in errors


@pytest.mark.parametrize(
    ("unlike", "said"),
    [
        (
            {"lr": 0.1},
            "train.lr: 0.05 on process 0 (HOST), 0.1 on process 1 (HOST): all processes need the same program",
        ),
        ({"data__root": "other"}, "data.root: 48 images of 6 identities (checksums "),
    ],
)
def test_processes_that_were_not_started_alike_are_refused(
    tiny_set: Path, tmp_path: Path, unlike: dict[str, object], said: str
) -> None:
    """Two machines with other flags, or with sets of one shape and other faces under one name, would train something
    between the two without a word. Where a set lies is each machine's own affair."""
    with write_face_set(tmp_path / "other", 32) as out:
        for identity in range(10, 16):
            out.add_identity(tiny_face(identity, shot) for shot in range(8))
    shutil.copy(tiny_set / "tiny.bin", tmp_path / "other")
    if "data__root" in unlike:
        unlike = {"data__root": tmp_path / "other"}
    common = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "WORLD_SIZE": "2"}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    processes = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *flags(tiny_set, tmp_path, "unlike", **settings)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**common, "RANK": str(rank)},
        )
        for rank, settings in enumerate(({}, unlike))
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 1
        assert said in errors.replace(socket.gethostname(), "HOST")
    assert not (tmp_path / "unlike").exists()


def wait_for(condition: object, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "nothing happened"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def trainers(torchrun: subprocess.Popen[str]) -> list[int]:
    """Process numbers of those that train."""
    return [pid for pid in children(torchrun.pid) if "train.py" in Path(f"/proc/{pid}/cmdline").read_text()]


def rank_of(pid: int) -> int:
    """The rank that torchrun gave to a process."""
    variables = dict(line.partition(b"=")[::2] for line in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
    return int(variables[b"RANK"])


def free_port() -> int:
    """One that nothing listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def children(parent: int) -> list[int]:
    """Process numbers of the direct children."""
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_a_batch_that_ranks_cannot_share_is_refused(tiny_set: Path, tmp_path: Path) -> None:
    """A batch size that is no multiple of the number of processes is an error that names the setting."""
    process = start(2, flags(tiny_set, tmp_path, "odd", batch_size=13))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count("train.batch_size: must be a multiple of the 2 ranks, got 13") == 1, "said by the first alone"


def test_all_processes_refuse_what_the_first_one_refuses(tiny_set: Path, tmp_path: Path) -> None:
    """A folder that exists is for the first process to see: the others end by it, and not by a broken connection. It is
    said once."""
    (tmp_path / "there").mkdir()
    process = start(2, flags(tiny_set, tmp_path, "there"))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert errors.count(f"train: {tmp_path / 'there'} exists: name another with --name, or remove it") == 1
    assert errors.count(str(tmp_path / "there")) == 1
    assert_clean(errors)


def test_broken_images_of_one_process_end_all(tmp_path: Path) -> None:
    """More than the limit, in what one of the processes decodes: all end by it."""
    with write_face_set(tmp_path / "set", 32) as out:
        for identity in range(6):
            out.add_identity(b"broken" if shot == identity == 3 else tiny_face(identity, shot) for shot in range(8))
    process = start(2, flags(tmp_path / "set", tmp_path, "broken", data__broken_limit=0))
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert "train: 1 images are broken, data.broken_limit allows 0" in errors
    assert_clean(errors)


def assert_clean(errors: str) -> None:
    """No traceback and no warning before torchrun's report, which has a traceback of its own."""
    said = re.split("torch[./]distributed[./]elastic", errors)[0]
    for word in ("Traceback", "Connection", "Warning"):
        assert word not in said, errors
