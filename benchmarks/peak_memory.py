"""Memory of this process on the CPU: now, and at its peak since a moment. Linux only.

`ru_maxrss` would not do: a process begins with the peak of the one that started it.
"""

import re
from pathlib import Path


def begin_peak() -> int:
    """Forget the peak so far; the bytes that are in memory now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """Most bytes in memory at once, since `begin_peak` or the start of the process."""
    return _status("VmHWM")


def _status(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])
