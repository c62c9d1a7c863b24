"""/api/agents: deploying, listing and deleting agents."""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import re
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path

from falcon.asgi import Request, Response

from ashd.coordinator import bundles, shapes
from ashd.coordinator.auth import tenant_of
from ashd.coordinator.request import Fields, json_object, save_body
from ashd.coordinator.services import Services
from ashd.errors import Rejected
from ashd.store import agents, sessions
from ashd.store import bundles as stored_bundles

NAME = re.compile(r"[a-zA-Z0-9_-]{1,255}")

_MAX_FILES = 10_000
_MAX_SYSTEM_PROMPT = 1_000_000
# Packing and storing hundreds of MiB outlasts database_timeout, which is meant for small statements.
_STORE_TIMEOUT_S = 300.0
# How many sessions of a deleted agent are ended at once.
_ENDED_AT_ONCE = 16
# PERF: JSON deploys and packing take memory and a thread each; more of them at once wait.
_PACKED_AT_ONCE = 2

_Pack = Callable[[Path], bundles.Bundle]


class Deployments:
    """Packs a bundle, stores it, and points the agent at it."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._turns = asyncio.Semaphore(_PACKED_AT_ONCE)

    async def deploy(
        self, tenant: str, name: str, pack: _Pack, *, path: str = "", env: str | None = None, config: str | None = None
    ) -> agents.Agent:
        """`pack` runs in a thread and writes to the path it is given."""
        async with self._turns:
            with tempfile.TemporaryDirectory(prefix="ashd-bundle-", dir=await self.staging()) as folder:
                bundle = await asyncio.to_thread(pack, Path(folder, "bundle"))
                deadline = time.monotonic() + _STORE_TIMEOUT_S
                await stored_bundles.store(self._services.db, bundle.digest, bundle.archive, deadline=deadline)
        new = agents.NewAgent(
            id=str(uuid.uuid4()),
            tenant_id=tenant,
            name=name,
            path=path,
            bundle_digest=bundle.digest,
            spec=json.dumps(bundle.spec.as_json()),
            env=env,
            config=config,
            turn_timeout_ms=bundle.spec.turnTimeoutMs,
        )
        return await agents.upsert(self._services.db, new)

    async def staging(self) -> Path | None:
        """Where uploads lie while they are packed; None = the system's folder for temporary files."""
        if self._services.config.data_dir is None:
            return None
        folder = self._services.config.data_dir / "staging"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True, mode=0o700)
        return folder


class Agents:
    """/api/agents"""

    def __init__(self, services: Services, deployments: Deployments) -> None:
        self._services = services
        self._deployments = deployments

    async def on_get(self, req: Request, resp: Response) -> None:
        rows = await agents.list_all(self._services.db, tenant_of(req))
        resp.media = {"agents": [shapes.agent(row) for row in rows]}

    async def on_post(self, req: Request, resp: Response) -> None:
        config = self._services.config
        body = await json_object(
            req,
            min(config.max_message_body, config.max_upload),
            advice="send larger agents as a tar.gz to PUT /api/agents/:name/bundle",
        )
        name = body.required_text("name", most=255, pattern=NAME)
        env, free = body.env("env"), body.mapping("config")
        pack, path = self._content(body)
        row = await self._deployments.deploy(
            tenant_of(req),
            name,
            pack,
            path=path,
            env=None if env is None else json.dumps(env),
            config=None if free is None else json.dumps(free),
        )
        resp.status = 201
        resp.media = {"agent": shapes.agent(row)}

    def _content(self, body: Fields) -> tuple[_Pack, str]:
        """How to pack what the request brings, and the path it brings it from, if it does."""
        limit = self._services.config.max_upload
        given = [name for name in ("files", "path", "systemPrompt") if body.values.get(name) is not None]
        if len(given) != 1:
            raise Rejected("Give exactly one of files, path, systemPrompt", code="request.invalid")
        if given == ["path"]:
            folder = _allowed_folder(body.required_text("path", most=4096), self._services.config.agent_roots)
            return (lambda archive: bundles.pack_folder(folder, archive, limit)), str(folder)
        if given == ["systemPrompt"]:
            files = [("CLAUDE.md", body.required_text("systemPrompt", most=_MAX_SYSTEM_PROMPT).encode())]
        else:
            files = [_file(item) for item in body.objects("files", most=_MAX_FILES) or []]
        return (lambda archive: bundles.pack_files(files, archive, limit)), ""


class Agent:
    """/api/agents/:name"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, name: str) -> None:
        resp.media = {"agent": shapes.agent(await agents.get(self._services.db, tenant_of(req), _known(name)))}

    async def on_delete(self, req: Request, resp: Response, name: str) -> None:
        tenant = tenant_of(req)
        await agents.get(self._services.db, tenant, _known(name))
        # ORDER: sessions first, so that a failure here leaves the agent to be deleted again; and once more afterwards,
        # for those created meanwhile.
        await self._end_sessions(tenant, name)
        await agents.delete(self._services.db, tenant, name)
        await self._end_sessions(tenant, name)
        resp.media = {"ok": True}

    async def _end_sessions(self, tenant: str, name: str) -> None:
        allowed = asyncio.Semaphore(_ENDED_AT_ONCE)

        async def end(session_id: str) -> None:
            async with allowed:
                ended = await sessions.end(self._services.db, tenant, session_id)
                await self._services.dispatch.end_session(ended)

        async with asyncio.TaskGroup() as group:
            for session_id in await sessions.live_of_agent(self._services.db, tenant, name):
                group.create_task(end(session_id), name=f"end {session_id}")


class AgentBundle:
    """/api/agents/:name/bundle: the body is the tar.gz itself, streamed to disk."""

    def __init__(self, services: Services, deployments: Deployments) -> None:
        self._services = services
        self._deployments = deployments

    async def on_put(self, req: Request, resp: Response, name: str) -> None:
        Fields({"name": name}).required_text("name", most=255, pattern=NAME)
        limit = self._services.config.max_upload
        staging = await self._deployments.staging()
        with tempfile.TemporaryDirectory(prefix="ashd-upload-", dir=staging) as folder:
            upload = Path(folder, "upload")
            await save_body(req, upload, limit)
            row = await self._deployments.deploy(
                tenant_of(req), name, lambda archive: bundles.pack_tar_gz(upload, archive, limit)
            )
        resp.status = 201
        resp.media = {"agent": shapes.agent(row)}


def _known(name: str) -> str:
    """The name, if an agent could have it."""
    if not NAME.fullmatch(name):
        raise agents.not_found()
    return name


def _file(item: Fields) -> tuple[str, bytes]:
    path = item.required_text("path", most=bundles.MAX_PATH_BYTES)
    content = item.values.get("content")
    if not isinstance(content, str):
        item.refuse("content", "is required, in base64")
    try:
        return path, base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Rejected(f"content of {path} is not base64: {error}", code="request.invalid") from error


def _allowed_folder(text: str, roots: tuple[str, ...]) -> Path:
    """The folder, with links resolved. SECURITY: only below a configured root, also after resolving."""
    if not roots:
        raise Rejected(
            "Deploying by path is off: set agent_roots on the coordinator, or send files", code="agent.path_denied"
        )
    if not Path(text).is_absolute():
        raise Rejected("path must be absolute: it names a folder on the coordinator's host", code="request.invalid")
    folder = Path(text).resolve()
    if not any(folder.is_relative_to(Path(root).resolve()) for root in roots):
        raise Rejected(f"path must lie below one of agent_roots: {', '.join(roots)}", code="agent.path_denied")
    if not folder.is_dir():
        raise Rejected(f"path {text} is not a folder on the coordinator's host", code="agent.path_missing")
    return folder
