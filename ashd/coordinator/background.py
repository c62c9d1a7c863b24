"""Work that goes on when the request that began it is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from ashd import log
from ashd.errors import AshdError, Fault

_log = log.get(__name__)
T = TypeVar("T")


class Background:
    """Tasks owned by the worker, each named and guarded: one that fails gives its error as its result and harms no
    other.
    """

    def __init__(self, tasks: asyncio.TaskGroup) -> None:
        self._tasks = tasks

    def run(self, work: Coroutine[Any, Any, T], name: str) -> asyncio.Task[T | AshdError]:
        """Starts `work`; await the task, shielded, for its result or error."""
        return self._tasks.create_task(_guarded(work, name), name=name)


async def _guarded(work: Coroutine[Any, Any, T], name: str) -> T | AshdError:
    try:
        return await work
    except AshdError as error:
        _log.info("background work failed", work=name, code=error.code, error=error.message)
        return error
    except Exception:  # the door between one session's bug and everybody else's worker
        _log.exception("background work failed", work=name)
        return Fault(f"{name} failed; the coordinator's log says why")
