"""What each sandbox uses, looked at by a thread that keeps to a budget of processor time.

Covers: memory as PSS and as the cgroup counts it, processor time, processes, descriptors; which sandbox is looked at
next, and when. Leaves out: space on disk (disk.py), the host's memory
(host_memory.py).

PSS is the honest size of a sandbox, because the zygote's pages are shared by all, and the costly one: the kernel walks
the page tables. So it is looked at less often than the cgroup's numbers, and idle sandboxes less often than running
ones. With more sandboxes the looks become fewer for each, not more in all.

Sources: proc_pid_smaps(5) (smaps_rollup), proc_pid_stat(5), cgroup-v2.rst, cgroup-v1/memory.rst, cpuacct.rst.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from ashd import log
from ashd.domain.sandbox import State
from ashd.runner import processes
from ashd.runner.sandbox_task import SandboxTask

_log = log.get(__name__)

NO_KEEPER = 0
SHARE = 0.01
"""Of one core: what looking may cost, whatever the number of sandboxes."""

_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LEAST_REST_S = 0.2
_IDLE_S = 1.0
_PLAN_LENGTH = 64
_OFTEN_S = {True: 2.0, False: 10.0}
"""Between two looks at a sandbox's cgroup: those that run or have run since, others."""
_SELDOM_S = {True: 10.0, False: 60.0}
"""Between two looks at its processes, likewise."""


@dataclass(frozen=True)
class Usage:
    """What one sandbox used when it was looked at last; zeros before that, and where the host doesn't tell."""

    pss_bytes: int = 0
    memory_bytes: int = 0
    cpu_s: float = 0.0
    processes: int = 0
    descriptors: int = 0


class Pace:
    """How long to rest, so that all work of this thread together takes at most `share` of a core."""

    def __init__(
        self, share: float, wall: Callable[[], float] = time.monotonic, cpu: Callable[[], float] = time.thread_time
    ) -> None:
        self._share = share
        self._wall, self._cpu = wall, cpu
        self._asked_at, self._cpu_before = wall(), cpu()
        self._paid_at = self._asked_at

    def rest_s(self) -> float:
        """What is owed now. Time that passed before the last call is no credit: work doesn't come in heaps."""
        now, cpu = self._wall(), self._cpu()
        self._paid_at = max(self._paid_at, self._asked_at) + (cpu - self._cpu_before) / self._share
        self._asked_at, self._cpu_before = now, cpu
        return max(0.0, self._paid_at - now)


class _Record:
    """What is known of one sandbox, and when it was learned."""

    def __init__(self, groups: list[Path]) -> None:
        self.usage = Usage()
        self.counters_at = self.processes_at = -1e9
        self.seen: tuple[str, int] = ("", 0)
        self._memory = _first_there(groups, "memory.current", "memory.usage_in_bytes")
        unified = [group for group in groups if (group / "cgroup.controllers").exists()]  # 1's cpu.stat is another
        self._cpu = _first_there(groups, "cpuacct.usage") or _first_there(unified, "cpu.stat")

    def look_at_counters(self, keeper: int) -> None:
        """The cheap numbers: what the cgroup counts of the jail, and the keeper's own processor time."""
        found = self.usage
        with contextlib.suppress(OSError, ValueError, IndexError):
            if self._memory:
                found = replace(found, memory_bytes=int(processes.read(self._memory)))
            if self._cpu:
                cpu_s = _cpu_of_group(self._cpu) + _own_cpu_of(keeper)
                found = replace(found, cpu_s=max(cpu_s, found.cpu_s))
        self.usage = found

    def look_at_processes(self, keeper: int) -> None:
        """The costly numbers: keeper and everything below it, one by one."""
        pids = processes.tree(keeper)
        found = replace(
            self.usage,
            pss_bytes=sum(map(_pss_of, pids)),
            processes=len(pids),
            descriptors=sum(map(_descriptors_of, pids)),
        )
        if not self._cpu:
            found = replace(found, cpu_s=max(sum(map(_cpu_of, pids)), found.cpu_s))
        self.usage = found


class Sampler:
    """Keeps a Usage of each sandbox. `run_in_thread` is for a thread of its own, all else for the event loop's."""

    def __init__(
        self,
        sandboxes: Callable[[], Iterable[SandboxTask]],
        groups_of: Callable[[str], list[Path]],
        pace: Callable[[], Pace] = lambda: Pace(SHARE),
    ) -> None:
        self._sandboxes = sandboxes
        self._groups_of = groups_of
        self._pace = pace
        self._records: dict[str, _Record] = {}
        self._lock = threading.Lock()  # over _records and _gone_cpu_s; never held while a file is read
        self._gone_cpu_s = 0.0
        self._stop = threading.Event()
        self.looks = 0

    # ------------------------------------------------------------ asking

    def of(self, sandbox_id: str) -> Usage:
        """What it used at the last look."""
        record = self._records.get(sandbox_id)
        return record.usage if record else Usage()

    def total(self) -> Usage:
        """Of all sandboxes; processor time also of those that are gone."""
        with self._lock:
            found = [record.usage for record in self._records.values()]
            gone_s = self._gone_cpu_s
        return Usage(
            sum(one.pss_bytes for one in found),
            sum(one.memory_bytes for one in found),
            sum(one.cpu_s for one in found) + gone_s,
            sum(one.processes for one in found),
            sum(one.descriptors for one in found),
        )

    def mean_pss(self) -> int:
        """Of the sandboxes whose processes were looked at; 0 = of none yet."""
        with self._lock:
            sizes = [size for record in self._records.values() if (size := record.usage.pss_bytes)]
        return sum(sizes) // len(sizes) if sizes else 0

    def close(self, sandbox: SandboxTask) -> None:
        """A sandbox is GONE, its cgroup not yet: what it used in the end stays in the sum."""
        with self._lock:
            record = self._records.pop(sandbox.id, None)
        record = record or _Record(self._groups_of(sandbox.id))
        record.look_at_counters(NO_KEEPER)
        with self._lock:
            self._gone_cpu_s += record.usage.cpu_s

    # ------------------------------------------------------------ the thread

    def stop(self) -> None:
        self._stop.set()

    def run_in_thread(self) -> None:
        """Looks at sandboxes until `stop`."""
        pace = self._pace()
        while not self._stop.is_set():
            try:
                if not self._look_at_some(pace):
                    self._stop.wait(_IDLE_S)
            except Exception:  # the door between looking and sandboxes
                _log.exception("what sandboxes use could not be seen")
                self._stop.wait(_IDLE_S)

    def _look_at_some(self, pace: Pace) -> bool:
        """One plan, with its rests; False if there was nothing to do."""
        planned = self._plan(time.monotonic())
        for sandbox, seldom in planned:
            self._look(sandbox, processes_too=seldom)
            if (rest_s := pace.rest_s()) >= _LEAST_REST_S:
                self._stop.wait(rest_s)
            if self._stop.is_set():
                break
        return bool(planned)

    def _plan(self, now: float) -> list[tuple[SandboxTask, bool]]:
        """The looks that are most overdue, a bounded number, and whether each goes into the processes."""
        due: list[tuple[float, SandboxTask, bool]] = []
        present = list(self._sandboxes())
        self._forget_all_but({sandbox.id for sandbox in present})
        for sandbox in present:
            if not sandbox.keeper_pid or sandbox.state is State.GONE:
                continue
            record = self._records.get(sandbox.id)
            runs = sandbox.state is State.RUNNING or (record is not None and record.seen != _progress(sandbox))
            counters = (now - record.counters_at) / _OFTEN_S[runs] if record else 1e9
            seldom = (now - record.processes_at) / _SELDOM_S[runs] if record else 1e9
            if max(counters, seldom) >= 1.0:
                due.append((max(counters, seldom), sandbox, seldom >= 1.0))
        due.sort(key=lambda one: one[0], reverse=True)
        return [(sandbox, seldom) for _, sandbox, seldom in due[:_PLAN_LENGTH]]

    def _forget_all_but(self, present: set[str]) -> None:
        """A look may have ended after its sandbox did, and brought its record back."""
        with self._lock:
            for sandbox_id in self._records.keys() - present:
                del self._records[sandbox_id]

    def _look(self, sandbox: SandboxTask, *, processes_too: bool) -> None:
        record = self._records.get(sandbox.id) or _Record(self._groups_of(sandbox.id))
        record.look_at_counters(sandbox.keeper_pid)
        record.counters_at = time.monotonic()
        if processes_too:
            record.seen = _progress(sandbox)
            record.look_at_processes(sandbox.keeper_pid)
            record.processes_at = record.counters_at
        self.looks += 1
        with self._lock:
            if sandbox.state is not State.GONE:  # RACE: it may have been closed while we looked
                self._records[sandbox.id] = record


def _progress(sandbox: SandboxTask) -> tuple[str, int]:
    """Where it stands; one that has gone on since it was seen is looked at like one that runs."""
    return sandbox.session, sandbox.last_seq


# ------------------------------------------------------------ one process, one group


def _first_there(groups: list[Path], *names: str) -> str:
    return next((str(path) for name in names for group in groups if (path := group / name).exists()), "")


def _cpu_of_group(path: str) -> float:
    """cpuacct.usage holds nanoseconds; cpu.stat begins with `usage_usec` and microseconds."""
    words = processes.read(path).split(None, 2)
    return int(words[0]) / 1e9 if words[0].isdigit() else int(words[1]) / 1e6


def _own_cpu_of(pid: int) -> float:
    """Without its children: user and system time (fields 14 and 15)."""
    with contextlib.suppress(OSError, IndexError):
        user, system = processes.stat_fields(pid)[11:13]
        return (int(user) + int(system)) / _TICKS_PER_S
    return 0.0


def _cpu_of(pid: int) -> float:
    """With the children it has waited for (fields 14 to 17): over a whole tree nothing is counted twice."""
    with contextlib.suppress(OSError, IndexError):
        return sum(map(int, processes.stat_fields(pid)[11:15])) / _TICKS_PER_S
    return 0.0


def _pss_of(pid: int) -> int:
    """Where the kernel doesn't tell us: what it shares with nobody, which is less."""
    try:
        data = processes.read(f"/proc/{pid}/smaps_rollup")
        return int(data.partition(b"\nPss:")[2].split(None, 1)[0]) * 1024
    except (ProcessLookupError, FileNotFoundError, IndexError):
        return 0
    except OSError:
        return _unshared_of(pid)


def _unshared_of(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        _, resident, shared = map(int, processes.read(f"/proc/{pid}/statm").split()[:3])
        return (resident - shared) * _PAGE_BYTES
    return 0


def _descriptors_of(pid: int) -> int:
    """The size of the folder is their number since Linux 6.2; before that it is 0 and they have to be listed."""
    with contextlib.suppress(OSError):
        folder = f"/proc/{pid}/fd"
        return os.stat(folder).st_size or len(os.listdir(folder))
    return 0
