"""/health, /ready, /metrics: is this worker alive, can it serve, and how is the fleet."""

from __future__ import annotations

import time
from collections.abc import Iterable

from falcon.asgi import Request, Response

from ashd import __version__
from ashd.coordinator.services import Services
from ashd.errors import Unavailable
from ashd.store import migrate, runners

# PERF: these endpoints are open; however often they are asked, the database is asked once in this time.
_REMEMBER_S = 1.0
_DATABASE_TIMEOUT_S = 2.0

_NOTHING = runners.Totals(0, 0, 0, 0, 0, 0, 0, 0, 0)


class FleetTotals:
    """Sums over the runners, remembered for a second; the last known ones while the database doesn't answer."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._known = _NOTHING
        self._asked_at = -_REMEMBER_S

    async def get(self) -> runners.Totals:
        """Costs at most one query over the table of runners."""
        now = time.monotonic()
        if now - self._asked_at >= _REMEMBER_S:
            self._asked_at = now
            dead_after_s = self._services.config.runner_dead_after
            try:
                self._known = await runners.totals(self._services.db, dead_after_s, deadline=now + _DATABASE_TIMEOUT_S)
            except Unavailable:
                pass  # said by /ready
        return self._known


class Health:
    """/health: 200 whenever the process answers."""

    open_without_key = True

    def __init__(self, services: Services, totals: FleetTotals) -> None:
        self._services = services
        self._totals = totals

    async def on_get(self, req: Request, resp: Response) -> None:
        total = await self._totals.get()
        resp.media = {
            "status": "ok",
            "activeSessions": total.running + total.waiting,
            "activeSandboxes": total.active,
            "uptime": int(time.monotonic() - self._services.started_at),
            "pool": {
                "total": total.warming + total.warm + total.running + total.waiting,
                "cold": 0,
                "warming": total.warming,
                "warm": total.warm,
                "waiting": total.waiting,
                "running": total.running,
                "maxCapacity": total.max_sandboxes,
                "resumeWarmHits": 0,
                "resumeColdHits": 0,
                "preWarmHits": total.warm_hits,
            },
            "version": __version__,
            "coordinatorId": self._services.coordinator_id,
            "remoteRunners": total.runners,
        }


class Ready:
    """/ready: 200 when the database answers and its schema is this version's."""

    open_without_key = True

    def __init__(self, services: Services) -> None:
        self._services = services

    async def on_get(self, req: Request, resp: Response) -> None:
        missing = await migrate.pending(self._services.db, deadline=time.monotonic() + _DATABASE_TIMEOUT_S)
        if missing:
            raise Unavailable(f"Migrations are missing: {', '.join(missing)}; run `ashd migrate`", code="not_migrated")
        resp.media = {"status": "ready"}


class Metrics:
    """/metrics: Prometheus text exposition format 0.0.4."""

    open_without_key = True

    def __init__(self, services: Services, totals: FleetTotals) -> None:
        self._services = services
        self._totals = totals

    async def on_get(self, req: Request, resp: Response) -> None:
        total = await self._totals.get()
        pool = self._services.db.stats()
        worker = f'coordinator="{self._services.coordinator_id}"'
        uptime = time.monotonic() - self._services.started_at
        states = {state: getattr(total, state) for state in ("warming", "warm", "running", "waiting")}
        resp.content_type = "text/plain; version=0.0.4; charset=utf-8"
        resp.text = "".join(
            (
                _gauge("ash_up", "This worker answers.", [(worker, 1)]),
                _gauge("ash_uptime_seconds", "Since this worker started.", [(worker, round(uptime, 3))]),
                _gauge("ash_active_sessions", "Sessions with a live sandbox.", [("", total.running + total.waiting)]),
                _gauge("ash_active_sandboxes", "Slots taken on live runners.", [("", total.active)]),
                _gauge("ash_pool_sandboxes", "Sandboxes by state.", _labelled("state", states)),
                _gauge("ash_pool_max_capacity", "Slots of live runners.", [("", total.max_sandboxes)]),
                _gauge("ash_resume_total", "Resumed sessions.", _labelled("path", {"warm": 0, "cold": 0}), "counter"),
                _gauge(
                    "ash_resume_cold_total",
                    "Cold resumes by source.",
                    _labelled("source", {"local": 0, "cloud": 0, "fresh": 0}),
                    "counter",
                ),
                _gauge("ash_runners", "Runners by health.", _labelled("health", {"healthy": total.runners})),
                _gauge("ash_database_pool", "Database connections of this worker.", _labelled("state", pool, worker)),
            )
        )


def _labelled(label: str, values: dict[str, int], more: str = "") -> list[tuple[str, float]]:
    return [(f'{label}="{name}"' + (f",{more}" if more else ""), value) for name, value in values.items()]


def _gauge(name: str, text: str, samples: Iterable[tuple[str, float]], kind: str = "gauge") -> str:
    lines = [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
    lines += [f"{name}{{{labels}}} {value}" if labels else f"{name} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"
