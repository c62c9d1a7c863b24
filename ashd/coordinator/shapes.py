"""The public API's objects (api.md §2), made from rows."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from ashd.coordinator import limits
from ashd.store.agents import Agent
from ashd.store.events import Event
from ashd.store.runners import Runner
from ashd.store.sessions import Session
from ashd.store.turns import Turn
from ashd.wire.v1 import runner_pb2

# SECURITY: of a session's settings only these are shown; mcpServers and systemPrompt may hold secrets.
_SHOWN_SETTINGS = ("permissionMode", "allowedTools", "disallowedTools", "betas", "subagents", "initialAgent")
_MIB = 1024 * 1024


def instant(value: datetime) -> str:
    """ISO-8601 in UTC with milliseconds and Z."""
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _instant_or_none(value: datetime | None) -> str | None:
    return None if value is None else instant(value)


def agent(row: Agent) -> dict[str, Any]:
    """Agent; values of env are masked."""
    shape: dict[str, Any] = {
        "id": row.id,
        "name": row.name,
        "version": row.version,
        "path": row.path,
        "createdAt": instant(row.created_at),
        "updatedAt": instant(row.updated_at),
        "tenantId": row.tenant_id,
        "digest": row.bundle_digest,
    }
    if env := json.loads(row.env):
        shape["env"] = dict.fromkeys(env, "***")
    if config := json.loads(row.config):
        shape["config"] = config
    return shape


def session(row: Session) -> dict[str, Any]:
    """Session."""
    shape: dict[str, Any] = {
        "id": row.id,
        "agentName": row.agent_name,
        "sandboxId": row.sandbox_id or "",
        "status": row.status,
        "createdAt": instant(row.created_at),
        "lastActiveAt": instant(row.last_active_at),
        "tenantId": row.tenant_id,
        "runnerId": row.runner_id,
        "parentSessionId": row.parent_session_id,
        "lastSeq": row.last_seq,
        "openTurnId": row.open_turn_id,
        "generation": row.generation,
        "isolation": row.isolation,
        "limits": None if row.effective_limits is None else json.loads(row.effective_limits),
    }
    if row.model is not None:
        shape["model"] = row.model
    settings = json.loads(row.settings)
    if config := {name: settings[name] for name in _SHOWN_SETTINGS if name in settings}:
        shape["config"] = config
    if row.labels:
        shape["labels"] = row.labels
    if row.status_cause is not None:
        shape["statusCause"] = row.status_cause
    return shape


def message(row: Event, session_id: str, tenant_id: str) -> dict[str, Any]:
    """Message: the agent's or the user's message object, as a string of JSON."""
    return {
        "id": row.id,
        "sessionId": session_id,
        "role": "user" if row.type == "user" else "assistant",
        "content": row.data,
        "sequence": row.seq,
        "createdAt": instant(row.created_at),
        "tenantId": tenant_id,
    }


def session_event(row: Event, session_id: str, tenant_id: str) -> dict[str, Any]:
    """SessionEvent."""
    return {
        "id": row.id,
        "sessionId": session_id,
        "type": row.type,
        "sequence": row.seq,
        "createdAt": instant(row.created_at),
        "tenantId": tenant_id,
        "data": row.data,
    }


def turn(row: Turn) -> dict[str, Any]:
    """Turn."""
    shape: dict[str, Any] = {
        "id": row.id,
        "sessionId": row.session_id,
        "state": row.state,
        "outcome": row.outcome,
        "firstSeq": row.first_seq,
        "lastSeq": row.last_seq,
        "createdAt": instant(row.created_at),
        "launchedAt": _instant_or_none(row.launched_at),
        "settledAt": _instant_or_none(row.settled_at),
        "usage": None if row.usage is None else json.loads(row.usage),
    }
    if row.error is not None:
        shape["error"] = row.error
        shape["errorCode"] = row.error_code
    return shape


def runner(row: Runner) -> dict[str, Any]:
    """A runner, as the fleet list shows it."""
    return {
        "runnerId": row.id,
        "host": row.host,
        "port": row.port,
        "active": row.active,
        "max": row.max_sandboxes,
        "lastHeartbeat": instant(row.last_heartbeat_at),
        "warming": row.warming,
        "warm": row.warm,
        "paused": row.paused,
        "draining": row.draining,
        "healthy": row.alive,
        "memory": {
            "totalMb": row.memory_total_bytes // _MIB,
            "usedMb": row.memory_used_bytes // _MIB,
            "perSandboxMb": _mib(row.memory_per_sandbox_bytes),
        },
        "version": row.version,
        "isolation": row.isolation or None,
        "enforced": row.enforced,
        "refusing": row.refusing or None,
        "usage": {
            "pssMb": _mib(row.used_pss_bytes),
            "cpuSeconds": round(row.used_cpu_seconds, 2),
            "processes": row.used_processes,
            "descriptors": row.used_descriptors,
            "diskMb": _mib(row.used_disk_bytes),
        },
        "orphans": row.orphans,
        "kills": row.kills,
    }


def sandbox(one: runner_pb2.Sandbox) -> dict[str, Any]:
    """A sandbox of a runner, as the runner tells it; `sessionId` null: warm, nobody's."""
    return {
        "sandboxId": one.sandbox_id,
        "sessionId": one.session_id or None,
        "epoch": one.epoch,
        "state": one.state,
        "isolation": one.isolation or None,
        "limits": limits.from_wire(one.limits),
        "pssMb": _mib(one.pss_bytes),
        "memoryMb": _mib(one.memory_bytes),
        "cpuSeconds": round(one.cpu_seconds, 2),
        "processes": one.processes,
        "descriptors": one.descriptors,
        "diskMb": _mib(one.disk_bytes),
    }


def _mib(size_bytes: int) -> float:
    return round(size_bytes / _MIB, 2)
