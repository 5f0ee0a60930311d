"""Processes of several machines find each other, or say in time why not."""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from utils import meeting
from utils.meeting import MeetingError
from utils.ranks import join_ranks

ROOT = Path(__file__).resolve().parents[1]

#: Of machines that are no one's (RFC 5737).
HERE, OTHER = "192.0.2.1", "192.0.2.2"


def listen(monkeypatch: pytest.MonkeyPatch, own: str, addresses: list[str]) -> str | None:
    """The interface chosen for gloo on a machine whose name leads to `own`, with others at `addresses`; None: none."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # what is chosen is undone with it
    monkeypatch.setattr(meeting, "_listening_at", lambda: own)
    monkeypatch.setattr(meeting, "_address_towards", {OTHER: HERE, "127.0.0.1": "127.0.0.1"}.get)
    monkeypatch.setattr(meeting, "_interface_of", {HERE: "eth7", "127.0.0.1": "lo"}.get)
    meeting._use_shared_network(addresses)
    return os.environ["GLOO_SOCKET_IFNAME"] or None


def test_gloo_listens_where_other_machines_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Debian's /etc/hosts has a machine's own name as 127.0.1.1: no other machine connects there. The first machine
    finds the way by the addresses of the others, as the one to meet at is its own."""
    assert listen(monkeypatch, "127.0.1.1", ["127.0.1.1", OTHER]) == "eth7"
    assert listen(monkeypatch, "127.0.1.1", ["", "127.0.1.1"]) is None, "on one machine the loopback will do"
    assert listen(monkeypatch, HERE, ["127.0.1.1", OTHER]) is None, "the name is as good as any"


def test_a_chosen_interface_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who says GLOO_SOCKET_IFNAME knows why."""
    listen(monkeypatch, "127.0.1.1", [])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    meeting._use_shared_network([OTHER])
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_a_machine_finds_its_addresses() -> None:
    """What is asked of the system, and not of torch, on the one interface that every machine has."""
    assert meeting._address_towards("127.0.0.1") == "127.0.0.1"
    assert meeting._interface_of("127.0.0.1") == "lo"
    assert meeting._interface_of(HERE) is None
    assert meeting._address_towards("no-such-machine.invalid") == ""


def test_where_a_name_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    """As gloo has it: to the first address that is the machine's own; without one to the loopback."""
    found = {"named": [HERE, "127.0.0.2", "127.0.0.1"], "foreign": [HERE]}

    def look_up(name: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        if name not in found:
            raise socket.gaierror(socket.EAI_AGAIN, "no such name")
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, 0)) for address in found[name]]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    for name, leads_to in (("named", "127.0.0.2"), ("foreign", "127.0.0.1"), ("unnamed", "127.0.0.1")):
        monkeypatch.setattr(socket, "gethostname", lambda name=name: name)
        assert meeting._listening_at() == leads_to


def test_a_name_without_an_address_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch would try for half an hour to find the first machine by a name that only that machine knows."""
    monkeypatch.setattr(meeting, "_NAMED_WITHIN", 0.0)
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "no-such-machine.invalid"}.items():
        monkeypatch.setenv(name, value)
    said = r"no-such-machine\.invalid \(MASTER_ADDR\).* --local-addr"
    with pytest.raises(MeetingError, match=said), join_ranks(torch.device("cpu")):
        pass


def test_who_does_not_come_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that ended before it met the others: they do not wait for ever, and say which it was."""
    monkeypatch.setattr(meeting, "_COME_WITHIN", timedelta(seconds=0.2))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with ThreadPoolExecutor(2) as threads:
        store = dist.HashStore()
        ends = [threads.submit(meeting._gather, store, rank, 3) for rank in (0, 2)]
        for end in ends:
            with pytest.raises(MeetingError, match=r"process 1 of 3 did not come within 0\.2 s"):
                end.result()
    with pytest.raises(MeetingError, match=r"process 0 of 2 did not come within 0\.2 s"):
        meeting._gather(dist.HashStore(), 1, 2)


def test_those_of_before_a_restart_are_not_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun may keep the store, with dead addresses in it; and each machine counts the failures of its own alone, so
    that those who meet may have been restarted a different number of times."""
    monkeypatch.setattr(meeting, "_COME_WITHIN", timedelta(seconds=20))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    store = dist.HashStore()
    with ThreadPoolExecutor(3) as threads:
        parts = []
        for address, late in (("of the first", 2), ("of the second", 0), ("of the third", 1)):
            monkeypatch.setattr(meeting, "_address_towards", lambda host, address=address: address)
            others = [rank for rank in range(3) if rank != late]
            ends = {rank: threads.submit(meeting._gather, store, rank, 3) for rank in others}
            time.sleep(0.2)
            ends[late] = threads.submit(meeting._gather, store, late, 3)
            for rank in range(3):
                part, addresses = ends[rank].result()
                assert addresses == [address] * 3
                part.set(f"rank-{rank}", address)
            parts.append(part)
        assert [part.get("rank-1").decode() for part in parts] == ["of the first", "of the second", "of the third"]


def two_machines(code: str, **of_the_second: str) -> list[tuple[int, list[str]]]:
    """(exit status, lines of errors) of two processes that run `code`, the second with other environment variables."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env={**common, "RANK": str(rank), **other},
        )
        for rank, other in enumerate(({}, of_the_second))
    ]  # fmt: skip
    errors = [process.communicate(timeout=60)[1].splitlines() for process in processes]
    said = [[line for line in lines if not line.startswith("[")] for lines in errors]  # without torch's own
    return [(process.returncode, lines) for process, lines in zip(processes, said, strict=True)]


def test_machines_that_cannot_connect_say_so() -> None:
    """All are there, but one listens where nobody reaches it: each ends in time, with a line, without a traceback."""
    code = """
import torch
from datetime import timedelta
from utils import ranks, scripts
ranks.CONNECT_WITHIN = timedelta(seconds=1)
with scripts.readable_errors('train', ''), ranks.join_ranks(torch.device('cpu')):
    pass
"""
    ends = two_machines(code, GLOO_SOCKET_IFNAME="none7")
    for (status, (line,)), (rank, interface) in zip(ends, ((0, "lo"), (1, "none7")), strict=True):
        assert status == 1
        assert line.startswith(
            f"train: process {rank} ({socket.gethostname()}) could not connect to the others of the 2"
        )
        assert f"by the interface {interface}: name the interface" in line


def test_patience_is_for_those_who_work() -> None:
    """Longer than connecting may take, and not without end: a machine may be gone without a word."""
    code = """
import time, torch
from datetime import timedelta
from utils import ranks, scripts
ranks.CONNECT_WITHIN = timedelta(seconds=0.5)
scripts._ENDED_BY_THEN = 0.1
with scripts.readable_errors('train', ''), ranks.join_ranks(torch.device('cpu'), timedelta(seconds=1.5)) as all:
    time.sleep(all.first)
    all.agree('')
    time.sleep(2.5 * all.first)
    all.agree('')
"""
    _, (status, (line,)) = two_machines(code)
    assert status == 1
    assert line.startswith("train: process 1 lost another of the 2 (Timed out waiting): that one ended")
