"""Keeping a child alive: start it, wait until it is ready, start it again when it dies, give up when it can't boot."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from ashd import log
from ashd.errors import AshdError
from ashd.standalone.child import Child

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
STABLE_AFTER_S = 10.0
MOST_FAILURES = 5
POLL_S = 0.05

_log = log.get(__name__)


class NotBooted(AshdError):
    """A part of `ashd up` does not come up, however often it is started."""

    code = "not_booted"


@dataclass(frozen=True)
class Part:
    """What must be known of a child to keep it.

    `spawn` starts it; `is_ready` says whether it serves, without waiting long. `stop_signal` asks it to end, and it
    gets `stop_timeout_s` for that.
    """

    name: str
    spawn: Callable[[], Awaitable[Child]]
    is_ready: Callable[[Child], Awaitable[bool]]
    ready_timeout_s: float
    stop_signal: signal.Signals
    stop_timeout_s: float


@asynccontextmanager
async def kept(part: Part) -> AsyncIterator[None]:
    """The part is ready on entry, kept alive within, and ended on leaving.

    When it has failed to boot MOST_FAILURES times in a row the body is cancelled and NotBooted raised (in a group).
    """
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        keeper = group.create_task(_keep(part, ready), name=f"keep {part.name}")
        await ready.wait()  # WAITS: bounded by ready_timeout_s and MOST_FAILURES, after which the group is cancelled
        yield
        keeper.cancel()


async def _keep(part: Part, ready: asyncio.Event) -> None:
    failures = 0
    while True:
        child = await part.spawn()
        started = time.monotonic()
        try:
            booted = await _becomes_ready(part, child)
            if booted:
                _log.info("part is ready", part=part.name, child=child.pid)
                ready.set()
                await child.exited()
        finally:
            code = await child.stop(part.stop_signal, timeout_s=part.stop_timeout_s)
        stable = booted and time.monotonic() - started >= STABLE_AFTER_S
        failures = 1 if stable else failures + 1
        _log.warning("part has ended", part=part.name, child=child.pid, code=code, booted=booted, failures=failures)
        if failures >= MOST_FAILURES:
            raise NotBooted(_last_words(part, child, failures))
        await asyncio.sleep(min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S))


async def _becomes_ready(part: Part, child: Child) -> bool:
    """Whether it serves within its deadline; False also when it ends before."""
    deadline = time.monotonic() + part.ready_timeout_s
    while time.monotonic() < deadline and not child.has_ended:
        if await part.is_ready(child):
            return True
        await asyncio.sleep(POLL_S)
    return False


def _last_words(part: Part, child: Child, failures: int) -> str:
    lines = [f"The {part.name} ended or was not ready in time, {failures} times in a row. It last said:"]
    return "\n".join(lines + [f"  {line}" for line in child.last_lines()])
