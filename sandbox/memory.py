"""A sandbox's memory: what its cgroups tell the keeper of limits being neared and of processes being killed.

Covers: warnings, the kernel's kills with victim, limit and peak, on cgroups of version 1 and 2. Leaves out: making and
limiting the groups (ashd.runner), who is in which (execs.py), what becomes of a turn (keeper.py).

Version 1 tells by eventfds that a threshold of usage was crossed and that a limit was hit, the latter a moment before
it kills; version 2 by changes of memory.events, seen by inotify. Whom it has killed it never says: the groups' counts
say how many, and the programs that died then say who.

Sources: Documentation/admin-guide/cgroup-v1/memory.rst (9. Memory thresholds, 10. OOM Control), cgroup-v2.rst (Memory
Interface Files), inotify(7), eventfd(2), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

from sandbox.execs import AGENT, FOREVER, TOOL, Program

MIB = 1024 * 1024
_WARN_AT_PERCENT = 85
_LOOK_EVERY_S = 0.01
_KILL_WITHIN_S = 1.0  # of a limit being hit; mostly it is reclaimed from instead, and nobody is killed
_NAME_WITHIN_S = 5.0  # of a kill, because dying takes time; then its victim was none of the programs we remember
_DIED_WITHIN_S = 0.25  # before a kill was counted
_DEATHS = 32
_IN_MODIFY = 2
_PROTECTED, _EXPOSED = -500, 500
_CHILD_OF = {AGENT: "a child of the agent", TOOL: "a child of a tool"}


class Group(TypedDict):
    """Where a sandbox's memory is accounted: its cgroup, with the children agent and tools."""

    version: int
    folder: str


@dataclass(frozen=True)
class Kill:
    """A process the kernel killed for want of memory."""

    scope: str
    """TOOL or AGENT."""
    name: str
    pid: int | None
    limit_bytes: int
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As events and agents are told."""
        victim = {"name": self.name} | ({} if self.pid is None else {"pid": self.pid})
        return {
            "victim": victim,
            "limitBytes": self.limit_bytes,
            "peakBytes": self.peak_bytes,
            "scope": self.scope,
        }

    def __str__(self) -> str:
        limit, peak = (f"{round(size / MIB)} MiB" for size in (self.limit_bytes, self.peak_bytes))
        return f"more memory than its limit of {limit} (peak {peak}) and was killed: {self.name}"


class Memory:
    """Watches one sandbox's memory; watches nothing where there is no group.

    `killed` is called for each kill, in the order victims become known; `warned` when usage nears the limit, with what
    is used and the limit, at most once a turn.
    """

    def __init__(
        self,
        group: Group | None,
        *,
        killed: Callable[[Kill], None],
        warned: Callable[[int, int], None],
    ) -> None:
        self.deadline = FOREVER
        """When `look` wants to be called, if nothing calls it before."""
        self._files: _Version1 | _Version2 | None = None
        self._killed, self._warned = killed, warned
        self._may_warn = self._is_watching = False
        self._counts = {TOOL: 0, AGENT: 0}
        self._nameless: deque[tuple[str, float]] = deque()  # kills without a victim: scope, until when one may turn up
        self._dead: deque[tuple[Program, bool, float]] = deque(maxlen=_DEATHS)  # died, surely killed, until when
        self._look_until = 0.0
        if group is not None:
            self._files = (_Version1 if group["version"] == 1 else _Version2)(Path(group["folder"]))

    def watch(self) -> list[int]:
        """The descriptors that are readable when `look` should be called, with the limits there are now; called again,
        those that came since. A host without any is asked where it matters: when a program dies, and when a turn ends.

        PERF: version 1 waits for a grace period of RCU, some 10 ms; so not while somebody waits for the sandbox.
        """
        if self._files is None:
            return []
        watch = self._files.watch_again if self._is_watching else self._files.watch
        self._is_watching = True
        return watch()

    def begin(self) -> None:
        """From now on a session's agent runs: who was killed before explains nothing."""
        if self._files is not None:
            self._counts = self._files.kills()

    def begin_turn(self) -> None:
        """From now on, another warning may be given."""
        self._may_warn = True

    def died(self, program: Program, killed_by: int | None) -> None:
        """One of the sandbox's programs has died; `killed_by` is the signal, 0 for none, None where that is unknown."""
        if killed_by in (None, signal.SIGKILL):
            self._dead.append((program, killed_by is not None, time.monotonic() + _DIED_WITHIN_S))
            self.look()

    def look(self) -> None:
        """Asks the cgroups, and tells of what is new."""
        if self._files is None:
            return
        now = time.monotonic()
        if self._files.limit_was_neared() and self._may_warn:  # ORDER: a warning comes before the kill it warned of
            self._may_warn = False
            self._warned(*self._files.used_and_limit())
        if self._files.limit_was_hit():
            self._look_until = now + _KILL_WITHIN_S
        for scope, count in self._files.kills().items():
            self._nameless.extend([(scope, now + _NAME_WITHIN_S)] * min(count - self._counts[scope], _DEATHS))
            self._counts[scope] = count
        self._name_victims(now)
        self.deadline = now + _LOOK_EVERY_S if self._nameless or now < self._look_until else FOREVER

    def _name_victims(self, now: float) -> None:
        assert self._files is not None
        for _ in range(len(self._nameless)):
            scope, until = self._nameless.popleft()
            victim = self._victim(scope, now)
            if victim is None and now < until:
                self._nameless.append((scope, until))
                continue
            name, pid = (victim.name, victim.pid) if victim else ("", None)
            self._look_until = 0.0
            self._killed(Kill(scope, name or _CHILD_OF[scope], pid, *self._files.limit_and_peak(scope)))

    def _victim(self, scope: str, now: float) -> Program | None:
        """The newest of the programs that died lately; one that was surely killed before one that may have been."""
        lately = [entry for entry in self._dead if entry[0].scope == scope and now < entry[2]]
        found = max(lately, key=lambda entry: (entry[1], entry[2]), default=None)
        if found is None:
            return None
        self._dead.remove(found)
        return found[0]

    def look_for_all(self) -> None:
        """Tells of every kill there was, its victim known or not."""
        self.look()
        self._nameless = deque((scope, 0.0) for scope, _ in self._nameless)
        self.look()


class _Version1:
    """The files of version 1: a folder for the sandbox, and in it one for the agent and one for its tools."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._neared = self._of_limit_before = self._sandbox_hit = self._tools_hit = -1
        self._threshold = 0
        self._above = False
        self._whole = True  # the last limit that was hit was the sandbox's, not the tools' own

    def watch(self) -> list[int]:
        """The descriptors that tell; fewer where the kernel has no notifications. Thresholds are absolute."""
        self._threshold = self._warn_at()
        self._neared = _notification(self._folder, "memory.usage_in_bytes", self._threshold)
        self._sandbox_hit = _notification(self._folder, "memory.oom_control")
        self._tools_hit = _notification(self._folder / "tools", "memory.oom_control")
        return [descriptor for descriptor in (self._neared, self._sandbox_hit, self._tools_hit) if descriptor >= 0]

    def watch_again(self) -> list[int]:
        """A descriptor that tells of the limit there is now, if it is another."""
        if self._warn_at() == self._threshold:
            return []
        self._threshold, self._of_limit_before = self._warn_at(), self._neared
        self._neared = _notification(self._folder, "memory.usage_in_bytes", self._threshold)
        return [self._neared] if self._neared >= 0 else []

    def _warn_at(self) -> int:
        return _number(self._folder / "memory.limit_in_bytes") * _WARN_AT_PERCENT // 100

    def limit_was_neared(self) -> bool:
        """Whether usage has gone above the threshold since the last look; a crossing is told in both directions."""
        _taken(self._of_limit_before)
        if not _taken(self._neared):
            return False
        was_above, self._above = self._above, self.used_and_limit()[0] >= self._threshold
        return not was_above

    def limit_was_hit(self) -> bool:
        """Whether a limit has been hit since the last look."""
        of_sandbox, of_tools = _taken(self._sandbox_hit), _taken(self._tools_hit)
        if of_sandbox or of_tools:
            self._whole = of_sandbox  # a sandbox's limit is told to those below it, too
        return of_sandbox or of_tools

    def kills(self) -> dict[str, int]:
        """How many processes were killed so far."""
        return {
            TOOL: _field(self._folder / "tools" / "memory.oom_control", "oom_kill"),
            AGENT: _field(self._folder / "agent" / "memory.oom_control", "oom_kill"),
        }

    def used_and_limit(self) -> tuple[int, int]:
        return _number(self._folder / "memory.usage_in_bytes"), _number(self._folder / "memory.limit_in_bytes")

    def limit_and_peak(self, scope: str) -> tuple[int, int]:
        """Of the group whose limit killed somebody of `scope`."""
        folder = self._folder / "tools" if scope == TOOL and not self._whole else self._folder
        return _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.max_usage_in_bytes")


class _Version2:
    """The files of version 2. What happens in a group counts in memory.events of those above it, too."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._inotify = -1
        self._high = self._oom = self._tools_oom = 0
        self._hits_of_tools = 0  # of the tools' own limit, for which nobody was told of yet

    def watch(self) -> list[int]:
        """The descriptor that tells; none where it can't be had."""
        self.limit_was_neared()
        self.limit_was_hit()
        self._inotify = _changes_of(self._folder / "memory.events")
        return [self._inotify] if self._inotify >= 0 else []

    def watch_again(self) -> list[int]:
        """Nothing: memory.events tells of whatever limit there is."""
        return []

    def limit_was_neared(self) -> bool:
        """Whether somebody was slowed down for going above memory.high since the last look."""
        _taken(self._inotify)
        before, self._high = self._high, _field(self._folder / "memory.events", "high")
        return self._high > before

    def limit_was_hit(self) -> bool:
        """Whether an allocation was about to fail since the last look."""
        before = self._oom, self._tools_oom
        self._oom = _field(self._folder / "memory.events", "oom")
        self._tools_oom = _field(self._folder / "tools" / "memory.events", "oom")
        self._hits_of_tools += self._tools_oom - before[1]
        return before != (self._oom, self._tools_oom)

    def kills(self) -> dict[str, int]:
        """How many processes were killed so far."""
        return {
            TOOL: _field(self._folder / "tools" / "memory.events", "oom_kill"),
            AGENT: _field(self._folder / "agent" / "memory.events", "oom_kill"),
        }

    def used_and_limit(self) -> tuple[int, int]:
        return _number(self._folder / "memory.current"), _number(self._folder / "memory.max")

    def limit_and_peak(self, scope: str) -> tuple[int, int]:
        """Of the group whose limit killed somebody of `scope`. Before Linux 5.19 there is no peak but the limit."""
        folder = self._folder
        if scope == TOOL and self._hits_of_tools > 0:
            self._hits_of_tools -= 1
            folder /= "tools"
        limit = _number(folder / "memory.max")
        return limit, _number(folder / "memory.peak") or limit


def _notification(folder: Path, name: str, argument: int | str = "") -> int:
    """An eventfd that tells of one of a group's files; -1 where the kernel has no such notifications."""
    event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with open(folder / name, "rb") as file:
            (folder / "cgroup.event_control").write_text(f"{event} {file.fileno()} {argument}")
    except OSError:
        os.close(event)
        return -1
    return event


def _changes_of(path: Path) -> int:
    """An inotify descriptor that tells when a file changes; -1 where that can't be had."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
    if descriptor >= 0 and libc.inotify_add_watch(descriptor, os.fsencode(path), _IN_MODIFY) < 0:
        os.close(descriptor)
        return -1
    return descriptor


def _taken(descriptor: int) -> bool:
    """Whether an eventfd or inotify descriptor had something to tell, which is taken."""
    with contextlib.suppress(OSError):
        return descriptor >= 0 and bool(os.read(descriptor, 4096))
    return False


def _number(path: Path) -> int:
    """The number a file holds; 0 where there is none, or no file."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return 0


def _field(path: Path, name: str) -> int:
    """The number behind a name in a file of lines "name number"; 0 where there is none, or no file."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name} ")), 0)


def protect() -> bool:
    """Makes this process one of the last the kernel kills when the host runs out of memory; False if it may not."""
    path = Path("/proc/self/oom_score_adj")
    try:
        if int(path.read_text()) > _PROTECTED:
            path.write_text(str(_PROTECTED))
    except OSError:  # needs CAP_SYS_RESOURCE
        return False
    return True


def expose() -> None:
    """Makes this process and its children more likely victims than any that isn't a sandbox's."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        if int(path.read_text()) < _EXPOSED:
            path.write_text(str(_EXPOSED))
