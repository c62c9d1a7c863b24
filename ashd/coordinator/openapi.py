"""The HTTP API as an OpenAPI 3.1 document, written by hand beside the code that answers.

Covers: every route of app.py, which tests/house/test_openapi.py holds it to. Leaves out: serving it (docs.py).
Rules that code and document share are taken from the code.
"""

from __future__ import annotations

import functools
from typing import Any

from ashd import __version__
from ashd.coordinator import agents, limits, messages, sessions
from ashd.coordinator.registry import RUNNER_ID
from ashd.domain.isolation import LEVELS

Data = dict[str, Any]

_KEY: list[Data] = [{"apiKey": []}]
_SECRET: list[Data] = [{"internalSecret": []}]
_OPEN: list[Data] = []
_JSON = "application/json"

_ERRORS = {
    400: "A field, parameter or header breaks its rule, or the state does not allow this; `error` says which.",
    401: "No key, or one nobody has.",
    404: "No such thing, or another tenant's, which looks the same.",
    409: "Not now: `turn.open` (retryable), or `idempotency.mismatch`.",
    413: "The body is above its limit.",
    415: "The body is not `application/json`.",
    503: "Something ashd needs does not answer, or there is no room now; `Retry-After` says when to come again.",
}


@functools.cache
def document() -> Data:
    """The document. Made once; not to be changed."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ashd",
            "version": __version__,
            "summary": "Runs AI-agent sessions in sandboxes, on one machine or a fleet.",
            "description": (
                "JSON is camelCase, times are ISO-8601 in UTC with milliseconds, ids are UUIDs. Unknown fields of a "
                "body are ignored. Every answer carries `X-Request-Id`: the request's own, or a new one. Every error "
                "has the one envelope `Error`."
            ),
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "tags": [
            {"name": "Service", "description": "Open without a key."},
            {"name": "Agents", "description": "What can be run: named pointers to bundles of files."},
            {"name": "Sessions", "description": "Durable conversations, each in a sandbox of its own."},
            {"name": "Messages", "description": "Speaking to a session, and what was said."},
            {"name": "Fleet", "description": "For runners and operators; takes the internal secret."},
        ],
        "paths": {**_service(), **_agents(), **_sessions(), **_messages(), **_fleet()},
        "components": {
            "securitySchemes": {
                "apiKey": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API key, `ash_…`; its tenant's rows.",
                },
                "internalSecret": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`ASH_INTERNAL_SECRET`. Where none is set, nothing is needed on a loopback "
                    "listener, and others answer 503.",
                },
            },
            "schemas": {**_objects(), **_bodies(), **_frames()},
            "responses": {_error_name(status): _error(text) for status, text in _ERRORS.items()},
        },
    }


# ------------------------------------------------------------ paths


def _service() -> Data:
    html = {"text/html": {"schema": {"type": "string"}}}
    return {
        "/health": _path(
            get=_op("Service", "Is the process alive", _ok(_ref("Health")), (), _OPEN),
            head=_op("Service", "Is the process alive", _bare(), (), _OPEN),
        ),
        "/ready": _path(
            get=_op("Service", "Can it serve", _ok(_object({"status": {"const": "ready"}})), (503,), _OPEN),
            head=_op("Service", "Can it serve", _bare(), (503,), _OPEN),
        ),
        "/metrics": _path(
            get=_op("Service", "Numbers for Prometheus", _answer(200, "Text", _TEXT), (), _OPEN),
            head=_op("Service", "Numbers for Prometheus", _bare(), (), _OPEN),
        ),
        "/openapi.json": _path(
            get=_op("Service", "This document", _ok({"type": "object"}), (), _OPEN),
            head=_op("Service", "This document", _bare(), (), _OPEN),
        ),
        "/docs": _path(
            get=_op("Service", "This document to read", _answer(200, "A page", html), (), _OPEN),
            head=_op("Service", "This document to read", _bare(), (), _OPEN),
        ),
    }


def _agents() -> Data:
    one = _object({"agent": _ref("Agent")})
    return {
        "/api/agents": _path(
            get=_op("Agents", "List agents, by name", _ok(_object({"agents": _array(_ref("Agent"))})), (401,)),
            post=_op(
                "Agents",
                "Deploy an agent",
                _ok(one, 201),
                (400, 401, 413, 415),
                body=_json("NewAgent"),
                description=(
                    "The same name again keeps the agent's id and makes its next version: the bundle is replaced "
                    "whole, `env` kept when absent. The files must hold an entry point: `agent.yaml`, `agent.py` or "
                    "`CLAUDE.md`."
                ),
            ),
        ),
        "/api/agents/{name}": _path(
            [_NAME],
            get=_op("Agents", "Show an agent", _ok(one), (401, 404)),
            delete=_op(
                "Agents", "Delete an agent and end its sessions", _ok(_object({"ok": {"const": True}})), (401, 404)
            ),
        ),
        "/api/agents/{name}/bundle": _path(
            [_NAME],
            put=_op(
                "Agents",
                "Deploy an agent from a tar.gz",
                _ok(one, 201),
                (400, 401, 413),
                body={"required": True, "content": {"application/gzip": {}}},
                description="For agents larger than a JSON body may be; streamed to disk.",
            ),
        ),
    }


def _sessions() -> Data:
    one = _object({"session": _ref("Session")})
    return {
        "/api/sessions": _path(
            get=_op(
                "Sessions",
                "List sessions, newest first",
                _ok(_object({"sessions": _array(_ref("Session"))}, {"total": {"type": "integer"}})),
                (400, 401),
                parameters=[
                    _query("agent", {"type": "string", "maxLength": 255}, "Of this agent only."),
                    _query("status", {"enum": list(sessions.STATUSES)}, "In this status only."),
                    _query("label", {"type": "string", "examples": ["team=search"]}, "With this label: `name=value`."),
                    _query("limit", _integer(1, 1000, default=100), "At most so many."),
                    _query("offset", _integer(0, 2**31, default=0), "Leave out so many first."),
                    _query("includeTotal", {"enum": ["true", "false", "1", "0"]}, "Count all of them, too."),
                ],
            ),
            post=_op(
                "Sessions",
                "Create a session",
                _ok(one, 201),
                (400, 401, 404, 409, 413, 415, 503),
                body=_json("NewSession"),
                parameters=[_IDEMPOTENCY_KEY],
                description="Answers when its sandbox is ready. Errors say in `admitted` whether one may be starting.",
            ),
        ),
        "/api/sessions/{session_id}": _path(
            [_SESSION],
            get=_op("Sessions", "Show a session", _ok(one), (400, 401, 404)),
            delete=_op(
                "Sessions",
                "End a session",
                _ok(one),
                (400, 401, 404),
                description="From every status, and again and again. Its messages stay readable.",
            ),
        ),
        "/api/sessions/{session_id}/stream": _path(
            [_SESSION],
            get=_op(
                "Messages",
                "Follow a session",
                {**_stream(), **_answer(204, "The session has ended and there is nothing more.")},
                (400, 401, 404),
                parameters=[
                    _header("Last-Event-ID", {"type": "string"}, "The cursor to go on from; browsers send it."),
                    _query("after", {"type": "string"}, "The same, for others; `0` is the beginning."),
                ],
                description=(
                    "Replays what came after the cursor, then goes on live, over turns and breaks, until the session "
                    "has ended. Without a cursor it begins at the last saved event. Any coordinator answers it."
                ),
            ),
        ),
    }


def _messages() -> Data:
    after, limit = _query("after", _integer(0, default=0), "Those behind this number."), _LIMIT
    pages = "After 8 MiB a page ends early: only an empty one is the end."
    return {
        "/api/sessions/{session_id}/messages": _path(
            [_SESSION],
            get=_op(
                "Messages",
                "List messages, oldest first",
                _ok(_object({"messages": _array(_ref("Message"))})),
                (400, 401, 404),
                parameters=[after, limit],
                description=pages,
            ),
            post=_op(
                "Messages",
                "Send a message, and stream the turn it begins",
                {**_stream(), **_ok(_object({"turn": _ref("Turn")}), 202, "With `Prefer: respond-async`.")},
                (400, 401, 404, 409, 413, 415, 503),
                body=_json("NewMessage"),
                parameters=[
                    _IDEMPOTENCY_KEY,
                    _header("Prefer", {"type": "string", "examples": ["respond-async"]}, "Don't stream (RFC 7240)."),
                ],
                description=(
                    "The stream ends with `done`, sent when everything before it is saved. A client that leaves does "
                    "not stop the turn. The same `Idempotency-Key` again streams the same turn from its start."
                ),
            ),
        ),
        "/api/sessions/{session_id}/events": _path(
            [_SESSION],
            get=_op(
                "Messages",
                "List timeline events, oldest first",
                _ok(_object({"events": _array(_ref("SessionEvent"))})),
                (400, 401, 404),
                parameters=[after, limit, _query("type", {"enum": list(messages.EVENT_TYPES)}, "Of this type only.")],
                description=pages,
            ),
        ),
        "/api/sessions/{session_id}/turns": _path(
            [_SESSION],
            get=_op(
                "Messages",
                "List turns, oldest first",
                _ok(_object({"turns": _array(_ref("Turn"))})),
                (400, 401, 404),
                parameters=[_query("after", _integer(0, 2**31 - 1, default=0), "Leave out so many first."), limit],
            ),
        ),
        "/api/sessions/{session_id}/turns/{turn_id}": _path(
            [_SESSION, _in_path("turn_id", _UUID)],
            get=_op("Messages", "Show a turn", _ok(_object({"turn": _ref("Turn")})), (400, 401, 404)),
        ),
    }


def _fleet() -> Data:
    done = _ok(_object({"ok": {"const": True}}))
    listed = _object({"runners": _array(_ref("Runner")), "count": {"type": "integer"}, "hasLocal": {"type": "boolean"}})
    addresses = _object({"addresses": _array({"type": "string", "examples": ["10.0.0.1:4101"]})})
    return {
        "/api/internal/registry": _path(
            get=_op("Fleet", "Where runners find the gRPC registries", _ok(addresses), (401, 503), _SECRET)
        ),
        "/api/internal/runners": _path(get=_op("Fleet", "List runners", _ok(listed), (401, 503), _SECRET)),
        "/api/internal/runners/register": _path(
            post=_op("Fleet", "Register a runner", done, _POSTED, _SECRET, body=_json("RunnerRegistration"))
        ),
        "/api/internal/runners/heartbeat": _path(
            post=_op("Fleet", "Say that a runner lives", done, (*_POSTED, 404), _SECRET, body=_json("RunnerHeartbeat"))
        ),
        "/api/internal/runners/deregister": _path(
            post=_op(
                "Fleet",
                "Take a runner out; its sessions are paused",
                done,
                _POSTED,
                _SECRET,
                body=_json("RunnerDeregistration"),
            )
        ),
        "/api/internal/runners/{runner_id}/sandboxes": _path(
            [_in_path("runner_id", _RUNNER_ID)],
            get=_op(
                "Fleet",
                "List a runner's sandboxes",
                _ok(_object({"sandboxes": _array(_ref("Sandbox"))})),
                (401, 404, 503),
                _SECRET,
                description="The runner itself is asked; 503 when it does not answer.",
            ),
        ),
    }


# ------------------------------------------------------------ schemas


def _objects() -> Data:
    count = {"type": "integer", "minimum": 0}
    sequence = {"type": "integer", "minimum": 1, "description": "1, 2, … within the session."}
    pool = ("total", "cold", "warming", "warm", "waiting", "running", "maxCapacity")
    hits = ("resumeWarmHits", "resumeColdHits", "preWarmHits")
    return {
        "Error": _object(
            {
                "error": {"type": "string", "description": "For people; may change."},
                "statusCode": {"type": "integer"},
                "code": {"type": "string", "description": "For programs; stable.", "examples": ["session.not_found"]},
                "retryable": {"type": "boolean", "description": "The same request may succeed later."},
            },
            {
                "admitted": {
                    "enum": ["no", "unknown"],
                    "description": "On requests that start work: whether that may have begun.",
                }
            },
        ),
        "Health": _object(
            {
                "status": {"const": "ok"},
                "activeSessions": count,
                "activeSandboxes": count,
                "uptime": {**count, "description": "Seconds, of this worker."},
                "pool": _object(dict.fromkeys((*pool, *hits), count)),
                "version": {"type": "string"},
                "coordinatorId": {"type": "string", "description": "`<hostname>-<pid>` of the worker that answers."},
                "remoteRunners": count,
            }
        ),
        "Agent": _object(
            {
                "id": _UUID,
                "name": _AGENT_NAME,
                "version": {"type": "integer", "minimum": 1},
                "path": {"type": "string", "description": "The folder it was deployed from, or empty."},
                "createdAt": _TIME,
                "updatedAt": _TIME,
                "tenantId": {"type": "string"},
                "digest": {"type": "string", "description": "Of its bundle."},
            },
            {
                "env": {
                    "type": "object",
                    "additionalProperties": {"const": "***"},
                    "description": "Values are masked.",
                },
                "config": {"type": "object"},
            },
        ),
        "Session": _object(
            {
                "id": _UUID,
                "agentName": _AGENT_NAME,
                "sandboxId": {"type": "string", "description": "Empty until there was one."},
                "status": {"enum": list(sessions.STATUSES)},
                "createdAt": _TIME,
                "lastActiveAt": _TIME,
                "tenantId": {"type": "string"},
                "runnerId": _or_null({"type": "string"}),
                "parentSessionId": _or_null(_UUID),
                "lastSeq": {**count, "description": "Number of its last saved event."},
                "openTurnId": _or_null(_UUID),
                "generation": _or_null({"type": "integer"}),
                "isolation": {
                    "enum": [*LEVELS, None],
                    "description": "How its last sandbox is closed off; null until it had one.",
                },
                "limits": {
                    **_or_null(_LIMITS),
                    "description": "What its last sandbox may use, all told; null until it had one.",
                },
            },
            {
                "model": {"type": "string"},
                "config": _object({}, _SESSION_SETTINGS),
                "labels": _LABELS,
                "statusCause": {"type": "string", "description": "Why it is not active."},
            },
        ),
        "Message": _object(
            {
                "id": _UUID,
                "sessionId": _UUID,
                "role": {"enum": ["user", "assistant"]},
                "content": {"type": "string", "contentMediaType": _JSON, "description": "The message object, as JSON."},
                "sequence": sequence,
                "createdAt": _TIME,
                "tenantId": {"type": "string"},
            }
        ),
        "SessionEvent": _object(
            {
                "id": _UUID,
                "sessionId": _UUID,
                "type": {"enum": list(messages.EVENT_TYPES)},
                "sequence": sequence,
                "createdAt": _TIME,
                "tenantId": {"type": "string"},
                "data": _or_null({"type": "string", "contentMediaType": _JSON}),
            }
        ),
        "Turn": _object(
            {
                "id": _UUID,
                "sessionId": _UUID,
                "state": {"enum": ["accepted", "launched", "settled"]},
                "outcome": _or_null(_OUTCOME),
                "firstSeq": _or_null({"type": "integer"}),
                "lastSeq": _or_null({"type": "integer"}),
                "createdAt": _TIME,
                "launchedAt": _or_null(_TIME),
                "settledAt": _or_null(_TIME),
                "usage": _or_null({"type": "object"}),
            },
            {"error": {"type": "string"}, "errorCode": _or_null({"type": "string"})},
        ),
        "Runner": _object(
            {
                "runnerId": {"type": "string"},
                "host": {"type": "string"},
                "port": {"type": "integer"},
                "active": count,
                "max": count,
                "lastHeartbeat": _TIME,
                "warming": count,
                "warm": count,
                "paused": count,
                "draining": {"type": "boolean"},
                "healthy": {"type": "boolean"},
                "memory": _object({"totalMb": count, "usedMb": count, "perSandboxMb": {"type": "number"}}),
                "version": {"type": "string"},
                "isolation": {"enum": [*LEVELS, None], "description": "What its self-test showed; null: not told."},
                "enforced": _array({"type": "string", "examples": ["cgroup-memory"]}),
                "refusing": {**_or_null({"type": "string"}), "description": "Why it admits no session now."},
                "usage": {**_object(_USAGE), "description": "Of all its sandboxes, as of its last heartbeat."},
                "orphans": {
                    **_COUNTERS,
                    "description": "Removed since it started, by kind.",
                    "examples": [{"process": 1}],
                },
                "kills": {**_COUNTERS, "description": "Since it started, by cause.", "examples": [{"tool_oom": 2}]},
            }
        ),
        "Sandbox": _object(
            {
                "sandboxId": _UUID,
                "sessionId": {**_or_null(_UUID), "description": "null: warm, nobody's."},
                "epoch": count,
                "state": {"type": "string", "examples": ["warm", "waiting", "running"]},
                "isolation": {"enum": [*LEVELS, None]},
                "limits": _LIMITS,
                "memoryMb": {**_AMOUNT, "description": "As its cgroup counts it, the kernel's included."},
                **_USAGE,
            }
        ),
    }


def _bodies() -> Data:
    most = 2**31 - 1
    files = _object({"path": {"type": "string"}, "content": {"type": "string", "contentEncoding": "base64"}})
    prompt = {"type": "string", "minLength": 1, "maxLength": 1_000_000, "examples": ["You are a kind assistant."]}
    free = {"type": "object"}
    source = {"required": ["source"], "properties": {"type": {"enum": ["image", "document"]}, "source": free}}
    text = {"required": ["text"], "properties": {"type": {"const": "text"}, "text": {"type": "string"}}}
    block = {"type": "object", "required": ["type"], "oneOf": [text, source]}
    return {
        "NewAgent": {
            **_object(
                {"name": _AGENT_NAME},
                {
                    "files": {**_array(files), "minItems": 1, "maxItems": 10_000},
                    "path": {
                        "type": "string",
                        "description": "A folder of the coordinator's host, below `agent_roots`.",
                    },
                    "systemPrompt": {**prompt, "description": "Alone it becomes the agent's `CLAUDE.md`."},
                    "env": _ENV,
                    "config": free,
                },
            ),
            "oneOf": [{"required": [name]} for name in ("files", "path", "systemPrompt")],
        },
        "NewSession": _object(
            {"agent": {"type": "string", "minLength": 1, "maxLength": 255, "examples": ["hello"]}},
            {
                "extraEnv": {**_ENV, "description": "Wins over the agent's."},
                "model": _MODEL,
                "systemPrompt": {**prompt, "minLength": 0},
                "mcpServers": {"type": "object", "additionalProperties": _MCP_SERVER},
                **_SESSION_SETTINGS,
                "limits": {
                    **_object({}, {name: _integer(1, limits.MOST) for name in limits.NAMES}),
                    "description": "At most the agent's own. The runner caps them by its own; see the session's.",
                },
                "labels": _LABELS,
            },
        ),
        "NewMessage": _object(
            {
                "content": {
                    "oneOf": [
                        {"type": "string", "minLength": 1, "maxLength": messages.MAX_CONTENT},
                        {**_array(block), "minItems": 1, "maxItems": messages.MAX_BLOCKS},
                    ],
                    "examples": ["Hello!"],
                }
            },
            {
                "includePartialMessages": {"type": "boolean", "description": "Stream deltas, too."},
                "model": _MODEL,
                "maxTurns": _integer(1, most),
                "maxBudgetUsd": {"type": "number", "minimum": 0, "maximum": 1e9},
                "effort": {"type": "string", "maxLength": 32},
                "thinking": free,
                "outputFormat": free,
            },
        ),
        "RunnerRegistration": _object(
            {
                "runnerId": _RUNNER_ID,
                "host": {"type": "string", "minLength": 1, "maxLength": 255, "examples": ["10.0.0.2"]},
                "port": _integer(1, 65535),
                "maxSandboxes": _integer(0, most),
            },
            {"isolation": {"enum": list(LEVELS)}, "enforced": _array({"type": "string"})},
        ),
        "RunnerHeartbeat": _object(
            {"runnerId": _RUNNER_ID},
            {
                "activeCount": _integer(0, most),
                "stats": _object({}, {name: _integer(0, most) for name in ("running", "warming", "warm")}),
                "refusing": {"type": "string", "maxLength": 1000},
                "usage": _object({}, _USAGE),
                "orphans": _COUNTERS,
                "kills": _COUNTERS,
            },
        ),
        "RunnerDeregistration": _object({"runnerId": _RUNNER_ID}),
    }


def _frames() -> Data:
    """Frames of a stream; `Frame` is any of them."""
    text: Data = {"type": "string"}
    anything: Data = {}
    delta = _object({"delta": text})
    turn = {"sessionId": _UUID, "turnId": _UUID}
    data = {
        "session_start": _object({"sessionId": _UUID, "version": text, "turnId": _or_null(_UUID)}),
        "text_delta": delta,
        "thinking_delta": delta,
        "tool_use": _object({"id": anything, "name": anything, "input": anything}),
        "tool_result": _object({"tool_use_id": anything, "content": anything, "is_error": anything}),
        "turn_complete": _object({"numTurns": anything, "result": anything}),
        "message": {"type": "object", "description": "The agent's message, untouched."},
        "user_message": _object({"turnId": _UUID, "content": anything}),
        "lifecycle": {
            "type": "object",
            "required": ["action"],
            "properties": {"action": text},
            "description": "What happened to the sandbox: `memory_warning`, `memory_kill`, …; `sandbox_closed` on "
            "attached streams only.",
        },
        "error": _object({"error": anything, "code": anything, "retryable": {"type": "boolean"}}),
        "reset": _object({"cursor": text}),
        "done": _object({**turn, "outcome": _OUTCOME, "lastSeq": {"type": "integer", "minimum": 0}}),
    }
    frames = {_frame_name(event): _frame({"const": event}, schema) for event, schema in data.items()}
    others = _frame({"type": "string", "not": {"enum": list(data)}}, {"type": "object"})
    frames["FrameOfAnAgent"] = {**others, "description": "A block or delta of a type of the agent's own."}
    return {**frames, "Frame": {"oneOf": [_ref(name) for name in frames]}}


# ------------------------------------------------------------ small parts

_UUID: Data = {"type": "string", "format": "uuid"}
_TIME: Data = {"type": "string", "format": "date-time", "examples": ["2026-01-31T12:00:00.000Z"]}
_TEXT: Data = {"text/plain": {"schema": {"type": "string"}}}
_POSTED = (400, 401, 413, 415, 503)
_USAGE: Data = {
    "pssMb": {"type": "number", "minimum": 0},
    "cpuSeconds": {"type": "number", "minimum": 0},
    "processes": {"type": "integer", "minimum": 0},
    "descriptors": {"type": "integer", "minimum": 0},
    "diskMb": {"type": "number", "minimum": 0},
}
_AGENT_NAME: Data = {"type": "string", "pattern": f"^{agents.NAME.pattern}$", "examples": ["hello"]}
_RUNNER_ID: Data = {"type": "string", "pattern": f"^{RUNNER_ID.pattern}$", "examples": ["runner-1"]}
_AMOUNT: Data = {"type": "number", "minimum": 0}
_COUNTERS: Data = {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}}
_MODEL: Data = {"type": "string", "maxLength": 100}
_OUTCOME: Data = {"enum": ["completed", "interrupted", "failed", "lost", "oom", "timeout"]}
_TEXTS: Data = {"type": "array", "items": {"type": "string"}, "maxItems": 1000}
_ENV: Data = {"type": "object", "additionalProperties": {"type": "string"}}
_LABELS: Data = {
    "type": "object",
    "maxProperties": 64,
    "propertyNames": {"pattern": "^[A-Za-z0-9._/-]{1,63}$"},
    "additionalProperties": {"type": "string", "pattern": "^[A-Za-z0-9._/-]{1,63}$"},
}
_MCP_SERVER: Data = {
    "type": "object",
    "properties": {"url": {"type": "string"}, "command": {"type": "string"}, "args": _TEXTS, "env": _ENV},
}
_SESSION_SETTINGS: Data = {
    "permissionMode": {"enum": list(sessions.PERMISSION_MODES)},
    "allowedTools": _TEXTS,
    "disallowedTools": _TEXTS,
    "betas": _TEXTS,
    "subagents": {},
    "initialAgent": {"type": "string", "maxLength": 255},
}


def _object(required: Data, optional: Data | None = None) -> Data:
    shape: Data = {"type": "object", "properties": {**required, **(optional or {})}}
    return {**shape, "required": list(required)} if required else shape


def _array(items: Data) -> Data:
    return {"type": "array", "items": items}


def _integer(least: int, most: int | None = None, **more: Any) -> Data:
    return {"type": "integer", "minimum": least, **({} if most is None else {"maximum": most}), **more}


def _or_null(schema: Data) -> Data:
    return {"oneOf": [schema, {"type": "null"}]}


def _ref(name: str) -> Data:
    return {"$ref": f"#/components/schemas/{name}"}


def _frame(event: Data, data: Data) -> Data:
    cursor = {"type": "string", "description": "The cursor behind this frame."}
    return _object({"id": cursor, "event": event, "data": data})


def _frame_name(event: str) -> str:
    return "Frame" + "".join(word.title() for word in event.split("_"))


def _error_name(status: int) -> str:
    return f"Error{status}"


def _error(text: str) -> Data:
    return {"description": text, "content": {_JSON: {"schema": _ref("Error")}}}


def _path(parameters: list[Data] | None = None, **operations: Data) -> Data:
    return {**({"parameters": parameters} if parameters else {}), **operations}


def _op(
    tag: str, summary: str, success: Data, errors: tuple[int, ...], security: list[Data] = _KEY, **more: Any
) -> Data:
    """An operation; `more` has its parameters, description and `body`."""
    body = {"requestBody": more.pop("body")} if "body" in more else {}
    failures = {str(status): {"$ref": f"#/components/responses/{_error_name(status)}"} for status in sorted(errors)}
    responses = {**success, **failures, "default": _error("Any other error.")}
    return {"tags": [tag], "summary": summary, **more, **body, "responses": responses, "security": security}


def _answer(status: int, text: str, content: Data | None = None) -> Data:
    return {str(status): {"description": text, **({"content": content} if content else {})}}


def _ok(schema: Data, status: int = 200, text: str = "Done") -> Data:
    return _answer(status, text, {_JSON: {"schema": schema}})


def _bare() -> Data:
    return _answer(200, "The headers of GET")


def _stream() -> Data:
    text = (
        "Server-sent events. A frame has the lines `id` (the cursor behind it), `event` and `data` (one line of JSON); "
        "here each is shown taken apart. After 15 s of silence comes the comment `: keep-alive`."
    )
    return _answer(200, text, {"text/event-stream": {"schema": _array(_ref("Frame"))}})


def _json(name: str) -> Data:
    return {"required": True, "content": {_JSON: {"schema": _ref(name)}}}


def _query(name: str, schema: Data, text: str) -> Data:
    return {"name": name, "in": "query", "schema": schema, "description": text}


def _header(name: str, schema: Data, text: str) -> Data:
    return {"name": name, "in": "header", "schema": schema, "description": text}


def _in_path(name: str, schema: Data) -> Data:
    return {"name": name, "in": "path", "required": True, "schema": schema}


_NAME = _in_path("name", _AGENT_NAME)
_LIMITS = _object({}, dict.fromkeys(limits.NAMES, _AMOUNT))
_SESSION = _in_path("session_id", _UUID)
_LIMIT = _query("limit", _integer(1, 1000, default=100), "At most so many.")
_IDEMPOTENCY_KEY = _header(
    "Idempotency-Key",
    {"type": "string", "pattern": "^[\\x21-\\x7e]{1,255}$"},
    "The same key with the same body has the same answer, for a day; with another body it is 409.",
)
