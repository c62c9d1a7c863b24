"""/health, /ready, /metrics: is this worker alive, can it serve, and how is the fleet."""

from __future__ import annotations

import asyncio
import time
from collections import Counter

from falcon.asgi import Request, Response
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric

from ashd import __version__
from ashd.coordinator import metrics
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

    on_head = on_get


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

    on_head = on_get


class Metrics:
    """/metrics: Prometheus' text exposition format 0.0.4. The numbers are the whole coordinator's, whichever of its
    workers is asked, and of the fleet what the database knows.
    """

    open_without_key = True

    def __init__(self, services: Services, totals: FleetTotals) -> None:
        self._services = services
        self._totals = totals
        self._runners: list[runners.Runner] = []
        self._text = b""
        self._made_at = -_REMEMBER_S
        self._making = asyncio.Lock()

    async def on_get(self, req: Request, resp: Response) -> None:
        resp.content_type = CONTENT_TYPE_PLAIN_0_0_4
        async with self._making:
            if time.monotonic() - self._made_at >= _REMEMBER_S:
                metrics.sample(self._services)
                self._text = await asyncio.to_thread(metrics.exposition, await self._fleet())
                self._made_at = time.monotonic()
        resp.data = self._text

    on_head = on_get

    async def _fleet(self) -> list[Metric]:
        total = await self._totals.get()
        await self._look_at_runners()
        health = Counter({"healthy": 0, "draining": 0, "dead": 0})
        health.update("dead" if not row.alive else "draining" if row.draining else "healthy" for row in self._runners)
        states = {state: getattr(total, state) for state in ("warming", "warm", "running", "waiting")}
        return [
            metrics.gauge("ash_active_sessions", "Sessions with a live sandbox.", total.running + total.waiting),
            metrics.gauge("ash_active_sandboxes", "Slots taken on live runners.", total.active),
            metrics.gauges("ash_pool_sandboxes", "Sandboxes by state.", "state", states),
            metrics.gauge("ash_pool_max_capacity", "Slots of live runners.", total.max_sandboxes),
            metrics.gauges("ash_runners", "Runners by health.", "health", health),
            *metrics.of_runners(self._runners),
        ]

    async def _look_at_runners(self) -> None:
        dead_after_s, deadline = self._services.config.runner_dead_after, time.monotonic() + _DATABASE_TIMEOUT_S
        try:
            self._runners = await runners.list_all(self._services.db, dead_after_s, deadline=deadline)
        except Unavailable:
            pass  # the last known ones; said by /ready
