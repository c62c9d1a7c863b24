"""Tables api_keys and server_keys: who may call, without keeping what they call with.

A key is stored as its HMAC-SHA256 under a server key that is minted once and kept in the database: all coordinators
share it, and hashes taken from another place are worth nothing here.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import uuid
from dataclasses import dataclass

from ashd.store.pool import Database

MINT_SERVER_KEY = "INSERT INTO server_keys (name, secret) VALUES ('api-keys', %(secret)s) ON CONFLICT DO NOTHING"
SERVER_KEY = "SELECT secret FROM server_keys WHERE name = 'api-keys'"

CREATE = """
INSERT INTO api_keys (id, tenant_id, label, key_hash, key_prefix)
VALUES (%(id)s, %(tenant)s, %(label)s, %(hash)s, %(prefix)s)
"""
# RACE: of all coordinators starting on an empty database at once, one inserts the key with this origin.
ADOPT_INITIAL = """
INSERT INTO api_keys (id, tenant_id, label, key_hash, key_prefix, origin)
SELECT %(id)s, %(tenant)s, 'initial', %(hash)s, %(prefix)s, 'initial' WHERE NOT EXISTS (SELECT 1 FROM api_keys)
ON CONFLICT DO NOTHING
"""
TENANT_OF = "SELECT tenant_id FROM api_keys WHERE key_hash = %(hash)s"
ANY = "SELECT EXISTS (SELECT 1 FROM api_keys)"

_PREFIX_LENGTH = 8


@dataclass(frozen=True)
class CreatedKey:
    """A new API key; `text` is shown once and stored nowhere."""

    id: str
    text: str


def new_text() -> str:
    """A fresh API key: `ash_` and 24 random bytes in base64url."""
    return "ash_" + secrets.token_urlsafe(24)


def hash_of(text: str, server_key: bytes) -> str:
    """What is stored of an API key."""
    return hmac.new(server_key, text.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()


async def server_key(db: Database, *, deadline: float | None = None) -> bytes:
    """The key under which API keys are hashed; minted at the first call ever, the same for ever after."""
    found = await db.fetch_value(SERVER_KEY, deadline=deadline)
    if found is None:
        await db.execute(MINT_SERVER_KEY, {"secret": secrets.token_bytes(32)}, deadline=deadline)
        found = await db.fetch_value(SERVER_KEY, deadline=deadline)
    return bytes(found)


async def create(db: Database, tenant_id: str, label: str = "", *, deadline: float | None = None) -> CreatedKey:
    """Make an API key of a tenant."""
    key = CreatedKey(str(uuid.uuid4()), new_text())
    params = await _params(db, key, tenant_id, deadline)
    await db.execute(CREATE, {**params, "label": label}, deadline=deadline)
    return key


async def adopt_initial(db: Database, text: str, tenant_id: str, *, deadline: float | None = None) -> bool:
    """Make `text` the first API key of this database; True when it is or was already, False when another one is."""
    key = CreatedKey(str(uuid.uuid4()), text)
    params = await _params(db, key, tenant_id, deadline)
    await db.execute(ADOPT_INITIAL, params, deadline=deadline)
    return await tenant_of(db, params["hash"], deadline=deadline) is not None


async def tenant_of(db: Database, key_hash: str, *, deadline: float | None = None) -> str | None:
    """The tenant whose key has this hash_of, or None."""
    tenant: str | None = await db.fetch_value(TENANT_OF, {"hash": key_hash}, deadline=deadline)
    return tenant


async def any_key_exists(db: Database, *, deadline: float | None = None) -> bool:
    """Whether any API key of any tenant exists."""
    return bool(await db.fetch_value(ANY, deadline=deadline))


async def _params(db: Database, key: CreatedKey, tenant_id: str, deadline: float | None) -> dict[str, str]:
    digest = hash_of(key.text, await server_key(db, deadline=deadline))
    return {"id": key.id, "tenant": tenant_id, "hash": digest, "prefix": key.text[:_PREFIX_LENGTH]}
