"""/metrics of a real coordinator: one answer, whichever of its workers gives it, also when one has been killed."""

from __future__ import annotations

import http.client
import json
from collections.abc import Callable, Iterator

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from ashd.coordinator.openapi import document
from tests.integration import agents
from tests.integration.fleet import SECRET, Api, Fleet, eventually, free_port

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

# What api.md promises; histograms and counters by their family's name.
FAMILIES = {
    "ash_up": "gauge",
    "ash_uptime_seconds": "gauge",
    "ash_active_sessions": "gauge",
    "ash_active_sandboxes": "gauge",
    "ash_pool_sandboxes": "gauge",
    "ash_pool_max_capacity": "gauge",
    "ash_resume": "counter",
    "ash_resume_cold": "counter",
    "ash_request_duration_seconds": "histogram",
    "ash_turn_duration_seconds": "histogram",
    "ash_turn_first_event_seconds": "histogram",
    "ash_sse_connections": "gauge",
    "ash_grpc_errors": "counter",
    "ash_runners": "gauge",
    "ash_runner_registrations": "counter",
    "ash_runner_isolation": "gauge",
    "ash_runner_refusing": "gauge",
    "ash_runner_pss_bytes": "gauge",
    "ash_runner_cpu_seconds": "counter",
    "ash_runner_processes": "gauge",
    "ash_runner_descriptors": "gauge",
    "ash_runner_disk_bytes": "gauge",
    "ash_runner_orphans": "counter",
    "ash_runner_kills": "counter",
    "ash_record_lag_seconds": "histogram",
    "ash_record_batch_events": "histogram",
    "ash_record_batches": "counter",
    "ash_record_events": "counter",
    "ash_reconnects": "counter",
    "ash_database_pool": "gauge",
}


@pytest.fixture(scope="module")
def fleet(new_database: Callable[[], str]) -> Iterator[Fleet]:
    """One coordinator with two workers, and a runner."""
    fleet = Fleet(new_database())
    try:
        fleet.add_coordinator()
        fleet.add_runner()
        yield fleet
    finally:
        left = fleet.stop()
    assert not left, f"left behind (see {fleet.folder}): {left}"


@pytest.fixture(scope="module")
def api(fleet: Fleet) -> Api:
    return fleet.apis[0]


def scrape(api: Api) -> tuple[str, Series]:
    """The worker that answered, and its numbers; both requests go over one connection, so to one worker."""
    connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=10)
    try:
        connection.request("GET", "/health")
        worker = json.loads(connection.getresponse().read())["coordinatorId"]
        connection.request("GET", "/metrics")
        return worker, parsed(connection.getresponse().read().decode())
    finally:
        connection.close()


def parsed(text: str) -> Series:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def number(series: Series, name: str, **labels: str) -> float:
    return series.get((name, frozenset(labels.items())), 0.0)


def until(api: Api, value: float, name: str, **labels: str) -> Series:
    """The first answer with that number; each worker's may be a second old."""
    found: Series = eventually(lambda: (told := scrape(api)[1]) and number(told, name, **labels) == value and told)
    return found


def of_both(api: Api) -> dict[str, Series]:
    """What each of the two workers says, asked until both have answered."""
    told: dict[str, Series] = {}
    eventually(lambda: told.update([scrape(api)]) or len(told) == 2)
    return told


def up(series: Series) -> set[int]:
    """Pids of the workers that are up."""
    return {int(dict(labels)["coordinator"].rpartition("-")[2]) for name, labels in series if name == "ash_up"}


def workers(fleet: Fleet) -> list[psutil.Process]:
    return fleet.coordinators[0].children("ashd: coordinator worker")


def test_all_families_are_there_from_the_start_and_parse(api: Api) -> None:
    answer = api.call("GET", "/metrics", Authorization="")
    assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    families = {family.name: family.type for family in text_string_to_metric_families(answer.body.decode())}
    assert families == FAMILIES


def test_whichever_worker_answers_the_numbers_are_the_same(api: Api, fleet: Fleet) -> None:
    before = scrape(api)[1]
    api.deploy("hello", agents.HELLO)
    for _ in range(4):  # new connections: both workers take some
        api.send(api.session("hello"), "you")
    turns = number(before, "ash_turn_duration_seconds_count") + 4

    def settled() -> list[Series] | None:
        """both workers know of all turns"""
        told = list(of_both(api).values())
        names = ("ash_turn_duration_seconds_count", "ash_turn_first_event_seconds_count")
        return told if all(number(series, name) == turns for series in told for name in names) else None

    one, other = eventually(settled)
    answered = {"method": "POST", "route": "/api/sessions/{session_id}/messages", "status": "2xx"}
    assert number(one, "ash_request_duration_seconds_count", **answered) == turns
    for name in ("ash_record_batches_total", "ash_record_events_total", "ash_record_lag_seconds_count"):
        assert number(one, name) == number(other, name) > 0
    assert number(one, "ash_record_batch_events_sum") == number(one, "ash_record_events_total")
    assert number(one, "ash_runners", health="healthy") == number(other, "ash_runners", health="healthy") == 1
    assert number(one, "ash_runner_registrations_total") >= 1
    assert number(one, "ash_database_pool", state="max") == 16  # of both workers together
    assert up(one) == up(other) == {process.pid for process in workers(fleet)}


def test_labels_are_bounded_whatever_clients_send(api: Api) -> None:
    for path in ("/nowhere/1", "/nowhere/2", "/api/sessions/x1", "/api/sessions/x2", "/api/sessions?agent=x3"):
        api.call("GET", path)
    api.call("FETCH", "/health")
    sent = {("GET", "none"), ("GET", "/api/sessions/{session_id}"), ("GET", "/api/sessions"), ("other", "/health")}
    eventually(lambda: sent <= routes(scrape(api)[1]))
    found = routes(scrape(api)[1])
    assert {method for method, _ in found} <= {"GET", "POST", "other"}
    assert {route for _, route in found} <= {"none", *templates()}


def templates() -> set[str]:
    """The templates of all routes, as the documents of the API name them."""
    return set(document()["paths"])


def routes(series: Series) -> set[tuple[str, str]]:
    found = [dict(labels) for name, labels in series if name == "ash_request_duration_seconds_count"]
    return {(labels["method"], labels["route"]) for labels in found}


def test_open_streams_and_reconnects_are_counted(api: Api) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    last = api.send(session, "you").last_id
    streams = [api.attach(session).start(), api.attach(session, after=last).start()]
    series = until(api, 2, "ash_sse_connections")
    assert number(series, "ash_reconnects_total", side="client") == 1  # the one with a cursor
    for stream in streams:
        stream.close()
    until(api, 0, "ash_sse_connections")


def test_a_killed_worker_takes_its_gauges_with_it_and_leaves_its_counts(api: Api, fleet: Fleet) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    api.send(session, "you")
    streams = [api.attach(session).start() for _ in range(8)]  # some at each worker
    counted = until(api, 8, "ash_sse_connections")
    killed = workers(fleet)[0]
    killed.kill()
    eventually(lambda: len(workers(fleet)) == 2 and killed.pid not in {one.pid for one in workers(fleet)})
    alive = {process.pid for process in workers(fleet)}
    eventually(lambda: all(up(series) == alive for series in of_both(api).values()))
    for series in of_both(api).values():
        for (name, labels), value in counted.items():
            if name.endswith(("_total", "_count", "_bucket")):
                assert series[name, labels] >= value, name
    still_open = [stream for stream in streams if not stream.ended.is_set()]
    until(api, len(still_open), "ash_sse_connections")
    for stream in streams:
        stream.close()
    api.send(session, "again")
    until(api, number(counted, "ash_turn_duration_seconds_count") + 1, "ash_turn_duration_seconds_count")
    folder = fleet.folder / "coordinator-0" / "run"
    assert {path.stem.rpartition("_")[2] for path in folder.glob("*/*.db")} == {"0", "1"}  # nothing piles up


def test_failed_calls_are_counted_by_method_and_status(api: Api) -> None:
    failed = {"service": "Runner", "method": "StartSession", "status": "UNAVAILABLE"}
    assert number(scrape(api)[1], "ash_grpc_errors_total", **failed) == 0
    nobody = {"runnerId": "nobody", "host": "127.0.0.1", "port": free_port(), "maxSandboxes": 10_000}
    internal = {"Authorization": f"Bearer {SECRET}"}
    assert api.call("POST", "/api/internal/runners/register", nobody, **internal).status == 200
    api.deploy("hello", agents.HELLO)
    api.session("hello")  # the emptiest runner is asked first, then the one that lives
    until(api, 1, "ash_grpc_errors_total", **failed)
    until(api, 2, "ash_runners", health="healthy")
    assert api.call("POST", "/api/internal/runners/deregister", {"runnerId": "nobody"}, **internal).status == 200


def test_the_numbers_are_gone_with_the_coordinator(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    folder = fleet.folder / "coordinator-1" / "run"
    assert list(folder.glob("metrics-*/*.db")) and scrape(api)
    assert fleet.coordinators[1].stop() == 0
    assert not list(folder.iterdir())
