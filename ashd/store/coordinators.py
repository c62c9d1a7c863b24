"""Table coordinators: which workers are alive and where runners reach their registry."""

from __future__ import annotations

from dataclasses import dataclass

from ashd.store.pool import Database

ANNOUNCE = """
INSERT INTO coordinators (id, registry_address) VALUES (%(id)s, %(address)s)
ON CONFLICT (id) DO UPDATE SET registry_address = excluded.registry_address, last_seen_at = now()
"""
LIVE = """
SELECT DISTINCT registry_address AS address FROM coordinators
WHERE last_seen_at > now() - %(seconds)s::float8 * interval '1 second' ORDER BY registry_address
"""
FORGET = "DELETE FROM coordinators WHERE id = %(id)s"
FORGET_SILENT = "DELETE FROM coordinators WHERE last_seen_at < now() - %(age_s)s::float8 * interval '1 second'"


@dataclass(frozen=True)
class _Address:
    address: str


async def announce(db: Database, coordinator_id: str, address: str, *, deadline: float | None = None) -> None:
    """Say that this worker is alive, with its registry at `address`; to be repeated."""
    await db.execute(ANNOUNCE, {"id": coordinator_id, "address": address}, deadline=deadline)


async def live(db: Database, seconds: float, *, deadline: float | None = None) -> list[str]:
    """Registry addresses announced within the last `seconds`, each once."""
    return [row.address for row in await db.fetch_all(_Address, LIVE, {"seconds": seconds}, deadline=deadline)]


async def forget(db: Database, coordinator_id: str, *, deadline: float | None = None) -> None:
    """This worker stops."""
    await db.execute(FORGET, {"id": coordinator_id}, deadline=deadline)


async def forget_silent(db: Database, age_s: float, *, deadline: float | None = None) -> int:
    """Remove workers that died without a word; returns how many."""
    return await db.execute(FORGET_SILENT, {"age_s": age_s}, deadline=deadline)
