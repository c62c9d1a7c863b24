"""Table runners: registration, heartbeats, and taking sessions away from runners that are dead, leaving or forgetful.

Leaves out: choosing a runner for a session (placement.py).
"""

# ruff: noqa: S608 - the statements are put together from constants of this room

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from ashd.errors import NotFound
from ashd.store.events import Lease, Recorded
from ashd.store.pool import Database, Tx
from ashd.store.takeover import Taken, take_over

# How many sessions one transaction takes over; a runner with more is dealt with in several.
TAKE_AT_ONCE = 500

# Slots: what the database believes, until the first heartbeat tells better.
REGISTER = """
INSERT INTO runners (id, host, port, address, version, isolation, enforced, max_sandboxes, active)
VALUES (
    %(id)s, %(host)s, %(port)s, %(address)s, %(version)s, %(isolation)s, %(enforced)s, %(max_sandboxes)s,
    (SELECT count(*) FROM sessions WHERE runner_id = %(id)s)
)
ON CONFLICT (id) DO UPDATE SET
    host = excluded.host, port = excluded.port, address = excluded.address, version = excluded.version,
    isolation = excluded.isolation, enforced = excluded.enforced, max_sandboxes = excluded.max_sandboxes,
    active = excluded.active, draining = false, refusing = '', registered_at = now(), last_heartbeat_at = now()
"""

OWNED = """
SELECT s.id AS session_id, s.epoch, s.last_seq
FROM unnest(%(session)s::uuid[], %(epoch)s::bigint[]) AS l (session_id, epoch)
JOIN sessions AS s ON s.id = l.session_id AND s.epoch = l.epoch AND s.runner_id = %(id)s
"""

# Sessions still starting may not be among the live ones yet, so their reservations are added.
HEARTBEAT = """
UPDATE runners SET
    last_heartbeat_at = now(),
    active = %(running)s::int + %(waiting)s::int
        + (SELECT count(*) FROM sessions WHERE runner_id = %(id)s AND status = 'starting'),
    warming = %(warming)s, warm = %(warm)s, running = %(running)s, waiting = %(waiting)s,
    warm_hits = %(warm_hits)s, cold_starts = %(cold_starts)s,
    memory_total_bytes = %(memory_total)s, memory_used_bytes = %(memory_used)s,
    memory_per_sandbox_bytes = %(memory_per_sandbox)s, draining = %(draining)s, refusing = %(refusing)s,
    used_pss_bytes = %(pss_bytes)s, used_cpu_seconds = %(cpu_seconds)s, used_processes = %(processes)s,
    used_descriptors = %(descriptors)s, used_disk_bytes = %(disk_bytes)s,
    orphans = %(orphans)s::jsonb, kills = %(kills)s::jsonb
WHERE id = %(id)s
"""

COLUMNS = """
    r.id, r.host, r.port, r.address, r.version, r.isolation, r.enforced, r.max_sandboxes, r.active, r.warming, r.warm,
    r.running, r.waiting, r.paused, r.warm_hits, r.cold_starts, r.memory_total_bytes, r.memory_used_bytes,
    r.memory_per_sandbox_bytes, r.draining, r.registered_at, r.last_heartbeat_at, r.refusing, r.used_pss_bytes,
    r.used_cpu_seconds, r.used_processes, r.used_descriptors, r.used_disk_bytes, r.orphans, r.kills
"""
ALL = f"""
SELECT {COLUMNS}, r.last_heartbeat_at > now() - %(dead_after_s)s::float8 * interval '1 second' AS alive
FROM runners AS r
"""
LIST = f"{ALL} ORDER BY r.id"
GET = f"{ALL} WHERE r.id = %(id)s"
TOTALS = """
SELECT count(*) AS runners,
    coalesce(sum(r.active), 0)::bigint AS active, coalesce(sum(r.warming), 0)::bigint AS warming,
    coalesce(sum(r.warm), 0)::bigint AS warm, coalesce(sum(r.running), 0)::bigint AS running,
    coalesce(sum(r.waiting), 0)::bigint AS waiting,
    coalesce(sum(CASE WHEN r.draining THEN 0 ELSE r.max_sandboxes END), 0)::bigint AS max_sandboxes,
    coalesce(sum(r.warm_hits), 0)::bigint AS warm_hits, coalesce(sum(r.cold_starts), 0)::bigint AS cold_starts
FROM runners AS r WHERE r.last_heartbeat_at > now() - %(dead_after_s)s::float8 * interval '1 second'
"""

LOCK_LOST = """
SELECT s.id FROM sessions AS s
WHERE s.runner_id = %(id)s AND s.status = 'active'
    AND s.placed_at < now() - %(grace_s)s::float8 * interval '1 second'
    AND NOT EXISTS (
        SELECT 1 FROM unnest(%(session)s::uuid[], %(epoch)s::bigint[]) AS l (session_id, epoch)
        WHERE l.session_id = s.id AND l.epoch = s.epoch
    )
ORDER BY s.id LIMIT %(limit)s FOR UPDATE OF s
"""
LOCK_OF_RUNNER = "SELECT id FROM sessions WHERE runner_id = %(id)s ORDER BY id LIMIT %(limit)s FOR UPDATE"
LOCK_OF_DEAD = """
SELECT s.id FROM sessions AS s LEFT JOIN runners AS r ON r.id = s.runner_id
WHERE s.runner_id IS NOT NULL
    AND (r.id IS NULL OR r.last_heartbeat_at < now() - %(dead_after_s)s::float8 * interval '1 second')
ORDER BY s.id LIMIT %(limit)s FOR UPDATE OF s
"""
DRAIN = "UPDATE runners SET draining = true WHERE id = %(id)s"
DELETE = "DELETE FROM runners WHERE id = %(id)s"
FORGET_SILENT = "DELETE FROM runners WHERE last_heartbeat_at < now() - %(age_s)s::float8 * interval '1 second'"


@dataclass(frozen=True)
class Registration:
    """What a runner says of itself when it registers."""

    id: str
    host: str
    port: int
    address: str
    max_sandboxes: int
    version: str = ""
    isolation: str = ""
    enforced: Sequence[str] = ()


@dataclass(frozen=True)
class Report:
    """What a heartbeat says: sandboxes by state, starts since the runner came up, memory; what all sandboxes use
    together; what was removed and killed since the runner came up, by kind and by cause.
    """

    warming: int = 0
    warm: int = 0
    running: int = 0
    waiting: int = 0
    warm_hits: int = 0
    cold_starts: int = 0
    memory_total: int = 0
    memory_used: int = 0
    memory_per_sandbox: int = 0
    draining: bool = False
    refusing: str = ""
    """Why no session is admitted now; empty = they are."""
    pss_bytes: int = 0
    cpu_seconds: float = 0.0
    processes: int = 0
    descriptors: int = 0
    disk_bytes: int = 0
    orphans: Mapping[str, int] = field(default_factory=dict)
    kills: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """A row of runners; `alive` as of the given runner_dead_after, by the database's clock."""

    id: str
    host: str
    port: int
    address: str
    version: str
    isolation: str
    enforced: list[str]
    max_sandboxes: int
    active: int
    warming: int
    warm: int
    running: int
    waiting: int
    paused: int
    warm_hits: int
    cold_starts: int
    memory_total_bytes: int
    memory_used_bytes: int
    memory_per_sandbox_bytes: int
    draining: bool
    registered_at: datetime
    last_heartbeat_at: datetime
    refusing: str
    used_pss_bytes: int
    used_cpu_seconds: float
    used_processes: int
    used_descriptors: int
    used_disk_bytes: int
    orphans: dict[str, int]
    kills: dict[str, int]
    alive: bool


@dataclass(frozen=True)
class Totals:
    """Sums over the runners that are alive; `max_sandboxes` without those that drain."""

    runners: int
    active: int
    warming: int
    warm: int
    running: int
    waiting: int
    max_sandboxes: int
    warm_hits: int
    cold_starts: int


@dataclass(frozen=True)
class Registered:
    """Which of the leases a runner brought are its own."""

    recorded: list[Recorded]
    stale: list[Lease]


@dataclass(frozen=True)
class Compared:
    """Where a runner's inventory and the database differed, and what was done."""

    stale: list[Lease]
    """Sandboxes the runner has and must end."""
    lost: list[Taken]
    """Sessions it should have had and has not: now paused."""


async def register(
    db: Database, runner: Registration, leases: Sequence[Lease] = (), *, deadline: float | None = None
) -> Registered:
    """Insert or renew the runner, and tell which of its leases are still its own. Two statements; safe to repeat."""
    params = {
        "id": runner.id,
        "host": runner.host,
        "port": runner.port,
        "address": runner.address,
        "version": runner.version,
        "isolation": runner.isolation,
        "enforced": list(runner.enforced),
        "max_sandboxes": runner.max_sandboxes,
    }
    await db.execute(REGISTER, params, deadline=deadline)
    owned = await _owned(db, runner.id, leases, deadline=deadline)
    return Registered(owned, _stale(leases, owned))


async def heartbeat(db: Database, runner_id: str, report: Report, *, deadline: float | None = None) -> bool:
    """Note that the runner lives and how it is; False when it is unknown and has to register again."""
    counts = {"orphans": json.dumps(dict(report.orphans)), "kills": json.dumps(dict(report.kills))}
    params = {**vars(report), **counts, "id": runner_id}
    return await db.execute(HEARTBEAT, params, deadline=deadline) == 1


async def compare(
    db: Database, runner_id: str, leases: Sequence[Lease], *, grace_s: float = 30.0, deadline: float | None = None
) -> Compared:
    """Compare a runner's full list of leases with the database.

    Sessions that should be active there for more than `grace_s` but are missing are paused, their open turns `lost`.
    """
    owned = await _owned(db, runner_id, leases, deadline=deadline)
    params = {"id": runner_id, "grace_s": grace_s, **_arrays(leases)}
    lost = await _take(db, LOCK_LOST, params, "sandbox lost", deadline)
    return Compared(_stale(leases, owned), lost)


async def deregister(db: Database, runner_id: str, *, deadline: float | None = None) -> list[Taken]:
    """The runner leaves: its sessions are paused, their open turns `lost`, the runner removed. Idempotent.

    ORDER: draining first, so that nothing is placed there any more; sessions before the runner's row, the order in
    which everybody locks them. Whatever a crash leaves half done, sweep_dead finishes.
    """
    await db.execute(DRAIN, {"id": runner_id}, deadline=deadline)
    taken: list[Taken] = []
    while batch := await _take(db, LOCK_OF_RUNNER, {"id": runner_id}, "runner left", deadline):
        taken += batch
    await db.execute(DELETE, {"id": runner_id}, deadline=deadline)
    return taken


async def sweep_dead(db: Database, dead_after_s: float, *, deadline: float | None = None) -> list[Taken]:
    """Pause the sessions of all runners silent for `dead_after_s` or gone, their open turns `lost`. Idempotent."""
    taken: list[Taken] = []
    while batch := await _take(db, LOCK_OF_DEAD, {"dead_after_s": dead_after_s}, "runner lost", deadline):
        taken += batch
    return taken


async def forget_silent(db: Database, age_s: float, *, deadline: float | None = None) -> int:
    """Remove runners silent for `age_s`; returns how many. Call it after sweep_dead, with much more than its limit."""
    return await db.execute(FORGET_SILENT, {"age_s": age_s}, deadline=deadline)


async def list_all(db: Database, dead_after_s: float, *, deadline: float | None = None) -> list[Runner]:
    """All runners by id, the dead ones too."""
    return await db.fetch_all(Runner, LIST, {"dead_after_s": dead_after_s}, deadline=deadline)


async def get(db: Database, runner_id: str, dead_after_s: float, *, deadline: float | None = None) -> Runner:
    """The runner of this id. Raises NotFound."""
    runner = await db.fetch_one(Runner, GET, {"id": runner_id, "dead_after_s": dead_after_s}, deadline=deadline)
    if runner is None:
        raise not_found()
    return runner


def not_found() -> NotFound:
    """The error for a runner that has not registered, or has left."""
    return NotFound("Runner not found; register again", code="runner.not_found")


async def totals(db: Database, dead_after_s: float, *, deadline: float | None = None) -> Totals:
    """The fleet in one row. PERF: reads runners only, never sessions."""
    row = await db.fetch_one(Totals, TOTALS, {"dead_after_s": dead_after_s}, deadline=deadline)
    return row or Totals(0, 0, 0, 0, 0, 0, 0, 0, 0)


async def _take(db: Database, lock: str, params: dict[str, Any], cause: str, deadline: float | None) -> list[Taken]:
    async def work(tx: Tx) -> list[Taken]:
        found = await tx.fetch_all(_Id, lock, {**params, "limit": TAKE_AT_ONCE})
        return await take_over(tx, [row.id for row in found], status="paused", cause=cause, outcome="lost")

    return await db.run(work, deadline=deadline)


async def _owned(db: Database, runner_id: str, leases: Sequence[Lease], *, deadline: float | None) -> list[Recorded]:
    if not leases:
        return []
    return await db.fetch_all(Recorded, OWNED, {"id": runner_id, **_arrays(leases)}, deadline=deadline)


def _stale(leases: Sequence[Lease], owned: Sequence[Recorded]) -> list[Lease]:
    own = {(row.session_id, row.epoch) for row in owned}
    return [lease for lease in leases if (lease.session_id, lease.epoch) not in own]


def _arrays(leases: Sequence[Lease]) -> dict[str, list[Any]]:
    return {"session": [lease.session_id for lease in leases], "epoch": [lease.epoch for lease in leases]}


@dataclass(frozen=True)
class _Id:
    id: str
