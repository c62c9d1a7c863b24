"""Table turns: admission, reading, and turns that were accepted but can never be launched.

Leaves out: launching and settling by recorded events (events.py), settling for sessions taken over (takeover.py).
"""

# ruff: noqa: S608 - the statements are put together from constants of this room

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

import psycopg

from ashd.errors import Conflict, NotFound, Rejected
from ashd.store.pool import Database
from ashd.store.sessions import not_found

COLUMNS = """
    t.id, t.session_id, t.tenant_id, t.number, t.epoch, t.state, t.outcome, t.error, t.error_code, t.timeout_ms,
    t.first_seq, t.last_seq, t.usage, t.idempotency_key, t.request_hash, t.created_at, t.launched_at, t.settled_at
"""

# One statement admits: the session is this tenant's, active and without an open turn, and from now on has this one.
ADMIT = f"""
WITH s AS (
    UPDATE sessions SET open_turn_id = %(turn)s, last_active_at = now(), turn_count = turn_count + 1
    WHERE id = %(session)s AND tenant_id = %(tenant)s AND status = 'active' AND open_turn_id IS NULL
    RETURNING id, tenant_id, epoch, status, runner_id, sandbox_id, last_seq, turn_count, turn_timeout_ms
),
t AS (
    INSERT INTO turns AS t (
        id, session_id, tenant_id, number, epoch, request, timeout_ms, idempotency_key, request_hash
    )
    SELECT %(turn)s, s.id, s.tenant_id, s.turn_count, s.epoch, %(request)s,
        least(%(timeout_ms)s::bigint, s.turn_timeout_ms), %(key)s, %(request_hash)s
    FROM s
    RETURNING {COLUMNS}
)
SELECT {COLUMNS}, s.epoch AS session_epoch, s.status AS session_status, s.last_seq AS session_last_seq,
    s.sandbox_id, s.runner_id, r.address AS runner_address
FROM s JOIN t ON t.session_id = s.id LEFT JOIN runners AS r ON r.id = s.runner_id
"""

# Why nothing was admitted: the session as it is, and the turn this request may be repeating.
DIAGNOSE = """
SELECT s.status, s.open_turn_id, s.epoch AS session_epoch, s.last_seq AS session_last_seq, s.sandbox_id, s.runner_id,
    (SELECT r.address FROM runners AS r WHERE r.id = s.runner_id) AS runner_address,
    t.id AS turn_id, t.request_hash
FROM sessions AS s
LEFT JOIN turns AS t ON t.session_id = s.id AND (t.id = %(turn)s OR t.idempotency_key = %(key)s)
WHERE s.id = %(session)s AND s.tenant_id = %(tenant)s
"""

GET = f"""
SELECT {COLUMNS} FROM turns AS t WHERE t.tenant_id = %(tenant)s AND t.session_id = %(session)s AND t.id = %(turn)s
"""
LIST = f"""
SELECT {COLUMNS} FROM turns AS t WHERE t.session_id = %(session)s AND t.number > %(after)s
ORDER BY t.number LIMIT %(limit)s
"""

ACCEPTED_OLDER_THAN = """
SELECT t.id, t.session_id, t.epoch, t.request, t.timeout_ms, s.epoch AS session_epoch, s.status AS session_status,
    s.last_seq AS session_last_seq, s.runner_id, r.address AS runner_address
FROM turns AS t JOIN sessions AS s ON s.id = t.session_id LEFT JOIN runners AS r ON r.id = s.runner_id
WHERE t.state = 'accepted' AND t.created_at < now() - %(age_s)s::float8 * interval '1 second'
ORDER BY t.created_at LIMIT %(limit)s
"""

# A keeper that holds the session gives the numbers, so only a session held by nobody gets a final event from here.
SETTLE_UNLAUNCHED = """
WITH locked AS (
    SELECT s.id, s.epoch, s.last_seq, s.runner_id FROM sessions AS s JOIN turns AS t ON t.session_id = s.id
    WHERE t.id = %(turn)s AND t.state = 'accepted' AND s.open_turn_id = t.id AND s.epoch = %(epoch)s
    FOR UPDATE OF s
),
updated AS (
    UPDATE sessions AS s SET
        open_turn_id = NULL, last_active_at = now(),
        last_seq = s.last_seq + CASE WHEN s.runner_id IS NULL THEN 1 ELSE 0 END
    FROM locked WHERE s.id = locked.id
    RETURNING s.id
),
final AS (
    INSERT INTO events (session_id, seq, epoch, turn_id, kind, type, data)
    SELECT id, last_seq + 1, epoch, %(turn)s, 4, 'lifecycle',
        '{"action":"turn_settled","turnId":"' || %(turn)s::text || '","outcome":"' || %(outcome)s::text || '"}'
    FROM locked WHERE runner_id IS NULL
    RETURNING seq
)
UPDATE turns AS t SET
    state = 'settled', outcome = %(outcome)s, error = %(error)s, error_code = %(code)s, request = NULL,
    last_seq = locked.last_seq + CASE WHEN locked.runner_id IS NULL THEN 1 ELSE 0 END, settled_at = now()
FROM locked WHERE t.id = %(turn)s
"""

FORGET_KEYS = """
UPDATE turns SET idempotency_key = NULL
WHERE idempotency_key IS NOT NULL AND created_at < now() - %(age_s)s::float8 * interval '1 second'
"""


@dataclass(frozen=True)
class Turn:
    """A row of turns, without its request."""

    id: str
    session_id: str
    tenant_id: str
    number: int
    """1, 2, … within its session."""
    epoch: int
    state: str
    outcome: str | None
    error: str | None
    error_code: str | None
    timeout_ms: int
    first_seq: int | None
    last_seq: int | None
    usage: str | None
    """JSON text."""
    idempotency_key: str | None
    request_hash: str | None
    created_at: datetime
    launched_at: datetime | None
    settled_at: datetime | None


@dataclass(frozen=True)
class NewTurn:
    """A message a client wants answered."""

    id: str
    tenant_id: str
    session_id: str
    request: str
    """JSON: {"content": …, "options": {…}}"""
    timeout_ms: int
    """The coordinator's longest; an agent's own turn_timeout may only shorten it."""
    idempotency_key: str | None = None
    request_hash: str | None = None


@dataclass(frozen=True)
class Admitted:
    """A turn that is accepted, and where its session is; or, when `replayed`, the turn an earlier request made."""

    turn: Turn
    request: str
    """What to launch it with, as in NewTurn."""
    epoch: int
    status: str
    last_seq: int
    """Of the session at admission: the turn's first event has a greater number (when not replayed)."""
    sandbox_id: str | None
    runner_id: str | None
    runner_address: str | None
    replayed: bool = False


@dataclass(frozen=True)
class AcceptedTurn:
    """A turn nobody has launched yet, and where its session is now."""

    id: str
    session_id: str
    epoch: int
    request: str
    timeout_ms: int
    session_epoch: int
    session_status: str
    session_last_seq: int
    runner_id: str | None
    runner_address: str | None


async def admit(db: Database, new: NewTurn, *, deadline: float | None = None) -> Admitted:
    """Accept a turn for an active session without an open one; one statement when all is well.

    Raises NotFound, Rejected `session.not_active`, Conflict `turn.open` (retryable) or `idempotency.mismatch`.
    The same turn id or idempotency key again answers with the turn it made before.
    """
    params = {
        "turn": new.id,
        "session": new.session_id,
        "tenant": new.tenant_id,
        "request": new.request,
        "timeout_ms": new.timeout_ms,
        "key": new.idempotency_key,
        "request_hash": new.request_hash,
    }
    try:
        row = await db.fetch_one(_AdmittedRow, ADMIT, params, deadline=deadline)
    except psycopg.errors.UniqueViolation:  # this id or key has a turn already
        row = None
    if row is None:
        return await _why_not_admitted(db, new, deadline=deadline)
    return Admitted(
        turn=row.turn(),
        request=new.request,
        epoch=row.session_epoch,
        status=row.session_status,
        last_seq=row.session_last_seq,
        sandbox_id=row.sandbox_id,
        runner_id=row.runner_id,
        runner_address=row.runner_address,
    )


async def _why_not_admitted(db: Database, new: NewTurn, *, deadline: float | None) -> Admitted:
    params = {"turn": new.id, "session": new.session_id, "tenant": new.tenant_id, "key": new.idempotency_key}
    found = await db.fetch_one(_Diagnosis, DIAGNOSE, params, deadline=deadline)
    if found is None:
        raise not_found()
    if found.turn_id is not None and found.request_hash != new.request_hash:
        raise Conflict("This Idempotency-Key was used with another message; use a new key", code="idempotency.mismatch")
    if found.turn_id is not None:
        turn = await get(db, new.tenant_id, new.session_id, found.turn_id, deadline=deadline)
        return Admitted(
            turn=turn,
            request=new.request,
            epoch=found.session_epoch,
            status=found.status,
            last_seq=found.session_last_seq,
            sandbox_id=found.sandbox_id,
            runner_id=found.runner_id,
            runner_address=found.runner_address,
            replayed=True,
        )
    if found.status != "active":
        raise Rejected(f"Session is {found.status}", code="session.not_active")
    # Either a turn is open, or one was a moment ago when the admission failed: both mean try again.
    raise Conflict("A turn is open in this session; wait for it or interrupt it", code="turn.open", retryable=True)


async def get(db: Database, tenant_id: str, session_id: str, turn_id: str, *, deadline: float | None = None) -> Turn:
    """One turn of a session of this tenant. Raises NotFound."""
    params = {"tenant": tenant_id, "session": session_id, "turn": turn_id}
    turn = await db.fetch_one(Turn, GET, params, deadline=deadline)
    if turn is None:
        raise NotFound("Turn not found", code="turn.not_found")
    return turn


async def list_of(
    db: Database, session_id: str, *, after: int = 0, limit: int = 100, deadline: float | None = None
) -> list[Turn]:
    """Turns of a session, oldest first, from number `after` + 1; the caller has checked whose session it is."""
    return await db.fetch_all(Turn, LIST, {"session": session_id, "after": after, "limit": limit}, deadline=deadline)


async def accepted_older_than(
    db: Database, age_s: float, *, limit: int = 500, deadline: float | None = None
) -> list[AcceptedTurn]:
    """Turns accepted more than `age_s` ago and not launched since: whoever accepted them may be gone."""
    return await db.fetch_all(AcceptedTurn, ACCEPTED_OLDER_THAN, {"age_s": age_s, "limit": limit}, deadline=deadline)


async def settle_unlaunched(
    db: Database, turn_id: str, epoch: int, *, outcome: str, error: str, code: str, deadline: float | None = None
) -> bool:
    """Settle a turn that is still `accepted`; False when it is launched, settled, or the session's epoch is another.

    Only for a caller that knows that no keeper of this epoch has the turn or will get it: the runner refused it, or
    the sandbox is gone. While the session is held by a runner the turn leaves no event: its keeper gives the numbers,
    and ours would collide with its next one. Otherwise the final event is written here. The epoch stays.
    """
    params = {"turn": turn_id, "epoch": epoch, "outcome": outcome, "error": error, "code": code}
    return await db.execute(SETTLE_UNLAUNCHED, params, deadline=deadline) == 1


async def forget_keys(db: Database, age_s: float, *, deadline: float | None = None) -> int:
    """Forget idempotency keys older than `age_s` (api.md: kept 24 h); returns how many."""
    return await db.execute(FORGET_KEYS, {"age_s": age_s}, deadline=deadline)


@dataclass(frozen=True)
class _AdmittedRow(Turn):
    session_epoch: int
    session_status: str
    session_last_seq: int
    sandbox_id: str | None
    runner_id: str | None
    runner_address: str | None

    def turn(self) -> Turn:
        return Turn(**{name: getattr(self, name) for name in Turn.__dataclass_fields__})


@dataclass(frozen=True)
class _Diagnosis:
    status: str
    open_turn_id: str | None
    session_epoch: int
    session_last_seq: int
    sandbox_id: str | None
    runner_id: str | None
    runner_address: str | None
    turn_id: str | None
    request_hash: str | None
