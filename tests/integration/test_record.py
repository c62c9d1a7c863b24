"""Recording a batch of many sessions: one whose events can't be stored holds up nobody else's."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import pytest

from ashd.coordinator.record import record
from ashd.store import events
from ashd.store.pool import Database
from ashd.wire.v1.events_pb2 import CLOSED, DELTA, MESSAGE, SETTLED, Event
from ashd.wire.v1.registry_pb2 import RecordRequest, RecordResponse, SessionEvents
from tests.integration.test_laws import put_session

TURN = str(uuid.uuid4())
POISON = {
    "an end that is no object": Event(seq=1, kind=SETTLED, turn_id=TURN, payload=b"[]"),
    "an end that is no JSON": Event(seq=1, kind=CLOSED, payload=b"{"),
    "an end nested too deep": Event(seq=1, kind=CLOSED, payload=b"[" * 100_000),
    "an end without an outcome": Event(seq=1, kind=SETTLED, turn_id=TURN, payload=b"{}"),
    "an outcome that is no text": Event(seq=1, kind=SETTLED, turn_id=TURN, payload=b'{"outcome": 1}'),
    "an error with NUL": Event(
        seq=1, kind=SETTLED, turn_id=TURN, payload=json.dumps({"outcome": "failed", "error": "\0"}).encode()
    ),
    "an error with half a character": Event(
        seq=1, kind=SETTLED, turn_id=TURN, payload=json.dumps({"outcome": "failed", "error": "\ud800"}).encode()
    ),
    "a payload with NUL": Event(seq=1, kind=MESSAGE, type="user", payload=b"{\0}"),
    "a payload beyond ASCII": Event(seq=1, kind=MESSAGE, type="user", payload="é".encode()),
    "a type with NUL": Event(seq=1, kind=MESSAGE, type="a\0b", payload=b"{}"),
    "a turn that is none": Event(seq=1, kind=MESSAGE, turn_id="first", payload=b"{}"),
    "a number below 1": Event(seq=0, kind=MESSAGE, payload=b"{}"),
    "a kind that is not saved": Event(seq=1, kind=DELTA, payload=b"{}"),
    "a kind that is none": Event(seq=1, kind=70_000, payload=b"{}"),  # type: ignore[arg-type]
}


@pytest.fixture(scope="module")
def url(new_database: Callable[[], str]) -> str:
    """One database for all: every test makes its own rows."""
    return new_database()


async def recorded(url: str, request: RecordRequest) -> RecordResponse:
    db = Database(url, 2, 5.0)
    await db.open()
    try:
        return await record(db, request)
    finally:
        await db.close()


async def saved(url: str, session: str) -> list[int]:
    db = Database(url, 2, 5.0)
    await db.open()
    try:
        return [event.seq for event in await events.page(db, session, 0, 10)]
    finally:
        await db.close()


@pytest.mark.parametrize("poison", POISON.values(), ids=POISON)
async def test_a_poisonous_event_costs_its_own_session_only(url: str, poison: Event) -> None:
    before, poisoned, after = (put_session(url, "active") for _ in range(3))
    good = Event(seq=1, kind=MESSAGE, type="user", payload=b"{}")
    batch = [(before, [good]), (poisoned, [poison]), (after, [good])]
    request = RecordRequest(
        sessions=[SessionEvents(session_id=session, epoch=1, events=theirs) for session, theirs in batch]
    )
    answer = await recorded(url, request)
    assert {(one.session_id, one.seq) for one in answer.recorded} == {(before, 1), (after, 1)}
    assert [one.session_id for one in answer.stale] == [poisoned]
    assert [await saved(url, session) for session, _ in batch] == [[1], [], [1]]


@pytest.mark.parametrize("write", [str.upper, lambda name: f"{{{name}}}", lambda name: f"urn:uuid:{name}"])
async def test_a_session_is_recorded_under_the_one_name_it_has(url: str, write: object) -> None:
    assert callable(write)
    session = put_session(url, "active")
    name = write(session)
    theirs = [Event(seq=1, kind=MESSAGE, type="user", payload=b"{}")]
    answer = await recorded(url, RecordRequest(sessions=[SessionEvents(session_id=name, epoch=1, events=theirs)]))
    assert not answer.recorded
    assert [one.session_id for one in answer.stale] == [name]
    assert await saved(url, session) == []
