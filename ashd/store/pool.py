"""The pool of database connections of one worker: deadlines, retries, and what its failures are called.

Covers: single statements (autocommit, one round trip) and transactions that are repeated when the database says so.
Leaves out: what the statements say (one module per table), the schema (migrate.py).
"""

from __future__ import annotations

import asyncio
import random
import select
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import class_row, scalar_row
from psycopg.types.string import TextLoader
from psycopg_pool import AsyncConnectionPool, PoolClosed, PoolTimeout

from ashd.errors import Unavailable

T = TypeVar("T")
Params = Mapping[str, Any]

# The transaction did nothing and may be repeated as it is: the database chose another one to win.
_REPEATABLE = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
_FIRST_PAUSE_S = 0.01
_LONGEST_PAUSE_S = 0.5

# How long the pool itself goes on trying to replace one lost connection. Short, because afterwards the next request
# tries at once, while the pool's own pauses between attempts double without end.
_RECONNECT_TIMEOUT_S = 2.0


class Database:
    """The database as one worker sees it; open it in the event loop that uses it, after gunicorn's fork.

    Every method takes a `deadline`, an instant of time.monotonic(), and by default makes one of `timeout_s` from now.
    It covers everything: waiting for a connection, the statement, and repeating it.

    Raises Unavailable with code
      `database.unavailable`      nothing was changed: no connection in time, or the database gave up;
      `database.outcome_unknown`  the connection broke or time ran out after a statement was sent; it may be committed.
    """

    def __init__(self, url: str, size: int, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._size = size
        self._pool = AsyncConnectionPool(
            _conninfo(url, timeout_s),
            min_size=min(2, size),
            max_size=size,
            open=False,
            kwargs={"autocommit": True},
            configure=_configure,
            reconnect_timeout=_RECONNECT_TIMEOUT_S,
            name="ashd",
        )

    async def open(self) -> None:
        """Start connecting in the background; a database that is down is noticed by the first request."""
        await self._pool.open(wait=False)

    async def close(self) -> None:
        """Close all connections; statements under way get `timeout_s` to end."""
        await self._pool.close(timeout=self._timeout_s)

    def stats(self) -> dict[str, int]:
        """Connections now open and idle, the most there may be, and requests waiting for one."""
        raw = self._pool.get_stats()
        return {
            "size": raw.get("pool_size", 0),
            "idle": raw.get("pool_available", 0),
            "max": self._size,
            "waiting": raw.get("requests_waiting", 0),
        }

    async def fetch_one(
        self, into: type[T], sql: str, params: Params | None = None, *, deadline: float | None = None
    ) -> T | None:
        """The first row as an `into` (a dataclass whose fields are the columns), or None."""
        return await self._perform(lambda tx: tx.fetch_one(into, sql, params), deadline, atomic=False)

    async def fetch_all(
        self, into: type[T], sql: str, params: Params | None = None, *, deadline: float | None = None
    ) -> list[T]:
        """All rows, each as an `into`."""
        return await self._perform(lambda tx: tx.fetch_all(into, sql, params), deadline, atomic=False)

    async def fetch_value(self, sql: str, params: Params | None = None, *, deadline: float | None = None) -> Any:
        """The first column of the first row, or None."""
        return await self._perform(lambda tx: tx.fetch_value(sql, params), deadline, atomic=False)

    async def execute(self, sql: str, params: Params | None = None, *, deadline: float | None = None) -> int:
        """Run one statement and return how many rows it touched."""
        return await self._perform(lambda tx: tx.execute(sql, params), deadline, atomic=False)

    async def run(self, work: Callable[[Tx], Awaitable[T]], *, deadline: float | None = None) -> T:
        """Run `work` in one transaction, again from its start when the database asks for it.

        `work` must have no effects besides its statements, for it may run more than once.
        """
        return await self._perform(work, deadline, atomic=True)

    async def _perform(self, work: Callable[[Tx], Awaitable[T]], deadline: float | None, *, atomic: bool) -> T:
        limit = time.monotonic() + self._timeout_s if deadline is None else deadline
        longest = _FIRST_PAUSE_S
        while True:
            try:
                return await self._attempt(work, limit, atomic=atomic)
            except _REPEATABLE as clash:
                pause = random.uniform(0, longest)
                if time.monotonic() + pause >= limit:
                    raise Unavailable("The database is too busy; try again", code="database.unavailable") from clash
            await asyncio.sleep(pause)
            longest = min(2 * longest, _LONGEST_PAUSE_S)

    async def _attempt(self, work: Callable[[Tx], Awaitable[T]], limit: float, *, atomic: bool) -> T:
        sent = False
        try:
            # WAITS: at most until `limit`, for a connection and then for the answer. psycopg cancels the statement
            # in the server when the wait is cancelled, and drops the connection when even that doesn't answer.
            async with asyncio.timeout(limit - time.monotonic()):
                while True:
                    async with self._pool.connection(timeout=limit - time.monotonic()) as conn:
                        if _is_dead(conn):
                            await conn.close()  # the pool replaces it in the background
                            continue
                        sent = True
                        return await _work_on(conn, work, atomic=atomic)
        except _REPEATABLE:
            raise
        except (PoolTimeout, PoolClosed) as error:
            raise Unavailable("The database does not answer; try again", code="database.unavailable") from error
        except (TimeoutError, psycopg.OperationalError, psycopg.InterfaceError) as error:
            code = "database.outcome_unknown" if sent else "database.unavailable"
            raise Unavailable("The database stopped answering; try again", code=code) from error


class Tx:
    """One connection while some work has it: the statements of a transaction, or a single one."""

    def __init__(self, conn: psycopg.AsyncConnection[Any]) -> None:
        self._conn = conn

    async def fetch_one(self, into: type[T], sql: str, params: Params | None = None) -> T | None:
        """The first row as an `into`, or None."""
        async with self._conn.cursor(row_factory=class_row(into)) as cursor:
            await cursor.execute(sql, params)
            return await cursor.fetchone()

    async def fetch_all(self, into: type[T], sql: str, params: Params | None = None) -> list[T]:
        """All rows, each as an `into`."""
        async with self._conn.cursor(row_factory=class_row(into)) as cursor:
            await cursor.execute(sql, params)
            return await cursor.fetchall()

    async def fetch_value(self, sql: str, params: Params | None = None) -> Any:
        """The first column of the first row, or None."""
        async with self._conn.cursor(row_factory=scalar_row) as cursor:
            await cursor.execute(sql, params)
            return await cursor.fetchone()

    async def execute(self, sql: str, params: Params | None = None) -> int:
        """Run one statement and return how many rows it touched."""
        cursor = await self._conn.execute(sql, params)
        return cursor.rowcount


async def _work_on(conn: psycopg.AsyncConnection[Any], work: Callable[[Tx], Awaitable[T]], *, atomic: bool) -> T:
    if not atomic:
        return await work(Tx(conn))
    async with conn.transaction():
        return await work(Tx(conn))


def _is_dead(conn: psycopg.AsyncConnection[Any]) -> bool:
    """Whether the server has closed an idle connection (it was restarted, or dropped us).

    PERF: asks the socket, not the server. A live idle connection has nothing to read; a closed one has its last
    message or the end of file.
    """
    if conn.closed:
        return True
    poll = select.poll()
    poll.register(conn.pgconn.socket, select.POLLIN)
    return bool(poll.poll(0))


def _conninfo(url: str, timeout_s: float) -> str:
    """`url` with what every connection needs: UTC, READ COMMITTED, bounds for a server or network that is silent."""
    given = conninfo_to_dict(url)
    timeout_ms = max(1, int(timeout_s * 1000))
    options = [
        str(given.get("options") or ""),
        "-c timezone=UTC",
        r"-c default_transaction_isolation=read\ committed",
        f"-c statement_timeout={timeout_ms}",
    ]
    bounds: dict[str, Any] = {
        "options": " ".join(part for part in options if part),
        "connect_timeout": given.get("connect_timeout") or max(2, int(timeout_s)),
        "tcp_user_timeout": given.get("tcp_user_timeout") or timeout_ms,
        "application_name": given.get("application_name") or "ashd",
    }
    return make_conninfo(url, **bounds)


async def _configure(conn: psycopg.AsyncConnection[Any]) -> None:
    """Ids are text everywhere in ashd, so uuid columns come as text too."""
    conn.adapters.register_loader("uuid", TextLoader)
