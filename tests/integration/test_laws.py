"""The database repeats the laws of ashd/domain: a fact applied to a row gives what the table says."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable

import psycopg
import pytest

from ashd.domain import session, turn
from ashd.store import events, runners, sessions, turns
from ashd.store.pool import Database
from ashd.store.takeover import take_over

TENANT, RUNNER = "default", "runner-1"
CLOSED = json.dumps({"action": "sandbox_closed", "cause": "exited"})


@pytest.fixture(scope="module")
def url(new_database: Callable[[], str]) -> str:
    """One database for all: every test makes its own rows."""
    return new_database()


def put_session(url: str, state: str) -> str:
    """A session row in any state, under epoch 1, on a live runner where a session of that state has one."""
    identity, held = str(uuid.uuid4()), state in ("starting", "active")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO runners (id, host, port, address, version, enforced, max_sandboxes, active) "
            "VALUES (%s, 'h', 1, 'h:1', '', '{}', 10, 1) ON CONFLICT DO NOTHING",
            (RUNNER,),
        )
        conn.execute(
            "INSERT INTO sessions (id, tenant_id, agent_id, agent_name, status, runner_id, bundle_digest, agent_spec) "
            "VALUES (%s, %s, %s, 'a', %s, %s, 'd', '{}')",
            (identity, TENANT, str(uuid.uuid4()), state, RUNNER if held else None),
        )
    return identity


def put_turn(url: str, session_id: str, state: str) -> str:
    """A turn row in any state; the session's open one unless it is settled."""
    identity = str(uuid.uuid4())
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(
            "INSERT INTO turns (id, session_id, tenant_id, number, epoch, state, request, timeout_ms, outcome) "
            "VALUES (%s, %s, %s, 1, 1, %s, '{}', 1000, %s)",
            (identity, session_id, TENANT, state, "completed" if state == "settled" else None),
        )
        if state != "settled":
            conn.execute("UPDATE sessions SET open_turn_id = %s WHERE id = %s", (identity, session_id))
    return identity


async def tell_session(db: Database, session_id: str, fact: session.Fact) -> None:
    match fact:
        case session.Fact.READY:
            await sessions.activate(db, session_id, 1, str(uuid.uuid4()))
        case session.Fact.START_FAILED:
            await sessions.fail_start(db, session_id, 1, "why")
        case session.Fact.SANDBOX_CLOSED:
            closed = events.NewEvent(kind=5, seq=1, turn_id=None, type="lifecycle", data=CLOSED, cause="exited")
            await events.record(db, [events.Batch(session_id, 1, [closed])])
        case session.Fact.DELETED:
            await sessions.end(db, TENANT, session_id)


@pytest.mark.parametrize("fact", session.Fact)
@pytest.mark.parametrize("state", session.State)
async def test_a_session_row_follows_the_table(url: str, state: session.State, fact: session.Fact) -> None:
    db = Database(url, 2, 5.0)
    await db.open()
    try:
        identity = put_session(url, state.value)
        await tell_session(db, identity, fact)
        row = await sessions.get(db, TENANT, identity)
        assert row.status == session.step(state, fact).value
    finally:
        await db.close()


async def tell_turn(db: Database, session_id: str, turn_id: str, fact: turn.Fact) -> None:
    user = events.NewEvent(kind=1, seq=1, turn_id=turn_id, type="user", data="{}")
    end = events.NewEvent(kind=4, seq=2, turn_id=turn_id, type="lifecycle", data="{}", outcome="completed")
    match fact:
        case turn.Fact.LAUNCHED:
            await events.record(db, [events.Batch(session_id, 1, [user])])
        case turn.Fact.SETTLED:
            await events.record(db, [events.Batch(session_id, 1, [user, end])])
        case turn.Fact.GIVEN_UP:
            await turns.settle_unlaunched(db, turn_id, 1, outcome="failed", error="why", code="c")
        case turn.Fact.LOST:
            await db.run(lambda tx: take_over(tx, [session_id], status="paused", cause="lost", outcome="lost"))


@pytest.mark.parametrize("fact", turn.Fact)
@pytest.mark.parametrize("state", turn.State)
async def test_a_turn_row_follows_the_table(url: str, state: turn.State, fact: turn.Fact) -> None:
    db = Database(url, 2, 5.0)
    await db.open()
    try:
        session_id = put_session(url, "active")
        turn_id = put_turn(url, session_id, state.value)
        await tell_turn(db, session_id, turn_id, fact)
        row = await turns.get(db, TENANT, session_id, turn_id)
        assert row.state == turn.step(state, fact).value
    finally:
        await db.close()


async def test_a_dead_runners_sessions_are_paused_once_however_many_sweep(database_url: str) -> None:
    db = Database(database_url, 4, 5.0)
    await db.open()
    try:
        identity = put_session(database_url, "active")
        put_turn(database_url, identity, "launched")
        assert len(await runners.sweep_dead(db, 0.0)) == 1
        assert await runners.sweep_dead(db, 0.0) == []
        row = await sessions.get(db, TENANT, identity)
        assert (row.status, row.epoch, row.last_seq, row.open_turn_id) == ("paused", 2, 1, None)
    finally:
        await db.close()
