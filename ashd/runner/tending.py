"""A sandbox's task: hears its keeper as long as it lives, then sees to it that everything is saved and nothing is left.

Covers: reconnecting, the last words of a keeper that couldn't write them, cleaning up.
Leaves out: what the keeper is told to do (supervisor.py), what is taken back from the host (sandbox_host.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

from ashd.config.schema import RunnerConfig
from ashd.domain.sandbox import Fact, State
from ashd.errors import SandboxFailed
from ashd.runner.sandbox_host import SandboxHost
from ashd.runner.sandbox_task import Grew, SandboxTask
from ashd.runner.sandboxes import Sandboxes
from ashd.runner.usage import Sampler
from sandbox import ledger
from sandbox.journal import Corrupt
from sandbox.protocol import NO_TURN

_RECONNECT_PAUSE_S = 0.1


class Tending:
    """The tasks of a runner's sandboxes."""

    def __init__(
        self,
        config: RunnerConfig,
        host: SandboxHost,
        sandboxes: Sandboxes,
        usage: Sampler,
        *,
        grew: Grew,
        left: Callable[[], None],
    ) -> None:
        self._config = config
        self._host = host
        self._sandboxes = sandboxes
        self._usage = usage
        self._grew = grew
        self._left = left
        self._tasks: asyncio.TaskGroup | None = None
        self._kills: Counter[str] = Counter()  # of sandboxes that are gone

    @property
    def kills(self) -> Counter[str]:
        """By cause: sandboxes that were ended by force, and what was killed inside of one that lives on."""
        living = (sandbox.kills for sandbox in self._sandboxes.all() if sandbox.state is not State.GONE)
        return sum(living, Counter(self._kills))

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """From now on sandboxes' tasks run in `tasks`."""
        self._tasks = tasks

    def own(self, sandbox: SandboxTask) -> None:
        """Tends a sandbox whose keeper is connected, until nothing of it is left."""
        self._start(sandbox, self._tend(sandbox))

    def bury(self, sandbox: SandboxTask) -> None:
        """A keeper that is dead or can't be talked to: makes sure of the former, then as always."""
        self._start(sandbox, self._bury(sandbox))

    async def _bury(self, sandbox: SandboxTask) -> None:
        await sandbox.end_keeper(self._config.kill_timeout)
        await self._lay_to_rest(sandbox)

    def _start(self, sandbox: SandboxTask, work: Coroutine[Any, Any, None]) -> None:
        assert self._tasks is not None
        self._tasks.create_task(self._guarded(sandbox, work), name=f"sandbox {sandbox.id}")

    async def _guarded(self, sandbox: SandboxTask, work: Coroutine[Any, Any, None]) -> None:
        """A sandbox's task. One that fails by a bug of ours costs its sandbox, not its siblings."""
        try:
            await work
        except Exception:  # the door between one sandbox and all others
            sandbox.log.exception("sandbox is given up")
            sandbox.recording.fence()
            await self._give_up(sandbox)

    async def _give_up(self, sandbox: SandboxTask) -> None:
        try:
            await self.clean_up(sandbox)
        except Exception:  # the same door: what is left is an orphan from now on
            sandbox.log.exception("sandbox could not be cleaned up")
            self._sandboxes.remove(sandbox)
            sandbox.gone.set()

    async def _tend(self, sandbox: SandboxTask) -> None:
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
                await sandbox.end_keeper(self._config.kill_timeout)
            with contextlib.suppress(SandboxFailed):
                sandbox.catch_up(await sandbox.connect(_RECONNECT_PAUSE_S))
                return True
            await asyncio.sleep(_RECONNECT_PAUSE_S)
        return False

    async def _lay_to_rest(self, sandbox: SandboxTask) -> None:
        """The keeper is dead: nothing of it runs on, everything it journaled is saved, then its folder goes."""
        sandbox.learn(Fact.KEEPER_DIED)
        sandbox.hang_up()
        if sandbox.closed_as in KILLS:
            sandbox.kills[sandbox.closed_as] += 1
        self._kills += sandbox.kills
        self._usage.close(sandbox)  # ORDER: while its cgroup is there to say what it used
        self._left()
        await self._host.end_processes(sandbox)
        if sandbox.session:
            await self._save_the_rest(sandbox)
        await self.clean_up(sandbox)

    async def _save_the_rest(self, sandbox: SandboxTask) -> None:
        try:
            sandbox.last_seq = await asyncio.to_thread(self._close_ledger, sandbox)
        except (Corrupt, OSError) as error:
            sandbox.log.error("journal could not be closed", error=str(error))
        sandbox.open_turn = NO_TURN
        sandbox.closed.set()
        sandbox.grew.ring()
        self._grew(sandbox)
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

    async def clean_up(self, sandbox: SandboxTask) -> None:
        """Nothing of the sandbox is left on this host."""
        sandbox.hang_up()
        await sandbox.end_keeper(self._config.kill_timeout)
        await self._host.unmake(sandbox)
        self._sandboxes.remove(sandbox)
        sandbox.gone.set()
        self._left()


KILLS = frozenset({"oom", "timeout", "disk"})
"""Causes of a sandbox's end that count as its kill."""
