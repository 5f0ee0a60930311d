"""What a report tells of: the models, and each set with what they reached on it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from utils.evaluation.checks import Finding
from utils.evaluation.comparison import Comparison
from utils.evaluation.folds import FoldResult
from utils.evaluation.identification import Identification
from utils.evaluation.measure import Measured
from utils.evaluation.test_sets import TestSet


@dataclass(frozen=True)
class TestedModel:
    """A model under its name in the report."""

    __test__ = False

    name: str
    path: Path
    runs_on: str
    fingerprint: str


@dataclass(frozen=True)
class Picture:
    """A picture of the report, beside it, with its caption."""

    file: Path
    caption: str


@dataclass(frozen=True, eq=False)
class TestedSet:
    """A set with what each model reached on it, in the models' order."""

    __test__ = False

    test_set: TestSet
    measured: Sequence[Measured]
    comparisons: Sequence[tuple[str, str, Comparison]]
    findings: Sequence[Finding]
    pictures: Sequence[Picture] = field(default=())

    @property
    def counts(self) -> dict[str, int]:
        """How many images, people and pairs there are."""
        return {"images": len(self.test_set.images), **pair_counts(self.test_set, self.measured[0])}


def pair_counts(test_set: TestSet, measured: Measured) -> dict[str, int]:
    """How many people, where they are known, and pairs there are."""
    result = measured.result
    if isinstance(result, FoldResult):
        return {
            "pairs": len(result.same),
            "genuine_pairs": int(result.same.sum()),
            "impostor_pairs": int((~result.same).sum()),
        }
    people = {"identities": len(test_set.identities)} if test_set.identities is not None else {}
    return {**people, "genuine_pairs": result.genuine, "impostor_pairs": result.impostor}


def galleries(measured: Measured) -> dict[str, Identification]:
    """The results of the 1:N tests by the galleries' names; "" is that of a face set's only one."""
    found = measured.identification
    if found is None:
        return {}
    return {"": found} if isinstance(found, Identification) else {**found.per_gallery, "joined": found.joined}
