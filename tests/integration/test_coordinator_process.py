"""The coordinator as processes: master and workers under signals."""

from __future__ import annotations

import http.client
import json
import socket
import time

import pytest

from tests.integration.fleet import Api, Fleet, eventually


def test_a_coordinator_stopped_while_its_workers_load_ends_at_once(fleet: Fleet) -> None:
    fleet.add_coordinator()
    part = fleet.coordinators[0]
    assert part.stop() == 0
    for _ in range(3):
        part.start()
        eventually(lambda: part.children("ashd: coordinator worker"), every_s=0.005)
        asked = time.monotonic()
        assert part.stop() == 0
        assert time.monotonic() - asked < 10  # and not graceful_timeout, 30 s


@pytest.fixture(scope="module")
def api(shared: Fleet) -> Api:
    return shared.apis[0]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GARBAGE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", 400),
        (b"GET / HTTP/9.9\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nno colon\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
        (b"GET /" + b"a" * 10_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nX-Long: " + b"a" * 10_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\n" + b"X-Many: 1\r\n" * 200 + b"\r\n", 431),
        (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: foo, chunked\r\n\r\n", 501),
    ],
    ids=[
        "no request",
        "TLS",
        "a version",
        "a header",
        "a length",
        "long line",
        "long header",
        "many headers",
        "coding",
    ],
)
def test_what_the_server_refuses_by_itself_is_an_error_of_the_api(api: Api, request_bytes: bytes, status: int) -> None:
    with socket.create_connection(("127.0.0.1", api.port), timeout=10) as connection:
        connection.sendall(request_bytes)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        body = json.loads(answer.read())
    assert answer.status == status
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Request-Id"]
    assert set(body) == {"error", "statusCode", "code", "retryable"}
    assert (body["statusCode"], body["code"], body["retryable"]) == (status, "request.invalid", False)
