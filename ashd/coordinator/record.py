"""Recording: what runners report becomes rows, and the acknowledgement that it did.

Covers: taking a batch apart, refusing what can't be stored. Leaves out: the transaction (store/events.py).
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ashd import log
from ashd.coordinator import metrics
from ashd.store import events
from ashd.store.pool import Database
from ashd.wire.v1 import events_pb2, registry_pb2

_log = log.get(__name__)

_SAVED = (events_pb2.MESSAGE, events_pb2.TIMELINE, events_pb2.SETTLED, events_pb2.CLOSED)


async def record(db: Database, request: registry_pb2.RecordRequest) -> registry_pb2.RecordResponse:
    """Commits one batch of many sessions' events. A session whose events can't be stored is answered as stale, which
    ends its sandbox; the others don't suffer for it. Raises Unavailable (nothing is known).
    """
    arrived = time.perf_counter()
    batches, refused = [], []
    for session in request.sessions:
        try:
            batches.append(_batch_of(session))
        except ValueError as error:
            _log.error("events can't be stored, ending their sandbox", session=session.session_id, error=str(error))
            refused.append(registry_pb2.SessionLease(session_id=session.session_id, epoch=session.epoch))
    recording = await events.record(db, batches)
    _measure(batches, time.perf_counter() - arrived)
    return registry_pb2.RecordResponse(
        recorded=[
            registry_pb2.Recorded(session_id=one.session_id, epoch=one.epoch, seq=one.last_seq)
            for one in recording.recorded
        ],
        stale=[
            *(registry_pb2.SessionLease(session_id=one.session_id, epoch=one.epoch) for one in recording.stale),
            *refused,
        ],
    )


def _measure(batches: list[events.Batch], took_s: float) -> None:
    size = sum(len(batch.events) for batch in batches)
    metrics.RECORD_SECONDS.observe(took_s)
    metrics.RECORD_SIZE.observe(size)
    metrics.RECORDED_BATCHES.inc()
    metrics.RECORDED_EVENTS.inc(size)


def _batch_of(session: registry_pb2.SessionEvents) -> events.Batch:
    """One session's events as rows. Raises ValueError: Postgres would refuse them, and the whole batch with them."""
    if _canonical(session.session_id) != session.session_id:
        raise ValueError("its session is not named as we name it")
    return events.Batch(session.session_id, session.epoch, [_event_of(event) for event in session.events])


def _canonical(identity: str) -> str:
    """Raises ValueError."""
    return str(uuid.UUID(identity))


def _storable(value: Any) -> str | None:
    """A text for a column of its own. Raises ValueError for NUL and lone surrogates, which JSON may hold."""
    if value is None:
        return None
    if not isinstance(value, str) or "\0" in value:
        raise ValueError(f"{value!r:.100} is not a text that can be stored")
    return value.encode().decode()


def _event_of(event: events_pb2.Event) -> events.NewEvent:
    """One event as a row. Raises ValueError."""
    if event.kind not in _SAVED or event.seq < 1 or "\0" in event.type or b"\0" in event.payload:
        raise ValueError(f"event {event.seq} of kind {event.kind} and type {event.type!r:.100} is none")
    end = _end_of(event) if event.kind in (events_pb2.SETTLED, events_pb2.CLOSED) else {}
    usage = end.get("usage")
    return events.NewEvent(
        kind=event.kind,
        seq=event.seq,
        turn_id=_canonical(event.turn_id) if event.turn_id else None,
        type=event.type,
        data=event.payload.decode("ascii"),
        outcome=_storable(end.get("outcome")),
        error=_storable(end.get("error")),
        error_code=_storable(end.get("code")),
        usage=json.dumps(usage) if usage else None,
        cause=_storable(end.get("cause")),
    )


def _end_of(event: events_pb2.Event) -> dict[str, Any]:
    """How a turn or a sandbox ended. Raises ValueError."""
    try:
        end = json.loads(event.payload)
    except RecursionError:
        raise ValueError("an end is nested too deep") from None
    if not isinstance(end, dict) or (event.kind == events_pb2.SETTLED and not end.get("outcome")):
        raise ValueError(f"event {event.seq} does not say how it ended")
    return end
