"""A cgroup for each sandbox, for memory, processes and processor time, on hierarchies of version 1 and 2.

Covers: finding what is mounted and may be written, making, limiting, emptying and removing groups. Leaves out: joining
(sandbox/jail.py does it, before the first instruction of agent code), watching (sandbox/memory.py), moving what an
agent executes (sandbox/execs.py).

    <base>/<cgroup_parent>/<runner>/<sandbox>          the limits of the whole sandbox
    <base>/<cgroup_parent>/<runner>/<sandbox>/agent    the bridge, the agent          (where memory is controlled)
    <base>/<cgroup_parent>/<runner>/<sandbox>/tools    what the agent executes        (where memory is controlled)

The base is the root of the hierarchy for root, and the group this process is in where that was delegated to us, as by
systemd's `Delegate=yes`. There, version 2 allows no processes beside groups with controllers: those found, ourselves
among them, move to the leaf `supervisor`. Version 2 freezes a group by its cgroup.freeze, without any preparation.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v1/{memory,pids}.rst, scheduler/sched-bwc.rst, cgroup-v2.rst ("No
Internal Process Constraint", "Delegation"), systemd's CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypedDict

ROOT = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")
AGENT, TOOLS, SUPERVISOR = "agent", "tools", "supervisor"
_CONTROLLERS = ("memory", "pids", "cpu")
_MIB = 1024 * 1024
_CPU_PERIOD_US = 100_000
_KILL_ROUNDS = 50
_KILL_PAUSE_S = 0.02
_EVACUATIONS = 10


class MemoryGroup(TypedDict):
    """Where a sandbox's memory is accounted, as its keeper is told."""

    version: int
    folder: str


def tools_limit(memory_bytes: int) -> int:
    """What tools may use together of a sandbox's memory: an eighth, at least 8 MiB where that leaves them half, is head
    room for the agent.
    """
    return memory_bytes - min(max(memory_bytes // 8, 8 * _MIB), memory_bytes // 2)


@dataclass(frozen=True)
class Hierarchy:
    """One mounted hierarchy below which sandboxes get their groups, and the controllers it gives them."""

    parent: Path
    version: int
    controllers: tuple[str, ...]

    def limit(self, group: Path, memory_bytes: int, processes: int, cpu_percent: int) -> None:
        """Writes the limits of a sandbox's group and those of its children. Raises OSError."""
        if "memory" in self.controllers:
            self._limit_memory(group, memory_bytes)
            self._make_children(group)
            self._limit_memory(group / TOOLS, tools_limit(memory_bytes))
        if "pids" in self.controllers:
            (group / "pids.max").write_text(str(processes))
        if "cpu" in self.controllers:
            quota_us = cpu_percent * _CPU_PERIOD_US // 100
            if self.version == 2:
                (group / "cpu.max").write_text(f"{quota_us} {_CPU_PERIOD_US}")
            else:
                (group / "cpu.cfs_period_us").write_text(str(_CPU_PERIOD_US))
                (group / "cpu.cfs_quota_us").write_text(str(quota_us))

    def _make_children(self, group: Path) -> None:
        if self.version == 2:
            (group / "cgroup.subtree_control").write_text("+memory")
        for child in (AGENT, TOOLS):
            (group / child).mkdir(exist_ok=True)

    def _limit_memory(self, group: Path, memory_bytes: int) -> None:
        if self.version == 1:
            _write_memory_v1(group, memory_bytes)
            return
        # Above `high` the kernel slows a group down the more the further it gets; a small gap warns and costs a second
        # or so.
        (group / "memory.high").write_text(str(memory_bytes - memory_bytes // 32))
        (group / "memory.max").write_text(str(memory_bytes))
        _write_if_there(group / "memory.swap.max", "0")
        _write_if_there(group / "memory.oom.group", "0")

    def to_join(self, group: Path) -> Path:
        """The group a sandbox's first process joins."""
        return group / AGENT if "memory" in self.controllers else group


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
    """For files that exist only with some kernels, or where they account swap."""
    if path.exists():
        path.write_text(value)


# ------------------------------------------------------------ what there is


def find(parent: str) -> list[Hierarchy]:
    """The hierarchies below which this process may make groups; makes `parent` (e.g. ashd/runner-1) in each.

    A host with controllers of version 1 and a bare version 2 beside them (hybrid) has its sandboxes on version 1.
    """
    found = []
    if (ROOT / "cgroup.controllers").exists():
        attempts = [partial(_make_v2, parent)]
    else:
        attempts = [partial(_make_v1, parent, controller) for controller in _CONTROLLERS]
    for attempt in attempts:
        with contextlib.suppress(OSError):
            found.append(attempt())
    return [hierarchy for hierarchy in found if hierarchy.controllers]


def _make_v1(parent: str, controller: str) -> Hierarchy:
    base = ROOT / controller
    if os.geteuid() != 0:
        base = base / _own_group(controller)
    hierarchy = Hierarchy(base / parent, 1, (controller,))
    hierarchy.parent.mkdir(parents=True, exist_ok=True)
    if controller == "memory":
        for folder in (hierarchy.parent.parent, hierarchy.parent):  # before Linux 5.11 a group's limit is its own alone
            with contextlib.suppress(OSError):
                _write_if_there(folder / "memory.use_hierarchy", "1")
    _try_limits(hierarchy)
    return hierarchy


def _make_v2(parent: str) -> Hierarchy:
    base = _base_v2()
    folder = base / parent
    folder.mkdir(parents=True, exist_ok=True)
    available = (base / "cgroup.controllers").read_text().split()
    enabled = tuple(name for name in _CONTROLLERS if name in available and _enable(name, base, folder))
    hierarchy = Hierarchy(folder, 2, enabled)
    _try_limits(hierarchy)
    return hierarchy


def _enable(controller: str, base: Path, folder: Path) -> bool:
    """Hands a controller down from `base` to what will be made in `folder`; False if the kernel refuses."""
    on_the_way = [base, *(base / part for part in reversed(folder.relative_to(base).parents[:-1])), folder]
    try:
        for group in on_the_way:
            _enable_in(group, controller)
    except OSError:
        return False
    return True


def _enable_in(group: Path, controller: str) -> None:
    control = group / "cgroup.subtree_control"
    try:
        control.write_text(f"+{controller}")
    except OSError as error:
        if error.errno != errno.EBUSY:  # there are processes in the group itself
            raise
        _evacuate(group)
        control.write_text(f"+{controller}")


def _evacuate(group: Path) -> None:
    """Moves all processes of a group that was delegated to us, so that it may have children with controllers."""
    leaf = group / SUPERVISOR
    leaf.mkdir(exist_ok=True)
    for _ in range(_EVACUATIONS):  # RACE: they may fork meanwhile
        pids = (group / "cgroup.procs").read_text().split()
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)


def _base_v2() -> Path:
    """The group below which ours are made: the root for root, unless systemd has given us one; our own for others."""
    own = ROOT / _own_group("")
    if own.name == SUPERVISOR and own != ROOT:  # an earlier run of ours, or systemd's DelegateSubgroup=, put us there
        own = own.parent
    return own if os.geteuid() != 0 or _is_delegated(own) else ROOT


def _own_group(controller: str) -> str:
    """The path of the group this process is in, relative to its hierarchy's root; `controller` is "" for version 2."""
    for line in OWN.read_text().splitlines():
        _, names, path = line.split(":", 2)
        if controller in names.split(",") and ".." not in path.split("/"):
            return path.lstrip("/")
    raise FileNotFoundError(errno.ENOENT, f"no cgroup of {controller or 'version 2'} in {OWN}")


def _is_delegated(group: Path) -> bool:
    """Whether systemd has marked the group as left to its processes."""
    for name in ("trusted.delegate", "user.delegate"):
        with contextlib.suppress(OSError):
            if os.getxattr(group, name) == b"1":
                return True
    return False


def _try_limits(hierarchy: Hierarchy) -> None:
    trial = hierarchy.parent / "trial"
    trial.mkdir(exist_ok=True)
    try:
        hierarchy.limit(trial, 64 * _MIB, 16, 100)
    finally:
        _remove_tree(trial)


def controllers(hierarchies: list[Hierarchy]) -> list[str]:
    """What is enforced, in the words of `enforced`: cgroup-memory, cgroup-pids, cgroup-cpu."""
    return [f"cgroup-{name}" for hierarchy in hierarchies for name in hierarchy.controllers]


# ------------------------------------------------------------ one sandbox


def create(
    hierarchies: list[Hierarchy], name: str, memory_bytes: int, processes: int, cpu_percent: int = 100
) -> list[Path]:
    """Makes the groups of one sandbox, or gives those there are other limits; the groups its first process is to join.

    `cpu_percent`: 100 = one core. Raises OSError.
    """
    joined = []
    for hierarchy in hierarchies:
        group = hierarchy.parent / name
        group.mkdir(exist_ok=True)
        hierarchy.limit(group, memory_bytes, processes, cpu_percent)
        joined.append(hierarchy.to_join(group))
    return joined


def memory_group(hierarchies: list[Hierarchy], name: str) -> MemoryGroup | None:
    """Where the memory of a sandbox is accounted; None where it isn't."""
    for hierarchy in hierarchies:
        if "memory" in hierarchy.controllers:
            return {"version": hierarchy.version, "folder": str(hierarchy.parent / name)}
    return None


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
        _kill(group)
        _remove_tree(group)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def _kill(group: Path) -> None:
    """Kills all in a group and in those below it, at once where the kernel can (cgroup.kill, Linux 5.14)."""
    at_once = group / "cgroup.kill"
    if at_once.exists():
        at_once.write_text("1")
        return
    for folder, _, _ in os.walk(group):
        for pid in Path(folder, "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(int(pid), signal.SIGKILL)  # in our group: ours, whatever it has become


def _remove_tree(group: Path) -> None:
    """Removes a group and those below it. Raises OSError while something runs in one."""
    for folder, _, _ in os.walk(group, topdown=False):
        os.rmdir(folder)
