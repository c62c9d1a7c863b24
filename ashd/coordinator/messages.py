"""/api/sessions/:id/messages, /events, /turns: speaking to a session, and what was said."""

from __future__ import annotations

import json
import uuid
from typing import Any

from falcon.asgi import Request, Response

from ashd.coordinator import problems, shapes
from ashd.coordinator.auth import tenant_of
from ashd.coordinator.request import (
    Fields,
    fingerprint,
    idempotency_key,
    json_object,
    path_id,
    prefers,
    query_choice,
    query_integer,
)
from ashd.coordinator.services import Services
from ashd.store import events, sessions, turns

MAX_CONTENT = 500_000
MAX_BLOCKS = 20
EVENT_TYPES = (
    "text",
    "tool_start",
    "tool_result",
    "reasoning",
    "error",
    "turn_complete",
    "lifecycle",
    "mcp_status",
)
MESSAGE_TYPES = ("user", "assistant", "result")

_BLOCK_TYPES = ("text", "image", "document")
_LAST = 2**62


class Messages:
    """/api/sessions/:id/messages"""

    starts_work_on = "POST"

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str) -> None:
        tenant, session_id = tenant_of(req), path_id(session_id, "session id")
        after, limit = query_integer(req, "after", 0, 0, _LAST), query_integer(req, "limit", 100, 1, 1000)
        await sessions.get(self._services.db, tenant, session_id)
        rows = await events.page(
            self._services.db, session_id, after, limit, kinds=[events.MESSAGE], types=MESSAGE_TYPES
        )
        resp.media = {"messages": [shapes.message(row, session_id, tenant) for row in rows]}

    async def on_post(self, req: Request, resp: Response, session_id: str) -> None:
        config = self._services.config
        session_id = path_id(session_id, "session id")
        body = await json_object(req, config.max_message_body)
        key = idempotency_key(req)
        new = turns.NewTurn(
            id=str(uuid.uuid4()),
            tenant_id=tenant_of(req),
            session_id=session_id,
            request=json.dumps({"content": _content(body), "options": _options(body)}),
            timeout_ms=int(config.turn_timeout * 1000),
            idempotency_key=key,
            request_hash=None if key is None else fingerprint(body),
        )
        admitted = await turns.admit(self._services.db, new)
        problems.admitted(req)
        if prefers(req, "respond-async"):
            resp.set_header("Preference-Applied", "respond-async")
            await self._respond_async(resp, admitted)
        else:
            await self._services.streams.post_message(req, resp, admitted)

    async def _respond_async(self, resp: Response, admitted: turns.Admitted) -> None:
        if not admitted.replayed:
            await self._services.streams.launch(admitted)
        resp.status = 202
        resp.media = {"turn": shapes.turn(admitted.turn)}


class SessionEvents:
    """/api/sessions/:id/events"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str) -> None:
        tenant, session_id = tenant_of(req), path_id(session_id, "session id")
        after, limit = query_integer(req, "after", 0, 0, _LAST), query_integer(req, "limit", 100, 1, 1000)
        chosen = query_choice(req, "type", EVENT_TYPES)
        await sessions.get(self._services.db, tenant, session_id)
        kinds = [events.TIMELINE, events.SETTLED, events.CLOSED]
        types = None if chosen is None else [chosen]
        rows = await events.page(self._services.db, session_id, after, limit, kinds=kinds, types=types)
        resp.media = {"events": [shapes.session_event(row, session_id, tenant) for row in rows]}


class Turns:
    """/api/sessions/:id/turns"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str) -> None:
        session_id = path_id(session_id, "session id")
        after, limit = query_integer(req, "after", 0, 0, 2**31 - 1), query_integer(req, "limit", 100, 1, 1000)
        await sessions.get(self._services.db, tenant_of(req), session_id)
        rows = await turns.list_of(self._services.db, session_id, after=after, limit=limit)
        resp.media = {"turns": [shapes.turn(row) for row in rows]}


class Turn:
    """/api/sessions/:id/turns/:t"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, session_id: str, turn_id: str) -> None:
        session_id, turn_id = path_id(session_id, "session id"), path_id(turn_id, "turn id")
        row = await turns.get(self._services.db, tenant_of(req), session_id, turn_id)
        resp.media = {"turn": shapes.turn(row)}


def _content(body: Fields) -> str | list[dict[str, Any]]:
    content = body.values.get("content")
    if isinstance(content, str):
        if not content:
            body.refuse("content", "must not be empty")
        if len(content) > MAX_CONTENT:
            body.refuse("content", f"must have at most {MAX_CONTENT} characters, has {len(content)}")
        return content
    if content is None:
        body.refuse("content", "is required: a string, or an array of blocks")
    blocks = body.objects("content", most=MAX_BLOCKS) or []
    for block in blocks:
        _check_block(block)
    return [block.values for block in blocks]


def _check_block(block: Fields) -> None:
    kind = block.choice("type", _BLOCK_TYPES)
    if kind is None:
        block.refuse("type", f"is required: one of {', '.join(_BLOCK_TYPES)}")
    if kind == "text" and not isinstance(block.values.get("text"), str):
        block.refuse("text", "must be a string")
    if kind != "text" and block.mapping("source") is None:
        block.refuse("source", "is required")


def _options(body: Fields) -> dict[str, Any]:
    options = {
        "includePartialMessages": body.flag("includePartialMessages") or None,
        "model": body.text("model", most=100),
        "maxTurns": body.integer("maxTurns", 1, 2**31 - 1),
        "maxBudgetUsd": body.number("maxBudgetUsd", 0, 1e9),
        "effort": body.text("effort", most=32),
        "thinking": body.mapping("thinking"),
        "outputFormat": body.mapping("outputFormat"),
    }
    return {name: value for name, value in options.items() if value is not None}
