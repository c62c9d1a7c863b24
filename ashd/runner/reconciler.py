"""The reconciler: finds what belongs to no sandbox of this runner, removes it and counts it.

Covers: processes, mounts, cgroups, folders, user ids, half-fetched bundles; a look at the supervisor's own descriptors.
Leaves out: ending sandboxes that are known (tending.py).

Every end of a sandbox cleans up after itself; this is for ends that were cut short: a supervisor, zygote or keeper
killed in the middle of a create, a bug of ours. Nothing is touched before it was nobody's in two looks in a row, so
what is being made or ended right now is safe: it becomes known, or is gone, in between.

SECURITY: another runner's, and a person's, are not ours to remove. Ours is what lies in our folder or our cgroups,
works in one of our sandboxes' folders without a terminal, or is a child of ours under a user id of ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ashd import log
from ashd.runner import mounts, processes
from ashd.runner.adoption import Adoption
from ashd.runner.sandbox_host import SandboxHost
from ashd.runner.sandboxes import Sandboxes
from ashd.runner.workspace import BundleCache

_log = log.get(__name__)

_INTERVAL_S = 3.0
_OWN_DESCRIPTORS = 512
_DESCRIPTORS_PER_SANDBOX = 8


@dataclass(frozen=True, order=True)
class Stray:
    """Something that seems to be nobody's. `name` tells it from all others that ever were."""

    kind: str  # process, mount, cgroup, folder, uid, staging
    name: str


class Suspicion:
    """Which strays were seen in two looks in a row; and of these, which for the first time."""

    def __init__(self) -> None:
        self._before: set[Stray] = set()
        self._condemned: set[Stray] = set()

    def confirmed(self, strays: set[Stray]) -> list[Stray]:
        """What to remove, now or once more."""
        return sorted(strays & self._before)

    def new(self, strays: set[Stray]) -> set[Stray]:
        """Those of them that were not removed, or tried to be, before. Ends this look."""
        again = strays & self._before
        new = again - self._condemned
        self._before, self._condemned = strays, again
        return new


class Reconciler:
    """Looks at one runner's share of the host every few seconds. `removed` counts by kind."""

    def __init__(self, host: SandboxHost, sandboxes: Sandboxes, adoption: Adoption, bundles: BundleCache) -> None:
        self._host = host
        self._sandboxes = sandboxes
        self._adoption = adoption
        self._bundles = bundles
        self._suspicion = Suspicion()
        self._most_descriptors = _OWN_DESCRIPTORS
        self.removed: Counter[str] = Counter()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_INTERVAL_S)
            try:
                await self.look()
            except Exception:  # the door between housekeeping and sandboxes; the next look does it
                _log.exception("orphans could not all be looked for")

    async def look(self) -> None:
        """One look, and the removal of what was nobody's at the last one too."""
        strays = await asyncio.to_thread(self._on_this_host) | self._in_our_books()
        confirmed, new = self._suspicion.confirmed(strays), self._suspicion.new(strays)
        for kind in _ORDER:
            for stray in (one for one in confirmed if one.kind == kind):
                if stray in new:
                    self.removed[kind] += 1
                    _log.warning("orphan is removed", kind=kind, name=stray.name)
                with contextlib.suppress(OSError):
                    await self._remove(stray)
        self._count_descriptors()

    # ------------------------------------------------------------ finding

    def _on_this_host(self) -> set[Stray]:
        """Runs in a thread: reading /proc takes milliseconds where there are thousands of processes."""
        known, root = self._sandboxes, self._host.folder
        folders = (entry.name for entry in os.scandir(root) if entry.is_dir(follow_symlinks=False))
        found = {Stray("folder", name) for name in folders if name not in known}
        found |= {
            Stray("mount", str(point)) for point in mounts.below(root) if point.relative_to(root).parts[0] not in known
        }
        found |= {Stray("cgroup", name) for name in self._host.groups() if name not in known}
        found |= {Stray("staging", str(folder)) for folder in self._bundles.abandoned()}
        workers = {pid for pid, name in processes.by_sandbox(root).items() if name not in known}
        for pid in {pid for pid in workers if not processes.has_terminal(pid)} | self._strangers():
            with contextlib.suppress(OSError, IndexError):
                found.add(Stray("process", _identity(pid)))
        return found

    def _strangers(self) -> set[int]:
        """Children of the supervisor and its zygote with a user id of ours that is no known sandbox's, and all below
        them: what a dead keeper left behind.
        """
        strays: set[int] = set()
        known = {sandbox.uid for sandbox in self._sandboxes.all()}
        for parent in filter(None, (os.getpid(), self._host.zygote_pid)):
            for child in processes.children(parent):
                uid = processes.user_of(child)
                if uid in self._host.uids and uid not in known:
                    strays |= set(processes.tree(child))
        return strays

    def _in_our_books(self) -> set[Stray]:
        known = {sandbox.uid for sandbox in self._sandboxes.all()}
        return {Stray("uid", str(uid)) for uid in self._host.taken_uids - known}

    def _count_descriptors(self) -> None:
        """Can't be told whose they are, so too many are only said, and again at each doubling."""
        there = len(os.listdir("/proc/self/fd"))
        expected = _OWN_DESCRIPTORS + _DESCRIPTORS_PER_SANDBOX * len(self._sandboxes.all())
        if there > max(expected, self._most_descriptors):
            _log.warning("supervisor has more descriptors open than expected", open=there, expected=expected)
            self._most_descriptors = 2 * there

    # ------------------------------------------------------------ removing

    async def _remove(self, stray: Stray) -> None:
        match stray.kind:
            case "process":
                _kill(stray.name)
            case "mount":
                mounts.detach(Path(stray.name))
            case "cgroup":
                await self._host.remove_groups(stray.name)
            case "folder":
                # What its journal holds may not be saved yet: it goes the way of all whose keeper is dead.
                await self._adoption.adopt(self._host.folder / stray.name)
            case "uid":
                self._host.give_back(int(stray.name))
            case "staging":
                await asyncio.to_thread(shutil.rmtree, stray.name, ignore_errors=True)


_ORDER = ("process", "mount", "cgroup", "folder", "uid", "staging")
"""ORDER: a keeper before its folder, so that the folder's journal has one writer; a mount before what it covers."""


def _identity(pid: int) -> str:
    """A pid and when its process began (field 22): no other process ever has both. Raises OSError, IndexError."""
    return f"{pid}@{processes.stat_fields(pid)[19].decode()}"


def _kill(identity: str) -> None:
    """RACE: the pid may be another's by now; a descriptor holds on to one process, and then it is compared."""
    pid = int(identity.partition("@")[0])
    descriptor = os.pidfd_open(pid)
    try:
        if _identity(pid) == identity:
            signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    except IndexError:
        return
    finally:
        os.close(descriptor)
