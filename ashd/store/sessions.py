"""Table sessions: create with placement, start, move, end, read, and what falls overdue.

Covers: every change of a session's status except by recorded events (events.py) and lost runners (runners.py).
Leaves out: turns (turns.py).
"""

# ruff: noqa: S608 - the statements are put together from constants of this room

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg

from ashd.errors import Conflict, Fault, NotFound
from ashd.store.placement import CANDIDATES, LEAST_LOADED, no_room
from ashd.store.pool import Database, Tx
from ashd.store.takeover import Taken, take_over

COLUMNS = """
    s.id, s.tenant_id, s.agent_id, s.agent_name, s.status, s.status_cause, s.epoch, s.runner_id, s.sandbox_id,
    s.parent_session_id, s.model, s.settings, s.env, s.limits, s.labels, s.bundle_digest, s.agent_spec, s.agent_env,
    s.turn_timeout_ms, s.last_seq, s.turn_count, s.open_turn_id, s.generation, s.idempotency_key, s.request_hash,
    s.created_at, s.last_active_at, s.ended_at, s.isolation, s.effective_limits,
    (SELECT r.address FROM runners AS r WHERE r.id = s.runner_id) AS runner_address
"""

CREATE = f"""
WITH agent AS (
    SELECT * FROM agents WHERE tenant_id = %(tenant)s AND name = %(agent)s
),
candidates AS (
    {CANDIDATES} AND EXISTS (SELECT 1 FROM agent) ORDER BY r.id FOR UPDATE
),
chosen AS (
    {LEAST_LOADED}
),
reserved AS (
    UPDATE runners AS r SET active = r.active + 1 FROM chosen WHERE r.id = chosen.id RETURNING r.id
)
INSERT INTO sessions AS s (
    id, tenant_id, agent_id, agent_name, status, runner_id, model, settings, env, limits, labels, bundle_digest,
    agent_spec, agent_env, turn_timeout_ms, idempotency_key, request_hash
)
SELECT
    %(id)s, %(tenant)s, agent.id, agent.name, 'starting', reserved.id, %(model)s, %(settings)s, %(env)s, %(limits)s,
    %(labels)s::jsonb, agent.bundle_digest, agent.spec, agent.env, agent.turn_timeout_ms, %(key)s, %(request_hash)s
FROM agent, reserved
RETURNING {COLUMNS}
"""

BY_KEY = f"SELECT {COLUMNS} FROM sessions AS s WHERE s.tenant_id = %(tenant)s AND s.idempotency_key = %(key)s"
AGENT_EXISTS = "SELECT true FROM agents WHERE tenant_id = %(tenant)s AND name = %(agent)s"

# The session keeps no slot on its old runner and takes one on the new: one UPDATE of runners does both. The epoch
# rises, so that the runner left behind is fenced should it have started something after all.
MOVE = f"""
WITH moving AS (
    SELECT id, runner_id FROM sessions
    WHERE id = %(id)s AND epoch = %(epoch)s AND status = 'starting' FOR UPDATE
),
candidates AS (
    {CANDIDATES} AND r.id <> (SELECT coalesce(moving.runner_id, '') FROM moving) ORDER BY r.id FOR UPDATE
),
chosen AS (
    {LEAST_LOADED}
),
swapped AS (
    UPDATE runners AS r SET
        active = CASE WHEN r.id = chosen.id THEN r.active + 1 ELSE greatest(r.active - 1, 0) END
    FROM chosen, moving WHERE r.id = chosen.id OR r.id = moving.runner_id
    RETURNING r.id
)
UPDATE sessions AS s SET runner_id = chosen.id, epoch = s.epoch + 1, placed_at = now(), last_active_at = now()
FROM moving, chosen WHERE s.id = moving.id
RETURNING {COLUMNS}
"""

ACTIVATE = f"""
UPDATE sessions AS s SET
    status = 'active', status_cause = NULL, sandbox_id = %(sandbox)s, isolation = %(isolation)s,
    effective_limits = %(effective_limits)s, last_active_at = now()
WHERE s.id = %(id)s AND s.epoch = %(epoch)s
    AND (s.status = 'starting' OR (s.status = 'active' AND s.sandbox_id = %(sandbox)s))
RETURNING {COLUMNS}
"""

GET = f"SELECT {COLUMNS} FROM sessions AS s WHERE s.tenant_id = %(tenant)s AND s.id = %(id)s"

MATCHING = """
    s.tenant_id = %(tenant)s
    AND (%(agent)s::text IS NULL OR s.agent_name = %(agent)s)
    AND (%(status)s::text IS NULL OR s.status = %(status)s)
    AND (%(labels)s::jsonb IS NULL OR s.labels @> %(labels)s::jsonb)
"""
LIST = f"""
SELECT {COLUMNS} FROM sessions AS s WHERE {MATCHING}
ORDER BY s.created_at DESC, s.id DESC LIMIT %(limit)s OFFSET %(offset)s
"""
COUNT = f"SELECT count(*) FROM sessions AS s WHERE {MATCHING}"

LOCATE = """
SELECT s.id, s.status, s.epoch, s.runner_id, r.address AS runner_address, s.last_seq, s.open_turn_id
FROM sessions AS s LEFT JOIN runners AS r ON r.id = s.runner_id WHERE s.id = ANY(%(ids)s::uuid[])
"""

LOCK_TO_END = "SELECT status FROM sessions WHERE tenant_id = %(tenant)s AND id = %(id)s FOR UPDATE"
LOCK_STARTING = """
SELECT id FROM sessions WHERE id = %(id)s AND epoch = %(epoch)s AND status = 'starting' FOR UPDATE
"""
LOCK_OVERDUE = """
SELECT id FROM sessions
WHERE status = 'starting' AND placed_at < now() - %(timeout_s)s::float8 * interval '1 second'
ORDER BY id LIMIT 500 FOR UPDATE
"""
LIVE_OF_AGENT = """
SELECT id FROM sessions
WHERE tenant_id = %(tenant)s AND agent_name = %(agent)s AND status <> 'ended' ORDER BY id
"""
FORGET_KEYS = """
UPDATE sessions SET idempotency_key = NULL
WHERE idempotency_key IS NOT NULL AND created_at < now() - %(age_s)s::float8 * interval '1 second'
"""


@dataclass(frozen=True)
class Session:
    """A row of sessions, and the address of its runner. `settings`, `env`, `*limits`, `agent_*` are JSON texts."""

    id: str
    tenant_id: str
    agent_id: str
    agent_name: str
    status: str
    status_cause: str | None
    epoch: int
    runner_id: str | None
    sandbox_id: str | None
    parent_session_id: str | None
    model: str | None
    settings: str
    env: str
    limits: str
    labels: dict[str, str]
    bundle_digest: str
    agent_spec: str
    agent_env: str
    turn_timeout_ms: int | None
    last_seq: int
    turn_count: int
    open_turn_id: str | None
    generation: int | None
    idempotency_key: str | None
    request_hash: str | None
    created_at: datetime
    last_active_at: datetime
    ended_at: datetime | None
    isolation: str | None
    effective_limits: str | None
    runner_address: str | None

    def environment(self) -> dict[str, str]:
        """What the sandbox gets: agent.yaml's env, then the agent's env, then the session's own; later wins."""
        spec_env: dict[str, str] = json.loads(self.agent_spec).get("env") or {}
        return {**spec_env, **json.loads(self.agent_env), **json.loads(self.env)}


@dataclass(frozen=True)
class NewSession:
    """What a client asks for. The texts are JSON objects."""

    id: str
    tenant_id: str
    agent_name: str
    model: str | None = None
    settings: str = "{}"
    env: str = "{}"
    limits: str = "{}"
    labels: str = "{}"
    idempotency_key: str | None = None
    request_hash: str | None = None


@dataclass(frozen=True)
class Created:
    """A session with a slot reserved for it, `starting`; or, when `replayed`, the one an earlier request made."""

    session: Session
    replayed: bool = False


@dataclass(frozen=True)
class Location:
    """Where a session is now."""

    id: str
    status: str
    epoch: int
    runner_id: str | None
    runner_address: str | None
    last_seq: int
    open_turn_id: str | None


@dataclass(frozen=True)
class Ended:
    """An ended session, and what it was before; `before` is None when it had ended already."""

    session: Session
    before: Taken | None


async def create(db: Database, new: NewSession, *, dead_after_s: float, deadline: float | None = None) -> Created:
    """Create a session `starting`, with a slot reserved on the least loaded runner; one statement when all is well.

    Raises NotFound (no such agent), Unavailable `fleet.no_runners` or `fleet.full`, Conflict `idempotency.mismatch`.
    """
    params: dict[str, Any] = {
        "id": new.id,
        "tenant": new.tenant_id,
        "agent": new.agent_name,
        "model": new.model,
        "settings": new.settings,
        "env": new.env,
        "limits": new.limits,
        "labels": new.labels,
        "key": new.idempotency_key,
        "request_hash": new.request_hash,
        "dead_after_s": dead_after_s,
        "exclude": [],
    }
    try:
        session = await db.fetch_one(Session, CREATE, params, deadline=deadline)
    except psycopg.errors.UniqueViolation:
        session = None
    if session is not None:
        return Created(session)
    return await _why_not_created(db, new, dead_after_s=dead_after_s, deadline=deadline)


async def _why_not_created(db: Database, new: NewSession, *, dead_after_s: float, deadline: float | None) -> Created:
    params = {"tenant": new.tenant_id, "key": new.idempotency_key, "agent": new.agent_name}
    if new.idempotency_key is not None:
        earlier = await db.fetch_one(Session, BY_KEY, params, deadline=deadline)
        if earlier is not None and earlier.request_hash != new.request_hash:
            raise Conflict(
                "This Idempotency-Key was used with another request; use a new key", code="idempotency.mismatch"
            )
        if earlier is not None:
            return Created(earlier, replayed=True)
    if await db.fetch_value(AGENT_EXISTS, params, deadline=deadline) is None:
        raise NotFound(f'Agent "{new.agent_name}" not found', code="agent.not_found")
    raise await no_room(db, dead_after_s=dead_after_s, deadline=deadline)


async def move(
    db: Database,
    session_id: str,
    epoch: int,
    *,
    dead_after_s: float,
    refused: Mapping[str, str],
    deadline: float | None = None,
) -> Session:
    """Give a session that is still `starting` to another runner than its present one, under the next epoch. `refused`:
    the runners that were asked, with what they said.

    Raises Conflict `session.not_starting` when somebody else has ended or moved it, Unavailable when there is no room.
    """
    params = {"id": session_id, "epoch": epoch, "dead_after_s": dead_after_s, "exclude": list(refused)}
    moved = await db.fetch_one(Session, MOVE, params, deadline=deadline)
    if moved is not None:
        return moved
    where = await locate(db, [session_id], deadline=deadline)
    if not where or where[0].status != "starting" or where[0].epoch != epoch:
        status = where[0].status if where else "gone"
        raise Conflict(f"Session is {status}", code="session.not_starting")
    raise await no_room(db, dead_after_s=dead_after_s, refused=refused, deadline=deadline)


async def activate(
    db: Database,
    session_id: str,
    epoch: int,
    sandbox_id: str | None,
    *,
    isolation: str | None = None,
    effective_limits: str | None = None,
    deadline: float | None = None,
) -> Session | None:
    """starting → active, or active already with this sandbox; None when it was ended, moved or taken over meanwhile.

    `isolation` and `effective_limits` (JSON) are what the runner says of the sandbox; None = it does not.
    """
    params = {
        "id": session_id,
        "epoch": epoch,
        "sandbox": sandbox_id,
        "isolation": isolation,
        "effective_limits": effective_limits,
    }
    return await db.fetch_one(Session, ACTIVATE, params, deadline=deadline)


async def fail_start(db: Database, session_id: str, epoch: int, cause: str, *, deadline: float | None = None) -> bool:
    """starting → error, its slot released; False when the session was not starting under this epoch any more."""

    async def work(tx: Tx) -> bool:
        if await tx.fetch_value(LOCK_STARTING, {"id": session_id, "epoch": epoch}) is None:
            return False
        return bool(await take_over(tx, [session_id], status="error", cause=cause, outcome="failed"))

    return await db.run(work, deadline=deadline)


async def sweep_starting(db: Database, timeout_s: float, *, deadline: float | None = None) -> list[Taken]:
    """Sessions `starting` for longer than `timeout_s` become `error`; returns at most 500 at a time."""

    async def work(tx: Tx) -> list[Taken]:
        overdue = await tx.fetch_all(_Id, LOCK_OVERDUE, {"timeout_s": timeout_s})
        cause = f"not started within {timeout_s:g} s"
        return await take_over(tx, [row.id for row in overdue], status="error", cause=cause, outcome="failed")

    return await db.run(work, deadline=deadline)


async def get(db: Database, tenant_id: str, session_id: str, *, deadline: float | None = None) -> Session:
    """The session of this tenant. Raises NotFound."""
    session = await db.fetch_one(Session, GET, {"tenant": tenant_id, "id": session_id}, deadline=deadline)
    if session is None:
        raise not_found()
    return session


async def list_newest(
    db: Database,
    tenant_id: str,
    *,
    agent: str | None = None,
    status: str | None = None,
    labels: dict[str, str] | None = None,
    limit: int = 100,
    offset: int = 0,
    deadline: float | None = None,
) -> list[Session]:
    """Sessions of a tenant, newest first, that have all the `labels` given."""
    params = {**_matching(tenant_id, agent, status, labels), "limit": limit, "offset": offset}
    return await db.fetch_all(Session, LIST, params, deadline=deadline)


async def count(
    db: Database,
    tenant_id: str,
    *,
    agent: str | None = None,
    status: str | None = None,
    labels: dict[str, str] | None = None,
    deadline: float | None = None,
) -> int:
    """How many sessions list_newest would go through without a limit. PERF: reads all of them."""
    return int(await db.fetch_value(COUNT, _matching(tenant_id, agent, status, labels), deadline=deadline))


def _matching(tenant: str, agent: str | None, status: str | None, labels: dict[str, str] | None) -> dict[str, Any]:
    return {"tenant": tenant, "agent": agent, "status": status, "labels": json.dumps(labels) if labels else None}


async def locate(db: Database, session_ids: Sequence[str], *, deadline: float | None = None) -> list[Location]:
    """Where these sessions are now, in one query; those that don't exist are left out."""
    return await db.fetch_all(Location, LOCATE, {"ids": list(session_ids)}, deadline=deadline)


async def end(db: Database, tenant_id: str, session_id: str, *, deadline: float | None = None) -> Ended:
    """End the session, from whatever state; its open turn settles `interrupted`. Again: answers the same. NotFound."""

    async def work(tx: Tx) -> Ended:
        params = {"tenant": tenant_id, "id": session_id}
        status = await tx.fetch_value(LOCK_TO_END, params)
        if status is None:
            raise not_found()
        taken: list[Taken] = []
        if status != "ended":
            taken = await take_over(tx, [session_id], status="ended", cause=None, outcome="interrupted")
        session = await tx.fetch_one(Session, GET, params)
        if session is None:
            raise Fault("An ended session vanished within its own transaction")
        return Ended(session, taken[0] if taken else None)

    return await db.run(work, deadline=deadline)


async def live_of_agent(db: Database, tenant_id: str, agent_name: str, *, deadline: float | None = None) -> list[str]:
    """Ids of the agent's sessions that have not ended."""
    rows = await db.fetch_all(_Id, LIVE_OF_AGENT, {"tenant": tenant_id, "agent": agent_name}, deadline=deadline)
    return [row.id for row in rows]


async def forget_keys(db: Database, age_s: float, *, deadline: float | None = None) -> int:
    """Forget idempotency keys older than `age_s` (api.md: kept 24 h); returns how many."""
    return await db.execute(FORGET_KEYS, {"age_s": age_s}, deadline=deadline)


def not_found() -> NotFound:
    """The error for a session that doesn't exist, or belongs to another tenant, which looks the same."""
    return NotFound("Session not found", code="session.not_found")


@dataclass(frozen=True)
class _Id:
    id: str
