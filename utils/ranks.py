"""The processes that train together: one on each card, or one alone, which needs no process group."""

import json
import os
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from utils.interrupts import Stopped
from utils.meeting import CONNECT_WITHIN, MeetingError, meet, why_not_connected
from utils.scripts import LostRanksError

# Their names since torch 2.14, which warns of the older ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

_Result = TypeVar("_Result")


# What gloo, nccl and the sockets of torch say when the other process is gone, or its machine, or the network.
_GONE = (
    "Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited",
    "Connection timed out", "No route to host", "Network is unreachable", "Timed out waiting",
)  # fmt: skip

#: The `patience` of `join_ranks` in a training: one process may read a set for the first time while the others wait.
HALF_AN_HOUR = timedelta(minutes=30)

#: The `patience` of `join_ranks` where the first rank may work alone for hours, or wait for another program.
DAYS = timedelta(days=7)

# Seconds that the other processes of a machine have to end with the first when torchrun was killed.
_OTHERS_END_AFTER = 30.0


class OtherRankError(ValueError):
    """Another rank failed, so this one cannot go on; the message says which, and why."""


class UnlikeRanksError(ValueError):
    """The ranks were not started alike; the message says in what they differ."""


def lost_another(error: BaseException | None) -> str | None:
    """The words by which `error`, of an exchange between ranks, tells that another one is gone; None: it does not."""
    return next((words for words in _GONE if words in str(error)), None) if isinstance(error, RuntimeError) else None


def share_of(total: int, rank: int, ranks: int) -> range:
    """One rank's share of `total` things: consecutive ones, as many as the others' or one more."""
    return range(total * rank // ranks, total * (rank + 1) // ranks)


class Ranks:
    """This process among those that train together. `group`: a process group; None: this process trains alone.

    No method makes the host wait for the device, except those that say "Waits.".
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and prints."""
        return self.rank == 0

    def gather(self, part: Tensor) -> Tensor:
        """The parts [b, ...] of all ranks, one after another: [ranks * b, ...]."""
        if self.size == 1:
            return part
        whole = part.new_empty(self.size * len(part), *part.shape[1:])
        _all_gather(whole, part.contiguous(), group=self.group)
        return whole

    def join(self, share: Tensor, total: int) -> Tensor:
        """Every rank's rows of `total`, split as by `share_of`, in order."""
        if self.size == 1:
            return share
        most = -(-total // self.size)
        padded = share.new_zeros(most, *share.shape[1:])
        padded[: len(share)] = share
        parts = self.gather(padded).split(most)
        return torch.cat([part[: len(share_of(total, rank, self.size))] for rank, part in enumerate(parts)])

    def scatter_sum(self, whole: Tensor) -> Tensor:
        """The sum over ranks of `whole` [ranks * b, ...], this rank's part of it: [b, ...]."""
        if self.size == 1:
            return whole
        part = whole.new_empty(len(whole) // self.size, *whole.shape[1:])
        _reduce_scatter(part, whole.contiguous(), group=self.group)
        return part

    def sum(self, values: Tensor) -> Tensor:
        """The sum over ranks of `values`, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.SUM, group=self.group)
        return values

    def maximum(self, values: Tensor) -> Tensor:
        """The largest over ranks of `values`, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX, group=self.group)
        return values

    def logsumexp(self, values: Tensor) -> Tensor:
        """log sum exp over ranks of `values` [B]."""
        if self.size == 1:
            return values
        return torch.logsumexp(self.gather(values[None]), dim=0)

    def broadcast(self, values: Tensor) -> Tensor:
        """The first rank's `values` on all ranks, in place."""
        if self.size > 1:
            dist.broadcast(values, group_src=0, group=self.group)
        return values

    def agree(self, text: str) -> str:
        """The first rank's `text`, on all ranks. Waits."""
        if self.size == 1:
            return text
        texts = [text]
        dist.broadcast_object_list(texts, group_src=0, group=self.group)
        return texts[0]

    def texts(self, text: str) -> list[str]:
        """Every rank's text, on all ranks. Waits."""
        if self.size == 1:
            return [text]
        texts = [""] * self.size
        dist.all_gather_object(texts, text, group=self.group)
        return texts

    def together(self, function: Callable[[], _Result]) -> _Result:
        """`function()`, called on every rank, which must not wait for other ranks. Waits.

        If it fails on some rank, all fail, with their own error or with an OtherRankError: the others would wait for
        the one that failed.
        """
        if self.size == 1:
            return function()
        failure: Exception | None = None
        try:
            result = function()
        except Exception as error:
            failure = error
        said = f"process {self.rank} ({socket.gethostname()}): {str(failure) or type(failure).__name__}"
        failures = self.texts("" if failure is None else said)
        if failure is not None:
            raise failure
        for text in failures:
            if text:
                raise OtherRankError(text)
        return result

    def require_alike(self, facts: Callable[[], Mapping[str, Any]]) -> None:
        """Raise UnlikeRanksError, on all ranks, unless `facts()`, JSON values by name, are the same on all. Waits.

        A process that trains alone does not call `facts`.
        """
        if self.size == 1:
            return
        found = json.dumps([socket.gethostname(), self.together(facts)])
        (host, mine), *others = (json.loads(text) for text in self.texts(found))
        for rank, (its_host, its) in enumerate(others, 1):
            for name in {**mine, **its}:
                if mine.get(name) != its.get(name):
                    raise UnlikeRanksError(
                        f"{name}: {mine.get(name)} on process 0 ({host}), {its.get(name)} on process {rank} "
                        f"({its_host}): all processes need the same program, settings and sets"
                    )

    def any(self, flag: bool) -> bool:
        """Whether `flag` holds on some rank. Waits."""
        return self.most(int(flag)) > 0

    def most(self, number: int) -> int:
        """The largest `number` of all ranks. Waits."""
        if self.size == 1:
            return number
        return int(self.maximum(torch.tensor(number)).item())  # on the host: a card's queue goes on

    def least(self, number: int) -> int:
        """The smallest `number` of all ranks. Waits."""
        return -self.most(-number)


@contextmanager
def join_ranks(device: torch.device, patience: timedelta = HALF_AN_HOUR) -> Iterator[Ranks]:
    """This process among those that torchrun started (environment variables `WORLD_SIZE` and so on), or alone.

    Tensors on CUDA are exchanged over nccl, each process having the card `LOCAL_RANK`, and tensors on the host over
    gloo, so that agreeing on a number does not wait for the cards. `patience`: how long a process waits for another one
    that still runs. Raises MeetingError, and LostRanksError in place of torch's errors when another process ended. If
    torchrun itself is killed, the process gets SIGTERM: nothing else would end it.
    """
    _warn_of_copies()
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield Ranks()
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    store, rank, size = meet()
    on_cuda, connected = device.type == "cuda", False
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=CONNECT_WITHIN,
            device_id=device if on_cuda else None,
        )
        connected = True
        _set_timeout(patience)
        ranks, stopped = Ranks(dist.group.WORLD), None
        try:
            yield ranks
        except Stopped as end:  # on all ranks
            stopped = end
        # torchrun takes it for an error, and ends the others, if one is gone that was stopped, or a machine whose
        # processes are done long before those of another: none leaves before the first has written and drawn it all.
        ranks.agree("done")
        if stopped is not None:
            raise stopped
    except RuntimeError as error:
        gone = lost_another(error)
        if gone is None and not connected and (isinstance(error, dist.DistError) or "gloo" in str(error).lower()):
            raise MeetingError(why_not_connected(error, rank, size)) from None
        if gone is None:
            raise
        raise LostRanksError(
            f"process {rank} lost another of the {size} ({gone}): that one ended, and says why here or on its machine, "
            "or the network failed"
        ) from None
    dist.destroy_process_group()  # not after an error: nccl would wait for ranks that may be waiting for this one


def _warn_of_copies() -> None:
    """Warn when srun or mpirun started several of this process, or of torchrun, which know nothing of each other."""
    for launcher, variable in (("srun", "SLURM_STEP_NUM_TASKS"), ("mpirun", "OMPI_COMM_WORLD_SIZE")):
        copies = os.environ.get(variable, "1")
        if copies != "1" and "WORLD_SIZE" not in os.environ:
            advice = "let it start torchrun, once a machine"
        elif copies != "1" and os.environ.get("GROUP_WORLD_SIZE") == "1" and os.environ.get("LOCAL_RANK") == "0":
            advice = "tell torchrun of them all, --nnodes and where to meet"
        else:
            continue
        warnings.warn(f"{launcher} started {copies} of these, and each works alone: {advice}", stacklevel=4)


def _end_with(launcher: int) -> None:
    """Send this process SIGTERM when its parent, the process `launcher`, is gone.

    The first on the machine gets it first: a run then stops by agreement, in which another SIGTERM would only disturb.
    """
    while os.getppid() == launcher:
        time.sleep(1)
    if os.environ.get("LOCAL_RANK", "0") != "0":
        time.sleep(_OTHERS_END_AFTER)
    os.kill(os.getpid(), signal.SIGTERM)
