"""The supervisor: decides about sandboxes, owns each one's task, and may die at any moment.

Covers: warming, claiming, launching turns, ending, adopting after a restart.
Leaves out: what a sandbox is made of on this host (sandbox_host.py), one keeper's conversation (sandbox_task.py), what
the wire says (service.py), what goes up to coordinators (uplink.py).

All it knows it can rebuild: from `<state_dir>/sandboxes/*/` and the keepers' sockets, and from what a coordinator
answers to Register.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import time
import uuid
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ashd import log
from ashd.config.schema import RunnerConfig
from ashd.domain.sandbox import Fact, State
from ashd.errors import AshdError, NotFound, Rejected, SandboxFailed, Unavailable
from ashd.runner import workspace
from ashd.runner.sandbox_host import SandboxHost
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.workspace import BundleCache
from ashd.wire.status import FULL, NOT_HERE, STALE
from sandbox import ledger
from sandbox.journal import Corrupt
from sandbox.protocol import NO_TURN

_log = log.get(__name__)

_RECONNECT_PAUSE_S = 0.1
_REFILL_PAUSE_S = 1.0
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
    network: str = ""
    """none or host; empty = the runner's own."""


class Supervisor:
    """The sandboxes of one runner."""

    def __init__(self, config: RunnerConfig, state_dir: Path, runner_id: str, bundles: BundleCache) -> None:
        self._config = config
        self._bundles = bundles
        self._host = SandboxHost(config, state_dir, runner_id)
        self._sandboxes: dict[str, SandboxTask] = {}
        self._by_session: dict[str, SandboxTask] = {}
        self._tasks: asyncio.TaskGroup | None = None
        self._refill = asyncio.Event()
        self._starting: dict[str, _Starting] = {}
        self.to_record: dict[str, SandboxTask] = {}
        self.has_to_record = asyncio.Event()
        self.capacity_changed = asyncio.Event()
        self.draining = False
        self.warm_hits = 0
        self.cold_starts = 0

    @property
    def enforced(self) -> list[str]:
        """What this host lets us enforce on sandboxes."""
        return self._host.enforced

    @property
    def isolation(self) -> str:
        """The level all sandboxes made now have: strict, standard or none."""
        return self._host.isolation

    # ------------------------------------------------------------ beginning and end

    async def run(self, tasks: asyncio.TaskGroup) -> None:
        """Starts the zygote, adopts what lives, and from then on owns its tasks in `tasks`."""
        self._tasks = tasks
        await self._host.open(tasks)
        await self._adopt_all()
        tasks.create_task(self._keep_warm(), name="warm pool")

    async def end_all(self, cause: str) -> None:
        """Ends every sandbox, warm ones too, and waits until they are gone or the kill ladder has run out."""
        for sandbox in list(self._sandboxes.values()):
            self._tell_to_end(sandbox, cause)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._config.kill_timeout + 2.0):
                for sandbox in list(self._sandboxes.values()):
                    await sandbox.gone.wait()
        self._host.close()

    async def settle_open_turns(self, timeout_s: float) -> None:
        """Waits for open turns to end, at most so long."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                for sandbox in self.live():
                    while sandbox.open_turn:
                        await sandbox.grew.next_ring().wait()

    # ------------------------------------------------------------ looking

    def live(self) -> Iterable[SandboxTask]:
        """Sandboxes that belong to a session."""
        return [sandbox for sandbox in self._by_session.values() if sandbox.takes_a_slot]

    def all(self) -> Iterable[SandboxTask]:
        """Every sandbox there is, warm ones too."""
        return list(self._sandboxes.values())

    def leases(self) -> list[tuple[str, int]]:
        """Every (session, epoch) there is something of here: a sandbox, or events not saved yet."""
        return [(sandbox.session, sandbox.epoch) for sandbox in self._by_session.values()]

    def find(self, session: str, epoch: int) -> SandboxTask:
        """The session's sandbox under this lease. Raises NotFound, or Rejected for another epoch."""
        sandbox = self._by_session.get(session)
        if sandbox is None:
            raise NotFound(f"session {session} has no sandbox on this runner", code=NOT_HERE)
        if sandbox.epoch != epoch:
            raise Rejected(f"the lease of session {session} here is {sandbox.epoch}, not {epoch}", code=STALE)
        return sandbox

    def of_lease(self, session: str, epoch: int) -> SandboxTask | None:
        """Like find, for those who don't mind."""
        sandbox = self._by_session.get(session)
        return sandbox if sandbox is not None and sandbox.epoch == epoch else None

    def count(self, *states: State) -> int:
        return sum(sandbox.state in states for sandbox in self._sandboxes.values())

    # ------------------------------------------------------------ spawning

    async def _spawn(self) -> SandboxTask:
        """A warm sandbox: forked, jailed, nobody's. Raises SandboxFailed, Unavailable."""
        sandbox_id = str(uuid.uuid4())
        folder = self._host.folder / sandbox_id
        sandbox = SandboxTask(sandbox_id, folder, self._host.take_uid(), self._has_grown)
        self._sandboxes[sandbox_id] = sandbox
        try:
            await self._host.make(sandbox)
        except (AshdError, asyncio.CancelledError):
            await self._clean_up(sandbox)
            raise
        sandbox.learn(Fact.FORKED)
        self._own(sandbox)
        if sandbox.state is State.ENDING:  # told so while it was being made
            sandbox.tell("end")
            raise Unavailable("this runner is stopping", code=FULL)
        return sandbox

    async def _keep_warm(self) -> None:
        """Refills the warm pool whenever one was taken."""
        while True:
            self._refill.clear()
            try:
                while not self.draining and self.count(State.WARM, State.WARMING) < self._config.warm_sandboxes:
                    await self._spawn()
            except (SandboxFailed, Unavailable) as error:
                _log.error("warm sandbox could not be made", error=error.message)
                await asyncio.sleep(_REFILL_PAUSE_S)
                continue
            await self._refill.wait()

    async def _take_warm(self) -> SandboxTask:
        """A warm sandbox for a session: a ready one, or one made now."""
        for sandbox in self._sandboxes.values():
            if sandbox.state is State.WARM:
                sandbox.was_warm = True
                self.warm_hits += 1
                return sandbox
        self.cold_starts += 1
        return await self._spawn()

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
        sandbox = self._by_session.get(claim.session)
        if sandbox is not None and sandbox.epoch == claim.epoch and sandbox.state in (State.ENDING, State.GONE):
            raise Unavailable("the session's sandbox here is ending", code="sandbox.gone")
        if sandbox is None or sandbox.epoch == claim.epoch:
            return sandbox
        if sandbox.epoch > claim.epoch:
            raise Rejected(f"the lease of session {claim.session} here is {sandbox.epoch}", code=STALE)
        sandbox.recording.fence()
        self._tell_to_end(sandbox, "fenced")
        return None

    async def _claim(self, claim: Claim) -> SandboxTask:
        """Takes a sandbox for a session that has none here, and loads its agent."""
        if self.draining:
            raise Unavailable("this runner is draining", code=FULL)
        taken = {*self._starting, *(sandbox.session for sandbox in self.live())}
        if len(taken) > self._config.max_sandboxes:
            raise Unavailable(f"this runner has all its {self._config.max_sandboxes} sandboxes in use", code=FULL)
        steps = _Steps()
        bundle = await self._bundles.folder_of(claim.bundle)
        steps.done("bundle")
        sandbox = await self._take_warm()
        # RACE: nothing is awaited from here until it belongs to the session, so no two sessions get one sandbox.
        sandbox.learn(Fact.CLAIMED)
        sandbox.belong_to(claim.session, claim.epoch, claim.last_seq)
        self._by_session[claim.session] = sandbox
        self._refill.set()
        self.capacity_changed.set()
        steps.done("take")
        try:
            self._host.limit(sandbox, claim.memory_bytes, claim.processes)
            await asyncio.to_thread(workspace.lay_out, bundle, sandbox.workspace, sandbox.uid)
            steps.done("workspace")
            await sandbox.call("claim", self._config.spawn_timeout, **self._claim_fields(sandbox, claim))
        except OSError as error:
            self._tell_to_end(sandbox, "not_loaded")
            raise SandboxFailed(f"the workspace could not be made: {error}", code="workspace.failed") from error
        except (AshdError, asyncio.CancelledError):
            self._tell_to_end(sandbox, "not_loaded")
            raise
        steps.done("load")
        if self._config.debug_timing:
            steps.write(sandbox)
        return sandbox

    def _claim_fields(self, sandbox: SandboxTask, claim: Claim) -> dict[str, Any]:
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
                "rlimits": self._host.rlimits(sandbox, claim.memory_bytes, claim.processes),
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
        sandbox = self._by_session.get(session)
        if sandbox is not None and sandbox.epoch <= up_to_epoch:
            sandbox.recording.fence()
            self._tell_to_end(sandbox, cause)

    def _tell_to_end(self, sandbox: SandboxTask, cause: str) -> None:
        if sandbox.state in (State.GONE, State.ENDING):
            return
        sandbox.learn(Fact.TOLD_TO_END)
        sandbox.tell("end", cause=cause)

    # ------------------------------------------------------------ a sandbox's life

    def _own(self, sandbox: SandboxTask) -> None:
        assert self._tasks is not None
        self._tasks.create_task(self._guarded(sandbox, self._tend(sandbox)), name=f"sandbox {sandbox.id}")

    async def _guarded(self, sandbox: SandboxTask, work: Coroutine[Any, Any, None]) -> None:
        """A sandbox's task. One that fails by a bug of ours costs its sandbox, not its siblings."""
        try:
            await work
        except Exception:  # the door between one sandbox and all others
            sandbox.log.exception("sandbox is given up")
            sandbox.recording.fence()
            _kill(sandbox.keeper_pid)
            await self._clean_up(sandbox)

    async def _tend(self, sandbox: SandboxTask) -> None:
        """Listens to a keeper as long as it lives, then brings its sandbox to its end."""
        await sandbox.listen()
        while await self._reconnected(sandbox):
            await sandbox.listen()
        await self._lay_to_rest(sandbox)

    async def _reconnected(self, sandbox: SandboxTask) -> bool:
        """Whether a keeper that hung up can be talked to again; if not, it is dead afterwards."""
        deadline = time.monotonic() + self._config.kill_timeout
        while not sandbox.keeper_is_dead():
            if time.monotonic() > deadline:
                sandbox.log.error("keeper hung up and does not answer, killing it")
                _kill(sandbox.keeper_pid)
            with contextlib.suppress(SandboxFailed):
                sandbox.catch_up(await sandbox.connect(_RECONNECT_PAUSE_S))
                return True
            await asyncio.sleep(_RECONNECT_PAUSE_S)
        return False

    async def _lay_to_rest(self, sandbox: SandboxTask) -> None:
        """The keeper is dead: nothing of it runs on, everything it journaled is saved, then its folder goes."""
        sandbox.learn(Fact.KEEPER_DIED)
        sandbox.hang_up()
        self.capacity_changed.set()
        await self._host.end_processes(sandbox)
        if sandbox.session:
            await self._save_the_rest(sandbox)
        await self._clean_up(sandbox)

    async def _save_the_rest(self, sandbox: SandboxTask) -> None:
        try:
            sandbox.last_seq = await asyncio.to_thread(self._close_ledger, sandbox)
        except (Corrupt, OSError) as error:
            sandbox.log.error("journal could not be closed", error=str(error))
        sandbox.open_turn = NO_TURN
        sandbox.closed.set()
        sandbox.grew.ring()
        self._has_grown(sandbox)
        await sandbox.recording.covers(sandbox.last_seq)

    def _close_ledger(self, sandbox: SandboxTask) -> int:
        """Writes the last words of a keeper that couldn't; the seq of the journal's last event."""
        journal = self._config.journal
        if not sandbox.journal.is_dir():
            return sandbox.recording.acked_seq  # claimed, and dead before its first record
        book = ledger.reopen(sandbox.journal, segment_bytes=journal.segment_bytes, max_bytes=journal.max_bytes)
        if not book.closed:
            if book.turn:
                why = ("The sandbox's keeper died.", "keeper.died")
                book.settle(ledger.Outcome("failed", *why))
            book.close("killed")
            book.writer.flush()
        book.writer.close()
        return book.writer.last.seq

    async def _clean_up(self, sandbox: SandboxTask) -> None:
        """Nothing of the sandbox is left on this host."""
        sandbox.hang_up()
        await self._host.unmake(sandbox)
        self._sandboxes.pop(sandbox.id, None)
        if self._by_session.get(sandbox.session) is sandbox:
            del self._by_session[sandbox.session]
        sandbox.gone.set()
        self._refill.set()
        self.capacity_changed.set()

    def _has_grown(self, sandbox: SandboxTask) -> None:
        if not sandbox.recording.fenced and sandbox.last_seq > sandbox.recording.acked_seq:
            self.to_record[sandbox.id] = sandbox
            self.has_to_record.set()

    # ------------------------------------------------------------ adopting

    async def _adopt_all(self) -> None:
        """Takes over what a supervisor before us left: live sandboxes, journals not saved yet, and litter."""
        folders = await self._host.found()
        for folder in folders:
            await self._adopt(folder)
        if folders:
            _log.info("sandboxes adopted", found=len(folders), live=len(list(self.live())))

    async def _adopt(self, folder: Path) -> None:
        sandbox = SandboxTask(folder.name, folder, self._host.uid_of(folder), self._has_grown)
        sandbox.enforced = self.enforced
        self._sandboxes[sandbox.id] = sandbox
        lease = _read_lease(folder / "session.json")
        if lease is not None:
            sandbox.belong_to(lease["session"], lease["epoch"], 0)
            self._by_session[sandbox.session] = sandbox
        try:
            if sandbox.keeper_is_dead():
                raise SandboxFailed("its keeper is dead")
            hello = await sandbox.connect(self._config.kill_timeout)
        except SandboxFailed:
            await self._bury(sandbox)
            return
        sandbox.learn(Fact.FORKED)
        if lease is None:
            sandbox.tell("end", cause="not_adopted")  # warm: cheaper made new than asked about
        else:
            self._take_over(sandbox, hello)
        self._own(sandbox)

    def _take_over(self, sandbox: SandboxTask, hello: dict[str, Any]) -> None:
        sandbox.learn(Fact.CLAIMED)
        sandbox.last_seq = hello["last_seq"]
        sandbox.open_turn = hello["open_turn"]
        if hello["life"] in ("ready", "ending"):
            sandbox.learn(Fact.LOADED)
        if sandbox.open_turn:
            sandbox.learn(Fact.TURN_LAUNCHED)
        if hello["life"] == "ending":
            sandbox.learn(Fact.TOLD_TO_END)
        self._has_grown(sandbox)

    async def _bury(self, sandbox: SandboxTask) -> None:
        """A keeper that is dead or can't be talked to: make sure of the former, then as always."""
        assert self._tasks is not None
        _kill(sandbox.keeper_pid)
        work = self._guarded(sandbox, self._lay_to_rest(sandbox))
        self._tasks.create_task(work, name=f"sandbox {sandbox.id}")


_SCRIPTS = ("install.sh", "startup.sh")
"""Of the agent's folder, run in each fresh sandbox before its first turn, in this order."""


def _kill(pid: int) -> None:
    if pid:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _read_lease(path: Path) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return lease


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
