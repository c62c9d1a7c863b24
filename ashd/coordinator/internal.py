"""/api/internal: the fleet as operators and runners see it over HTTP. Takes the internal secret, not an API key."""

from __future__ import annotations

from typing import Any

from falcon.asgi import Request, Response

from ashd.coordinator import shapes
from ashd.coordinator.registry import RUNNER_ID, counters, reason
from ashd.coordinator.request import Fields, json_object
from ashd.coordinator.services import Services
from ashd.domain.isolation import LEVELS
from ashd.store import coordinators, runners

_MOST = 2**31 - 1
_MOST_COUNTED = 2**53
_MOST_ENFORCED = 64
_MIB = 1024 * 1024


class Registry:
    """/api/internal/registry: where runners find the gRPC registries of all live coordinators."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response) -> None:
        live_s = self._services.config.runner_dead_after
        resp.media = {"addresses": await coordinators.live(self._services.db, live_s)}


class Runners:
    """/api/internal/runners"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response) -> None:
        rows = await runners.list_all(self._services.db, self._services.config.runner_dead_after)
        resp.media = {
            "runners": [shapes.runner(row) for row in rows],
            "count": len(rows),
            "hasLocal": any(row.address.startswith("unix:") for row in rows),
        }


class RunnerRegister:
    """/api/internal/runners/register"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: Response) -> None:
        body = await json_object(req, self._services.config.max_json_body)
        host, port = body.required_text("host", most=255), _required_integer(body, "port", 1, 65535)
        runner = runners.Registration(
            id=body.required_text("runnerId", most=255, pattern=RUNNER_ID),
            host=host,
            port=port,
            address=f"[{host}]:{port}" if ":" in host else f"{host}:{port}",
            max_sandboxes=_required_integer(body, "maxSandboxes", 0, _MOST),
            isolation=body.choice("isolation", LEVELS) or "",
            enforced=[reason(word) for word in body.texts("enforced", most=_MOST_ENFORCED) or []],
        )
        await runners.register(self._services.db, runner)
        resp.media = {"ok": True}


class RunnerHeartbeat:
    """/api/internal/runners/heartbeat"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: Response) -> None:
        body = await json_object(req, self._services.config.max_json_body)
        runner_id = body.required_text("runnerId", most=255)
        active = body.integer("activeCount", 0, _MOST) or 0
        stats = Fields(body.mapping("stats") or {}, "stats.")
        running = stats.integer("running", 0, _MOST) or 0
        report = runners.Report(
            warming=stats.integer("warming", 0, _MOST) or 0,
            warm=stats.integer("warm", 0, _MOST) or 0,
            running=running,
            waiting=max(active - running, 0),
            refusing=reason(body.text("refusing", most=1000) or ""),
            **_usage(Fields(body.mapping("usage") or {}, "usage.")),
            orphans=_counters(body, "orphans"),
            kills=_counters(body, "kills"),
        )
        if not await runners.heartbeat(self._services.db, runner_id, report):
            raise runners.not_found()
        resp.media = {"ok": True}


def _usage(usage: Fields) -> dict[str, Any]:
    return {
        "pss_bytes": round((usage.number("pssMb", 0, _MOST) or 0) * _MIB),
        "cpu_seconds": float(usage.number("cpuSeconds", 0, 1e12) or 0),
        "processes": usage.integer("processes", 0, _MOST) or 0,
        "descriptors": usage.integer("descriptors", 0, _MOST) or 0,
        "disk_bytes": round((usage.number("diskMb", 0, _MOST) or 0) * _MIB),
    }


def _counters(body: Fields, name: str) -> dict[str, int]:
    counts = Fields(body.mapping(name) or {}, f"{name}.")
    return counters({word: counts.integer(word, 0, _MOST_COUNTED) or 0 for word in counts.values})


class RunnerSandboxes:
    """/api/internal/runners/:id/sandboxes: asked of the runner itself."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response, runner_id: str) -> None:
        if not RUNNER_ID.fullmatch(runner_id):
            raise runners.not_found()
        runner = await runners.get(self._services.db, runner_id, self._services.config.runner_dead_after)
        sandboxes = await self._services.dispatch.sandboxes_of(runner)
        resp.media = {"sandboxes": [shapes.sandbox(one) for one in sandboxes]}


class RunnerDeregister:
    """/api/internal/runners/deregister"""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_post(self, req: Request, resp: Response) -> None:
        body = await json_object(req, self._services.config.max_json_body)
        await runners.deregister(self._services.db, body.required_text("runnerId", most=255))
        resp.media = {"ok": True}


def _required_integer(body: Fields, name: str, least: int, most: int) -> int:
    value = body.integer(name, least, most)
    if value is None:
        body.refuse(name, "is required")
    return value
