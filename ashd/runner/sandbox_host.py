"""What this host gives sandboxes and takes back: folders, user ids, cgroups, and the zygote's forks.

Covers: making one sandbox and leaving nothing of it behind; what the host lets us enforce.
Leaves out: when and for whom (supervisor.py), the groups (cgroup.py), the jail (the room `sandbox`).
"""

from __future__ import annotations

import asyncio
import os
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ashd import log
from ashd.config.schema import RunnerConfig, SandboxLimits
from ashd.errors import SandboxFailed, Unavailable
from ashd.runner import cgroup, processes, selftest, workspace
from ashd.runner.disk import Disk, allowance
from ashd.runner.disk_watch import Watched
from ashd.runner.orphans import collect_orphans
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.zygote_process import ZygoteProcess
from ashd.wire.status import FULL
from sandbox.memory import protect

_log = log.get(__name__)

_WITHOUT = {
    "cgroup-memory": "the memory limit holds for each process, not for a sandbox",
    "cgroup-cpu": "a sandbox may use all processors as long as nobody else wants them",
    "tool-cgroup": "an agent's tools count as the agent: where one uses too much memory, the session may die with it",
    "oom-protection": "where the host runs out of memory, the runner is as likely a victim as any process",
    "cgroup-pids": "the number of processes of a sandbox is limited per user id or not at all",
    "landlock": "there is no second wall behind namespaces and user ids",
}
_SANDBOX_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_LOCKED_BYTES = 8 * 1024 * 1024
_QUEUED_SIGNALS = 4096


class SandboxHost:
    """The resources of one runner's sandboxes."""

    def __init__(self, config: RunnerConfig, state_dir: Path, runner_id: str) -> None:
        self._config = config
        self.folder = state_dir / "sandboxes"
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._hierarchies = cgroup.find(f"{config.cgroup_parent}/{_cgroup_name(runner_id, state_dir)}")
        self._setup = selftest.setup_for(config, state_dir)
        self._free_uids = _uids(config.uid_range) if self._setup.uid is not None else []
        self.uids = frozenset(self._free_uids)
        self.taken_uids: set[int] = set()
        self._zygote = ZygoteProcess(selftest.levels_for(config), self._setup, config.spawn_timeout)
        self._is_protected = protect()
        self.isolation = ""
        self._end_sandbox: Callable[[SandboxTask, str], None] = lambda sandbox, cause: None
        self.enforced: list[str] = []
        self.disk = Disk(self.folder)

    async def open(self, tasks: asyncio.TaskGroup, end_sandbox: Callable[[SandboxTask, str], None]) -> None:
        """Starts the zygote, kept alive in `tasks`, and learns from it what can be enforced here. `end_sandbox` ends
        one for a cause.

        Raises ConfigError: this host does not give the isolation that is configured.
        """
        self._end_sandbox = end_sandbox
        started = asyncio.Event()
        tasks.create_task(collect_orphans(lambda: self._zygote.pid), name="orphans")
        tasks.create_task(self._zygote.run(started), name="zygote")
        await asyncio.wait_for(started.wait(), self._config.spawn_timeout)
        report = selftest.report_of(self._config, self._zygote.shown)
        if not report.is_enough:
            self.close()
        report.demand()
        self.isolation = report.level
        self.folder.chmod(0o711 if report.level == "standard" else 0o700)
        self.disk.open(own_uids="uid" in report.enforced)
        self.enforced = [*self._what_is_enforced(report), self.disk.enforced]
        tasks.create_task(self.disk.watch.run(), name="disk watch")

    def close(self) -> None:
        """Gives back what all sandboxes shared, once they are gone."""
        cgroup.remove_parents(self._hierarchies)
        self.disk.close()

    def _what_is_enforced(self, report: selftest.Report) -> list[str]:
        enforced = [*cgroup.controllers(self._hierarchies), "rlimits", "no-new-privileges", *report.enforced]
        for missed in report.missed:
            _log.warning("isolation is not strict", open=missed.name, why=missed.detail, remedy=missed.remedy)
        if self._zygote.shown["tools"] and "cgroup-memory" in enforced:
            enforced.append("tool-cgroup")
        if self._is_protected:
            enforced.append("oom-protection")
        for name, without in _WITHOUT.items():
            if name not in enforced:
                _log.warning("this host does not let the runner enforce everything", missing=name, means=without)
        return enforced

    @property
    def zygote_pid(self) -> int | None:
        """Of a zygote whose children are keepers, or what keepers left behind."""
        return self._zygote.pid if self._zygote.is_ready else None

    # ------------------------------------------------------------ groups

    def group_parents(self) -> list[Path]:
        """The cgroups below which each sandbox has its own, one in each hierarchy."""
        return [hierarchy.parent for hierarchy in self._hierarchies]

    def groups_of(self, sandbox_id: str) -> list[Path]:
        """Where a sandbox's cgroups are, or would be."""
        return [parent / sandbox_id for parent in self.group_parents()]

    def groups(self) -> set[str]:
        """Names of all groups of sandboxes there are; what has another name is not a sandbox's. Raises OSError."""
        return {name for name in cgroup.leftovers(self._hierarchies, set()) if _SANDBOX_ID.fullmatch(name)}

    async def remove_groups(self, name: str) -> None:
        """Kills what runs in a group that is nobody's, and removes it."""
        await cgroup.remove(self._hierarchies, name)

    # ------------------------------------------------------------ one sandbox

    def take_uid(self) -> int | None:
        """A user id for one sandbox; None where sandboxes can't have their own. Raises Unavailable: all are taken."""
        if self._setup.uid is None:
            return None
        if not self._free_uids:
            raise Unavailable(f"all user ids of uid_range {self._config.uid_range} are taken", code=FULL)
        uid = self._free_uids.pop()
        self.taken_uids.add(uid)
        return uid

    def give_back(self, uid: int) -> None:
        """Nobody runs under this user id any more."""
        if uid in self.taken_uids:
            self.taken_uids.remove(uid)
            self._free_uids.insert(0, uid)  # the longest unused goes out first

    def uid_of(self, folder: Path) -> int | None:
        """The user id a sandbox of an earlier supervisor has; it is taken from now on."""
        try:
            owner = (folder / "workspace").lstat().st_uid
        except OSError:
            return None
        if owner in self._free_uids:
            self._free_uids.remove(owner)
            self.taken_uids.add(owner)
        return owner if owner != os.geteuid() else None

    async def make(self, sandbox: SandboxTask) -> None:
        """Forks and jails it, and connects to its keeper. Raises SandboxFailed, Unavailable."""
        try:
            groups = self._make_room(sandbox)
        except OSError as error:
            raise SandboxFailed(f"no sandbox could be made: {error}", code="sandbox.not_made") from error
        await self._zygote.fork(self._fork_request(sandbox, groups))
        await sandbox.connect(self._config.spawn_timeout)
        sandbox.enforced = self.enforced
        sandbox.isolation = self.isolation

    def _make_room(self, sandbox: SandboxTask) -> list[Path]:
        """The sandbox's folder, workspace and cgroups. Raises OSError."""
        # Where a sandbox sees nothing of the host, this folder may be closed to everyone; else its user has to pass.
        closed = self.isolation == "strict" or sandbox.uid is None
        sandbox.folder.mkdir(mode=0o700 if closed else 0o711)
        for folder in (sandbox.workspace, sandbox.folder / "scratch"):
            folder.mkdir(mode=0o700)
            if sandbox.uid is not None:
                os.chown(folder, sandbox.uid, sandbox.uid)
        limits = self._config.limits
        self.disk.limit(self._watched(sandbox), limits.disk)
        return cgroup.create(self._hierarchies, sandbox.id, limits.memory, limits.processes, limits.cpu_percent)

    def _fork_request(self, sandbox: SandboxTask, groups: list[Path]) -> dict[str, Any]:
        journal = self._config.journal
        return {
            "sandbox": sandbox.id,
            "folder": str(sandbox.folder),
            "jail": {
                "level": self.isolation,
                "template": self._setup.template,
                "folder": str(sandbox.folder),
                "uid": sandbox.uid,
                "cgroups": [str(group) for group in groups],
                "visible": self._setup.visible,
            },
            "bounds": {
                "max_frame": journal.max_frame,
                "segment_bytes": journal.segment_bytes,
                "max_journal_bytes": journal.max_bytes,
                "max_log_bytes": journal.max_log_bytes,
                "kill_timeout_s": self._config.kill_timeout,
                "max_events_per_s": journal.max_events_per_s,
            },
            "memory": cgroup.memory_group(self._hierarchies, sandbox.id),
        }

    def _watched(self, sandbox: SandboxTask) -> Watched:
        return Watched(
            workspace=sandbox.workspace,
            uid=sandbox.uid,
            most=allowance(self._config.limits.disk),
            processes=lambda: cgroup.members(self._hierarchies, sandbox.id) or processes.tree(sandbox.keeper_pid)[1:],
            is_busy=lambda: bool(sandbox.open_turn),
            say=lambda text: sandbox.tell("note", text=text),
            end=lambda: self._end_sandbox(sandbox, "disk"),
        )

    def adopt(self, sandbox: SandboxTask) -> None:
        """Takes over the limits of a sandbox of an earlier supervisor."""
        self.disk.adopt(self._watched(sandbox))

    def limit(self, sandbox: SandboxTask, limits: SandboxLimits) -> None:
        """Gives a sandbox the limits of its session, where they aren't the runner's own. Raises OSError."""
        if limits != sandbox.limits:
            cgroup.create(self._hierarchies, sandbox.id, limits.memory, limits.processes, limits.cpu_percent)
            self.disk.limit(self._watched(sandbox), limits.disk)
        sandbox.limits = limits

    def rlimits(self, sandbox: SandboxTask, limits: SandboxLimits) -> dict[str, int]:
        """The limits of each process of a sandbox, by the names of getrlimit(2)."""
        rlimits = {
            "NOFILE": limits.open_files,
            "FSIZE": limits.file_size,
            "CORE": 0,
            "MEMLOCK": _LOCKED_BYTES,
            "MSGQUEUE": 0,
            "SIGPENDING": _QUEUED_SIGNALS,
            "RTPRIO": 0,
            "NICE": 0,
        }
        if sandbox.uid is not None:  # counted per user id: only right where the sandbox has its own
            rlimits["NPROC"] = limits.processes
        if "cgroup-memory" not in self.enforced:  # the last resort: per process, not per sandbox
            rlimits["DATA"] = limits.memory
        return rlimits

    async def end_processes(self, sandbox: SandboxTask) -> None:
        """Nothing of the sandbox runs any more, where it has a cgroup."""
        if not await cgroup.remove(self._hierarchies, sandbox.id):
            sandbox.log.error("processes of a sandbox would not die")

    async def unmake(self, sandbox: SandboxTask) -> None:
        """Nothing of the sandbox is left on this host."""
        await self.end_processes(sandbox)
        await asyncio.to_thread(workspace.remove, sandbox.folder)
        self.disk.forget(sandbox.workspace, sandbox.uid)
        if sandbox.uid is not None:
            self.give_back(sandbox.uid)

    async def found(self) -> list[Path]:
        """Folders of sandboxes that an earlier supervisor left; groups without a folder are removed."""
        folders = [folder for folder in self.folder.iterdir() if folder.is_dir()]
        for name in cgroup.leftovers(self._hierarchies, {folder.name for folder in folders}):
            await cgroup.remove(self._hierarchies, name)
        return folders


def _uids(text: str) -> list[int]:
    first, _, last = text.partition("-")
    return list(range(int(last), int(first) - 1, -1))


def _cgroup_name(runner_id: str, state_dir: Path) -> str:
    """One of this runner's own. What is found there at a start and isn't in state_dir is killed, so an id alone, which
    somebody may have given twice on this host, is not enough.
    """
    return f"{re.sub(r'[^A-Za-z0-9_.-]', '_', runner_id)}-{zlib.crc32(bytes(state_dir)):08x}"
