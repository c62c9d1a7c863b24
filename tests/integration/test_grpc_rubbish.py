"""Rubbish on the two gRPC ports, the registry's and the runner's: both refuse it sensibly, and neither is harmed."""

from __future__ import annotations

import collections
import contextlib
import os
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import grpc
import psutil
import pytest
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from ashd.wire.channel import MAX_MESSAGE_BYTES
from ashd.wire.v1 import events_pb2, registry_pb2, runner_pb2
from ashd.wire.v1.registry_pb2_grpc import RunnerRegistryStub
from tests.integration.fleet import SECRET, Fleet

MIB = 1024 * 1024
TIMEOUT_S = 20.0
LET_IN = (("authorization", f"Bearer {SECRET}"),)
REGISTRY, RUNNER = "/ashd.wire.v1.RunnerRegistry/", "/ashd.wire.v1.Runner/"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113, 3.4
SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
HEADERS_OF_16_MIB = b"\xff\xff\xff\x01\x04\x00\x00\x00\x01"
RUBBISH = {
    "nothing": b"",
    "random bytes": os.urandom(256 * 1024),
    "zeros": bytes(256 * 1024),
    "an HTTP/1 request": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "half a preface": PREFACE[:12],
    "a preface and random frames": PREFACE + SETTINGS + os.urandom(64 * 1024),
    "a preface and a giant frame": PREFACE + SETTINGS + HEADERS_OF_16_MIB + bytes(MIB),
    "a frame on a stream never opened": PREFACE + SETTINGS + b"\x00\x00\x04\x00\x00\x00\x00\x00\x07abcd",
    "a flood of settings": PREFACE + SETTINGS * 5_000,
    "a flood of pings": PREFACE + SETTINGS + (b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)) * 5_000,
    "a flood of resets": PREFACE + SETTINGS + (b"\x00\x00\x04\x03\x00\x00\x00\x00\x01" + bytes(4)) * 5_000,
    "a TLS greeting": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + os.urandom(512),
}


@dataclass
class Port:
    """One of the two servers, and the service on it."""

    fleet: Fleet
    number: int
    service: str

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.number}"

    def processes(self) -> list[psutil.Process]:
        """Those that listen on it."""
        part = self.fleet.coordinators[0] if self.service == REGISTRY else self.fleet.runners[0]
        return part.children("ashd: coordinator worker") or [psutil.Process(part.process.pid)]

    def memory(self) -> int:
        return sum(process.memory_info().rss for process in self.processes())

    def channel(self) -> grpc.Channel:
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        return grpc.insecure_channel(self.address, options=options)


@pytest.fixture(scope="module")
def fleet(new_database: Callable[[], str]) -> Iterator[Fleet]:
    """One coordinator and one runner; whatever they were sent, they have logged no traceback and not started anew."""
    fleet = Fleet(new_database())
    try:
        fleet.add_coordinator()
        fleet.add_runner()
        before = [child.pid for child in fleet.coordinators[0].children("ashd: coordinator worker")]
        yield fleet
        assert [child.pid for child in fleet.coordinators[0].children("ashd: coordinator worker")] == before
        for part in (*fleet.coordinators, *fleet.runners):
            assert "Traceback" not in (log := part.log.read_text()), log[log.index("Traceback") - 1000 :][:4000]
    finally:
        left = fleet.stop()
    assert not left, f"left behind (see {fleet.folder}): {left}"


@pytest.fixture(params=[REGISTRY, RUNNER], ids=["registry", "runner"])
def port(fleet: Fleet, request: pytest.FixtureRequest) -> Iterator[Port]:
    part = fleet.coordinators[0] if request.param == REGISTRY else fleet.runners[0]
    number = part.environment["ASH_REGISTRY_PORT" if request.param == REGISTRY else "ASH_RUNNER_PORT"]
    port = Port(fleet, int(number), request.param)
    yield port
    assert_serves(port)


def assert_serves(port: Port) -> None:
    with port.channel() as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        assert (
            check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status == health_pb2.HealthCheckResponse.SERVING
        )


def call(
    port: Port, method: str, *bodies: bytes, metadata: tuple[tuple[str, str | bytes], ...] = LET_IN
) -> tuple[grpc.StatusCode, str]:
    """Status and details of a call with these messages as its body, whatever the method expects; it stays open for
    more of them.
    """
    open_end = threading.Event()

    def send() -> Iterator[bytes]:
        yield from bodies
        open_end.wait()

    with port.channel() as channel:
        answers = channel.stream_stream(method)(send(), metadata=metadata, timeout=TIMEOUT_S)
        try:
            with contextlib.suppress(grpc.RpcError):
                next(answers, None)
            open_end.set()
            with contextlib.suppress(grpc.RpcError):
                collections.deque(answers, maxlen=0)
        finally:
            open_end.set()
        return answers.code(), answers.details()


def methods(port: Port) -> list[str]:
    (file,) = (registry_pb2.DESCRIPTOR,) if port.service == REGISTRY else (runner_pb2.DESCRIPTOR,)
    (service,) = file.services_by_name.values()
    assert f"/{service.full_name}/" == port.service
    return [port.service + method.name for method in service.methods]


@pytest.mark.parametrize("rubbish", RUBBISH.values(), ids=RUBBISH)
def test_bytes_that_are_no_grpc_harm_nobody(port: Port, rubbish: bytes) -> None:
    before = port.memory()
    with contextlib.ExitStack() as opened:
        for _ in range(20):
            connection = opened.enter_context(socket.create_connection(("127.0.0.1", port.number), timeout=TIMEOUT_S))
            with contextlib.suppress(ConnectionError):  # it hung up on us
                connection.sendall(rubbish)
        assert_serves(port)  # while these are still open
    assert port.memory() - before < 32 * MIB


@pytest.mark.parametrize(
    "secret",
    [(), (("authorization", "Bearer wrong"),), (("authorization", SECRET),), (("authorization-bin", b"\xff\0"),)],
    ids=["none", "wrong", "not a bearer's", "binary"],
)
def test_without_the_secret_no_method_even_reads_its_message(
    port: Port, secret: tuple[tuple[str, str | bytes], ...]
) -> None:
    for method in (*methods(port), port.service + "Nothing", "/grpc.reflection.v1alpha.ServerReflection/Nothing"):
        code, text = call(port, method, metadata=secret)  # sends nothing, and is refused all the same
        assert (code, "ASH_INTERNAL_SECRET" in text) == (grpc.StatusCode.UNAUTHENTICATED, True), method


def test_large_messages_without_the_secret_cost_no_memory(port: Port) -> None:
    before, large = port.memory(), bytes(64 * MIB)
    with ThreadPoolExecutor(4) as many:
        calls = [many.submit(call, port, methods(port)[0], large, metadata=()) for _ in range(8)]
        assert {one.result()[0] for one in calls} == {grpc.StatusCode.UNAUTHENTICATED}
    assert port.memory() - before < 32 * MIB


def test_a_message_above_the_limit_is_refused(port: Port) -> None:
    code, text = call(port, methods(port)[0], bytes(MAX_MESSAGE_BYTES + 1))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in text


def test_methods_that_are_none_are_refused(port: Port) -> None:
    for method in (port.service + "Nothing", "/ashd.Nothing/Register", "/", "/grpc.health.v1.Health/Nothing"):
        assert call(port, method, b"")[0] is grpc.StatusCode.UNIMPLEMENTED, method


def test_huge_metadata_is_refused(port: Port) -> None:
    code, text = call(port, methods(port)[0], b"", metadata=(*LET_IN, ("x-much", "y" * MIB)))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "metadata size" in text


def test_bodies_that_are_no_message_are_refused_in_one_line(port: Port) -> None:
    for method in (*methods(port), "/grpc.health.v1.Health/Check"):
        for body in (b"\xff" * 100, b"\x0a\x7f" + b"x", os.urandom(64) + b"\xff"):
            assert call(port, method, body)[0] is grpc.StatusCode.UNKNOWN, method


IDS = ["", "x", "a\0b", "../..", "\N{SNOWMAN}" * 500, "3f2504e0-4f89-11d3-9a0c-0305e82c330"]
REFUSED = {grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.NOT_FOUND}


@pytest.mark.parametrize("name", IDS, ids=["empty", "short", "with NUL", "a path", "long", "almost a uuid"])
def test_messages_of_nonsense_are_refused_by_their_fields(fleet: Fleet, port: Port, name: str) -> None:
    requests = _to_registry(name) if port.service == REGISTRY else _to_runner(name)
    for method, request in requests:
        code, text = call(port, port.service + method, request.SerializeToString())
        assert code in REFUSED, (method, code, text)
        assert "Unexpected" not in text, method
    assert [runner["runnerId"] for runner in fleet.listed_runners()] == ["runner-0"]


def _to_registry(name: str) -> list[tuple[str, Message]]:
    lease = registry_pb2.SessionLease(session_id=name, epoch=-1)
    beat = registry_pb2.HeartbeatRequest(
        runner_id="runner-0", inventory=registry_pb2.Inventory(leases=[lease]), counts=registry_pb2.Counts(warm=-5)
    )
    return [
        ("Register", registry_pb2.RegisterRequest(runner_id="runner-9", host="h", leases=[lease])),
        ("Register", registry_pb2.RegisterRequest(runner_id="runner-9", host=f" {name}")),
        ("Register", registry_pb2.RegisterRequest(runner_id="runner-9", host="h", max_sandboxes=-1)),
        ("Register", registry_pb2.RegisterRequest(runner_id=f"/{name}", host="h")),
        ("Heartbeat", registry_pb2.HeartbeatRequest(runner_id=f"/{name}")),
        ("Heartbeat", beat),
        ("Deregister", registry_pb2.DeregisterRequest(runner_id=f"/{name}")),
        ("FetchBundle", registry_pb2.FetchBundleRequest(digest=name)),
    ]


def _to_runner(name: str) -> list[tuple[str, Message]]:
    session, digest = str(uuid.uuid4()), "0" * 64
    limits = runner_pb2.Limits(memory_bytes=-1)
    start = runner_pb2.StartSessionRequest
    return [
        ("StartSession", start(session_id=name, bundle_digest=digest)),
        ("StartSession", start(session_id=session, bundle_digest=name)),
        ("StartSession", start(session_id=session, bundle_digest=digest, limits=limits)),
        ("StartSession", start(session_id=session, bundle_digest=digest, settings_json=f"{{{name}")),
        ("StartSession", start(session_id=session, bundle_digest=digest, settings_json="[" * 100_000)),
        ("StartTurn", runner_pb2.StartTurnRequest(session_id=name, turn_id=name, request=b"\xff")),
        ("StreamEvents", runner_pb2.StreamEventsRequest(session_id=name, epoch=-1, after_seq=-1)),
        ("InterruptTurn", runner_pb2.InterruptTurnRequest(session_id=name)),
    ]


def test_events_of_sessions_that_are_none_are_stale(port: Port) -> None:
    if port.service != REGISTRY:
        pytest.skip("runners take no events")
    events = [
        events_pb2.Event(turn_id="x", seq=1, kind=1, payload=b"\xff"),
        events_pb2.Event(seq=-1, kind=99, type="a\0b", payload=b"{"),
        events_pb2.Event(seq=1, kind=events_pb2.SETTLED, payload=b"[]"),
    ]
    sessions = [
        registry_pb2.SessionEvents(session_id=name, epoch=1, events=events) for name in (*IDS, str(uuid.uuid4()))
    ]
    sessions += [registry_pb2.SessionEvents(session_id=str(uuid.uuid4()), epoch=1, events=[event]) for event in events]
    with port.channel() as channel:
        record = RunnerRegistryStub(channel).Record
        (answer,) = record(
            iter([registry_pb2.RecordRequest(runner_id="a\0b", sessions=sessions)]), metadata=LET_IN, timeout=TIMEOUT_S
        )
    assert not answer.recorded
    assert {one.session_id for one in answer.stale} == {one.session_id for one in sessions}
