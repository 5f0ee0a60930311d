"""mxnet as a fixture, and the table of what was compared at the end: a pytest plugin that with_mxnet.py loads."""

from collections.abc import Callable
from typing import NamedTuple

import pytest

from conformance.mxnet_process import PYTHON, Mxnet


class Compared(NamedTuple):
    """A line of the table: how many records were equal in each way, and how many images pixel for pixel."""

    what: str
    bytes_equal: int = 0
    ours_read_by_mxnet: int = 0
    mxnets_read_by_us: int = 0
    images_decoded: int = 0


_lines = pytest.StashKey[list[Compared]]()
_version = pytest.StashKey[str]()


@pytest.fixture(scope="session")
def mxnet(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Mxnet:
    """mxnet in its environment; without one the comparison fails."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} does not exist: `make conformance` makes it")
    process = Mxnet(tmp_path_factory.mktemp("mxnet"))
    pytestconfig.stash[_version] = process.run("-c", "import mxnet; print(mxnet.__version__)").strip()
    return process


@pytest.fixture
def compared(pytestconfig: pytest.Config) -> Callable[..., None]:
    """Called with the fields of Compared when everything of a line turned out equal."""
    lines = pytestconfig.stash.setdefault(_lines, [])
    return lambda *fields: lines.append(Compared(*fields))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """The table, once mxnet has answered at all."""
    if _version not in config.stash:
        return
    lines = config.stash.get(_lines, [])
    total = Compared("total", *(sum(column) for column in list(zip(*lines, strict=True))[1:]))
    terminalreporter.section(f"records equal to those of mxnet {config.stash[_version]}")
    _write_row(terminalreporter, "", "bytes of both", "ours by mxnet", "mxnet's by us", "pixels")
    for line in [*lines, total]:
        _write_row(terminalreporter, line.what, *(f"{count:,}" if count else "-" for count in line[1:]))


def _write_row(terminalreporter: pytest.TerminalReporter, what: str, *columns: str) -> None:
    terminalreporter.write_line(f"{what:26}" + "".join(f"{column:>15}" for column in columns))
