"""How processes find each other, before they can talk: on one machine, or on several."""

import fcntl
import ipaddress
import os
import socket
import struct
import time
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist

# How long they wait for one that comes late: it may load torch from a slow disk.
_COME_WITHIN = timedelta(minutes=10)

#: How long connecting may take once all of them are there.
CONNECT_WITHIN = timedelta(minutes=5)

# Seconds after which a name that leads nowhere is no passing trouble.
_NAMED_WITHIN = 60.0

# Of `ioctl`: the IPv4 address of a network interface. The number is that of Linux.
_SIOCGIFADDR = 0x8915


class MeetingError(OSError):
    """The processes did not find each other."""


def meet() -> tuple[dist.Store, int, int]:
    """What all processes read and write, and the rank of this one and their number; when it returns all are there.

    Raises MeetingError when they do not come together where `MASTER_ADDR` and `MASTER_PORT` say.
    """
    try:
        _require_address(os.environ.get("MASTER_ADDR", ""))
        store, rank, size = next(dist.rendezvous("env://", timeout=_COME_WITHIN))
        store, addresses = _gather(store, rank, size)
        _use_shared_network(addresses)
    except (ValueError, dist.DistError) as error:
        raise MeetingError(_why_not_met(error)) from None
    return store, rank, size


def why_not_connected(error: Exception, rank: int, size: int) -> str:
    """What to say when all were there, but no connections came about between them."""
    interface = os.environ.get("GLOO_SOCKET_IFNAME")
    way = f"interface {interface}" if interface else f"address {_listening_at()}, to which this machine's name leads"
    return (
        f"process {rank} ({socket.gethostname()}) could not connect to the others of the {size} "
        f"({str(error).splitlines()[0].rstrip('.')}) by the {way}: name the interface that the machines share with "
        "GLOO_SOCKET_IFNAME (`ip -brief address` lists them), and let no firewall block ports between them"
    )


def _require_address(host: str) -> None:
    """Raise MeetingError for a name that leads nowhere: torch would try for half an hour."""
    deadline = time.monotonic() + _NAMED_WITHIN
    while host:
        try:
            socket.getaddrinfo(host, None)
            return
        except socket.gaierror as error:
            if time.monotonic() > deadline:
                raise MeetingError(
                    f"the processes are to meet at {host} (MASTER_ADDR), a name without an address on "
                    f"{socket.gethostname()} ({error.strerror}): add it to /etc/hosts, or start torchrun on the first "
                    "machine with --local-addr and an address that the others reach"
                ) from None
        time.sleep(1)


def _gather(store: dist.Store, rank: int, size: int) -> tuple[dist.Store, list[str]]:
    """A part of `store` that these processes alone have, and the IPv4 address of each one's machine on its way to
    `MASTER_ADDR`; an empty one where there is none. Waits for all of them.

    After a restart by torchrun the store still has what the processes before wrote: addresses that are dead. How often
    it restarted them does not tell: each machine counts the failures of its own. So each says hello by a name that
    nobody had before, and the first process welcomes that name to the part that it has named itself.
    """
    address = _address_towards(os.environ["MASTER_ADDR"])
    if rank:
        name = uuid.uuid4().hex
        store.set(f"hello-{rank}", name)
        _wait_for(store, {f"welcome-{name}": 0}, size)
        own: dist.Store = dist.PrefixStore(store.get(f"welcome-{name}").decode(), store)
        own.set(f"address-{rank}", address)
    else:
        part = uuid.uuid4().hex
        own = dist.PrefixStore(part, store)
        own.set("address-0", address)
        _welcome(store, own, part, size)
    names = {f"address-{other}": other for other in range(size)}
    _wait_for(own, names, size)
    return own, [found.decode() for found in own.multi_get([*names])]


def _welcome(store: dist.Store, own: dist.Store, part: str, size: int) -> None:
    """Welcome the others to `part` of the store, which is `own`, until all are there."""
    deadline, pause = time.monotonic() + _COME_WITHIN.total_seconds(), 0.01
    missing, welcomed = set(range(1, size)), dict[int, bytes]()
    while missing:
        for other in sorted(missing):
            if own.check([f"address-{other}"]):
                missing.discard(other)
            elif store.check([f"hello-{other}"]) and (name := store.get(f"hello-{other}")) != welcomed.get(other):
                welcomed[other] = name  # maybe one from before a restart, whom the present one will replace
                store.set(f"welcome-{name.decode()}", part)
        if missing and time.monotonic() > deadline:
            raise _not_there(min(missing), size)
        time.sleep(pause if missing else 0)
        pause = min(2 * pause, 0.25)


def _wait_for(store: dist.Store, names: Mapping[str, int], size: int) -> None:
    """Wait until the store has all `names`, each of which the process that it is mapped to writes."""
    try:
        store.wait([*names], _COME_WITHIN)
    except dist.DistError:
        missing = next((other for name, other in names.items() if not store.check([name])), size - 1)
        raise _not_there(missing, size) from None


def _not_there(missing: int, size: int) -> MeetingError:
    return MeetingError(
        f"process {missing} of {size} did not come within {_COME_WITHIN.total_seconds():g} s: its machine says why"
    )


def _use_shared_network(addresses: Iterable[str]) -> None:
    """Let gloo listen on the interface by which this machine reaches the others, who are at `addresses`, where its own
    choice is the loopback: none of them can reach it there.

    Gloo goes by the machine's name, which Debian's /etc/hosts has as 127.0.1.1.
    """
    if os.environ.get("GLOO_SOCKET_IFNAME") or not _is_loopback(_listening_at()):
        return
    for address in addresses:
        if address and not _is_loopback(address) and (interface := _interface_of(_address_towards(address))):
            os.environ["GLOO_SOCKET_IFNAME"] = interface
            return


def _listening_at() -> str:
    """The address that gloo chooses: the first of this machine's name that is its own, or else the loopback."""
    with suppress(OSError):
        for family, kind, protocol, _, address in socket.getaddrinfo(socket.gethostname(), 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0])
    return "127.0.0.1"


def _address_towards(host: str) -> str:
    """This machine's IPv4 address as `host` would see it, to which nothing is sent; empty if there is no way there."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _interface_of(address: str) -> str | None:
    """The name of the network interface with this IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # it has none
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == address:
                    return name
    return None


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.split("%")[0]).is_loopback


def _why_not_met(error: Exception) -> str:
    there = ":".join(os.environ.get(name, f"({name} is not set)") for name in ("MASTER_ADDR", "MASTER_PORT"))
    advice = "start them by torchrun, or unset WORLD_SIZE for a single one"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        advice = "the machines of those that did not come say why, unless a firewall blocks ports between them"
    return (
        f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but the processes did not meet at {there} "
        f"({str(error).splitlines()[0].rstrip('.')}): {advice}"
    )
