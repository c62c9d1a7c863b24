"""How much memory is left where this runner's sandboxes live, and how hard the host is pressed for it.

Covers: the host, and the cgroups of version 1 and 2 that the runner and its sandboxes are confined in; the tightest of
them counts. Leaves out: what follows from it (admission.py).

Swap is never counted as memory: a host that swaps is what admission is there to prevent.

Sources: proc_meminfo(5), accounting/psi.rst, cgroup-v2.rst (memory.current, memory.stat), cgroup-v1/memory.rst.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ashd.runner import processes
from ashd.runner.cgroup import ROOT

_MEMINFO = Path("/proc/meminfo")
_PRESSURE = Path("/proc/pressure/memory")
_OWN_CGROUPS = Path("/proc/self/cgroup")
_FILES = (
    ("memory.max", "memory.current", b"inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", b"total_inactive_file"),
)
_UNLIMITED = 1 << 60
"""Version 1 says so with a number a little below 2**63, version 2 with `max`."""


@dataclass(frozen=True)
class Reading:
    """What is left, where, and the share of the last 10 s (%) in which tasks waited for memory; 0 without PSI."""

    available_bytes: int
    where: str = "this host"
    pressure: float = 0.0


class HostMemory:
    """Reads it. Cheap enough for each session's start: three small files and three of each cgroup around us."""

    def __init__(self, sandbox_groups: list[Path]) -> None:
        """`sandbox_groups`: the cgroups below which sandboxes get theirs."""
        around = {folder for group in [*_own_groups(), *sandbox_groups] for folder in (group, *group.parents)}
        self._groups = sorted(folder for folder in around if folder.is_relative_to(ROOT))

    def read(self) -> Reading:
        """Raises OSError where /proc can't be read."""
        left = [(_available_on_host(), "this host")]
        for group in self._groups:
            with contextlib.suppress(OSError, ValueError, IndexError):
                if (bytes_left := _left_in(group)) is not None:
                    left.append((bytes_left, f"the cgroup {group}"))
        return Reading(*min(left), _pressure())


def _own_groups() -> Iterator[Path]:
    """Where this process is confined for memory. What a namespace hides of the path does not exist, and is skipped."""
    for line in _OWN_CGROUPS.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            yield ROOT / path.lstrip("/")
        elif "memory" in controllers.split(","):
            yield ROOT / "memory" / path.lstrip("/")


def _available_on_host() -> int:
    rest = processes.read(str(_MEMINFO)).partition(b"\nMemAvailable:")[2]
    return int(rest.split(None, 1)[0]) * 1024


def _left_in(group: Path) -> int | None:
    """Up to the group's limit, with the page cache the kernel would give up first; None without a limit."""
    for limit_file, usage_file, reclaimable in _FILES:
        try:
            limit = processes.read(str(group / limit_file)).strip()
        except FileNotFoundError:
            continue
        if limit == b"max" or int(limit) >= _UNLIMITED:
            return None
        used = int(processes.read(str(group / usage_file)))
        stat = b"\n" + processes.read(str(group / "memory.stat"))
        cached = int(stat.partition(b"\n" + reclaimable + b" ")[2].split(None, 1)[0])
        return int(limit) - used + cached
    return None


def _pressure() -> float:
    """`some avg10`; 0 where the kernel has no PSI."""
    try:
        return float(processes.read(str(_PRESSURE)).split()[1].removeprefix(b"avg10="))
    except (OSError, IndexError, ValueError):
        return 0.0
