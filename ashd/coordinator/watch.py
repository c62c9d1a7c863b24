"""Asking the database about many sessions at once: where each is now, at most once a second for all that are
watched.
"""

from __future__ import annotations

import asyncio
import time

from ashd import log
from ashd.errors import Unavailable
from ashd.store import sessions
from ashd.store.pool import Database

_log = log.get(__name__)

_INTERVAL_S = 1.0
_PER_QUERY = 1000


class Watch:
    """Answers `where` for everyone who asked, with one query a second. PERF: idle streams ask nothing."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._asked: dict[str, asyncio.Future[sessions.Location | None]] = {}
        self._wake = asyncio.Event()

    async def where(self, session: str) -> sessions.Location | None:
        """The session's place as the database knows it within the next second or as soon as it answers; None = no such
        session.
        """
        if session not in self._asked:
            self._asked[session] = asyncio.get_running_loop().create_future()
            self._wake.set()
        return await asyncio.shield(self._asked[session])

    async def run(self) -> None:
        """Until cancelled. While the database is away everybody waits."""
        while True:
            await self._wake.wait()
            started = time.monotonic()
            self._wake.clear()
            for chunk in self._take():
                await self._answer(chunk)
            await asyncio.sleep(max(0.0, started + _INTERVAL_S - time.monotonic()))

    def _take(self) -> list[dict[str, asyncio.Future[sessions.Location | None]]]:
        asked, self._asked = list(self._asked.items()), {}
        return [dict(asked[start : start + _PER_QUERY]) for start in range(0, len(asked), _PER_QUERY)]

    async def _answer(self, asked: dict[str, asyncio.Future[sessions.Location | None]]) -> None:
        try:
            found = {location.id: location for location in await sessions.locate(self._db, list(asked))}
        except Unavailable as error:
            _log.warning("watched sessions can't be looked up", sessions=len(asked), error=error.message)
            for session, future in asked.items():
                self._ask_again(session, future)
            return
        for session, future in asked.items():
            future.set_result(found.get(session))

    def _ask_again(self, session: str, future: asyncio.Future[sessions.Location | None]) -> None:
        newer = self._asked.get(session)
        if newer is not None:
            newer.add_done_callback(lambda done: future.set_result(done.result()) if not done.cancelled() else None)
        else:
            self._asked[session] = future
        self._wake.set()
