"""The store against a real Postgres: what each statement promises, also when others do the same at once."""

from __future__ import annotations

import asyncio
import json
import signal
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psycopg
import pytest

from ashd.errors import Conflict, NotFound, Rejected, Unavailable
from ashd.store import agents, bundles, coordinators, events, keys, runners, sessions, turns
from ashd.store.events import CLOSED, MESSAGE, SETTLED, TIMELINE, Batch, Lease, NewEvent
from ashd.store.migrate import known, migrate, pending
from ashd.store.pool import Database, Tx

if TYPE_CHECKING:
    from tests.conftest import Cluster

DEAD_AFTER_S = 30.0
MIB = 1024 * 1024
TENANT = "default"
SANDBOX = "5b0c4a0e-6d0f-4a53-9c1d-0c9b5c3c7a11"


@asynccontextmanager
async def opened(url: str, size: int = 8, timeout_s: float = 10.0) -> AsyncIterator[Database]:
    db = Database(url, size, timeout_s)
    await db.open()
    try:
        yield db
    finally:
        await db.close()


def new_id() -> str:
    return str(uuid.uuid4())


async def add_agent(db: Database, name: str = "echo", tenant: str = TENANT, turn_timeout_ms: int | None = None) -> None:
    await db.execute(
        "INSERT INTO bundles (digest, size_bytes, chunk_count) VALUES (%(d)s, 0, 0) ON CONFLICT DO NOTHING", {"d": "d0"}
    )
    spec = json.dumps({"runtime": "echo", "env": {"A": "spec", "B": "spec", "C": "spec"}})
    env = json.dumps({"B": "agent", "C": "agent"})
    new = agents.NewAgent(new_id(), tenant, name, "", "d0", spec, env, turn_timeout_ms=turn_timeout_ms)
    await agents.upsert(db, new)


async def add_runner(db: Database, name: str = "r1", slots: int = 10) -> None:
    await runners.register(db, runners.Registration(name, "127.0.0.1", 4200, f"unix:/{name}", slots))


async def create(db: Database, **kwargs: str) -> sessions.Created:
    new = sessions.NewSession(**{"id": new_id(), "tenant_id": TENANT, "agent_name": "echo", **kwargs})
    return await sessions.create(db, new, dead_after_s=DEAD_AFTER_S)


async def active_session(db: Database) -> sessions.Session:
    created = (await create(db)).session
    session = await sessions.activate(db, created.id, created.epoch, SANDBOX)
    assert session is not None
    assert await sessions.activate(db, created.id, created.epoch, SANDBOX) is not None
    assert await sessions.activate(db, created.id, created.epoch, new_id()) is None
    return session


async def admit(db: Database, session: sessions.Session, **kwargs: str) -> turns.Admitted:
    values = {"id": new_id(), "tenant_id": TENANT, "session_id": session.id, "request": "{}", **kwargs}
    return await turns.admit(db, turns.NewTurn(**values, timeout_ms=60_000))


async def slots_taken(db: Database) -> dict[str, int]:
    return {runner.id: runner.active for runner in await runners.list_all(db, DEAD_AFTER_S)}


async def age_runner(db: Database, name: str, seconds: float = 60.0) -> None:
    params = {"id": name, "s": seconds}
    await db.execute(
        "UPDATE runners SET last_heartbeat_at = now() - %(s)s * interval '1 second' WHERE id = %(id)s", params
    )


def user_message(seq: int, turn_id: str) -> NewEvent:
    return NewEvent(MESSAGE, seq, turn_id, "user", '{"type":"user"}')


def assistant_message(seq: int, turn_id: str) -> NewEvent:
    return NewEvent(MESSAGE, seq, turn_id, "assistant", '{"text":"\\u0000\\ud800"}')


def settled(seq: int, turn_id: str, outcome: str = "completed") -> NewEvent:
    return NewEvent(SETTLED, seq, turn_id, "lifecycle", "{}", outcome=outcome, usage='{"input_tokens":1}')


def closed(seq: int, cause: str = "out of memory") -> NewEvent:
    return NewEvent(CLOSED, seq, None, "lifecycle", "{}", cause=cause)


def a_turn(turn_id: str, first: int = 1) -> list[NewEvent]:
    return [user_message(first, turn_id), assistant_message(first + 1, turn_id), settled(first + 2, turn_id)]


# Migrations


def test_processes_that_migrate_at_once_apply_each_migration_once(postgres: Cluster) -> None:
    url = postgres.create("ashd_migrate")
    with ThreadPoolExecutor(8) as pool:
        applied = [name for names in pool.map(lambda _: migrate(url), range(8)) for name in names]
    assert sorted(applied) == [migration.name for migration in known()]


async def test_pending_names_what_an_empty_database_lacks(postgres: Cluster, database_url: str) -> None:
    async with opened(postgres.create("ashd_empty")) as empty, opened(database_url) as current:
        assert await pending(empty) == [migration.name for migration in known()]
        assert await pending(current) == []


def test_migrating_a_database_that_does_not_answer_says_unavailable(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        migrate(f"postgresql://ashd@/x?host={tmp_path}")


# The pool


async def test_a_database_that_does_not_answer_is_unavailable_within_the_deadline(tmp_path: Path) -> None:
    async with opened(f"postgresql://ashd@/x?host={tmp_path}", timeout_s=0.5) as db:
        begun = time.monotonic()
        with pytest.raises(Unavailable) as caught:
            await db.fetch_value("SELECT 1")
        assert caught.value.code == "database.unavailable"
        assert time.monotonic() - begun < 2


async def test_a_statement_that_outlasts_its_deadline_has_an_unknown_outcome(database_url: str) -> None:
    async with opened(database_url) as db:
        with pytest.raises(Unavailable) as caught:
            await db.fetch_value("SELECT pg_sleep(5)", deadline=time.monotonic() + 0.2)
        assert caught.value.code == "database.outcome_unknown"
        assert await db.fetch_value("SELECT 1") == 1


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGQUIT])
async def test_the_pool_survives_a_restart_of_the_database(
    postgres: Cluster, database_url: str, how: signal.Signals
) -> None:
    async with opened(database_url) as db:
        await asyncio.gather(*(db.fetch_value("SELECT pg_sleep(0.05)") for _ in range(8)))
        postgres.stop(how)
        try:
            with pytest.raises(Unavailable):
                await db.fetch_value("SELECT 1", deadline=time.monotonic() + 0.3)
        finally:
            postgres.start()
        assert await asyncio.gather(*(db.fetch_value("SELECT 1") for _ in range(16))) == [1] * 16


async def test_a_transaction_that_clashes_is_repeated(database_url: str) -> None:
    async with opened(database_url) as db:
        await keys.server_key(db)
        await db.execute("CREATE TABLE counter (n int)")
        await db.execute("INSERT INTO counter VALUES (0)")

        async def increment(tx: Tx) -> None:
            await tx.execute("SET TRANSACTION ISOLATION LEVEL SERIALIZABLE")
            value = await tx.fetch_value("SELECT n FROM counter")
            await asyncio.sleep(0.01)
            await tx.execute("UPDATE counter SET n = %(n)s", {"n": value + 1})

        await asyncio.gather(*(db.run(increment) for _ in range(8)))
        assert await db.fetch_value("SELECT n FROM counter") == 8


# Sessions


async def test_a_burst_of_creates_spreads_over_the_runners(database_url: str) -> None:
    async with opened(database_url, size=20) as db:
        await add_agent(db)
        await add_runner(db, "a", 50)
        await add_runner(db, "b", 50)
        made = await asyncio.gather(*(create(db) for _ in range(20)))
        assert Counter(one.session.runner_id for one in made) == {"a": 10, "b": 10}
        assert await slots_taken(db) == {"a": 10, "b": 10}


async def test_a_burst_of_creates_never_takes_more_slots_than_there_are(database_url: str) -> None:
    async with opened(database_url, size=20) as db:
        await add_agent(db)
        await add_runner(db, "a", 3)
        await add_runner(db, "b", 4)
        results = await asyncio.gather(*(create(db) for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(one, sessions.Created) for one in results) == 7
        assert {one.code for one in results if isinstance(one, Unavailable)} == {"fleet.full"}
        assert await slots_taken(db) == {"a": 3, "b": 4}


async def test_create_holds_all_a_runner_needs(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = (await create(db, env='{"C":"session"}', model="m", labels='{"team":"x"}')).session
        assert (session.status, session.epoch, session.runner_id, session.runner_address) == (
            "starting",
            1,
            "r1",
            "unix:/r1",
        )
        assert session.environment() == {"A": "spec", "B": "agent", "C": "session"}
        assert (session.bundle_digest, session.last_seq, session.turn_count) == ("d0", 0, 0)
        assert session.labels == {"team": "x"}


async def test_create_says_why_not(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        with pytest.raises(Unavailable, match="No runners available"):
            await create(db)
        await add_runner(db, slots=1)
        with pytest.raises(NotFound, match='Agent "other" not found'):
            await create(db, agent_name="other")
        with pytest.raises(NotFound):
            await create(db, tenant_id="stranger")
        assert await slots_taken(db) == {"r1": 0}
        await create(db)
        with pytest.raises(Unavailable, match="capacity reached"):
            await create(db)
        await age_runner(db, "r1")
        with pytest.raises(Unavailable, match="No runners available"):
            await create(db)


async def test_a_runner_that_refuses_is_passed_over_until_it_admits_again(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db, "large", 100)
        await add_runner(db, "small", 3)
        await runners.heartbeat(db, "large", runners.Report(refusing="memory: 100 MiB free, 512 MiB kept"))
        assert (await create(db)).session.runner_id == "small"
        await runners.heartbeat(db, "small", runners.Report(refusing="draining"))
        with pytest.raises(Unavailable, match="capacity reached") as caught:
            await create(db)
        assert (caught.value.code, caught.value.retryable) == ("fleet.full", True)
        assert "2 runners admitting none now (large: memory: 100 MiB free, 512 MiB kept)" in caught.value.message
        await runners.heartbeat(db, "large", runners.Report())
        assert (await create(db)).session.runner_id == "large"
        await add_runner(db, "small", 1000)  # it registers again, so it has begun anew
        assert (await create(db)).session.runner_id == "small"


async def test_a_session_keeps_what_its_sandbox_was_given(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        new = (await create(db)).session
        assert (new.isolation, new.effective_limits) == (None, None)
        given = {"isolation": "strict", "effective_limits": '{"memoryMb": 512}'}
        await sessions.activate(db, new.id, new.epoch, SANDBOX, **given)
        await sessions.end(db, TENANT, new.id)
        ended = await sessions.get(db, TENANT, new.id)
        assert (ended.isolation, ended.effective_limits) == ("strict", '{"memoryMb": 512}')


async def test_an_idempotency_key_makes_one_session(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        same = {"idempotency_key": "k", "request_hash": "h"}
        made = await asyncio.gather(*(create(db, **same) for _ in range(6)))
        assert len({one.session.id for one in made}) == 1
        assert sorted(one.replayed for one in made) == [False] + [True] * 5
        assert await slots_taken(db) == {"r1": 1}
        with pytest.raises(Conflict) as caught:
            await create(db, idempotency_key="k", request_hash="other")
        assert caught.value.code == "idempotency.mismatch"
        assert await sessions.forget_keys(db, 0) == 1
        assert not (await create(db, **same)).replayed


async def test_move_takes_another_runner_and_gives_the_slot_back(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db, "a", 5)
        await add_runner(db, "b", 4)
        session = (await create(db)).session
        moved = await sessions.move(db, session.id, 1, dead_after_s=DEAD_AFTER_S, refused={"a": "draining"})
        assert (moved.runner_id, moved.runner_address, moved.epoch) == ("b", "unix:/b", 2)
        assert await slots_taken(db) == {"a": 0, "b": 1}
        with pytest.raises(Conflict):
            await sessions.move(db, session.id, 1, dead_after_s=DEAD_AFTER_S, refused={})
        refused = {"a": "draining", "b": "its bundle is missing" + "!" * 1000}
        with pytest.raises(Unavailable, match="capacity reached") as caught:
            await sessions.move(db, session.id, 2, dead_after_s=DEAD_AFTER_S, refused=refused)
        assert (
            "1 of 9 sandboxes in use on 2 runners; a refused: draining; b refused: its bundle" in caught.value.message
        )
        assert len(caught.value.message) < 500
        assert await sessions.activate(db, session.id, 1, new_id()) is None
        assert await sessions.activate(db, session.id, 2, new_id()) is not None


async def test_a_failed_or_overdue_start_becomes_an_error_and_frees_its_slot(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        first, second = (await create(db)).session, (await create(db)).session
        assert await sessions.fail_start(db, first.id, 1, "install.sh failed")
        assert not await sessions.fail_start(db, first.id, 1, "again")
        assert await sessions.sweep_starting(db, 60.0) == []
        assert [taken.session_id for taken in await sessions.sweep_starting(db, 0.0)] == [second.id]
        failed = await sessions.get(db, TENANT, first.id)
        assert (failed.status, failed.status_cause, failed.runner_id) == ("error", "install.sh failed", None)
        assert await slots_taken(db) == {"r1": 0}


async def test_sessions_are_listed_newest_first_by_tenant_agent_status_and_label(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_agent(db, tenant="other")
        await add_runner(db)
        made = [(await create(db, labels=json.dumps({"n": str(n)}))).session.id for n in range(3)]
        await create(db, tenant_id="other")
        await sessions.end(db, TENANT, made[0])
        assert [one.id for one in await sessions.list_newest(db, TENANT)] == made[::-1]
        assert [one.id for one in await sessions.list_newest(db, TENANT, limit=1, offset=1)] == [made[1]]
        assert [one.id for one in await sessions.list_newest(db, TENANT, status="ended")] == [made[0]]
        assert [one.id for one in await sessions.list_newest(db, TENANT, labels={"n": "2"})] == [made[2]]
        assert await sessions.list_newest(db, TENANT, agent="none") == []
        assert await sessions.count(db, TENANT) == 3
        with pytest.raises(NotFound):
            await sessions.get(db, "other", made[0])


async def test_end_wins_from_every_state_and_only_once(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        admitted = await admit(db, session)
        results = await asyncio.gather(*(sessions.end(db, TENANT, session.id) for _ in range(4)))
        before = [one.before for one in results if one.before is not None]
        assert len(before) == 1
        assert (before[0].runner_address, before[0].epoch, before[0].turn_id) == ("unix:/r1", 1, admitted.turn.id)
        ended = results[0].session
        assert (ended.status, ended.epoch, ended.last_seq, ended.open_turn_id) == ("ended", 2, 1, None)
        assert ended.ended_at is not None
        turn = await turns.get(db, TENANT, session.id, admitted.turn.id)
        assert (turn.state, turn.outcome, turn.last_seq) == ("settled", "interrupted", 1)
        final = await events.page(db, session.id, 0, 10)
        assert [(one.seq, one.kind, one.epoch) for one in final] == [(1, SETTLED, 2)]
        assert json.loads(final[0].data) == {
            "action": "turn_settled",
            "turnId": admitted.turn.id,
            "outcome": "interrupted",
        }
        assert await slots_taken(db) == {"r1": 0}
        with pytest.raises(NotFound):
            await sessions.end(db, "stranger", session.id)


async def test_end_racing_an_admission_leaves_no_turn_open(database_url: str) -> None:
    async with opened(database_url, size=12) as db:
        await add_agent(db)
        await add_runner(db, slots=100)
        for _ in range(15):
            session = await active_session(db)
            await asyncio.gather(admit(db, session), sessions.end(db, TENANT, session.id), return_exceptions=True)
            ended = await sessions.get(db, TENANT, session.id)
            assert (ended.status, ended.open_turn_id) == ("ended", None)
            assert {turn.state for turn in await turns.list_of(db, session.id)} <= {"settled"}
            assert len(await events.page(db, session.id, 0, 10)) == ended.last_seq


# Turns


async def test_one_turn_is_admitted_at_a_time(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        results = await asyncio.gather(*(admit(db, session) for _ in range(6)), return_exceptions=True)
        won = [one for one in results if isinstance(one, turns.Admitted)]
        assert len(won) == 1
        assert {(one.code, one.retryable) for one in results if isinstance(one, Conflict)} == {("turn.open", True)}
        assert (won[0].epoch, won[0].runner_address, won[0].turn.number) == (1, "unix:/r1", 1)
        assert (won[0].turn.timeout_ms, won[0].turn.state) == (60_000, "accepted")


async def test_admission_says_why_not(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        starting = (await create(db)).session
        with pytest.raises(Rejected, match="Session is starting") as caught:
            await admit(db, starting)
        assert (caught.value.code, caught.value.status) == ("session.not_active", 400)
        with pytest.raises(NotFound, match="Session not found"):
            await admit(db, starting, tenant_id="stranger")


async def test_an_agents_turn_timeout_only_shortens(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_runner(db)
        for limit_ms, expected in ((5_000, 5_000), (90_000, 60_000)):
            await add_agent(db, turn_timeout_ms=limit_ms)
            assert (await admit(db, await active_session(db))).turn.timeout_ms == expected


async def test_an_idempotency_key_makes_one_turn(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        same = {"idempotency_key": "k", "request_hash": "h"}
        made = await asyncio.gather(*(admit(db, session, **same) for _ in range(5)))
        assert len({one.turn.id for one in made}) == 1
        assert sorted(one.replayed for one in made) == [False] + [True] * 4
        turn_id = made[0].turn.id
        await events.record(db, [Batch(session.id, 1, a_turn(turn_id))])
        again = await admit(db, session, **same)
        assert (again.replayed, again.turn.state, again.turn.first_seq) == (True, "settled", 1)
        assert (await sessions.get(db, TENANT, session.id)).open_turn_id is None
        with pytest.raises(Conflict) as caught:
            await admit(db, session, idempotency_key="k", request_hash="other")
        assert caught.value.code == "idempotency.mismatch"


async def test_a_turn_nobody_launched_is_found_and_settled_without_taking_a_number_of_the_keeper(
    database_url: str,
) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        admitted = await admit(db, session, request='{"content":"hi"}')
        found = await turns.accepted_older_than(db, 0.0)
        assert [(one.id, one.request, one.runner_address) for one in found] == [
            (admitted.turn.id, '{"content":"hi"}', "unix:/r1")
        ]
        assert await turns.accepted_older_than(db, 60.0) == []
        failure = {"outcome": "failed", "error": "too large", "code": "turn.refused"}
        assert not await turns.settle_unlaunched(db, admitted.turn.id, 2, **failure)
        assert await turns.settle_unlaunched(db, admitted.turn.id, 1, **failure)
        assert not await turns.settle_unlaunched(db, admitted.turn.id, 1, **failure)
        turn = await turns.get(db, TENANT, session.id, admitted.turn.id)
        assert (turn.state, turn.outcome, turn.error, turn.first_seq, turn.last_seq) == (
            "settled",
            "failed",
            "too large",
            None,
            0,
        )
        assert await events.page(db, session.id, 0, 10) == []
        await admit(db, session)


async def test_an_unlaunched_turn_of_a_closed_sandbox_gets_its_final_event(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        admitted = await admit(db, session)
        await events.record(db, [Batch(session.id, 1, [closed(1)])])
        failure = {"outcome": "failed", "error": "sandbox gone", "code": "sandbox.gone"}
        assert await turns.settle_unlaunched(db, admitted.turn.id, 1, **failure)
        assert [(one.seq, one.kind) for one in await events.page(db, session.id, 0, 10)] == [(1, CLOSED), (2, SETTLED)]
        assert (await sessions.get(db, TENANT, session.id)).last_seq == 2


# Events


async def test_recording_a_turn_launches_and_settles_it(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        turn_id = (await admit(db, session)).turn.id
        story = a_turn(turn_id)
        first = await events.record(db, [Batch(session.id, 1, story[:1])])
        assert first == events.Recording([events.Recorded(session.id, 1, 1)], [])
        turn = await turns.get(db, TENANT, session.id, turn_id)
        assert (turn.state, turn.first_seq, turn.outcome) == ("launched", 1, None)
        assert await db.fetch_value("SELECT request FROM turns") is None
        await events.record(db, [Batch(session.id, 1, story[1:])])
        turn = await turns.get(db, TENANT, session.id, turn_id)
        assert (turn.state, turn.outcome, turn.first_seq, turn.last_seq) == ("settled", "completed", 1, 3)
        assert turn.usage == '{"input_tokens":1}'
        page = await events.page(db, session.id, 0, 10)
        assert [(one.seq, one.type, one.data) for one in page] == [(e.seq, e.type, e.data) for e in story]
        assert (await sessions.get(db, TENANT, session.id)).open_turn_id is None
        messages = await events.page(db, session.id, 1, 10, kinds=[MESSAGE], types=["user", "assistant"])
        assert [one.seq for one in messages] == [2]


async def test_a_page_of_large_events_ends_early_and_the_next_one_goes_on(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        sizes = [5 * MIB, 5 * MIB, 20 * MIB, 1, 1, 8 * MIB, 1]
        large = [NewEvent(MESSAGE, seq, None, "user", "x" * size) for seq, size in enumerate(sizes, 1)]
        await events.record(db, [Batch(session.id, 1, large)])
        pages: list[list[int]] = []
        while page := await events.page(db, session.id, pages[-1][-1] if pages else 0, 1000):
            pages.append([event.seq for event in page])
            assert sum(len(event.data) for event in page[:-1]) < events.PAGE_BYTES
        assert pages == [[1, 2], [3], [4, 5, 6], [7]]


async def test_recording_again_whole_or_overlapping_changes_nothing(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        one, two = (await admit(db, session)).turn.id, None
        story = a_turn(one)
        await events.record(db, [Batch(session.id, 1, story)])
        two = (await admit(db, session)).turn.id
        again = await events.record(db, [Batch(session.id, 1, story)])
        assert again.recorded[0].last_seq == 3
        assert (await sessions.get(db, TENANT, session.id)).open_turn_id == two
        overlap = [*story[1:], user_message(4, two)]
        assert (await events.record(db, [Batch(session.id, 1, overlap)])).recorded[0].last_seq == 4
        assert (await turns.get(db, TENANT, session.id, one)).state == "settled"
        assert (await turns.get(db, TENANT, session.id, two)).first_seq == 4
        assert [one.seq for one in await events.page(db, session.id, 0, 10)] == [1, 2, 3, 4]


async def test_a_stale_epoch_may_not_record_events(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        mine, fenced, unknown = await active_session(db), await active_session(db), new_id()
        await sessions.end(db, TENANT, fenced.id)
        note = NewEvent(TIMELINE, 1, None, "lifecycle", "{}")
        batches = [Batch(fenced.id, 1, [note]), Batch(mine.id, 1, [note]), Batch(unknown, 1, [note])]
        result = await events.record(db, batches)
        assert result.recorded == [events.Recorded(mine.id, 1, 1)]
        assert result.stale == [Lease(fenced.id, 1), Lease(unknown, 1)]
        assert await events.page(db, fenced.id, 0, 10) == []


async def test_a_gap_is_not_recorded_and_the_sender_learns_how_far_we_are(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        notes = {seq: NewEvent(TIMELINE, seq, None, "text", "{}") for seq in range(1, 8)}
        ahead = await events.record(db, [Batch(session.id, 1, [notes[3]])])
        assert ahead == events.Recording([events.Recorded(session.id, 1, 0)], [])
        holed = await events.record(db, [Batch(session.id, 1, [notes[1], notes[2], notes[4]])])
        assert holed.recorded[0].last_seq == 2
        twice = await events.record(db, [Batch(session.id, 1, [notes[3]]), Batch(session.id, 1, [notes[4]])])
        assert twice.recorded == [events.Recorded(session.id, 1, 4)]
        asked = await events.record(db, [Batch(session.id, 1, [])])
        assert asked.recorded[0].last_seq == 4
        assert [one.seq for one in await events.page(db, session.id, 0, 10)] == [1, 2, 3, 4]


async def test_a_closed_sandbox_pauses_its_session_and_frees_the_slot_once(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session, _other = await active_session(db), await active_session(db)
        for _ in range(2):
            await events.record(db, [Batch(session.id, 1, [closed(1)])])
            assert await slots_taken(db) == {"r1": 1}
        paused = await sessions.get(db, TENANT, session.id)
        assert (paused.status, paused.status_cause, paused.runner_id, paused.epoch) == (
            "paused",
            "out of memory",
            None,
            1,
        )


async def test_concurrent_recorders_keep_each_session_dense(database_url: str) -> None:
    async with opened(database_url, size=10) as db:
        await add_agent(db)
        await add_runner(db, "a", 100)
        await add_runner(db, "b", 100)
        live = [await active_session(db) for _ in range(8)]

        async def recorder(reverse: bool) -> None:
            for last in range(1, 26):
                notes = [NewEvent(TIMELINE, seq, None, "text", "{}") for seq in range(max(1, last - 3), last + 1)]
                batches = [Batch(one.id, 1, notes) for one in live]
                await events.record(db, batches[::-1] if reverse else batches)

        await asyncio.gather(*(recorder(bool(n % 2)) for n in range(6)))
        for one in live:
            assert [event.seq for event in await events.page(db, one.id, 0, 100)] == list(range(1, 26))
            assert (await sessions.get(db, TENANT, one.id)).last_seq == 25
        await asyncio.gather(*(events.record(db, [Batch(one.id, 1, [closed(26)]) for one in live]) for _ in range(4)))
        assert await slots_taken(db) == {"a": 0, "b": 0}


# Runners and coordinators


async def test_register_tells_a_runner_which_leases_are_its_own(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        mine, gone = await active_session(db), await active_session(db)
        await sessions.end(db, TENANT, gone.id)
        await events.record(db, [Batch(mine.id, 1, [NewEvent(TIMELINE, 1, None, "text", "{}")])])
        leases = [Lease(mine.id, 1), Lease(gone.id, 1), Lease(new_id(), 1)]
        again = runners.Registration("r1", "h", 1, "unix:/new", 5, "2", "strict", ["uid"])
        answer = await runners.register(db, again, leases)
        assert answer.recorded == [events.Recorded(mine.id, 1, 1)]
        assert answer.stale == leases[1:]
        row = (await runners.list_all(db, DEAD_AFTER_S))[0]
        assert (row.address, row.max_sandboxes, row.active, row.alive) == ("unix:/new", 5, 1, True)
        assert (row.isolation, row.enforced) == ("strict", ["uid"])
        other = await runners.register(db, runners.Registration("r2", "h", 1, "unix:/2", 5), leases[:1])
        assert other.stale == leases[:1]


async def test_a_heartbeat_counts_starting_sessions_too(database_url: str) -> None:
    async with opened(database_url) as db:
        assert not await runners.heartbeat(db, "r1", runners.Report())
        await add_agent(db)
        await add_runner(db)
        await create(db)
        await active_session(db)
        report = runners.Report(warm=2, waiting=1, memory_total=7)
        assert await runners.heartbeat(db, "r1", report)
        assert await slots_taken(db) == {"r1": 2}
        total = await runners.totals(db, DEAD_AFTER_S)
        assert (total.runners, total.active, total.warm, total.waiting, total.max_sandboxes) == (1, 2, 2, 1, 10)


async def test_a_heartbeat_tells_what_sandboxes_use_and_what_was_killed(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_runner(db)
        report = runners.Report(
            pss_bytes=2**33, cpu_seconds=1.5, processes=7, descriptors=70, disk_bytes=2**40,
            orphans={"process": 2}, kills={"oom": 1, "tool_oom": 3}, refusing="memory",
        )  # fmt: skip
        await runners.heartbeat(db, "r1", report)
        row = await runners.get(db, "r1", DEAD_AFTER_S)
        assert (row.used_pss_bytes, row.used_cpu_seconds, row.used_processes) == (2**33, 1.5, 7)
        assert (row.used_descriptors, row.used_disk_bytes, row.refusing) == (70, 2**40, "memory")
        assert (row.orphans, row.kills) == ({"process": 2}, {"oom": 1, "tool_oom": 3})
        with pytest.raises(NotFound):
            await runners.get(db, "r2", DEAD_AFTER_S)


async def test_an_inventory_finds_stale_sandboxes_and_lost_sessions(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        kept, lost = await active_session(db), await active_session(db)
        turn_id = (await admit(db, lost)).turn.id
        stranger = Lease(new_id(), 1)
        leases = [Lease(kept.id, 1), stranger]
        young = await runners.compare(db, "r1", leases)
        assert (young.stale, young.lost) == ([stranger], [])
        compared = await runners.compare(db, "r1", leases, grace_s=0.0)
        assert [(one.session_id, one.turn_id) for one in compared.lost] == [(lost.id, turn_id)]
        session = await sessions.get(db, TENANT, lost.id)
        assert (session.status, session.status_cause, session.epoch) == ("paused", "sandbox lost", 2)
        assert (await turns.get(db, TENANT, lost.id, turn_id)).outcome == "lost"
        assert await slots_taken(db) == {"r1": 1}


async def test_a_runner_that_leaves_takes_no_session_with_it(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        session = await active_session(db)
        turn_id = (await admit(db, session)).turn.id
        assert [taken.session_id for taken in await runners.deregister(db, "r1")] == [session.id]
        assert await runners.deregister(db, "r1") == []
        assert await runners.list_all(db, DEAD_AFTER_S) == []
        assert (await sessions.get(db, TENANT, session.id)).status == "paused"
        assert (await turns.get(db, TENANT, session.id, turn_id)).outcome == "lost"


async def test_coordinators_that_sweep_at_once_pause_each_session_once(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "TAKE_AT_ONCE", 3)
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db, "dead", 20)
        dead = [await active_session(db) for _ in range(8)]
        turn_ids = {one.id: (await admit(db, one)).turn.id for one in dead[:4]}
        starting = (await create(db)).session
        await age_runner(db, "dead")
        await add_runner(db, "alive", 20)
        alive = await active_session(db)
        swept = await asyncio.gather(*(runners.sweep_dead(db, DEAD_AFTER_S) for _ in range(3)))
        assert Counter(taken.session_id for part in swept for taken in part) == {one.id: 1 for one in [*dead, starting]}
        assert await runners.sweep_dead(db, DEAD_AFTER_S) == []
        for one in dead:
            session = await sessions.get(db, TENANT, one.id)
            assert (session.status, session.epoch, session.last_seq) == ("paused", 2, int(one.id in turn_ids))
        assert (await sessions.get(db, TENANT, alive.id)).status == "active"
        assert await runners.forget_silent(db, 50.0) == 1


async def test_locate_finds_many_sessions_in_one_query(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        await add_runner(db)
        first, second = await active_session(db), await active_session(db)
        turn_id = (await admit(db, second)).turn.id
        await sessions.end(db, TENANT, first.id)
        found = {one.id: one for one in await sessions.locate(db, [first.id, second.id, new_id()])}
        assert (found[first.id].status, found[first.id].runner_address) == ("ended", None)
        assert (found[second.id].runner_address, found[second.id].open_turn_id) == ("unix:/r1", turn_id)
        assert len(found) == 2


async def test_coordinators_announce_and_forget(database_url: str) -> None:
    async with opened(database_url) as db:
        for name in ("c1", "c2"):
            await coordinators.announce(db, name, "10.0.0.1:4101")
        await coordinators.announce(db, "c3", "10.0.0.3:4101")
        assert await coordinators.live(db, 30) == ["10.0.0.1:4101", "10.0.0.3:4101"]
        await coordinators.forget(db, "c3")
        assert await coordinators.live(db, 30) == ["10.0.0.1:4101"]
        assert await coordinators.forget_silent(db, -1) == 2


# Agents, bundles, keys


async def test_deploying_again_keeps_id_and_env(database_url: str) -> None:
    async with opened(database_url) as db:
        await add_agent(db)
        first = await agents.get(db, TENANT, "echo")
        again = await agents.upsert(db, agents.NewAgent(new_id(), TENANT, "echo", "/x", "d0", "{}"))
        assert (again.id, again.version, again.path, again.env) == (first.id, 2, "/x", first.env)
        assert [one.name for one in await agents.list_all(db, TENANT)] == ["echo"]
        await agents.delete(db, TENANT, "echo")
        for ask in (agents.get, agents.delete):
            with pytest.raises(NotFound, match="Agent not found"):
                await ask(db, TENANT, "echo")


async def test_a_bundle_is_stored_once_and_read_back_whole(database_url: str, tmp_path: Path) -> None:
    archive = tmp_path / "bundle"
    archive.write_bytes(bytes(range(256)) * 10_000)
    async with opened(database_url) as db:
        deadline = time.monotonic() + 20
        stored = await asyncio.gather(*(bundles.store(db, "abc", archive, deadline=deadline) for _ in range(4)))
        assert sorted(stored) == [False, False, False, True]
        pieces = [piece async for piece in bundles.read(db, "abc")]
        assert b"".join(pieces) == archive.read_bytes()
        assert max(map(len, pieces)) <= bundles.CHUNK_BYTES
        with pytest.raises(NotFound):
            await anext(bundles.read(db, "nothing"))


async def test_keys_are_kept_as_hashes_under_one_server_key(new_database: Callable[[], str]) -> None:
    url = new_database()
    async with opened(url) as db:
        assert len(set(await asyncio.gather(*(keys.server_key(db) for _ in range(6))))) == 1
        assert not await keys.any_key_exists(db)
        key = await keys.create(db, "acme", "laptop")
        assert key.text.startswith("ash_")
        assert len(key.text) == 4 + 32
        digest = keys.hash_of(key.text, await keys.server_key(db))
        assert await keys.tenant_of(db, digest) == "acme"
        assert await keys.tenant_of(db, "0" * 64) is None
    with psycopg.connect(url) as conn:
        assert key.text not in str(conn.execute("SELECT * FROM api_keys").fetchall())


async def test_of_many_initial_keys_one_is_adopted(database_url: str) -> None:
    async with opened(database_url) as db:
        texts = [keys.new_text() for _ in range(5)]
        adopted = await asyncio.gather(*(keys.adopt_initial(db, text, TENANT) for text in texts))
        assert adopted.count(True) == 1
        assert await keys.adopt_initial(db, texts[adopted.index(True)], TENANT)
