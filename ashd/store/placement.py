"""Choosing a runner and taking a slot on it: the pieces of SQL that creating and moving a session share.

Least loaded first among runners that are healthy, not draining, not refusing (short of memory, say) and have room.
Choosing and reserving happen in one statement under row locks, so a burst of creates spreads instead of piling up on
the runner that looked best to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ashd.errors import Unavailable
from ashd.store.pool import Database

HEALTHY = """
    NOT r.draining AND r.last_heartbeat_at > now() - %(dead_after_s)s::float8 * interval '1 second'
"""

# RACE: a burst of creates queues up on these locks. Under READ COMMITTED, FOR UPDATE waits and then returns the newest
# version of each row, so `active` counts the reservation of whoever was before us. ORDER BY id keeps the locks in one
# order for all.
CANDIDATES = f"""
    SELECT r.id, r.max_sandboxes, r.active FROM runners AS r
    WHERE {HEALTHY} AND r.refusing = '' AND r.id <> ALL(%(exclude)s::text[])
"""  # noqa: S608 - constants

LEAST_LOADED = """
    SELECT id FROM candidates WHERE active < max_sandboxes ORDER BY max_sandboxes - active DESC, id LIMIT 1
"""

CAPACITY = f"""
SELECT count(*) AS runners, coalesce(sum(r.max_sandboxes), 0)::bigint AS slots,
    coalesce(sum(r.active), 0)::bigint AS active,
    count(*) FILTER (WHERE r.refusing <> '') AS refusing,
    min(r.id || ': ' || r.refusing) FILTER (WHERE r.refusing <> '') AS refusal
FROM runners AS r WHERE {HEALTHY}
"""  # noqa: S608 - constants


_SHOWN_REFUSALS = 3
_REFUSAL_LENGTH = 300


@dataclass(frozen=True)
class _Capacity:
    runners: int
    slots: int
    active: int
    refusing: int
    """Runners that admit no session, by their last heartbeat."""
    refusal: str | None
    """What one of them says."""


async def no_room(
    db: Database, *, dead_after_s: float, refused: Mapping[str, str] | None = None, deadline: float | None = None
) -> Unavailable:
    """The error that says why no runner was chosen. `refused`: those asked for this session, with what they said."""
    capacity = await db.fetch_one(_Capacity, CAPACITY, {"dead_after_s": dead_after_s}, deadline=deadline)
    if capacity is None or capacity.runners == 0:
        return Unavailable(
            "No runners available: start one with `ashd runner -c conf/runner.yaml`",
            code="fleet.no_runners",
            retry_after_s=5.0,
        )
    return Unavailable(
        f"Fleet capacity reached: {'; '.join(_reasons(capacity, refused or {}))}. End a session or add a runner.",
        code="fleet.full",
        retry_after_s=5.0,
    )


def _reasons(capacity: _Capacity, refused: Mapping[str, str]) -> Iterator[str]:
    yield f"{capacity.active} of {capacity.slots} sandboxes in use on {_runners(capacity.runners)}"
    if capacity.refusing:
        yield f"{_runners(capacity.refusing)} admitting none now ({capacity.refusal})"
    for runner, why in list(refused.items())[:_SHOWN_REFUSALS]:
        yield f"{runner} refused: {why[:_REFUSAL_LENGTH]}"
    if len(refused) > _SHOWN_REFUSALS:
        yield f"{_runners(len(refused) - _SHOWN_REFUSALS)} more refused"


def _runners(count: int) -> str:
    return f"{count} runner{'' if count == 1 else 's'}"
