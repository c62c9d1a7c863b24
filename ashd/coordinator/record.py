"""Recording: what runners report becomes rows, and the acknowledgement that it did.

Covers: taking a batch apart, refusing what can't be stored. Leaves out: the transaction (store/events.py).
"""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from ashd.coordinator import metrics
from ashd.errors import Rejected
from ashd.store import events
from ashd.store.pool import Database
from ashd.wire.v1 import events_pb2, registry_pb2


async def record(db: Database, request: registry_pb2.RecordRequest) -> registry_pb2.RecordResponse:
    """Commits one batch of many sessions' events. Raises Rejected (it can't be stored), Unavailable (nothing is
    known).
    """
    arrived = time.perf_counter()
    batches = [_batch_of(session) for session in request.sessions]
    recording = await events.record(db, batches)
    _measure(batches, time.perf_counter() - arrived)
    return registry_pb2.RecordResponse(
        recorded=[
            registry_pb2.Recorded(session_id=one.session_id, epoch=one.epoch, seq=one.last_seq)
            for one in recording.recorded
        ],
        stale=[registry_pb2.SessionLease(session_id=one.session_id, epoch=one.epoch) for one in recording.stale],
    )


def _measure(batches: list[events.Batch], took_s: float) -> None:
    size = sum(len(batch.events) for batch in batches)
    metrics.RECORD_SECONDS.observe(took_s)
    metrics.RECORD_SIZE.observe(size)
    metrics.RECORDED_BATCHES.inc()
    metrics.RECORDED_EVENTS.inc(size)


def _batch_of(session: registry_pb2.SessionEvents) -> events.Batch:
    try:
        uuid.UUID(session.session_id)
        return events.Batch(session.session_id, session.epoch, [_event_of(event) for event in session.events])
    except ValueError as error:
        raise Rejected(f"an event of session {session.session_id} can't be stored: {error}") from None


def _event_of(event: events_pb2.Event) -> events.NewEvent:
    """One event as a row. Raises ValueError."""
    end: dict[str, Any] = {}
    if event.kind in (events_pb2.SETTLED, events_pb2.CLOSED):
        end = json.loads(event.payload)
    usage = end.get("usage")
    return events.NewEvent(
        kind=event.kind,
        seq=event.seq,
        turn_id=str(uuid.UUID(event.turn_id)) if event.turn_id else None,
        type=event.type,
        data=event.payload.decode("ascii"),
        outcome=end.get("outcome"),
        error=end.get("error"),
        error_code=end.get("code"),
        usage=json.dumps(usage) if usage else None,
        cause=end.get("cause"),
    )
