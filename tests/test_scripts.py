"""The scripts as users start them: from any directory, with nothing shadowed and nothing heavy at import."""

import ast
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import NoReturn

import pytest
import torch

import all_pair_test
from config import READS, Config
from data.report import main as report_main
from dataset_merge import dataset_merge
from utils.interrupts import Stopped
from utils.ranks import MeetingError, Ranks, UnlikeRanksError, join_ranks
from utils.scripts import readable_errors
from utils.settings import flatten, is_read

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("data", "dataset_merge", "models", "utils")
#: Each script and its name in the table of what programs read; the demo passes settings on to all of them.
PROGRAMS = {
    "train.py": "train",
    "all_pair_test.py": "test",
    "data/prepare_data.py": "prepare",
    "data/pack_set.py": "pack",
    "data/pack_bin.py": "pack_bin",
    "data/report.py": "report",
    "data/drop_noisy.py": "drop_noisy",
    "data/make_demo_set.py": "make_demo_set",
    "dataset_merge/dataset_merge.py": "merge",
    "utils/demo.py": None,
    "utils/export.py": "export",
}


def product_files() -> list[Path]:
    return sorted([*ROOT.glob("*.py"), *(file for package in PACKAGES for file in (ROOT / package).rglob("*.py"))])


@pytest.mark.parametrize("script", PROGRAMS)
def test_scripts_start_from_any_directory(script: str, tmp_path: Path) -> None:
    """A decoy package in the working directory is not picked up; the help names the settings that the script reads,
    and not those of other programs, which are hundreds of lines."""
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("raise SystemExit('the wrong package was imported')")
    done = subprocess.run([sys.executable, ROOT / script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = set(re.findall(r"--([a-z-]+\.[a-z0-9-]+)", done.stdout.partition("\noptions:")[2]))
    program = PROGRAMS[script]
    reads = {name for name in flatten(Config()) if program is None or is_read(name, READS[program])}
    assert shown - {f"no-{name}" for name in shown} == {name.replace("_", "-") for name in reads}
    assert ("of the other programs" in done.stdout) == (program is not None)


def test_a_warning_is_one_line() -> None:
    """It shows no line of the source, and outside of scripts warnings are as they were."""
    before = warnings.formatwarning
    with readable_errors("pack_set", ""):
        shown = warnings.formatwarning(UserWarning("the disk is slow"), UserWarning, __file__, 1)
    assert shown == "pack_set: warning: the disk is slow\n"
    assert warnings.formatwarning is before


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (
            lambda here: (here / "file" / "set").mkdir(),
            r"{here}/file/set: Not a directory (it, or a part of its path, is a file)",
        ),
        (lambda here: (here / "file").mkdir(), r"{here}/file: File exists (and is no folder)"),
        (lambda here: (here / "no").rename(here / "new"), "{here}/no -> {here}/new: No such file or directory"),
        (lambda here: os.close(-1), "Bad file descriptor"),
    ],
)
def test_errors_of_the_system_name_the_file_first(do: Callable[[Path], object], message: str, tmp_path: Path) -> None:
    """What is wrong, and with which file, in words; the number of the error says nothing to anybody."""
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended, readable_errors("pack_set", ""):
        do(tmp_path)
    assert ended.value.code == "pack_set: " + message.format(here=tmp_path)


def test_a_name_is_no_command_to_the_terminal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Escapes in names of other people's files are shown, in warnings, errors and reports, and not obeyed."""
    clear, shown = "\x1b[2J\x9b2J\r", "\\x1b[2J\\x9b2J\\x0d"
    with readable_errors("pack_set", ""):
        assert warnings.formatwarning(UserWarning(clear), UserWarning, __file__, 1) == f"pack_set: warning: {shown}\n"
    with pytest.raises(SystemExit, match=re.escape(f"pack_set: {shown}")), readable_errors("pack_set", ""):
        raise ValueError(clear)
    with pytest.raises(SystemExit), readable_errors("train", ""):
        raise Stopped(f"stopped; go on with {clear}", 130)
    assert capfd.readouterr().err == f"\ntrain: stopped; go on with {shown}\n"
    (tmp_path / "set" / clear).mkdir(parents=True)
    (tmp_path / "set" / clear / f"{clear}.jpg").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        report_main([str(tmp_path / "set"), "--check", "--output", str(tmp_path / "report"), "--workers", "0"])
    printed = capfd.readouterr().out
    assert f"every image of identity {shown} is broken" in printed
    assert f"{shown}.jpg: its 8 bytes are no image" in printed
    assert "\x1b" not in printed


def test_commands_that_are_advised_have_their_paths_quoted() -> None:
    """What a message says to type is typed as it stands: a path with a blank or an apostrophe is one word of it."""
    flags = "merge|resume|name|data[.]root|source|model"
    unquoted = re.compile(rf"(?:[.]py|--(?:{flags})) \{{(?!quote\()[^}}]*\}}")
    found = [f"{file.name}: {text}" for file in product_files() for text in unquoted.findall(file.read_text())]
    assert not found


@pytest.mark.skipif(sys.platform != "linux", reason="needs SIGBUS")
def test_a_bus_error_shows_where_it_came() -> None:
    """A read error of a mapped file in the main process ends it with its place in the program, not without a word."""
    program = (
        "import os\nfrom utils.scripts import readable_errors\nwith readable_errors('a', 'b'): os.kill(os.getpid(), 7)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert "Fatal Python error: Bus error" in done.stderr
    assert done.returncode == -7


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell of Unix")
@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_a_program_without_standard_streams(closed: str, tmp_path: Path) -> None:
    """It works as any other, says what it says to nobody, and no file that it writes takes the place of a stream."""
    program = f"""
import sys
from utils.scripts import readable_errors
from utils.settings import flatten, is_read
with readable_errors('a', 'b'):
    with open({str(tmp_path / "file")!r}, 'w') as file:
        file.write(str(file.fileno() > 2))
    print('out')
    print('err', file=sys.stderr)
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} {closed}"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True)
    shown = ("" if " >&-" in f" {closed}" else "out\n", "" if "2>&-" in closed else "err\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, *shown)
    assert (tmp_path / "file").read_text() == "True"


@pytest.mark.parametrize("script", [script for script in PROGRAMS if "/" in script])
def test_scripts_in_folders_put_the_root_first(script: str) -> None:
    """The repository's root is at sys.path[0] before anything but the standard library is imported."""
    body = ast.parse((ROOT / script).read_text()).body
    imports = []
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            imports += [node.module] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
        elif "sys.path.insert(0" in ast.unparse(node):
            break
    else:
        pytest.fail("sys.path is left alone")
    assert {name.split(".")[0] for name in imports if name} <= set(sys.stdlib_module_names)


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """A script's own folder comes second on sys.path, so a name like `types` or `profile` would shadow Python's."""
    names = {file.stem for file in product_files()} | set(PACKAGES)
    assert not names & set(sys.stdlib_module_names)


def test_mxnet_is_never_imported() -> None:
    """mxnet does not import with current NumPy; the product must not need it anywhere."""
    for file in product_files():
        for node in ast.walk(ast.parse(file.read_text())):
            names = [name.name for name in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] == "mxnet" for name in names), file


def test_preparing_data_needs_no_torch(tmp_path: Path) -> None:
    """Settings, records and prepare_data are light: they load neither torch nor matplotlib."""
    program = (
        "import sys, config, data.prepare_data, data.pack_set, data.pack_bin, data.face_sets, data.verification_bin; "
        "sys.exit(', '.join({'torch', 'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)) or None)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_wrong_flags_name_the_field() -> None:
    """A typing error ends with the flag, what it should be, and no traceback."""
    for flags, message in (
        (["--batch-size", "many"], "argument --batch-size/--train.batch-size: must be a whole number, got 'many'"),
        (["--bacth-size", "3"], "there is no setting --bacth-size (did you mean --batch-size?)"),
        (["--epochs", "0"], "train.epochs: must be 1 or more, got 0"),
    ):
        done = subprocess.run([sys.executable, ROOT / "train.py", *flags], capture_output=True, text=True)
        assert done.returncode == 2
        assert message in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        ("ValueError('no such set')", 1, "train: no such set\n"),
        ("RuntimeError('a fault')", 1, "RuntimeError: a fault\n"),
        ("KeyboardInterrupt()", 130, "\ntrain: interrupted; all is kept\n"),
    ],
)
def test_a_rank_with_an_error_ends_at_once(error: str, status: int, printed: str) -> None:
    """What other libraries do at the interpreter's end may wait for the other ranks, which wait for this one, and
    torchrun would never hear of the error. A process alone ends as any other."""
    code = "import atexit; from utils.scripts import readable_errors; atexit.register(lambda: print('taken down'))\n"
    code += f"with readable_errors('train', 'all is kept'): raise {error}"
    for ranks, at_the_end in ((1, "taken down\n"), (2, "")):
        environment = {**os.environ, "WORLD_SIZE": str(ranks), "RANK": "0"}
        ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert (ended.returncode, ended.stdout) == (status, at_the_end)
        assert ended.stderr.endswith(printed)


def test_a_rank_with_an_error_does_not_wait_for_the_others() -> None:
    """It leaves the group of processes as it is: to let go of it, nccl would wait for a rank that is in the middle of
    an exchange with this one."""
    code = """
import time, torch
from utils.ranks import dist, join_ranks
from utils.scripts import readable_errors
from utils.settings import flatten, is_read
dist.destroy_process_group = lambda: time.sleep(600)  # as nccl
with readable_errors('train', ''), join_ranks(torch.device('cpu')) as ranks:
    if not ranks.first:
        raise ValueError('no such set')
    ranks.agree('')
"""
    first, second = two_processes(code)
    try:
        _, errors = second.communicate(timeout=60)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
    assert second.returncode == 1
    assert errors.endswith("train: no such set\n")


def two_processes(code: str) -> list[subprocess.Popen[str]]:
    """Two that run `code`, each on a machine of its own as far as they know; their errors can be read."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, env={**common, "RANK": rank}, stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]


def said(errors: str) -> list[str]:
    """The lines of `errors` that are not torch's own warnings, of a network without IPv6 or names, say."""
    return [line for line in errors.splitlines() if not line.startswith("[W")]


def test_ranks_leave_together(tmp_path: Path) -> None:
    """The second waits for what the first does alone: torchrun gives up on a machine whose processes are gone long
    before the others."""
    code = f"""
import time, torch
from pathlib import Path
from utils.ranks import join_ranks
from utils.scripts import end_rank
written = Path({str(tmp_path / "written")!r})
with join_ranks(torch.device('cpu')) as ranks:
    if ranks.first:
        time.sleep(1)
        written.touch()
assert written.exists()
end_rank()
"""
    processes = two_processes(code)
    ends = [(said(process.communicate(timeout=60)[1]), process.returncode) for process in processes]
    assert ends == [([], 0)] * 2


def test_a_lost_rank_is_told_in_a_line() -> None:
    """When the first is killed the second says so, after the time that torchrun has to end it, without a traceback."""
    code = """
import os, torch
from utils import scripts
from utils.ranks import join_ranks
scripts._ENDED_BY_THEN = 0.5
with scripts.readable_errors('train', ''), join_ranks(torch.device('cpu')) as ranks:
    ranks.texts('')  # both are connected: of a loss before that torch's own warning has many lines
    if ranks.first:
        os._exit(9)
    ranks.agree('')
"""
    first, second = two_processes(code)
    _, errors = second.communicate(timeout=60)
    first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (9, 1)
    (line,) = said(errors)
    assert line.startswith("train: process 1 lost another of the 2 (")
    assert line.endswith("): that one ended, and says why here or on its machine, or the network failed")


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        ({"a": 1}, {"a": 2}, r"a: 1 on process 0 \(.*\), 2 on process 1"),
        ({"a": 1, "b": 2}, {"a": 1}, r"b: 2 on process 0 \(.*\), None on process 1"),
        ({"a": 1}, {"a": 1, "b": 2}, r"b: None on process 0 \(.*\), 2 on process 1"),
    ],
)
def test_what_one_rank_alone_has_is_unlike(
    first: dict[str, int], second: dict[str, int], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A verification set that is there on one machine only, be it that of the first rank or another: the other ranks
    would wait for those who test on it."""
    ranks = Ranks()
    ranks.size = 2
    monkeypatch.setattr(ranks, "together", lambda function: function())
    monkeypatch.setattr(ranks, "texts", lambda text: [text, json.dumps(["other", second])])
    with pytest.raises(UnlikeRanksError, match=said):
        ranks.require_alike(lambda: first)
    second.clear()
    second.update(first)
    ranks.require_alike(lambda: first)


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, "RANK expected"),
        ({"RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "TAKEN"}, "EADDRINUSE"),
        ({"RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "port"}, "invalid literal"),
    ],
)
def test_ranks_that_do_not_meet_say_where(
    environment: dict[str, str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A WORLD_SIZE that something else left in the environment, or a port that is taken: one line, no traceback."""
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for name, value in {"WORLD_SIZE": "2", **environment}.items():
            monkeypatch.setenv(name, value.replace("TAKEN", str(taken.getsockname()[1])))
        with (
            pytest.raises(MeetingError, match=f"WORLD_SIZE is 2, but .*{said}.* unset WORLD_SIZE"),
            join_ranks(torch.device("cpu")),
        ):
            pass


@pytest.mark.parametrize(
    ("environment", "tasks", "advice"),
    [
        ({}, "8", "let it start torchrun, once a machine"),
        ({}, "1", None),
        ({"WORLD_SIZE": "1"}, "8", None),
        ({"WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "8", "tell torchrun of them all, --nnodes"),
        ({"WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "8", "LOCAL_RANK": "0"}, "8", None),
    ],
)
def test_copies_that_srun_started_are_warned_of(
    environment: dict[str, str],
    tasks: str,
    advice: str | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Eight programs that train the same, each alone, are not what `srun -n 8` was for, nor eight torchruns that were
    not told of each other; with one torchrun over all is well."""
    for name in ("WORLD_SIZE", "GROUP_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"SLURM_STEP_NUM_TASKS": tasks, **environment}.items():
        monkeypatch.setenv(name, value)
    with join_ranks(torch.device("cpu")) as ranks:
        assert ranks.size == 1
    said = [str(one.message) for one in recwarn]
    assert len(said) == (advice is not None)
    assert all(line.startswith(f"srun started 8 of these, and each works alone: {advice}") for line in said)


@pytest.mark.parametrize("program", [all_pair_test, dataset_merge])
def test_what_the_first_rank_does_alone_may_take_long(program: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others wait for hours of bootstrap or writing, or for another program that makes the same embeddings; torch
    would give up after half an hour."""
    waits = []

    class JoinedError(Exception):
        pass

    def join(device: torch.device, patience: timedelta | None = None) -> NoReturn:
        waits.append(patience)
        raise JoinedError

    monkeypatch.setattr(program, "join_ranks", join)
    with pytest.raises(JoinedError):
        program.main(["--common.device", "cpu", "--model", str(ROOT)])
    assert waits == [timedelta(days=7)]


def test_a_rank_ends_without_taking_the_interpreter_down() -> None:
    """What aborts in that would make a complete run a failed one to torchrun; a process alone ends as any other, with
    no search for garbage among all that torch has made."""
    code = "import atexit, gc; from utils.scripts import end_rank; print('done'); "
    code += "atexit.register(lambda: print('taken down' if gc.get_freeze_count() > 1000 else 'searched')); "
    for ranks, printed in ((1, "done\ntaken down\n"), (2, "done\n")):
        environment = {**os.environ, "WORLD_SIZE": str(ranks)}
        ended = subprocess.run(
            [sys.executable, "-c", code + "end_rank()"], cwd=ROOT, env=environment, capture_output=True, text=True
        )
        assert (ended.returncode, ended.stdout) == (0, printed)
