"""Joining sets: matches against brute force, the rules of a merge, and a valid set at the end."""

import csv
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.face_sets import open_face_set, write_face_set
from dataset_merge import dataset_merge
from dataset_merge.matching import best_matches, identity_sums
from dataset_merge.plan import plan_merge
from tiny_faces import tiny_face


class Named:
    """A face set as far as a plan looks at it: two images of each identity."""

    def __init__(self, *identities: str) -> None:
        self.identities = list(identities)
        self.labels = np.repeat(np.arange(len(identities)), 2)


def at(*degrees: float) -> torch.Tensor:
    """Unit vectors in the plane."""
    angles = torch.tensor(degrees).deg2rad()
    return torch.stack((angles.cos(), angles.sin()), 1)


def test_identity_centres() -> None:
    """A centre is the normalised mean of unit embeddings, whatever the order of the images."""
    embeddings = F.normalize(torch.randn(50, 8, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(50) % 7
    sums = identity_sums(embeddings, labels, 7)
    for identity in range(7):
        mean = embeddings[labels == identity].mean(0)
        torch.testing.assert_close(F.normalize(sums[identity], dim=0), F.normalize(mean, dim=0))


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_best_matches_equal_brute_force(block: int) -> None:
    """Blocks are an implementation detail: best matches both ways are those of the whole cosine matrix."""
    generator = torch.Generator().manual_seed(block)
    newcomers, known = torch.randn(83, 5, generator=generator), torch.randn(61, 5, generator=generator)
    matches = best_matches(newcomers, known, block)
    cosines = F.normalize(newcomers) @ F.normalize(known).T
    torch.testing.assert_close(matches.score, cosines.max(1).values)
    assert torch.equal(matches.known, cosines.argmax(1))
    assert torch.equal(matches.mutual, cosines.argmax(0)[cosines.argmax(1)] == torch.arange(83))


def test_memory_does_not_grow_with_the_product() -> None:
    """No tensor is larger than a block of cosines or the centres themselves."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
            nonlocal largest
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor):
                largest = max(largest, result.numel())
            return result

    with Watch():
        best_matches(torch.randn(3000, 4), torch.randn(2000, 4), block=64)
    assert largest == 3000 * 4


def test_same_person_is_joined_others_are_added() -> None:
    """The rule at its simplest, with the threshold on either side."""
    sets = [Named("a", "b"), Named("x", "y")]
    sums = [at(0, 90), at(10, 200)]
    plan = plan_merge(sums, sets, t=0.9)  # cos 10 degrees = 0.985
    assert [(d.label, d.decision, d.new_label) for d in plan] == [
        ("a", "added", 0),
        ("b", "added", 1),
        ("x", "joined", 0),
        ("y", "added", 2),
    ]
    assert plan[2].score == pytest.approx(np.cos(np.deg2rad(10)), abs=1e-6)
    assert (plan[2].match_source, plan[2].match_label) == (0, "a")
    assert [d.decision for d in plan_merge(sums, sets, t=0.99)] == ["added"] * 4


def test_identities_that_a_set_holds_apart_stay_apart() -> None:
    """Two newcomers near one identity: the nearer one joins, the other is added."""
    plan = plan_merge([at(0), at(12, 8)], [Named("a"), Named("x", "y")], t=0.9)
    assert [(d.decision, d.new_label) for d in plan] == [("added", 0), ("added", 1), ("joined", 0)]


def test_a_third_set_meets_the_union() -> None:
    """After a join the centre is that of all images: a third set is compared with it, not with the first set's."""
    plan = plan_merge([at(0), at(20), at(28)], [Named("a"), Named("b"), Named("c")], t=np.cos(np.deg2rad(20.5)))
    assert [d.decision for d in plan] == ["added", "joined", "joined"]  # 28 - 10 = 18 degrees from the union
    assert plan[2].score == pytest.approx(np.cos(np.deg2rad(18)), abs=1e-5)


def test_merged_set_is_valid_and_complete(tmp_path: Path, tiny_run: Path, capsys: pytest.CaptureFixture) -> None:
    """All images of all sets, bytes as they were, under labels without holes, with a row for every identity."""
    sets = []
    for name, people, shots in (("one", (0, 1, 2), range(4)), ("two", (2, 9, 1), range(4, 7))):
        with write_face_set(tmp_path / name, 32) as out:
            for person in people:
                out.add_identity(tiny_face(person, shot) for shot in shots)
        sets.append(tmp_path / name)
    merged = tmp_path / "merged"
    command = ["--merge", ",".join(map(str, sets)), "--output", str(merged), "--model", str(tiny_run), "--workers", "0"]
    dataset_merge.main([*command, "--t", "0.99"])
    assert "merged" in capsys.readouterr().out
    rows = list(csv.DictReader((merged / "merge.csv").open()))
    assert [(row["label"], row["decision"], row["new_label"], row["images"]) for row in rows[3:]] == [
        ("0", "joined", "2", "3"),
        ("1", "added", "3", "3"),
        ("2", "joined", "1", "3"),
    ]
    faces = open_face_set(merged)
    assert faces.identities == ["0", "1", "2", "3"]
    assert (merged / "property").read_text() == "4,32,32"
    wanted = [(0, range(4)), (1, range(4)), (1, range(4, 7)), (2, range(4)), (2, range(4, 7)), (9, range(4, 7))]
    assert [faces.encoded(i) for i in range(len(faces))] == [tiny_face(p, s) for p, shots in wanted for s in shots]

    with pytest.raises(SystemExit, match=r"merged exists and is not empty"):
        dataset_merge.main(command)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--merge", "a"], "two sets or more"),
        (["--merge", "a,b"], "name a folder for the merged set"),
        (["--merge", "a,b", "--output", "c", "--runs", "/nowhere"], "no model is named"),
        (["--merge", "a,b", "--output", "c", "--model", "/nowhere.onnx"], "there is no model at /nowhere.onnx"),
    ],
)
def test_errors_say_what_is_missing(flags: list[str], message: str) -> None:
    """Each thing that a merge needs is asked for by its name."""
    with pytest.raises(SystemExit, match=f"dataset_merge: .*{message}"):
        dataset_merge.main(flags)
