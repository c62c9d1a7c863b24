"""Limits of space where the filesystem has no quotas: looks at workspaces, stops writers, ends what goes on growing.

Covers: whom to look at and when, at a bounded cost; the soft limit RLIMIT_FSIZE = 0, by which writing fails with EFBIG
while deleting works; the end of sandboxes that grow all the same.
Leaves out: looking (tree_usage.py), hard limits (quota.py), what a sandbox is (sandbox_host.py).

A sandbox can only have outgrown its limit if the whole filesystem has grown by what it had left when it was last looked
at, so most of the time one statvfs(2) shows that nobody needs to be looked at. What is deleted elsewhere at the same
moment hides growth; therefore everybody is looked at now and then all the same.

Chosen by trying: remounting a workspace read-only is no better. A single open file for writing forbids it (EBUSY), and
where it works (EROFS) nothing can be deleted any more.

Sources: getrlimit(2) (prlimit: the same real ids, or CAP_SYS_RESOURCE), statvfs(3), signal(7) (SIGXFSZ).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ashd import log
from ashd.runner.quota import Usage
from ashd.runner.tree_usage import usage_of

_log = log.get(__name__)

TICK_S = 0.25
_SLICE_S = 0.05
"""Processor time of one go; what is left has its turn in the next."""
_SHARE = 0.25
"""Of one core, at most, as long as the filesystem grows."""
_LEAST_GROWTH = Usage(1 << 20, 64)
_EVERY_S = 60.0
"""Between two looks at a sandbox that nothing speaks against."""
_STOPPED_EVERY_S = 0.5
_COST_FACTOR = 20
"""A sandbox that is looked at without new growth costs at most one part in so many of a core."""
_ENOUGH, _BACK, _END, _FAR = 1.0, 0.95, 1.25, 2.0
"""Shares of the limit: above the first, writing stops; below the second it may go on; what goes on growing above the
third is ended, and above the last everything. What goes on making files is ended above the first.
"""
_GROWING = 0.05
_NOTHING = Usage(0, 0)
_ROUNDS = 8
_HELPER_TIMEOUT_S = 5.0


@dataclass(eq=False)
class Watched:
    """A sandbox whose workspace is looked at. `processes` are all its processes' ids; `say` writes a line in its log;
    `end` ends it.
    """

    workspace: Path
    uid: int | None
    most: Usage
    processes: Callable[[], Iterable[int]]
    is_busy: Callable[[], bool]
    say: Callable[[str], None]
    end: Callable[[], None]
    used: Usage = _NOTHING
    is_stopped: bool = False
    inodes_when_stopped: int = 0
    used_since_stopped: Usage | None = None  # at the first look after its writers were stopped
    is_ended: bool = False
    looked_at: float = field(default_factory=time.monotonic)
    grown_at_look: Usage = _NOTHING
    cost_s: float = 0.0

    def must_end(self) -> bool:
        """Whether stopping its writers doesn't help: what was written quickly before that is no reason."""
        allowed = max(self.most.inodes, self.inodes_when_stopped + int(self.most.inodes * _GROWING))
        if self.is_stopped and self.used.inodes > allowed:
            return True  # making empty files can't be stopped otherwise
        most, before = self.most, self.used_since_stopped or self.used
        grown = Usage(self.used.bytes - before.bytes, self.used.inodes - before.inodes)
        return self.used.exceeds(most, _FAR) or (self.used.exceeds(most, _END) and grown.exceeds(most, _GROWING))

    def is_due(self, now: float, grown: Usage) -> bool:
        if self.is_ended:
            return False
        age = now - self.looked_at
        if age > max(_STOPPED_EVERY_S if self.is_stopped else _EVERY_S, self.cost_s * _COST_FACTOR):
            return True
        since = Usage(grown.bytes - self.grown_at_look.bytes, grown.inodes - self.grown_at_look.inodes)
        return (
            since.bytes >= max(_LEAST_GROWTH.bytes, (self.most.bytes - self.used.bytes) // 2)
            or since.inodes >= max(_LEAST_GROWTH.inodes, (self.most.inodes - self.used.inodes) // 2)
        )  # fmt: skip


class DiskWatch:
    """Looks after all sandboxes of one filesystem. `stops` and `ends` are counted since the runner started."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._watched: dict[Path, Watched] = {}
        self._full = _filled(folder)
        self._grown = Usage(0, 0)
        self.stops = 0
        self.ends = 0

    def watch(self, watched: Watched) -> None:
        watched.grown_at_look = self._grown
        self._watched[watched.workspace] = watched

    def get(self, workspace: Path) -> Watched | None:
        return self._watched.get(workspace)

    def forget(self, workspace: Path) -> None:
        self._watched.pop(workspace, None)

    async def run(self) -> None:
        """Never returns."""
        while True:
            due = self.due()
            looked, cost_s = await asyncio.to_thread(self._look, due) if due else ([], 0.0)
            for watched in looked:
                await self._judge(watched)
            done = len(looked) == len(due)
            await asyncio.sleep(max(TICK_S if done else 0.0, cost_s * (1 / _SHARE - 1)))

    def _note_growth(self) -> None:
        """Growth is only ever added up: what is deleted later doesn't make it undone."""
        full = _filled(self._folder)
        self._grown = Usage(
            self._grown.bytes + max(0, full.bytes - self._full.bytes),
            self._grown.inodes + max(0, full.inodes - self._full.inodes),
        )
        self._full = full

    def due(self) -> list[Watched]:
        """Who has to be looked at now; those in a turn first, then who has waited longest."""
        self._note_growth()
        now = time.monotonic()
        due = [watched for watched in self._watched.values() if watched.is_due(now, self._grown)]
        return sorted(due, key=lambda watched: (not watched.is_busy(), watched.looked_at))

    def _look(self, due: list[Watched]) -> tuple[list[Watched], float]:
        """Looks at as many as fit in one slice, one at least; they, and the processor time it took. In a thread."""
        looked, began = [], time.thread_time()
        last = began
        for watched in due:
            stop_at = Usage(int(watched.most.bytes * _FAR) + 1, int(watched.most.inodes * _FAR) + 1)
            watched.grown_at_look = self._grown
            try:
                watched.used = usage_of(watched.workspace, stop_at, watched.processes())
            except OSError as error:
                _log.warning("a workspace could not be looked at", folder=str(watched.workspace), error=str(error))
            watched.looked_at = time.monotonic()
            now = time.thread_time()
            watched.cost_s, last = now - last, now
            looked.append(watched)
            if now - began > _SLICE_S:
                break
        return looked, last - began

    async def _judge(self, watched: Watched) -> None:
        if watched.workspace not in self._watched or watched.is_ended:
            return
        if watched.is_stopped:
            watched.used_since_stopped = watched.used_since_stopped or watched.used
        elif watched.used.exceeds(watched.most, _ENOUGH):
            watched.is_stopped = True
            watched.inodes_when_stopped = watched.used.inodes
            self.stops += 1
            watched.say(f"the workspace has {_told(watched.used)}, its limit is {_told(watched.most)}: writing fails")
        if watched.must_end():
            watched.is_ended = True
            self.ends += 1
            watched.say("the workspace goes on growing: the sandbox is ended")
            watched.end()
        elif watched.is_stopped and not watched.used.exceeds(watched.most, _BACK):
            watched.is_stopped, watched.used_since_stopped = False, None
            watched.say("the workspace is below its limit again: writing works")
            await asyncio.to_thread(set_writing, watched, may=True)
        elif watched.is_stopped:  # at each look again, for processes born meanwhile and those that undid it
            await asyncio.to_thread(set_writing, watched, may=False)


def _filled(folder: Path) -> Usage:
    """What is taken on a whole filesystem. Inodes are 0 where it doesn't count them (btrfs)."""
    found = os.statvfs(folder)
    return Usage((found.f_blocks - found.f_bfree) * found.f_frsize, found.f_files - found.f_ffree)


def _told(usage: Usage) -> str:
    return f"{usage.bytes / (1 << 20):.1f} MiB in {usage.inodes} files"


# -------------------------------------------------------------------- processes


def writing_is_stopped(watched: Watched) -> bool:
    """Whether an earlier supervisor stopped its writers."""
    for pid in watched.processes():
        with contextlib.suppress(OSError, ValueError):
            if _file_size_limits(pid)[0] == "0":
                return True
    return False


def set_writing(watched: Watched, *, may: bool) -> None:
    """Lets a sandbox's processes write to files, or not: by their soft limit, which children inherit.

    RACE: a child may be born of one not yet limited, so it is done until a round finds nothing to do.
    """
    for _ in range(_ROUNDS):
        changes = {pid: change for pid in watched.processes() if (change := _change(pid, may=may)) is not None}
        if not changes:
            return
        refused = {pid: soft for pid, (soft, hard) in changes.items() if not _set_limits(pid, soft, hard)}
        for soft in set(refused.values()):
            _set_as_their_user([pid for pid in refused if refused[pid] == soft], watched.uid, soft)


def _change(pid: int, *, may: bool) -> tuple[str, str] | None:
    """The soft and hard limit a process should have; None if it has them, or is gone."""
    try:
        soft, hard = _file_size_limits(pid)
    except (OSError, ValueError):
        return None
    wanted = hard if may else "0"
    return (wanted, hard) if soft != wanted else None


def _set_limits(pid: int, soft: str, hard: str) -> bool:
    """False where it is not allowed."""
    try:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (_number(soft), _number(hard)))
    except PermissionError:
        return False
    except (OSError, ValueError):  # it is gone, or has lowered its hard limit meanwhile
        return True
    return True


_FOR_EACH = 'soft=$1; shift; for pid; do prlimit --pid="$pid" --fsize="$soft:"; done'


def _set_as_their_user(pids: list[int], uid: int | None, soft: str) -> None:
    """root without CAP_SYS_RESOURCE, as in most containers, may not limit others; they themselves may.

    FORK: setpriv(1) changes the user, not subprocess, which would fork all of the runner for that.
    """
    program = shutil.which("setpriv")
    if uid is None or program is None:
        return
    become = [program, f"--reuid={uid}", f"--regid={uid}", "--clear-groups"]
    quiet = subprocess.DEVNULL
    with contextlib.suppress(subprocess.TimeoutExpired):
        subprocess.run(
            [*become, "sh", "-c", _FOR_EACH, "sh", soft, *map(str, pids)],
            env={"PATH": os.defpath}, stdin=quiet, stdout=quiet, stderr=quiet, cwd="/", check=False,
            timeout=_HELPER_TIMEOUT_S,
        )  # fmt: skip


def _file_size_limits(pid: int) -> tuple[str, str]:
    """Soft and hard limit, as /proc tells them to everybody. Raises OSError, ValueError."""
    found = re.search(r"^Max file size\s+(\S+)\s+(\S+)", Path(f"/proc/{pid}/limits").read_text(), re.MULTILINE)
    if found is None:
        raise ValueError(f"/proc/{pid}/limits has no line about file sizes")
    return found[1], found[2]


def _number(limit: str) -> int:
    return resource.RLIM_INFINITY if limit == "unlimited" else int(limit)
