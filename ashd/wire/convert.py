"""Between the journal's records and the wire's events."""

from __future__ import annotations

from ashd.wire.v1 import events_pb2 as events
from sandbox.protocol import Record


def event_of(record: Record) -> events.Event:
    """A journal record as it travels."""
    return events.Event(
        kind=record.kind,  # type: ignore[arg-type]
        seq=record.seq,
        part=record.part,
        turn_id=record.turn,
        type=record.type,
        payload=record.payload,
    )
