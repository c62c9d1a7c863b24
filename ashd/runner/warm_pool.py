"""The warm pool: sandboxes kept forked and jailed for whichever session comes next.

Covers: handing one out, refilling. Leaves out: how one is made (supervisor.py), whether the host has room
(admission.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from ashd import log
from ashd.domain.sandbox import State
from ashd.errors import SandboxFailed, Unavailable
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.sandboxes import Sandboxes

_log = log.get(__name__)

_REFILL_PAUSE_S = 1.0


class WarmPool:
    """Up to `size` warm sandboxes among those of a runner. `refill` is set when there may be something to do."""

    def __init__(
        self,
        size: int,
        sandboxes: Sandboxes,
        spawn: Callable[[], Awaitable[SandboxTask]],
        spawn_spare: Callable[[], Awaitable[bool]],
    ) -> None:
        """`spawn_spare` makes one more, or says that there is no room for it now."""
        self._size = size
        self._sandboxes = sandboxes
        self._spawn = spawn
        self._spawn_spare = spawn_spare
        self.refill = asyncio.Event()
        self.hits = 0
        self.cold_starts = 0

    async def run(self) -> None:
        """Refills the pool whenever one was taken, until cancelled."""
        while True:
            self.refill.clear()
            try:
                while self._is_short() and await self._spawn_spare():
                    pass
            except (SandboxFailed, Unavailable) as error:
                _log.error("warm sandbox could not be made", error=error.message)
                await asyncio.sleep(_REFILL_PAUSE_S)
                continue
            await self.refill.wait()

    def _is_short(self) -> bool:
        return self._sandboxes.count(State.WARM, State.WARMING) < self._size

    async def take(self) -> SandboxTask:
        """A warm sandbox for a session: a ready one, or one made now. Raises SandboxFailed, Unavailable.

        RACE: the caller claims it before it awaits anything else.
        """
        for sandbox in self._sandboxes.all():
            if sandbox.state is State.WARM:
                sandbox.was_warm = True
                self.hits += 1
                return sandbox
        self.cold_starts += 1
        return await self._spawn()
