"""What a coordinator counts and measures, under the names Prometheus sees.

Covers: the families, their text over all workers. Leaves out: how workers' numbers become one (slots.py), the fleet's
own numbers, which come from the database (service.py).

ORDER: imported after the fork, because a family opens the worker's files as soon as it is made.
PERF: an observation takes 2 to 4 µs; so per request, turn, stream or batch, never per event.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Iterable

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from ashd.coordinator.services import Services
from ashd.coordinator.slots import FOLDER_VARIABLE
from ashd.store.runners import Runner
from ashd.wire.v1 import registry_pb2, runner_pb2

_OWN = CollectorRegistry()
_SAMPLE_INTERVAL_S = 1.0

_METHODS = frozenset({"DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT"})
_REQUEST_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_FIRST_EVENT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TURN_S = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)
_LAG_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_BATCH_EVENTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)

_USED_OF_RUNNERS = {
    "pss_bytes": "Memory of a runner's sandboxes (PSS: shared pages by their share).",
    "processes": "Processes in a runner's sandboxes.",
    "descriptors": "Open descriptors in a runner's sandboxes.",
    "disk_bytes": "Disk space of a runner's workspaces.",
}

_UP = Gauge("ash_up", "Workers that answer.", ["coordinator"], multiprocess_mode="livesum", registry=_OWN)
_UPTIME = Gauge(
    "ash_uptime_seconds", "Since the worker started.", ["coordinator"], multiprocess_mode="livesum", registry=_OWN
)
_DATABASE_POOL = Gauge(
    "ash_database_pool",
    "Database connections (size, available, max) and requests waiting for one.",
    ["state"],
    multiprocess_mode="livesum",
    registry=_OWN,
)
_REQUEST_SECONDS = Histogram(
    "ash_request_duration_seconds",
    "Requests, until their answer is ready or their stream begins.",
    ["method", "route", "status"],
    buckets=_REQUEST_S,
    registry=_OWN,
)
_GRPC_ERRORS = Counter(
    "ash_grpc_errors",
    "Failed calls: ours to runners (service Runner), theirs to us (RunnerRegistry).",
    ["service", "method", "status"],
    registry=_OWN,
)
_RESUMES = Counter("ash_resume", "Resumed sessions.", ["path"], registry=_OWN)
_COLD_RESUMES = Counter("ash_resume_cold", "Cold resumes by source.", ["source"], registry=_OWN)
_RECONNECTS = Counter(
    "ash_reconnects",
    "Streams taken up again: by clients with a cursor, by us to a session's runner.",
    ["side"],
    registry=_OWN,
)

SSE_CONNECTIONS = Gauge(
    "ash_sse_connections", "Streams of events open to clients.", multiprocess_mode="livesum", registry=_OWN
)
TURN_SECONDS = Histogram(
    "ash_turn_duration_seconds",
    "From a turn's admission until its client has taken `done`, of clients that stayed.",
    buckets=_TURN_S,
    registry=_OWN,
)
FIRST_EVENT_SECONDS = Histogram(
    "ash_turn_first_event_seconds",
    "From a turn's admission until its first event went to its client.",
    buckets=_FIRST_EVENT_S,
    registry=_OWN,
)
RECORD_SECONDS = Histogram(
    "ash_record_lag_seconds",
    "From the arrival of a batch of events at the registry until it is committed.",
    buckets=_LAG_S,
    registry=_OWN,
)
RECORD_SIZE = Histogram("ash_record_batch_events", "Events of a committed batch.", buckets=_BATCH_EVENTS, registry=_OWN)
RECORDED_BATCHES = Counter("ash_record_batches", "Batches of events committed.", registry=_OWN)
RECORDED_EVENTS = Counter("ash_record_events", "Events of committed batches, repeated ones too.", registry=_OWN)
REGISTRATIONS = Counter("ash_runner_registrations", "Runners that registered, first or again.", registry=_OWN)
CLIENT_RECONNECTS = _RECONNECTS.labels("client")
RUNNER_RECONNECTS = _RECONNECTS.labels("runner")

# What may be counted is there from the start, as 0: of a series that begins with 1, rate() doesn't see that one.
for _path in ("warm", "cold"):
    _RESUMES.labels(_path)
for _source in ("local", "cloud", "fresh"):
    _COLD_RESUMES.labels(_source)
for _file in (runner_pb2.DESCRIPTOR, registry_pb2.DESCRIPTOR):
    for _service in _file.services_by_name.values():
        for _method in _service.methods:
            _GRPC_ERRORS.labels(_service.name, _method.name, grpc.StatusCode.UNAVAILABLE.name)


def answered(method: str, route: str | None, status: int, took_s: float) -> None:
    """A request has its answer. SECURITY: labels are bounded whatever clients send: templates of ours, never paths."""
    method = method if method in _METHODS else "other"
    _REQUEST_SECONDS.labels(method, route or "none", f"{status // 100}xx").observe(took_s)


def runner_failed(method: str, status: grpc.StatusCode) -> None:
    """A call of ours to a runner has failed."""
    _GRPC_ERRORS.labels("Runner", method, status.name).inc()


def registry_refused(method: str, status: grpc.StatusCode) -> None:
    """We have refused a runner's call."""
    _GRPC_ERRORS.labels("RunnerRegistry", method, status.name).inc()


def sample(services: Services) -> None:
    """Write down what changes by itself, for the worker that will be asked."""
    _UP.labels(services.coordinator_id).set(1)
    _UPTIME.labels(services.coordinator_id).set(round(time.monotonic() - services.started_at, 3))
    for state, value in services.db.stats().items():
        _DATABASE_POOL.labels("available" if state == "idle" else state).set(value)


async def keep_sampled(services: Services) -> None:
    """Until cancelled."""
    while True:
        sample(services)
        await asyncio.sleep(_SAMPLE_INTERVAL_S)


def gauge(name: str, text: str, value: float) -> Metric:
    """A family of one number, known when asked."""
    return GaugeMetricFamily(name, text, value=value)


def gauges(name: str, text: str, label: str, values: dict[str, int]) -> Metric:
    """A family of numbers by one label, known when asked."""
    family = GaugeMetricFamily(name, text, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def of_runners(rows: Iterable[Runner]) -> list[Metric]:
    """What live runners said of themselves in their last heartbeats; of dead ones nothing is known."""
    alive = [row for row in rows if row.alive]
    isolation = GaugeMetricFamily(
        "ash_runner_isolation", "1 for the level a runner's self-test showed.", labels=["runner", "level"]
    )
    refusing = GaugeMetricFamily("ash_runner_refusing", "1 while a runner admits no session.", labels=["runner"])
    cpu = CounterMetricFamily(
        "ash_runner_cpu_seconds", "Processor time of sandboxes since the runner started.", labels=["runner"]
    )
    orphans = CounterMetricFamily(
        "ash_runner_orphans", "What was left behind and removed, by kind.", labels=["runner", "kind"]
    )
    kills = CounterMetricFamily("ash_runner_kills", "What limits have killed, by cause.", labels=["runner", "cause"])
    used = {
        name: GaugeMetricFamily(f"ash_runner_{name}", text, labels=["runner"])
        for name, text in _USED_OF_RUNNERS.items()
    }
    for row in alive:
        if row.isolation:
            isolation.add_metric([row.id, row.isolation], 1)
        refusing.add_metric([row.id], int(row.refusing != ""))
        cpu.add_metric([row.id], row.used_cpu_seconds)
        for kind, count in row.orphans.items():
            orphans.add_metric([row.id, kind], count)
        for cause, count in row.kills.items():
            kills.add_metric([row.id, cause], count)
        for name, family in used.items():
            family.add_metric([row.id], getattr(row, f"used_{name}"))
    return [isolation, refusing, cpu, orphans, kills, *used.values()]


def exposition(more: Iterable[Metric]) -> bytes:
    """The families of all workers and `more`, in Prometheus' text format 0.0.4. Reads files: call it in a thread."""
    own: Collector = MultiProcessCollector(None) if FOLDER_VARIABLE in os.environ else _OWN
    return generate_latest(_Families([*own.collect(), *more]))


class _Families(Collector):
    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return sorted(self._families, key=lambda family: family.name)
