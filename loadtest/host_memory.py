"""What sandboxes cost the host they run on, as its kernel counts it.

Covers: memory and processes of this host at one moment, split into sandboxes and what serves them.
Leaves out: hosts elsewhere; when to look (ramp.py).

PSS is what can be charged to a process: its own pages, and of shared ones its share. Summed over all who share, each
page counts once. What the kernel itself spends on processes, namespaces, mounts and cgroups is in nobody's PSS; it
shows in MemAvailable, and in part in the counters of KERNEL.

Sources: proc_pid_smaps(5), proc_pid_stat(5), proc_meminfo(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
KEEPER_TITLE = "ashd: keeper "
KERNEL = ("SUnreclaim", "KernelStack", "PageTables", "SecPageTables", "Percpu")
"""Counters of /proc/meminfo that grow with processes. Reclaimable slab is left out: MemAvailable counts it as free."""

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")


def meminfo(text: str | None = None) -> dict[str, int]:
    """/proc/meminfo in bytes."""
    lines = (PROC.joinpath("meminfo").read_text(encoding="ascii") if text is None else text).splitlines()
    sizes = (line.partition(":") for line in lines)
    return {name: int(value.split()[0]) * 1024 for name, _, value in sizes if value.endswith("kB")}


@dataclass(frozen=True)
class Host:
    """Memory of this host at one moment, in bytes."""

    available: int
    kernel: int

    @classmethod
    def now(cls) -> Host:
        counters = meminfo()
        return cls(counters["MemAvailable"], sum(counters.get(name, 0) for name in KERNEL))


@dataclass(frozen=True)
class Process:
    """One process at one moment. `started` (ticks since boot) tells it from a later one with its number."""

    pid: int
    parent: int
    cpu_s: float
    started: int


def processes() -> dict[int, Process]:
    """All processes of this host, by number."""
    found = {}
    for entry in os.listdir(PROC):
        if entry.isdigit():
            with contextlib.suppress(OSError):  # it has ended meanwhile
                process = parsed_stat(int(entry), (PROC / entry / "stat").read_text(encoding="utf-8", errors="replace"))
                found[process.pid] = process
    return found


def parsed_stat(pid: int, text: str) -> Process:
    """A line of /proc/PID/stat. The name in it may hold anything, brackets too: what counts comes after the last."""
    fields = text.rpartition(")")[2].split()
    return Process(pid, int(fields[1]), (int(fields[11]) + int(fields[12])) * _TICK_S, int(fields[19]))


def below(all_: dict[int, Process], roots: Collection[int]) -> set[int]:
    """The processes `roots` and everything below them."""
    children: dict[int, list[int]] = {}
    for process in all_.values():
        children.setdefault(process.parent, []).append(process.pid)
    found: set[int] = set()
    todo = [root for root in roots if root in all_]
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, ())
    return found


def keepers(all_: Collection[int], sessions: Collection[str]) -> dict[int, str]:
    """Keepers of these sessions: the session of each, by process."""
    found = {}
    for pid in all_:
        with contextlib.suppress(OSError):
            title = (PROC / str(pid) / "cmdline").read_bytes().rstrip(b"\0 ").decode("utf-8", "replace")
            session = title.removeprefix(KEEPER_TITLE)
            if session != title and session in sessions:
                found[pid] = session
    return found


def pss_bytes(pids: Collection[int]) -> int:
    """Of those that can be read and have not ended."""
    return sum(_pss(pid) for pid in pids)


def _pss(pid: int) -> int:
    try:
        for line in (PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:  # ended, a zombie, or another user's
        pass
    return 0


@dataclass(frozen=True)
class Sample:
    """Sandboxes of some sessions on this host, and what serves them, at one moment. Bytes."""

    host: Host
    sandboxes: int
    processes: int
    sandboxes_pss: int
    keepers_pss: int
    """Of sandboxes_pss."""
    platform_pss: int


class Watch:
    """Looks at the sandboxes of some sessions on this host, and at the platform: everything else below `root`."""

    def __init__(self, root: int | None) -> None:
        self._root = root

    def sample(self, sessions: Collection[str]) -> Sample:
        host = Host.now()  # ORDER: first, so that our own reading of /proc is not in it
        found, sandboxes, platform = self._split(sessions)
        sizes = {pid: pss_bytes((pid,)) for pid in sandboxes}
        keepers_pss = sum(sizes[pid] for pid in found)
        return Sample(host, len(found), len(sandboxes), sum(sizes.values()), keepers_pss, pss_bytes(platform))

    def cpu_s(self, sessions: Collection[str]) -> tuple[float, float]:
        """Processor time so far of the sandboxes and of the platform."""
        all_ = processes()
        _, sandboxes, platform = self._split(sessions, all_)
        return sum(all_[pid].cpu_s for pid in sandboxes), sum(all_[pid].cpu_s for pid in platform)

    def _split(
        self, sessions: Collection[str], all_: dict[int, Process] | None = None
    ) -> tuple[set[int], set[int], set[int]]:
        """The keepers, all processes of their sandboxes, and those of the platform."""
        all_ = processes() if all_ is None else all_
        found = set(keepers(all_, sessions))
        sandboxes = below(all_, found)
        platform = below(all_, [self._root]) - sandboxes if self._root is not None else set()
        return found, sandboxes, platform


def still_there(before: dict[int, Process]) -> Iterator[int]:
    """Which of these processes have not ended."""
    now = processes()
    return (pid for pid, process in before.items() if pid in now and now[pid].started == process.started)
