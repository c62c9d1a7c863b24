"""Who is calling: API keys of tenants, the internal secret of the fleet, and the first key of an installation."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import os
import tempfile
import time
from collections import OrderedDict
from pathlib import Path
from typing import Any

from falcon.asgi import Request, Response

from ashd import log
from ashd.config.data_dir import API_KEY_FILE, default_data_dir
from ashd.config.schema import CoordinatorConfig
from ashd.errors import Rejected, Unavailable
from ashd.store import keys
from ashd.store.pool import Database

_log = log.get(__name__)

DEFAULT_TENANT = "default"
INTERNAL_PREFIX = "/api/internal/"

_CACHE_S = 10.0
_CACHE_SIZE = 4096


class Authentication:
    """Middleware: no resource outside the open ones is reached without a key.

    A resource is open when it has the attribute `open_without_key`. SECURITY: closed is the default, so a new
    resource that says nothing is closed.
    """

    def __init__(self, config: CoordinatorConfig, db: Database) -> None:
        self._config = config
        self._tenants = _Tenants(db)

    async def process_resource(self, req: Request, resp: Response, resource: Any, params: dict[str, Any]) -> None:
        """Check the key and note its tenant. OPTIONS carries no key (Fetch standard, CORS preflight)."""
        if req.method == "OPTIONS" or getattr(resource, "open_without_key", False):
            return
        if (req.uri_template or "").startswith(INTERNAL_PREFIX):
            self._check_internal(req)
            return
        req.context.tenant = await self._tenant(_bearer(req))

    async def _tenant(self, key: str) -> str:
        if self._config.api_key and _equal(key, self._config.api_key):
            return DEFAULT_TENANT
        tenant = await self._tenants.of(key)
        if tenant is None:
            raise _unauthorized("Invalid API key")
        return tenant

    def _check_internal(self, req: Request) -> None:
        if self._config.internal_secret:
            if not _equal(_bearer(req), self._config.internal_secret):
                raise _unauthorized("Invalid API key")
        elif not _is_loopback(self._config.host):
            raise Unavailable(
                "Internal endpoints are closed: set internal_secret (ASH_INTERNAL_SECRET) on coordinators and runners",
                code="internal.closed",
                retry_after_s=60.0,
            )


def tenant_of(req: Request) -> str:
    """The tenant whose key the request carries; only for resources behind Authentication."""
    tenant: str = req.context.tenant
    return tenant


async def ensure_initial_key(db: Database, config: CoordinatorConfig) -> Path | None:
    """On an installation without any key, mint one and keep it in `<data_dir>/initial-api-key`; returns that path.

    None when a key exists or api_key is configured. RACE: of workers on one host the file decides who makes the key,
    of hosts the database; a crash between the two is made good by the next start, which finds the file.
    """
    if config.api_key or await keys.any_key_exists(db):
        return None
    folder = config.data_dir or default_data_dir(os.environ)
    path = folder / API_KEY_FILE
    text = await asyncio.to_thread(_key_in, path)
    if await keys.adopt_initial(db, text, DEFAULT_TENANT):
        _log.info("initial API key minted", path=str(path))
        return path
    await asyncio.to_thread(path.unlink, missing_ok=True)
    return None


def _key_in(path: Path) -> str:
    """The key in the file, which is made with a new one when it isn't there; whole or not at all, and only ours."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    # SECURITY: mkstemp makes it 0600 from its first moment, and follows nothing that lies there.
    descriptor, draft = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "w", encoding="ascii") as file:
            file.write(keys.new_text() + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
    except FileExistsError:
        pass  # another worker was first, or a start before this one
    finally:
        os.unlink(draft)
    return path.read_text("ascii").strip()


class _Tenants:
    """Tenants of keys, remembered for a few seconds: a deleted key goes on working for no longer."""

    def __init__(self, db: Database) -> None:
        self._db = db
        self._server_key: bytes | None = None
        self._known: OrderedDict[str, tuple[str, float]] = OrderedDict()

    async def of(self, key: str) -> str | None:
        if self._server_key is None:
            self._server_key = await keys.server_key(self._db)
        digest = keys.hash_of(key, self._server_key)
        now = time.monotonic()
        known = self._known.get(digest)
        if known is not None and known[1] > now:
            return known[0]
        tenant = await keys.tenant_of(self._db, digest)
        self._known.pop(digest, None)
        if tenant is not None:
            self._known[digest] = (tenant, now + _CACHE_S)
        while len(self._known) > _CACHE_SIZE:
            self._known.popitem(last=False)
        return tenant


def _bearer(req: Request) -> str:
    header = req.get_header("Authorization")
    if not header:
        raise _unauthorized("Missing Authorization header")
    scheme, _, token = header.partition(" ")
    if scheme.lower() != "bearer" or not token.strip():
        raise _unauthorized("Invalid Authorization header format")
    return token.strip()


def _unauthorized(text: str) -> Rejected:
    return Rejected(text, code="auth.invalid", status=401)


def _equal(given: str, expected: str) -> bool:
    """SECURITY: compared in constant time."""
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape"))


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
