"""Verification during training, shared by ranks: the numbers are those of one process."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from data.verification_bin import VerificationPairs, read_bin
from models import create_network
from ranks import run_on_ranks
from utils.evaluation.verification import Verifier
from utils.ranks import Ranks

CPU = torch.device("cpu")


def sets(path: Path) -> list[VerificationPairs]:
    """The tiny set without one of its forty images, and a set with a single one."""
    tiny = read_bin(path)
    one = VerificationPairs("one", tiny.images[:1], np.zeros((10, 2), np.int64), np.arange(10) % 2 == 0)
    return [VerificationPairs("tiny", tiny.images[:39], tiny.index % 39, tiny.same), one]


def network() -> nn.Module:
    """Random weights, with the statistics of norms of some faces."""
    torch.manual_seed(0)
    net = create_network("demo", 16, 32)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        net(torch.rand(16, 3, 32, 32) * 2 - 1)
    return net


def verify(path: str) -> dict[str, dict[str, object]]:
    """What this process, or this rank, finds. Each rank but the first has statistics of its own."""
    group = dist.group.WORLD if dist.is_initialized() else None
    ranks = Ranks(group)
    net = network()
    with torch.no_grad():
        for buffer in net.buffers():
            buffer += ranks.rank
    both, polls = sets(Path(path)), list[None]()

    def poll() -> None:
        polls.append(None)

    found = {
        f"{name} of {len(chosen)}": {
            "accuracy": result.accuracy, "std": result.std, "distances": torch.from_numpy(result.distances)
        }
        for chosen in (both, both[1:], both[:1])
        for name, result in Verifier(chosen, 32, CPU, torch.float32, 19, 0, True, ranks)(net, poll).items()
    }  # fmt: skip
    return {**found, "buffers": dict(net.named_buffers()), "training": net.training, "polls": len(polls)}  # type: ignore[dict-item]


def test_ranks_find_what_one_process_finds(tiny_set: Path) -> None:
    """Shares that are uneven, or empty for want of images: every rank has the accuracy and the distances of all
    pairs, with the first rank's statistics of norms."""
    path = str(tiny_set / "tiny.bin")
    alone = verify(path)
    assert alone["tiny of 2"]["distances"].std() > 0.01  # type: ignore[attr-defined]
    for rank, found in enumerate(run_on_ranks(2, verify, path)):
        assert found.keys() == alone.keys()
        for name in ("tiny of 2", "one of 2", "one of 1"):
            torch.testing.assert_close(found[name]["distances"], alone[name]["distances"], rtol=1e-5, atol=1e-6)
            assert (found[name]["accuracy"], found[name]["std"]) == (alone[name]["accuracy"], alone[name]["std"]), rank
        for name, value in alone["buffers"].items():
            assert torch.equal(found["buffers"][name], value)  # type: ignore[arg-type]
        assert not found["training"]
        assert found["polls"] == 2 + 1 + 2, "of 20 and 20 images, 1 and none, 20 and 19, in batches of 19"


def test_a_set_that_cannot_be_tested_is_refused_at_once(tiny_set: Path) -> None:
    """Before any network is trained: too few pairs, and images of another size, each with the set's name."""
    good = read_bin(tiny_set / "tiny.bin")
    few = VerificationPairs("few", good.images, good.index[:9], good.same[:9])
    for pairs, size, message in ((few, 32, "few: 9 pairs cannot make 10 folds"), (good, 48, "tiny")):
        with pytest.raises(ValueError, match=message):
            Verifier([pairs], size, CPU, torch.float32, 7, 0, True, Ranks())


def test_embeddings_that_are_no_numbers_are_an_error(tiny_set: Path) -> None:
    """A network that diverged has no accuracy; the error names the set."""
    net = network()
    with torch.no_grad():
        next(net.parameters()).fill_(torch.nan)
    verifier = Verifier(sets(tiny_set / "tiny.bin")[:1], 32, CPU, torch.float32, 7, 0, True, Ranks())
    with pytest.raises(ValueError, match=r"^tiny: "):
        verifier(net)


def test_it_computes_in_the_precision_of_the_training(tiny_set: Path) -> None:
    """Which is several times faster on a card than float32."""
    net, seen = network(), set[torch.dtype]()
    next(m for m in net.modules() if isinstance(m, nn.Conv2d)).register_forward_hook(lambda *a: seen.add(a[2].dtype))
    Verifier(sets(tiny_set / "tiny.bin"), 32, CPU, torch.bfloat16, 7, 0, True, Ranks())(net)
    assert seen == {torch.bfloat16}
