"""One cgroup a sandbox, for memory and processes, on hierarchies of version 1 and 2.

Covers: finding what is mounted and writable, making, limiting, emptying and removing groups. Leaves out: joining
(sandbox/jail.py does it, before the first instruction of agent code).

Sources: cgroups(7), Documentation/admin-guide/cgroup-v1/{memory,pids}.rst, cgroup-v2.rst.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
_CONTROLLERS = ("memory", "pids")
_KILL_ROUNDS = 50
_KILL_PAUSE_S = 0.02


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy below which sandboxes get their groups, and the controllers it gives them."""

    parent: Path
    version: int
    controllers: tuple[str, ...]

    def limit(self, group: Path, memory_bytes: int, processes: int) -> None:
        """Writes the limits of a group. Raises OSError."""
        if "memory" in self.controllers:
            if self.version == 2:
                (group / "memory.max").write_text(str(memory_bytes))
                _write_if_there(group / "memory.swap.max", "0")
            else:
                _write_memory_v1(group, memory_bytes)
        if "pids" in self.controllers:
            (group / "pids.max").write_text(str(processes))


def _write_memory_v1(group: Path, memory_bytes: int) -> None:
    """ORDER: memory.limit may never be above memory+swap.limit, so which comes first depends on the direction."""
    limit, with_swap = group / "memory.limit_in_bytes", group / "memory.memsw.limit_in_bytes"
    if memory_bytes > int(limit.read_text()):
        _write_if_there(with_swap, str(memory_bytes))
        limit.write_text(str(memory_bytes))
    else:
        limit.write_text(str(memory_bytes))
        _write_if_there(with_swap, str(memory_bytes))


def _write_if_there(path: Path, value: str) -> None:
    """For files that exist only where the kernel accounts swap."""
    with contextlib.suppress(FileNotFoundError):
        path.write_text(value)


def find(parent: str) -> list[Hierarchy]:
    """The hierarchies below which this process may make groups; makes `parent` (e.g. ashd/runner-1) in each."""
    found = []
    if (ROOT / "cgroup.controllers").exists():
        wanted = [Hierarchy(ROOT / parent, 2, _CONTROLLERS)]
    else:
        wanted = [Hierarchy(ROOT / name / parent, 1, (name,)) for name in _CONTROLLERS]
    for hierarchy in wanted:
        try:
            _make(hierarchy)
        except OSError:
            continue
        found.append(hierarchy)
    return found


def _make(hierarchy: Hierarchy) -> None:
    hierarchy.parent.mkdir(parents=True, exist_ok=True)
    if hierarchy.version == 2:
        enable = " ".join(f"+{name}" for name in hierarchy.controllers)
        for folder in [*reversed(hierarchy.parent.relative_to(ROOT).parents), hierarchy.parent.relative_to(ROOT)]:
            (ROOT / folder / "cgroup.subtree_control").write_text(enable)
    trial = hierarchy.parent / "trial"
    trial.mkdir(exist_ok=True)
    try:
        hierarchy.limit(trial, 64 * 1024 * 1024, 16)
    finally:
        trial.rmdir()


def controllers(hierarchies: list[Hierarchy]) -> list[str]:
    """What is enforced, in the words of `enforced`: cgroup-memory, cgroup-pids."""
    return [f"cgroup-{name}" for hierarchy in hierarchies for name in hierarchy.controllers]


def create(hierarchies: list[Hierarchy], name: str, memory_bytes: int, processes: int) -> list[Path]:
    """The groups of one sandbox, limited and empty. Raises OSError."""
    groups = []
    for hierarchy in hierarchies:
        group = hierarchy.parent / name
        group.mkdir(exist_ok=True)
        hierarchy.limit(group, memory_bytes, processes)
        groups.append(group)
    return groups


def leftovers(hierarchies: list[Hierarchy], known: set[str]) -> set[str]:
    """Names of groups that belong to no known sandbox."""
    return {
        entry.name
        for hierarchy in hierarchies
        for entry in os.scandir(hierarchy.parent)
        if entry.is_dir() and entry.name not in known
    }


def members(hierarchies: list[Hierarchy], name: str) -> list[int]:
    """The processes in a sandbox's group and in groups made below it; none where it has no group."""
    for hierarchy in hierarchies:
        with contextlib.suppress(OSError):
            lists = [(Path(folder) / "cgroup.procs") for folder, _, _ in os.walk(hierarchy.parent / name)]
            return [int(pid) for listed in lists for pid in listed.read_text().split()]
    return []


async def remove(hierarchies: list[Hierarchy], name: str) -> bool:
    """Kills whatever still runs in a sandbox's groups and removes them; False if something would not die in about a
    second.
    """
    groups = [group for hierarchy in hierarchies if (group := hierarchy.parent / name).is_dir()]
    for _ in range(_KILL_ROUNDS):
        groups = [group for group in groups if not _try_remove(group)]
        if not groups:
            return True
        await asyncio.sleep(_KILL_PAUSE_S)
    return False


def remove_parents(hierarchies: list[Hierarchy]) -> None:
    """Removes the runner's own groups, where nothing is left in them."""
    for hierarchy in hierarchies:
        with contextlib.suppress(OSError):
            hierarchy.parent.rmdir()
            hierarchy.parent.parent.rmdir()  # shared by the runners of this host: goes with the last


def _try_remove(group: Path) -> bool:
    try:
        for pid in (group / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)  # in our group: ours, whatever it has become
        group.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True
