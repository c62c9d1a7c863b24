"""Bringing the schema up to date: numbered SQL files, forward only, each applied once, in one transaction each.

A migration must be safe while the version before it still runs: add, fill, and remove only one release later.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from typing import TypeVar

import psycopg

from ashd.errors import Unavailable
from ashd.store.pool import Database

T = TypeVar("T")

CREATE_TABLE = """
CREATE TABLE IF NOT EXISTS schema_migrations (
    name text PRIMARY KEY, applied_at timestamptz NOT NULL DEFAULT now()
)
"""
CREATE_LOCK = "INSERT INTO schema_migrations (name) VALUES ('lock') ON CONFLICT DO NOTHING"
LOCK = "SELECT name FROM schema_migrations WHERE name = 'lock' FOR UPDATE"
APPLIED = "SELECT name FROM schema_migrations"
NOTE = "INSERT INTO schema_migrations (name) VALUES (%(name)s)"
TABLE_EXISTS = "SELECT count(*) > 0 FROM information_schema.tables WHERE table_name = 'schema_migrations'"

_ATTEMPTS = 10
# Two processes may run CREATE TABLE IF NOT EXISTS at once and both find it missing: one then gets UniqueViolation.
_REPEATABLE = (
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
    psycopg.errors.UniqueViolation,
    psycopg.errors.DuplicateTable,
    psycopg.errors.DuplicateObject,  # the table's row type
)


@dataclass(frozen=True)
class Migration:
    """One file of ashd/store/migrations."""

    name: str
    sql: str


def known() -> list[Migration]:
    """All migrations of this version, in their order."""
    folder = files("ashd.store") / "migrations"
    found = [entry for entry in folder.iterdir() if entry.name.endswith(".sql")]
    return [
        Migration(entry.name.removesuffix(".sql"), entry.read_text("utf-8"))
        for entry in sorted(found, key=lambda entry: entry.name)
    ]


def migrate(database_url: str, *, lock_timeout_s: float = 60.0) -> list[str]:
    """Apply what is missing and return its names. Safe to run from any number of processes at once.

    Raises Unavailable when the database doesn't answer, or others keep the lock for `lock_timeout_s`.
    """
    try:
        with psycopg.connect(database_url, connect_timeout=10, autocommit=True) as conn:
            conn.execute(f"SET lock_timeout = {int(lock_timeout_s * 1000)}")
            _repeat(partial(_prepare, conn))
            return [migration.name for migration in known() if _repeat(partial(_apply, conn, migration))]
    except psycopg.OperationalError as error:
        raise Unavailable(f"The database can't be migrated: {error}", code="database.unavailable") from error


async def pending(db: Database, *, deadline: float | None = None) -> list[str]:
    """Names of migrations this version needs and the database lacks; empty = current."""
    applied: set[str] = set()
    if await db.fetch_value(TABLE_EXISTS, deadline=deadline):
        applied = {row.name for row in await db.fetch_all(_Name, APPLIED, deadline=deadline)}
    return [migration.name for migration in known() if migration.name not in applied]


def _prepare(conn: psycopg.Connection) -> None:
    conn.execute(CREATE_TABLE)
    conn.execute(CREATE_LOCK)


def _apply(conn: psycopg.Connection, migration: Migration) -> bool:
    """Apply one migration unless it is; the row named `lock` lets one process at a time in."""
    with conn.transaction():
        conn.execute(LOCK)
        applied = {name for (name,) in conn.execute(APPLIED)}
        if migration.name in applied:
            return False
        conn.execute(migration.sql.encode())
        conn.execute(NOTE, {"name": migration.name})
        return True


def _repeat(action: Callable[[], T]) -> T:
    for attempt in range(1, _ATTEMPTS):
        try:
            return action()
        except _REPEATABLE:
            time.sleep(0.05 * attempt)
    return action()


@dataclass(frozen=True)
class _Name:
    name: str
