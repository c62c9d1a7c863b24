"""Channels and servers: the options every one of them has, and the shared secret on every call."""

from __future__ import annotations

import hmac
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc import aio

MAX_MESSAGE_BYTES = 256 * 1024 * 1024
"""A message of the API's 50 MiB, which in escaped JSON may be three times as long, with room to spare."""

Metadata = tuple[tuple[str, str], ...]

_OPEN = "/grpc.health.v1.Health/"
"""Callable without the secret: probes have none, and learn nothing but that we live."""

_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # PERF: without probing, a reader that stops lets its writer run 64 KiB ahead; with it, 4 MiB.
    ("grpc.http2.bdp_probe", 0),
]
_CLIENT_OPTIONS = [
    *_OPTIONS,
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
    ("grpc.enable_http_proxy", 0),
]


def open_channel(address: str) -> aio.Channel:
    """A channel to `host:port` or `unix:/path`. Calls on it carry `bearer(secret)` as their metadata."""
    return aio.insecure_channel(address, options=_CLIENT_OPTIONS)


def bearer(secret: str) -> Metadata:
    """The metadata that lets a call in."""
    return (("authorization", f"Bearer {secret}"),) if secret else ()


def make_server(secret: str, *, shared_port: bool) -> aio.Server:
    """A server that takes only calls with the secret, if there is one. `shared_port`: several processes listen on its
    port.
    """
    logging.getLogger("grpc._cython.cygrpc").addFilter(_without_traceback)
    interceptors: list[Any] = [_Gate(secret)] if secret else []
    options = [*_OPTIONS, ("grpc.so_reuseport", int(shared_port))]
    return aio.server(options=options, interceptors=interceptors)


class _Gate(aio.ServerInterceptor):  # type: ignore[type-arg]
    """SECURITY: the one place where calls are let in; constant-time comparison."""

    def __init__(self, secret: str) -> None:
        self._expected = f"Bearer {secret}".encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        details: grpc.HandlerCallDetails,
    ) -> Any:
        if details.method.startswith(_OPEN):
            return await continuation(details)
        given = dict(details.invocation_metadata or ()).get("authorization", "")
        if hmac.compare_digest(given.encode() if isinstance(given, str) else given, self._expected):
            return await continuation(details)
        # SECURITY: of a method that takes one message, gRPC would first read that, up to MAX_MESSAGE_BYTES.
        return grpc.stream_unary_rpc_method_handler(_refuse)


async def _refuse(_: Any, context: aio.ServicerContext[Any, Any]) -> Any:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "ASH_INTERNAL_SECRET is missing or differs")


def _without_traceback(record: logging.LogRecord) -> bool:
    """A body that is no message of ours is its caller's mistake, and one line; gRPC logs the traceback of a bug."""
    if record.exc_info and isinstance(record.exc_info[1], DecodeError):
        record.exc_info = None
    return True
