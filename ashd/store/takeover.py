"""Taking sessions away from whoever holds them: the one place that settles open turns on a keeper's behalf.

Covers: what end, failed starts, dead, lost and departing runners have in common. Leaves out: choosing the sessions
(sessions.py, runners.py), and endings that the keeper reports itself (events.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ashd.store.pool import Tx

# The new epoch fences the old holder, so the final event's number is free: nobody but this transaction gives numbers.
TAKE_OVER = """
WITH taken AS (
    SELECT id, epoch, runner_id, open_turn_id, last_seq FROM sessions WHERE id = ANY(%(ids)s::uuid[])
),
updated AS (
    UPDATE sessions AS s SET
        status = %(status)s, status_cause = %(cause)s, epoch = s.epoch + 1, runner_id = NULL, open_turn_id = NULL,
        last_seq = s.last_seq + CASE WHEN s.open_turn_id IS NULL THEN 0 ELSE 1 END,
        last_active_at = now(), ended_at = CASE WHEN %(status)s = 'ended' THEN now() END
    FROM taken WHERE s.id = taken.id
    RETURNING s.id
),
final AS (
    INSERT INTO events (session_id, seq, epoch, turn_id, kind, type, data)
    SELECT id, last_seq + 1, epoch + 1, open_turn_id, 4, 'lifecycle',
        '{"action":"turn_settled","turnId":"' || open_turn_id::text || '","outcome":"' || %(outcome)s::text || '"}'
    FROM taken WHERE open_turn_id IS NOT NULL
    RETURNING session_id
),
settled AS (
    UPDATE turns AS t SET
        state = 'settled', outcome = %(outcome)s, error = %(cause)s, error_code = 'turn.' || %(outcome)s::text,
        request = NULL, last_seq = taken.last_seq + 1, settled_at = now()
    FROM taken WHERE t.id = taken.open_turn_id AND t.state <> 'settled'
    RETURNING t.id
),
released AS (
    UPDATE runners AS r SET active = greatest(r.active - held.slots, 0)
    FROM (SELECT runner_id, count(*) AS slots FROM taken WHERE runner_id IS NOT NULL GROUP BY runner_id) AS held
    WHERE r.id = held.runner_id
    RETURNING r.id
)
SELECT taken.id AS session_id, taken.epoch, taken.runner_id, r.address AS runner_address, taken.open_turn_id AS turn_id
FROM taken JOIN updated ON updated.id = taken.id LEFT JOIN runners AS r ON r.id = taken.runner_id
"""


@dataclass(frozen=True)
class Taken:
    """What a session was before it was taken over."""

    session_id: str
    epoch: int
    runner_id: str | None
    runner_address: str | None
    turn_id: str | None
    """The turn that was open and is now settled."""


async def take_over(tx: Tx, session_ids: Sequence[str], *, status: str, cause: str | None, outcome: str) -> list[Taken]:
    """Give the sessions `status`, raise their epochs, settle their open turns as `outcome`, release their slots.

    RACE: the caller has locked the rows (SELECT … FOR UPDATE) by an earlier statement of the same transaction. It
    can't be one statement: a turn admitted while we waited for the lock is invisible to the statement that waited.
    Lock sessions before runners, and sessions in the order of their ids, here as everywhere in the store.
    """
    if not session_ids:
        return []
    params = {"ids": list(session_ids), "status": status, "cause": cause, "outcome": outcome}
    return await tx.fetch_all(Taken, TAKE_OVER, params)
