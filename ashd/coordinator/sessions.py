"""/api/sessions: create, list, show and end sessions; attach to their streams."""

from __future__ import annotations

import json
import re
import uuid
from typing import Any

from falcon.asgi import Request, Response

from ashd.coordinator import limits, problems, shapes
from ashd.coordinator.auth import tenant_of
from ashd.coordinator.request import (
    Fields,
    fingerprint,
    idempotency_key,
    json_object,
    path_id,
    query_choice,
    query_integer,
    query_text,
)
from ashd.coordinator.services import Services
from ashd.errors import Rejected
from ashd.store import agents, sessions

STATUSES = ("starting", "active", "paused", "stopped", "ended", "error")
PERMISSION_MODES = ("bypassPermissions", "permissionsByAgent", "default")

_LABEL = re.compile(r"[A-Za-z0-9._/-]{1,63}")
_MOST_LABELS = 64
_MAX_SYSTEM_PROMPT = 1_000_000
_SERVER_KEYS = ("url", "command", "args", "env")


class Sessions:
    """/api/sessions"""

    starts_work_on = "POST"

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response) -> None:
        db, tenant = self._services.db, tenant_of(req)
        chosen: dict[str, Any] = {
            "agent": query_text(req, "agent"),
            "status": query_choice(req, "status", STATUSES),
            "labels": _label_in_query(req),
        }
        limit = query_integer(req, "limit", 100, 1, 1000)
        offset = query_integer(req, "offset", 0, 0, 2**31)
        rows = await sessions.list_newest(db, tenant, **chosen, limit=limit, offset=offset)
        answer: dict[str, Any] = {"sessions": [shapes.session(row) for row in rows]}
        if query_choice(req, "includeTotal", ("true", "false", "1", "0")) in ("true", "1"):
            answer["total"] = await sessions.count(db, tenant, **chosen)
        resp.media = answer

    async def on_post(self, req: Request, resp: Response) -> None:
        body = await json_object(req, self._services.config.max_json_body)
        new = _new_session(tenant_of(req), body, idempotency_key(req))
        if new.limits != "{}":
            await self._check_limits(new)
        created = await sessions.create(self._services.db, new, dead_after_s=self._services.config.runner_dead_after)
        problems.admitted(req)
        session = await self._services.dispatch.start_session(created)
        resp.status = 201
        resp.media = {"session": shapes.session(session)}

    async def _check_limits(self, new: sessions.NewSession) -> None:
        agent = await agents.get(self._services.db, new.tenant_id, new.agent_name)
        most = json.loads(agent.spec).get("limits", {})
        for name, value in json.loads(new.limits).items():
            if value > most.get(name, limits.MOST):
                raise Rejected(f"limits.{name} must be at most the agent's {most[name]}", code="request.invalid")


class Session:
    """/api/sessions/:id"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str) -> None:
        row = await sessions.get(self._services.db, tenant_of(req), path_id(session_id, "session id"))
        resp.media = {"session": shapes.session(row)}

    async def on_delete(self, req: Request, resp: Response, session_id: str) -> None:
        ended = await sessions.end(self._services.db, tenant_of(req), path_id(session_id, "session id"))
        await self._services.dispatch.end_session(ended)
        resp.media = {"session": shapes.session(ended.session)}


class SessionStream:
    """/api/sessions/:id/stream: attach and replay."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str) -> None:
        row = await sessions.get(self._services.db, tenant_of(req), path_id(session_id, "session id"))
        cursor = req.get_header("Last-Event-ID") or query_text(req, "after")
        await self._services.streams.attach(req, resp, row, cursor)


def _new_session(tenant: str, body: Fields, key: str | None) -> sessions.NewSession:
    agent = body.required_text("agent", most=255)
    if body.text("credentialId", most=255) is not None:
        raise Rejected("Invalid or inaccessible credential", code="credential.invalid")
    settings = _settings(body)
    return sessions.NewSession(
        id=str(uuid.uuid4()),
        tenant_id=tenant,
        agent_name=agent,
        model=settings.get("model"),
        settings=json.dumps(settings),
        env=json.dumps(body.env("extraEnv") or {}),
        limits=json.dumps(_limits(body)),
        labels=json.dumps(_labels(body)),
        idempotency_key=key,
        request_hash=None if key is None else fingerprint(body),
    )


def _settings(body: Fields) -> dict[str, Any]:
    """What is stored with the session and given to its sandbox each time."""
    settings = {
        "model": body.text("model", most=100),
        "mcpServers": _mcp_servers(body),
        "systemPrompt": body.text("systemPrompt", most=_MAX_SYSTEM_PROMPT),
        "permissionMode": body.choice("permissionMode", PERMISSION_MODES),
        "allowedTools": body.texts("allowedTools"),
        "disallowedTools": body.texts("disallowedTools"),
        "betas": body.texts("betas"),
        "subagents": body.values.get("subagents"),
        "initialAgent": body.text("initialAgent", most=255),
    }
    return {name: value for name, value in settings.items() if value is not None}


def _mcp_servers(body: Fields) -> dict[str, Any] | None:
    servers = body.mapping("mcpServers")
    for name, value in (servers or {}).items():
        if not isinstance(value, dict):
            body.refuse(f"mcpServers.{name[:80]}", f"must be an object with {', '.join(_SERVER_KEYS)}")
        server = Fields(value, f"mcpServers.{name[:80]}.")
        server.text("url", most=4096)
        server.text("command", most=4096)
        server.texts("args")
        server.env("env")
    return servers


def _limits(body: Fields) -> dict[str, int]:
    fields = Fields(body.mapping("limits") or {}, "limits.")
    asked = {name: fields.integer(name, 1, limits.MOST) for name in limits.NAMES}
    return {name: value for name, value in asked.items() if value is not None}


def _labels(body: Fields) -> dict[str, str]:
    labels = body.mapping("labels") or {}
    if len(labels) > _MOST_LABELS:
        body.refuse("labels", f"must have at most {_MOST_LABELS} entries")
    for name, value in labels.items():
        if not _LABEL.fullmatch(name) or not isinstance(value, str) or not _LABEL.fullmatch(value):
            body.refuse("labels", f"must map names to values, both matching ^{_LABEL.pattern}$")
    return labels


def _label_in_query(req: Request) -> dict[str, str] | None:
    """?label=name=value"""
    text = query_text(req, "label")
    if text is None:
        return None
    name, equals, value = text.partition("=")
    if not equals or not _LABEL.fullmatch(name) or not _LABEL.fullmatch(value):
        raise Rejected(f"label must be name=value, both matching ^{_LABEL.pattern}$", code="request.invalid")
    return {name: value}
