"""Table events: recording what keepers report, fenced by epoch, and reading it back.

Covers: group commit of many sessions in one statement, with the changes of session and turn that the events imply.
Leaves out: final events that coordinators write themselves (takeover.py, turns.settle_unlaunched).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ashd.store.pool import Database

# Kinds as in proto/ashd/wire/v1/events.proto.
MESSAGE, TIMELINE, SETTLED, CLOSED = 1, 2, 4, 5

# `batch` has one row per lease, `incoming` one per event, `digest` one per turn that a lease's events launch or settle.
# ORDER: sessions are locked by id, then runners by id, as everywhere in the store.
# RACE: `locked` waits for the rows and sees their newest version, so `known` is exact, and a lease whose epoch rose
# meanwhile drops out: a fenced keeper writes nothing. Events up to `known` were recorded before and are skipped;
# a batch that doesn't follow on `known` writes nothing, and the sender learns how far we are.
RECORD = """
WITH batch AS (
    SELECT * FROM unnest(
        %(session)s::uuid[], %(epoch)s::bigint[], %(first_seq)s::bigint[], %(last_seq)s::bigint[],
        %(settled_turn)s::uuid[], %(closed)s::boolean[], %(cause)s::text[]
    ) AS b (session_id, epoch, first_seq, last_seq, settled_turn, closed, cause)
),
incoming AS (
    SELECT * FROM unnest(
        %(event_session)s::uuid[], %(event_epoch)s::bigint[], %(event_seq)s::bigint[], %(event_kind)s::smallint[],
        %(event_turn)s::uuid[], %(event_type)s::text[], %(event_data)s::text[]
    ) AS e (session_id, epoch, seq, kind, turn_id, type, data)
),
digest AS (
    SELECT * FROM unnest(
        %(turn)s::uuid[], %(turn_session)s::uuid[], %(turn_epoch)s::bigint[], %(turn_first_seq)s::bigint[],
        %(turn_last_seq)s::bigint[], %(outcome)s::text[], %(error)s::text[], %(error_code)s::text[], %(usage)s::text[]
    ) AS d (turn_id, session_id, epoch, first_seq, last_seq, outcome, error, error_code, usage)
),
locked AS (
    SELECT s.id, s.epoch, s.last_seq AS known, s.runner_id, b.last_seq, b.settled_turn, b.closed, b.cause,
        b.first_seq <= s.last_seq + 1 AS follows
    FROM sessions AS s JOIN batch AS b ON b.session_id = s.id AND b.epoch = s.epoch
    ORDER BY s.id FOR UPDATE OF s
),
updated AS (
    UPDATE sessions AS s SET
        last_seq = greatest(s.last_seq, l.last_seq),
        last_active_at = now(),
        open_turn_id = CASE WHEN s.open_turn_id = l.settled_turn THEN NULL ELSE s.open_turn_id END,
        status = CASE WHEN l.closed AND s.status IN ('starting', 'active') THEN 'paused' ELSE s.status END,
        status_cause = CASE WHEN l.closed AND s.status IN ('starting', 'active') THEN l.cause ELSE s.status_cause END,
        runner_id = CASE WHEN l.closed THEN NULL ELSE s.runner_id END
    FROM locked AS l WHERE s.id = l.id AND l.follows
    RETURNING s.id
),
inserted AS (
    INSERT INTO events (session_id, seq, epoch, turn_id, kind, type, data)
    SELECT i.session_id, i.seq, i.epoch, i.turn_id, i.kind, i.type, i.data
    FROM incoming AS i JOIN locked AS l ON l.id = i.session_id AND l.epoch = i.epoch
    WHERE l.follows AND i.seq > l.known
    ON CONFLICT DO NOTHING
    RETURNING session_id
),
turned AS (
    UPDATE turns AS t SET
        state = CASE WHEN d.outcome IS NULL THEN 'launched' ELSE 'settled' END,
        request = NULL,
        first_seq = coalesce(t.first_seq, d.first_seq),
        launched_at = coalesce(t.launched_at, CASE WHEN d.first_seq IS NULL THEN NULL ELSE now() END),
        last_seq = d.last_seq, outcome = d.outcome, error = d.error, error_code = d.error_code, usage = d.usage,
        settled_at = CASE WHEN d.outcome IS NULL THEN NULL ELSE now() END
    FROM digest AS d JOIN locked AS l ON l.id = d.session_id AND l.epoch = d.epoch
    WHERE t.id = d.turn_id AND t.session_id = d.session_id AND t.state <> 'settled' AND l.follows
    RETURNING t.id
),
closing AS (
    SELECT runner_id, count(*) AS slots FROM locked
    WHERE closed AND follows AND runner_id IS NOT NULL GROUP BY runner_id
),
slots AS (
    SELECT r.id, c.slots FROM runners AS r JOIN closing AS c ON c.runner_id = r.id ORDER BY r.id FOR UPDATE OF r
),
released AS (
    UPDATE runners AS r SET active = greatest(r.active - slots.slots, 0) FROM slots WHERE r.id = slots.id
    RETURNING r.id
)
SELECT l.id AS session_id, l.epoch, CASE WHEN l.follows THEN greatest(l.known, l.last_seq) ELSE l.known END AS last_seq
FROM locked AS l
"""

PAGE_BYTES = 8 * 1024 * 1024
"""A page ends behind the event that makes it so large; one event may have more by itself."""

# PERF: octet_length knows a large text's size without reading it.
PAGE = """
SELECT seq, epoch, turn_id, kind, type, data, id, created_at FROM (
    SELECT *, sum(octet_length(data)) OVER (ORDER BY seq) - octet_length(data) AS bytes_before FROM events
    WHERE session_id = %(session)s AND seq > %(after)s
        AND (%(kinds)s::smallint[] IS NULL OR kind = ANY(%(kinds)s::smallint[]))
        AND (%(types)s::text[] IS NULL OR type = ANY(%(types)s::text[]))
    ORDER BY seq LIMIT %(limit)s
) AS found WHERE bytes_before < %(bytes)s ORDER BY seq
"""


@dataclass(frozen=True)
class Event:
    """A saved event of a session."""

    seq: int
    epoch: int
    turn_id: str | None
    kind: int
    type: str
    data: str
    """One line of ASCII JSON."""
    id: str
    created_at: datetime


@dataclass(frozen=True)
class NewEvent:
    """A saved-kind event as a keeper reports it, with what the recorder has read from its payload."""

    kind: int
    seq: int
    turn_id: str | None
    type: str
    data: str
    """One line of ASCII JSON."""
    outcome: str | None = None
    """Of a SETTLED event: how the turn ended; required there."""
    error: str | None = None
    error_code: str | None = None
    usage: str | None = None
    """JSON text."""
    cause: str | None = None
    """Of a CLOSED event: why the sandbox ended."""


@dataclass(frozen=True)
class Batch:
    """Consecutive events of one session under one epoch."""

    session_id: str
    epoch: int
    events: Sequence[NewEvent]


@dataclass(frozen=True)
class Recorded:
    """How far the events of a lease are committed."""

    session_id: str
    epoch: int
    last_seq: int


@dataclass(frozen=True)
class Lease:
    """A session under an epoch."""

    session_id: str
    epoch: int


@dataclass(frozen=True)
class Recording:
    """What became of the batches: each lease is in one of the two lists."""

    recorded: list[Recorded]
    """Committed up to `last_seq`, which is less than was sent if the batch left a gap: send again from there."""
    stale: list[Lease]
    """Fenced: the lease is not the session's any more, nothing of it was written."""


async def record(db: Database, batches: Sequence[Batch], *, deadline: float | None = None) -> Recording:
    """Commit the events of many sessions, and what they mean for session and turn, in one statement.

    Idempotent: batches may be sent again, whole or overlapping. Ids must be uuids and texts free of NUL, or the whole
    group fails. A batch is used up to its first gap; an empty one just asks how far its lease is recorded.
    A user message launches its turn, SETTLED settles it, CLOSED pauses the session and releases its slot.
    """
    leases = _merged(batches)
    if not leases:
        return Recording([], [])
    recorded = await db.fetch_all(Recorded, RECORD, _arrays(leases), deadline=deadline)
    owned = {(row.session_id, row.epoch) for row in recorded}
    return Recording(recorded, [Lease(*lease) for lease in leases if lease not in owned])


async def page(
    db: Database,
    session_id: str,
    after_seq: int,
    limit: int,
    *,
    kinds: Sequence[int] | None = None,
    types: Sequence[str] | None = None,
    deadline: float | None = None,
) -> list[Event]:
    """Saved events after `after_seq`, ascending, of the given kinds and types; the caller has checked the tenant.

    At most `limit`, and no more after PAGE_BYTES: only an empty page is the end.
    """
    params = {
        "bytes": PAGE_BYTES,
        "session": session_id,
        "after": after_seq,
        "limit": limit,
        "kinds": list(kinds) if kinds is not None else None,
        "types": list(types) if types is not None else None,
    }
    return await db.fetch_all(Event, PAGE, params, deadline=deadline)


def _merged(batches: Sequence[Batch]) -> dict[tuple[str, int], list[NewEvent]]:
    """Events by lease, ascending, without doubles, each up to its first gap."""
    leases: dict[tuple[str, int], dict[int, NewEvent]] = {}
    for batch in batches:
        events = leases.setdefault((batch.session_id, batch.epoch), {})
        events.update((event.seq, event) for event in batch.events)
    return {lease: _up_to_gap(events) for lease, events in leases.items()}


def _up_to_gap(events: dict[int, NewEvent]) -> list[NewEvent]:
    run: list[NewEvent] = []
    for seq in sorted(events):
        if run and seq != run[-1].seq + 1:
            break
        run.append(events[seq])
    return run


@dataclass
class _TurnDigest:
    """What a lease's events say about one turn."""

    first_seq: int | None = None
    settled: NewEvent | None = None


def _digests(events: Sequence[NewEvent]) -> dict[str, _TurnDigest]:
    turns: dict[str, _TurnDigest] = {}
    for event in events:
        if event.turn_id is None:
            continue
        if event.kind == MESSAGE and event.type == "user" and event.turn_id not in turns:
            turns.setdefault(event.turn_id, _TurnDigest()).first_seq = event.seq
        elif event.kind == SETTLED:
            turns.setdefault(event.turn_id, _TurnDigest()).settled = event
    return turns


def _arrays(leases: dict[tuple[str, int], list[NewEvent]]) -> dict[str, list[Any]]:
    """The parallel arrays of RECORD."""
    rows = [
        (*lease, event.seq, event.kind, event.turn_id, event.type, event.data)
        for lease, events in leases.items()
        for event in events
    ]
    turns = [
        (turn_id, *lease, *_turn_row(digest))
        for lease, events in leases.items()
        for turn_id, digest in _digests(events).items()
    ]
    return {
        **_columns(
            ("session", "epoch", "first_seq", "last_seq", "settled_turn", "closed", "cause"),
            [(*lease, *_lease_row(events)) for lease, events in leases.items()],
        ),
        **_columns(
            (
                "event_session",
                "event_epoch",
                "event_seq",
                "event_kind",
                "event_turn",
                "event_type",
                "event_data",
            ),
            rows,
        ),
        **_columns(
            (
                "turn",
                "turn_session",
                "turn_epoch",
                "turn_first_seq",
                "turn_last_seq",
                "outcome",
                "error",
                "error_code",
                "usage",
            ),
            turns,
        ),
    }


def _lease_row(events: Sequence[NewEvent]) -> tuple[int, int, str | None, bool, str | None]:
    """first_seq, last_seq, settled_turn, closed, cause.

    Only the last turn settled can be the session's open one: the next turn is admitted after the one before is
    recorded as settled.
    """
    if not events:
        return 0, 0, None, False, None
    settled = [event.turn_id for event in events if event.kind == SETTLED]
    closed = [event.cause for event in events if event.kind == CLOSED]
    return events[0].seq, events[-1].seq, settled[-1] if settled else None, bool(closed), closed[-1] if closed else None


def _turn_row(digest: _TurnDigest) -> tuple[int | None, int | None, str | None, str | None, str | None, str | None]:
    settled = digest.settled
    if settled is None:
        return digest.first_seq, None, None, None, None, None
    return digest.first_seq, settled.seq, settled.outcome, settled.error, settled.error_code, settled.usage


def _columns(names: tuple[str, ...], rows: Sequence[tuple[Any, ...]]) -> dict[str, list[Any]]:
    return {name: [row[index] for row in rows] for index, name in enumerate(names)}


LAST_UP_TO = """
SELECT coalesce(
    (SELECT seq FROM events WHERE session_id = %(session)s AND epoch <= %(epoch)s ORDER BY seq DESC LIMIT 1), 0
)
"""


async def last_seq_up_to(db: Database, session_id: str, epoch: int, *, deadline: float | None = None) -> int:
    """The last event saved under `epoch` or an older one: what a reader of that lease may hold on to."""
    seq: int = await db.fetch_value(LAST_UP_TO, {"session": session_id, "epoch": epoch}, deadline=deadline)
    return seq
