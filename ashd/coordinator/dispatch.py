"""Asking runners to do what the database has decided: start sessions, launch turns, end sandboxes.

Covers: what to do when a runner refuses or doesn't answer. Leaves out: choosing it (store/placement.py), following it
(follow.py).

What must come to an end although its client has left runs in the background.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass
from typing import Any

from grpc import aio

from ashd import log
from ashd.config.schema import CoordinatorConfig
from ashd.coordinator import limits, metrics
from ashd.coordinator.background import Background
from ashd.coordinator.fleet import Fleet
from ashd.coordinator.runner_stream import RunnerStream
from ashd.domain.isolation import LEVELS
from ashd.domain.restart import Backoff
from ashd.errors import AshdError, Conflict, Fault, NotFound, Rejected, Unavailable
from ashd.store import runners, sessions, turns
from ashd.store.pool import Database
from ashd.wire.status import NOT_HERE, STALE, error_of
from ashd.wire.v1 import runner_pb2

_log = log.get(__name__)

_END_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 5.0
_LAUNCH_PATIENCE_S = 30.0

_NETWORK_OF = {"claude": "host"}
"""Runtimes that can't work without; an agent's own word wins, and the others get the runner's default."""


@dataclass(frozen=True)
class Launch:
    """A turn to launch, and where. The same turn may be asked for again: its keeper launches it once."""

    session: str
    turn: str
    epoch: int
    runner_address: str | None
    request: str
    timeout_ms: int


class Dispatcher:
    """One worker's dispatch."""

    def __init__(self, config: CoordinatorConfig, db: Database, fleet: Fleet, background: Background) -> None:
        self._config = config
        self._db = db
        self._fleet = fleet
        self._background = background

    # ------------------------------------------------------------ sessions

    async def start_session(self, created: sessions.Created) -> sessions.Session:
        """Has a runner start the session's sandbox; the session, active. Finishes even if nobody waits for it any
        more.
        """
        session = created.session
        if created.replayed and session.status == "error":
            raise Rejected(f"The agent could not be started: {session.status_cause}", code="session.not_started")
        if created.replayed and session.status != "starting":
            return session
        outcome = await asyncio.shield(self._background.run(self._start(session), f"start session {session.id}"))
        if isinstance(outcome, AshdError):
            raise outcome
        return outcome

    async def _start(self, session: sessions.Session) -> sessions.Session:
        refused: dict[str, str] = {}
        answer = None
        while answer is None:
            try:
                answer = await self._ask_to_start(session)
            except Unavailable as error:  # full, draining or not answering: the next one
                refused[session.runner_id or ""] = error.message
                _log.info("runner can't take a session", session=session.id, runner=session.runner_id, code=error.code)
                session = await self._move(session, refused)
            except Fault as fault:
                await sessions.fail_start(self._db, session.id, session.epoch, fault.message)
                raise
            except ValueError as error:  # what can't travel, such as a lone surrogate in a variable
                await sessions.fail_start(self._db, session.id, session.epoch, str(error))
                raise Rejected(f"The session's settings can't be sent to a runner: {error}") from None
            except AshdError as error:
                await sessions.fail_start(self._db, session.id, session.epoch, error.message)
                raise Rejected(f"The agent could not be started: {error.message}", code=error.code) from None
        active = await sessions.activate(
            self._db,
            session.id,
            session.epoch,
            answer.sandbox_id,
            isolation=answer.isolation if answer.isolation in LEVELS else None,
            effective_limits=json.dumps(limits.from_wire(answer.limits)) if answer.HasField("limits") else None,
        )
        if active is None:
            await self._tell_to_end(session.id, session.epoch, session.runner_address)
            raise Conflict("The session was ended while it was being started", code="session.ended")
        return active

    async def _move(self, session: sessions.Session, refused: dict[str, str]) -> sessions.Session:
        try:
            return await sessions.move(
                self._db, session.id, session.epoch, dead_after_s=self._config.runner_dead_after, refused=refused
            )
        except Unavailable as error:
            await sessions.fail_start(self._db, session.id, session.epoch, error.message)
            raise
        except Conflict:
            current = await sessions.get(self._db, session.tenant_id, session.id)
            if current.status != "paused":
                raise
            # Its sandbox was ready and died before the runner could say so. Nobody has been told of the session.
            await sessions.end(self._db, session.tenant_id, session.id)
            raise Unavailable("the session's sandbox died as it started; try again", code="sandbox.gone") from None

    async def _ask_to_start(self, session: sessions.Session) -> runner_pb2.StartSessionResponse:
        spec = json.loads(session.agent_spec)
        request = runner_pb2.StartSessionRequest(
            session_id=session.id,
            epoch=session.epoch,
            agent_name=session.agent_name,
            bundle_digest=session.bundle_digest,
            runtime=spec["runtime"],
            entry=spec.get("entry", []),
            env=session.environment(),
            limits=limits.to_wire({**spec.get("limits", {}), **json.loads(session.limits)}),
            settings_json=_settings_of(session),
            last_seq=session.last_seq,
            turns=session.turn_count,
            network=spec.get("network") or _NETWORK_OF.get(spec["runtime"], ""),
        )
        runner = self._fleet.runner(session.runner_address)
        try:
            response: runner_pb2.StartSessionResponse = await runner.StartSession(
                request, metadata=self._fleet.metadata, timeout=self._config.create_timeout
            )
        except aio.AioRpcError as failed:
            metrics.runner_failed("StartSession", failed.code())
            raise error_of(failed, f"runner {session.runner_id}") from None
        return response

    async def end_session(self, ended: sessions.Ended) -> None:
        """Has the runner end the sandbox the session had; one that doesn't answer learns it from its next inventory."""
        if ended.before is not None and ended.before.runner_address is not None:
            await self._tell_to_end(ended.before.session_id, ended.before.epoch, ended.before.runner_address)

    async def _tell_to_end(self, session: str, epoch: int, address: str | None) -> None:
        request = runner_pb2.EndSessionRequest(session_id=session, epoch=epoch)
        try:
            runner = self._fleet.runner(address)
            await runner.EndSession(request, metadata=self._fleet.metadata, timeout=_END_TIMEOUT_S)
        except aio.AioRpcError as failed:
            metrics.runner_failed("EndSession", failed.code())
            _log.info("runner was not told of a session's end", session=session, error=failed.details())

    async def sandboxes_of(self, runner: runners.Runner) -> list[runner_pb2.Sandbox]:
        """What the runner's sandboxes are and use. Raises Unavailable when it does not answer."""
        try:
            response = await self._fleet.runner(runner.address).ListSandboxes(
                runner_pb2.ListSandboxesRequest(), metadata=self._fleet.metadata, timeout=_ANSWER_TIMEOUT_S
            )
        except aio.AioRpcError as failed:
            metrics.runner_failed("ListSandboxes", failed.code())
            raise error_of(failed, f"runner {runner.id}") from None
        return list(response.sandboxes)

    # ------------------------------------------------------------ turns

    async def launch(self, launch: Launch) -> RunnerStream:
        """Launches an accepted turn, patiently; the stream of its events, its first batch read.

        A turn that can't be launched any more is settled, and the reason raised: Rejected. Raises Unavailable when the
        runner doesn't answer for long, with the turn still accepted (the sweep tries again), and when the turn turns
        out to be launched already. WAITS: _LAUNCH_PATIENCE_S.
        """
        backoff = Backoff(first_s=0.05, most_s=1.0)
        deadline = asyncio.get_running_loop().time() + _LAUNCH_PATIENCE_S
        while True:
            try:
                return await self._open(launch)
            except Unavailable:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(backoff.next_s(random.random()))
            except (NotFound, Rejected) as refusal:
                raise await self._given_up(launch, refusal) from None

    async def _open(self, launch: Launch) -> RunnerStream:
        request = runner_pb2.StartTurnRequest(
            session_id=launch.session,
            epoch=launch.epoch,
            turn_id=launch.turn,
            request=launch.request.encode(),
            timeout_ms=launch.timeout_ms,
        )
        call = self._fleet.runner(launch.runner_address).StartTurn(request, metadata=self._fleet.metadata)
        return await RunnerStream(call, "StartTurn").opened(_ANSWER_TIMEOUT_S)

    async def _given_up(self, launch: Launch, why: AshdError) -> AshdError:
        """Settles a turn its runner has refused, and says how it ended: Rejected, it was not run and never will be.

        Unavailable: it was launched all the same, in an attempt whose answer was lost, or its session has moved on; the
        database knows. A sandbox goes only when all it journaled is recorded, so `accepted` there is the truth.
        """
        if why.code in (NOT_HERE, STALE):
            why = Rejected("The session's sandbox is gone; the turn was not run.", code="sandbox.gone")
        settled = await turns.settle_unlaunched(
            self._db, launch.turn, launch.epoch, outcome="failed", error=why.message, code=why.code
        )
        return why if settled else Unavailable("The turn is not waiting to be launched any more", code="turn.launched")

    def launch_unwatched(self, launch: Launch) -> None:
        """Launches a turn nobody listens to."""

        async def work() -> None:
            (await self.launch(launch)).close()

        self._background.run(work(), f"launch turn {launch.turn}")


def _settings_of(session: sessions.Session) -> str:
    settings: dict[str, Any] = json.loads(session.settings)
    if session.model is not None:
        settings["model"] = session.model
    return json.dumps(settings)
