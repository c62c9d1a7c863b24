"""What the HTTP resources of one worker need from the rest of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from falcon.asgi import Request, Response

from ashd.config.schema import CoordinatorConfig
from ashd.store import runners, sessions, turns
from ashd.store.pool import Database
from ashd.wire.v1 import runner_pb2


class Dispatch(Protocol):
    """Asking runners to do what the database has decided."""

    async def start_session(self, created: sessions.Created) -> sessions.Session:
        """Have the chosen runner start the session's sandbox, or another one when it refuses; the session, `active`.

        A replayed session is answered as it is, once it is no longer `starting`.
        Raises Unavailable when no runner will have it, Rejected when the agent can't be started; the session then is
        in `error` and its slot free.
        """
        ...

    async def end_session(self, ended: sessions.Ended) -> None:
        """Have the runner end the sandbox the session had. A runner that doesn't answer is no error: its next
        inventory is compared with the database."""
        ...

    async def sandboxes_of(self, runner: runners.Runner) -> list[runner_pb2.Sandbox]:
        """What the runner's sandboxes are and use. Raises Unavailable when it does not answer."""
        ...


class Streams(Protocol):
    """Server-sent events of sessions. Each fills `resp` with a stream, or raises before it has sent anything."""

    async def post_message(self, req: Request, resp: Response, admitted: turns.Admitted) -> None:
        """Launch the turn (unless it is a replayed one) and stream its events, from its start, until `done`."""
        ...

    async def launch(self, admitted: turns.Admitted) -> None:
        """Launch the turn with nobody listening (`Prefer: respond-async`); returns at once."""
        ...

    async def attach(self, req: Request, resp: Response, session: sessions.Session, cursor: str | None) -> None:
        """Stream the session's events after `cursor`; None = from the live end. Raises Rejected on a bad cursor."""
        ...


@dataclass(frozen=True, kw_only=True)
class Services:
    """One per worker, made in its lifespan after the fork."""

    config: CoordinatorConfig
    db: Database
    coordinator_id: str
    """`<hostname>-<pid>` of the worker."""
    started_at: float
    """Of time.monotonic()."""
    dispatch: Dispatch
    streams: Streams
