"""The sweep: every coordinator looks, every half minute or so, for what nobody else will bring to its end (P8).

Covers: dead runners, sessions starting for ever, turns accepted and never launched, expired keys, forgotten rows.
Each is one idempotent statement, so any number of coordinators may sweep at once; jitter keeps them apart.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from ashd import log
from ashd.config.schema import CoordinatorConfig
from ashd.coordinator.dispatch import Dispatcher, Launch
from ashd.coordinator.fleet import Fleet
from ashd.errors import AshdError
from ashd.store import coordinators, runners, sessions, turns
from ashd.store.pool import Database

_log = log.get(__name__)

_JITTER_S = 5.0
_ANNOUNCE_S = 10.0
_UNLAUNCHED_AFTER_S = 40.0
_DAY_S = 86400.0


class Sweep:
    """One worker's sweeps."""

    def __init__(self, config: CoordinatorConfig, db: Database, fleet: Fleet, dispatcher: Dispatcher) -> None:
        self._config = config
        self._db = db
        self._fleet = fleet
        self._dispatcher = dispatcher

    async def run(self) -> None:
        """Until cancelled."""
        steps: list[Callable[[], Awaitable[None]]] = [
            self._dead_runners,
            self._starting_sessions,
            self._unlaunched_turns,
            self._forget,
        ]
        while True:
            await asyncio.sleep(self._config.sweep_interval + random.random() * _JITTER_S)
            for step in steps:
                try:
                    await step()
                except AshdError as error:  # the next sweep does it
                    _log.warning("sweep could not finish", step=step.__name__, code=error.code, error=error.message)

    async def _dead_runners(self) -> None:
        for taken in await runners.sweep_dead(self._db, self._config.runner_dead_after):
            _log.warning("runner is dead, session paused", session=taken.session_id, runner=taken.runner_id)
        known = await runners.list_all(self._db, self._config.runner_dead_after)
        await self._fleet.keep_only({runner.address for runner in known})

    async def _starting_sessions(self) -> None:
        for taken in await sessions.sweep_starting(self._db, self._config.create_timeout):
            _log.warning("session did not start in time", session=taken.session_id, runner=taken.runner_id)

    async def _unlaunched_turns(self) -> None:
        """Whoever accepted these is gone, or was never answered: launching them again is safe (P3)."""
        for turn in await turns.accepted_older_than(self._db, _UNLAUNCHED_AFTER_S):
            if turn.session_status == "active" and turn.session_epoch == turn.epoch:
                address = turn.runner_address
                launch = Launch(turn.session_id, turn.id, turn.epoch, address, turn.request, turn.timeout_ms)
                self._dispatcher.launch_unwatched(launch)
            else:
                why = f"The session was {turn.session_status} before the turn could run."
                await turns.settle_unlaunched(
                    self._db, turn.id, turn.session_epoch, outcome="failed", error=why, code="session.not_active"
                )

    async def _forget(self) -> None:
        await sessions.forget_keys(self._db, _DAY_S)
        await turns.forget_keys(self._db, _DAY_S)
        await runners.forget_silent(self._db, _DAY_S)
        await coordinators.forget_silent(self._db, _DAY_S)


async def announce(db: Database, coordinator_id: str, address: str) -> None:
    """Keeps telling runners, through the database, where this worker's registry is; until cancelled."""
    while True:
        try:
            await coordinators.announce(db, coordinator_id, address)
        except AshdError as error:
            _log.warning("coordinator could not announce itself", code=error.code, error=error.message)
        await asyncio.sleep(_ANNOUNCE_S)
