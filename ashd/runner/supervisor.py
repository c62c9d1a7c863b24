"""The supervisor: decides about sandboxes, and may die at any moment.

Covers: making and claiming sandboxes, launching turns, ending.
Leaves out: whether the host has room (admission.py), what a sandbox is made of on this host (sandbox_host.py), one
keeper's conversation (sandbox_task.py), a sandbox's task (tending.py), taking over after a restart (adoption.py),
orphans (reconciler.py), what the wire says (service.py), what goes up to coordinators (uplink.py).

All it knows it can rebuild: from `<state_dir>/sandboxes/*/` and the keepers' sockets, and from what a coordinator
answers to Register.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ashd import log
from ashd.config.schema import Bytes, RunnerConfig, SandboxLimits
from ashd.domain.sandbox import Fact, State
from ashd.errors import Rejected, SandboxFailed, Unavailable
from ashd.runner import workspace
from ashd.runner.admission import Admission
from ashd.runner.adoption import Adoption
from ashd.runner.disk import shortage
from ashd.runner.host_memory import HostMemory
from ashd.runner.reconciler import Reconciler
from ashd.runner.sandbox_host import SandboxHost
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.sandboxes import Sandboxes
from ashd.runner.tending import Tending
from ashd.runner.usage import Sampler
from ashd.runner.warm_pool import WarmPool
from ashd.runner.workspace import BundleCache
from ashd.wire.status import FULL, STALE

_log = log.get(__name__)

_ADMISSION_LOOK_S = 1.0
_SAFE_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Claim:
    """What a session asks of its sandbox. Sizes in bytes; 0 = the runner's own limit."""

    session: str
    epoch: int
    last_seq: int
    turns: int
    bundle: str
    runtime: str
    entry: list[str]
    env: dict[str, str]
    settings: dict[str, Any]
    memory_bytes: int
    processes: int
    open_files: int = 0
    file_size_bytes: int = 0
    cpu_percent: int = 0
    disk_bytes: int = 0
    network: str = ""
    """none or host; empty = the runner's default."""


class Supervisor:
    """The sandboxes of one runner."""

    def __init__(self, config: RunnerConfig, state_dir: Path, runner_id: str, bundles: BundleCache) -> None:
        self._config = config
        self._bundles = bundles
        self._host = SandboxHost(config, state_dir, runner_id)
        self.sandboxes = Sandboxes()
        self.usage = Sampler(self.sandboxes.all, self._host.groups_of)
        self.admission = Admission(
            config.memory_headroom,
            config.memory_pressure,
            HostMemory(self._host.group_parents()).read,
            self.usage.mean_pss,
            lambda: shortage(self._host.folder, config.disk_headroom),
        )
        self.pool = WarmPool(config.warm_sandboxes, self.sandboxes, self._spawn, self._spawn_spare)
        self._tending = Tending(
            config, self._host, self.sandboxes, self.usage, grew=self._has_grown, left=self._room_changed
        )
        self._adoption = Adoption(config, self._host, self.sandboxes, self._tending, self._has_grown)
        self._reconciler = Reconciler(self._host, self.sandboxes, self._adoption, bundles)
        self._starting: dict[str, _Starting] = {}
        self.to_record: dict[str, SandboxTask] = {}
        self.has_to_record = asyncio.Event()
        self.capacity_changed = asyncio.Event()
        self.draining = False
        self.orphans = self._reconciler.removed

    @property
    def enforced(self) -> list[str]:
        """What this host lets us enforce on sandboxes."""
        return self._host.enforced

    @property
    def isolation(self) -> str:
        """The level all sandboxes made now have: strict, standard or none."""
        return self._host.isolation

    def disk_bytes(self, sandbox: SandboxTask) -> int:
        """What a sandbox's workspace takes, as last known."""
        return self._host.disk.usage_of(sandbox.workspace, sandbox.uid)

    @property
    def kills(self) -> Counter[str]:
        """Kills since this supervisor started, by cause: oom, timeout, disk, and those a sandbox survived."""
        return self._tending.kills

    # ------------------------------------------------------------ beginning and end

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Starts the zygote, adopts what lives, and from then on owns its tasks in `tasks`."""
        self._tending.open(tasks)
        await self._host.open(tasks, self._tell_to_end)
        await self._adoption.adopt_all()
        tasks.create_task(self.pool.run(), name="warm pool")
        tasks.create_task(self._sample(), name="usage sampler")
        tasks.create_task(self._watch_admission(), name="admission")
        tasks.create_task(self._reconciler.run(), name="reconciler")

    async def _sample(self) -> None:
        """Keeps the sampler's thread; one of its own, because it would take a place of the loop's few for ever."""
        with ThreadPoolExecutor(1, thread_name_prefix="usage sampler") as own:
            try:
                await asyncio.get_running_loop().run_in_executor(own, self.usage.run_in_thread)
            finally:
                self.usage.stop()

    async def _watch_admission(self) -> None:
        """Tells coordinators at once when this runner begins to refuse sessions, and when it takes them again."""
        told = ""
        while True:
            self.admission.allows()
            if self.admission.refusing != told:
                told = self.admission.refusing
                _log.warning("admission has changed", refusing=told or "nothing", why=self.admission.why)
                self._room_changed()
            await asyncio.sleep(_ADMISSION_LOOK_S)

    def _room_changed(self) -> None:
        self.pool.refill.set()
        self.capacity_changed.set()

    async def end_all(self, cause: str) -> None:
        """Ends every sandbox, warm ones too, and waits until they are gone or the kill ladder has run out."""
        for sandbox in self.sandboxes.all():
            self._tell_to_end(sandbox, cause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.kill_timeout + 2.0):
                for sandbox in self.sandboxes.all():
                    await sandbox.gone.wait()
        self._host.close()

    async def settle_open_turns(self, timeout_s: float) -> None:
        """Waits for open turns to end, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for sandbox in self.sandboxes.live():
                    while sandbox.open_turn:
                        await sandbox.grew.next_ring().wait()

    # ------------------------------------------------------------ spawning

    async def _spawn(self) -> SandboxTask:
        """A warm sandbox: forked, jailed, nobody's. Raises SandboxFailed, Unavailable."""
        sandbox_id = str(uuid.uuid4())
        folder = self._host.folder / sandbox_id
        sandbox = SandboxTask(sandbox_id, folder, self._host.take_uid(), self._has_grown)
        sandbox.limits = self._config.limits
        self.sandboxes.add(sandbox)
        try:
            await self._host.make(sandbox)
        except BaseException:
            await self._tending.clean_up(sandbox)
            raise
        sandbox.learn(Fact.FORKED)
        self._tending.own(sandbox)
        if sandbox.state is State.ENDING:  # told so while it was being made
            sandbox.tell("end")
            raise Unavailable("this runner is stopping", code=FULL)
        return sandbox

    async def _spawn_spare(self) -> bool:
        """One more for the warm pool, unless there is no room for it."""
        if self.draining or not self.admission.allows():
            return False
        with self.admission.beginning():
            await self._spawn()
        return True

    # ------------------------------------------------------------ sessions

    async def start_session(self, claim: Claim) -> SandboxTask:
        """The session's sandbox, ready for turns. The same claim again gets the same sandbox.

        Raises Unavailable (runner.full: another may have room), Rejected (the agent can't be loaded; an older epoch).
        """
        starting = self._starting.get(claim.session)
        if starting is not None and starting.epoch == claim.epoch:
            return await asyncio.shield(starting.sandbox)
        if (sandbox := self._older_or_same(claim)) is not None:
            return sandbox
        starting = self._starting[claim.session] = _Starting(claim.epoch, asyncio.get_running_loop().create_future())
        try:
            self._admit()
            with self.admission.beginning():
                sandbox = await self._claim(claim)
        except BaseException as error:
            starting.sandbox.set_exception(error)
            starting.sandbox.exception()  # seen: whoever waits gets it, nobody has to
            raise
        else:
            starting.sandbox.set_result(sandbox)
            return sandbox
        finally:
            del self._starting[claim.session]

    def _older_or_same(self, claim: Claim) -> SandboxTask | None:
        """The session's sandbox if it is the claim's own; one of an older lease is ended."""
        sandbox = self.sandboxes.of_session(claim.session)
        if sandbox is not None and sandbox.epoch == claim.epoch and sandbox.state in (State.ENDING, State.GONE):
            raise Unavailable("the session's sandbox here is ending", code="sandbox.gone")
        if sandbox is None or sandbox.epoch == claim.epoch:
            return sandbox
        if sandbox.epoch > claim.epoch:
            raise Rejected(f"the lease of session {claim.session} here is {sandbox.epoch}", code=STALE)
        sandbox.recording.fence()
        self._tell_to_end(sandbox, "fenced")
        return None

    def _admit(self) -> None:
        """Raises Unavailable (runner.full) where there is no room for one more session."""
        if self.draining:
            raise Unavailable("this runner is draining", code=FULL)
        taken = {*self._starting, *(sandbox.session for sandbox in self.sandboxes.live())}
        if len(taken) > self._config.max_sandboxes:
            raise Unavailable(f"this runner has all its {self._config.max_sandboxes} sandboxes in use", code=FULL)
        self.admission.check()

    async def _claim(self, claim: Claim) -> SandboxTask:
        """Takes a sandbox for a session that has none here, and loads its agent."""
        steps = _Steps()
        bundle = await self._bundles.folder_of(claim.bundle)
        steps.done("bundle")
        sandbox = await self.pool.take()
        # RACE: nothing is awaited from here until it belongs to the session, so no two sessions get one sandbox.
        sandbox.learn(Fact.CLAIMED)
        sandbox.belong_to(claim.session, claim.epoch, claim.last_seq)
        self.sandboxes.give(sandbox)
        self._room_changed()
        steps.done("take")
        try:
            limits = self._limits_of(claim)
            self._host.limit(sandbox, limits)
            await asyncio.to_thread(workspace.lay_out, bundle, sandbox.workspace, sandbox.uid)
            steps.done("workspace")
            await self._give(sandbox, claim, limits)
        except OSError as error:
            self._tell_to_end(sandbox, "not_loaded")
            raise SandboxFailed(f"the workspace could not be made: {error}", code="workspace.failed") from error
        except BaseException:
            self._tell_to_end(sandbox, "not_loaded")
            raise
        steps.done("load")
        if self._config.debug_timing:
            steps.write(sandbox)
        return sandbox

    async def _give(self, sandbox: SandboxTask, claim: Claim, limits: SandboxLimits) -> None:
        """Raises Rejected (the agent can't be loaded), Unavailable (the sandbox is going, or doesn't answer)."""
        try:
            await sandbox.call("claim", self._config.spawn_timeout, **self._claim_fields(sandbox, claim, limits))
        except Rejected as refused:
            if refused.code != "sandbox.taken":
                raise
            raise Unavailable(refused.message, code=refused.code) from None

    def _limits_of(self, claim: Claim) -> SandboxLimits:
        """What the claim's sandbox may use: its own limits only go down from the runner's."""
        most = self._config.limits
        return SandboxLimits(
            memory=Bytes(min(claim.memory_bytes or most.memory, most.memory)),
            processes=min(claim.processes or most.processes, most.processes),
            open_files=min(claim.open_files or most.open_files, most.open_files),
            file_size=Bytes(min(claim.file_size_bytes or most.file_size, most.file_size)),
            cpu_percent=min(claim.cpu_percent or most.cpu_percent, most.cpu_percent),
            disk=Bytes(min(claim.disk_bytes or most.disk, most.disk)),
        )

    def _claim_fields(self, sandbox: SandboxTask, claim: Claim, limits: SandboxLimits) -> dict[str, Any]:
        return {
            "session": claim.session,
            "epoch": claim.epoch,
            "last_seq": claim.last_seq,
            "agent": {
                "session_id": claim.session,
                "turns": claim.turns,
                "runtime": claim.runtime,
                "entry": claim.entry,
                "env": claim.env,
                "settings": claim.settings,
                "path": f"{sys.base_prefix}/bin:{_SAFE_PATH}",
                "startup": [name for name in _SCRIPTS if (sandbox.workspace / name).is_file()],
                "max_frame": self._config.journal.max_frame,
                "timing": self._config.debug_timing,
                "real_sdk": self._config.real_sdk,
                "network": claim.network or self._network_of(claim.runtime),
                "rlimits": self._host.rlimits(sandbox, limits),
            },
        }

    def _network_of(self, runtime: str) -> str:
        """Of an agent that doesn't say; one that is a prompt to a model can't work without."""
        return "host" if runtime == "claude" else self._config.network

    async def start_turn(self, sandbox: SandboxTask, turn: str, request: dict[str, Any], timeout_s: float) -> int:
        """Launches a turn, once; the seq before its first event. Raises Rejected, Unavailable."""
        answer = await sandbox.call("turn", self._config.kill_timeout, turn=turn, request=request, timeout_s=timeout_s)
        after: int = answer["after_seq"]
        return after

    async def interrupt(self, sandbox: SandboxTask, turn: str) -> bool:
        answer = await sandbox.call("interrupt", self._config.kill_timeout, turn=turn)
        return bool(answer["interrupted"])

    def end_session(self, session: str, up_to_epoch: int, cause: str) -> None:
        """Ends the session's sandbox if its lease is not newer; what it still says is nobody's any more."""
        sandbox = self.sandboxes.of_session(session)
        if sandbox is not None and sandbox.epoch <= up_to_epoch:
            sandbox.recording.fence()
            self._tell_to_end(sandbox, cause)

    def _tell_to_end(self, sandbox: SandboxTask, cause: str) -> None:
        if sandbox.state in (State.GONE, State.ENDING):
            return
        sandbox.learn(Fact.TOLD_TO_END)
        sandbox.tell("end", cause=cause)

    def _has_grown(self, sandbox: SandboxTask) -> None:
        if not sandbox.recording.fenced and sandbox.last_seq > sandbox.recording.acked_seq:
            self.to_record[sandbox.id] = sandbox
            self.has_to_record.set()


_SCRIPTS = ("install.sh", "startup.sh")
"""Of the agent's folder, run in each fresh sandbox before its first turn, in this order."""


class _Steps:
    """How long each step of a sandbox's creation took: the line of ASH_DEBUG_TIMING for it (api.md §6)."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._took_ms: dict[str, float] = {}

    def done(self, step: str) -> None:
        now = time.perf_counter()
        self._took_ms[f"{step}Ms"] = round((now - self._last) * 1000, 3)
        self._last = now

    def write(self, sandbox: SandboxTask) -> None:
        line = {"type": "timing", "source": "sandbox", "sessionId": sandbox.session, "sandboxId": sandbox.id}
        print(json.dumps({**line, "warm": sandbox.was_warm, **self._took_ms}), file=sys.stderr, flush=True)


@dataclass(frozen=True)
class _Starting:
    """A session on its way into a sandbox; whoever asks for it again meanwhile waits for the same one."""

    epoch: int
    sandbox: asyncio.Future[SandboxTask]
