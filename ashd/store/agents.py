"""Table agents: a tenant's named pointers to bundles."""

# ruff: noqa: S608 - the statements are put together from constants of this room

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from ashd.errors import Fault, NotFound
from ashd.store.pool import Database

COLUMNS = """
    id, tenant_id, name, version, path, bundle_digest, spec, env, config, turn_timeout_ms, created_at, updated_at
"""
# The same name keeps its id; env and config stay when the new ones are absent.
UPSERT = f"""
INSERT INTO agents AS a (id, tenant_id, name, path, bundle_digest, spec, env, config, turn_timeout_ms)
VALUES (
    %(id)s, %(tenant)s, %(name)s, %(path)s, %(digest)s, %(spec)s, coalesce(%(env)s::text, '{{}}'),
    coalesce(%(config)s::text, '{{}}'), %(turn_timeout_ms)s
)
ON CONFLICT (tenant_id, name) DO UPDATE SET
    version = a.version + 1, path = excluded.path, bundle_digest = excluded.bundle_digest, spec = excluded.spec,
    env = coalesce(%(env)s::text, a.env), config = coalesce(%(config)s::text, a.config),
    turn_timeout_ms = excluded.turn_timeout_ms, updated_at = now()
RETURNING {COLUMNS}
"""
GET = f"SELECT {COLUMNS} FROM agents WHERE tenant_id = %(tenant)s AND name = %(name)s"
LIST = f"SELECT {COLUMNS} FROM agents WHERE tenant_id = %(tenant)s ORDER BY name"
DELETE = "DELETE FROM agents WHERE tenant_id = %(tenant)s AND name = %(name)s"


@dataclass(frozen=True)
class Agent:
    """A row of agents. `spec`, `env` and `config` are JSON texts."""

    id: str
    tenant_id: str
    name: str
    version: int
    path: str
    bundle_digest: str
    spec: str
    env: str
    config: str
    turn_timeout_ms: int | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True)
class NewAgent:
    """A deployment: the bundle is stored already. `env` and `config` None = keep what the name has."""

    id: str
    tenant_id: str
    name: str
    path: str
    bundle_digest: str
    spec: str
    env: str | None = None
    config: str | None = None
    turn_timeout_ms: int | None = None


async def upsert(db: Database, new: NewAgent, *, deadline: float | None = None) -> Agent:
    """Deploy: create the agent, or give the one of this name its next version."""
    params = {
        "id": new.id,
        "tenant": new.tenant_id,
        "name": new.name,
        "path": new.path,
        "digest": new.bundle_digest,
        "spec": new.spec,
        "env": new.env,
        "config": new.config,
        "turn_timeout_ms": new.turn_timeout_ms,
    }
    agent = await db.fetch_one(Agent, UPSERT, params, deadline=deadline)
    if agent is None:
        raise Fault("Inserting an agent returned no row")
    return agent


async def get(db: Database, tenant_id: str, name: str, *, deadline: float | None = None) -> Agent:
    """The agent of this tenant. Raises NotFound."""
    agent = await db.fetch_one(Agent, GET, {"tenant": tenant_id, "name": name}, deadline=deadline)
    if agent is None:
        raise not_found()
    return agent


async def list_all(db: Database, tenant_id: str, *, deadline: float | None = None) -> list[Agent]:
    """All agents of a tenant by name."""
    return await db.fetch_all(Agent, LIST, {"tenant": tenant_id}, deadline=deadline)


async def delete(db: Database, tenant_id: str, name: str, *, deadline: float | None = None) -> None:
    """Remove the agent, so that no new session is made of it; its sessions are the caller's. Raises NotFound."""
    if await db.execute(DELETE, {"tenant": tenant_id, "name": name}, deadline=deadline) == 0:
        raise not_found()


def not_found() -> NotFound:
    """The error for an agent that doesn't exist in this tenant."""
    return NotFound("Agent not found", code="agent.not_found")
