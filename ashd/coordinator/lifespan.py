"""A worker's life as an ASGI application: everything with a connection or a task is opened here, after gunicorn's fork.

Covers: the order of opening and closing, the registry's address, the deadline on a client that takes nothing.
Leaves out: the resources (app.py), processes and signals (worker.py, main.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection

from ashd import log
from ashd.config.schema import CoordinatorConfig
from ashd.coordinator import metrics
from ashd.coordinator.app import build_app
from ashd.coordinator.auth import ensure_initial_key
from ashd.coordinator.background import Background
from ashd.coordinator.dispatch import Dispatcher
from ashd.coordinator.fleet import Fleet
from ashd.coordinator.registry import RegistryService
from ashd.coordinator.services import Services
from ashd.coordinator.stream import SessionStreams
from ashd.coordinator.sweep import Sweep, announce
from ashd.coordinator.watch import Watch
from ashd.errors import AshdError, Unavailable
from ashd.store import coordinators
from ashd.store.migrate import pending
from ashd.store.pool import Database
from ashd.wire.channel import make_server
from ashd.wire.v1 import registry_pb2, registry_pb2_grpc

_log = log.get(__name__)

_SERVICE = registry_pb2.DESCRIPTOR.services_by_name["RunnerRegistry"].full_name
_MAX_SOCKETS = 1024

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Coordinator:
    """The ASGI application of one worker."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        self._app: Callable[[Scope, Receive, Send], Awaitable[None]] | None = None
        self._streams: SessionStreams | None = None

    def stop_streams(self) -> None:
        """The worker is to stop: streams end now, so that it needn't wait for them."""
        if self._streams is not None:
            self._streams.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # there are none; the server answers 403 (ASGI, websocket protocol)
        elif self._app is not None:
            await self._app(scope, receive, _Patient(send, self._config.stall_timeout))

    async def _live(self, receive: Receive, send: Send) -> None:
        """From lifespan.startup to lifespan.shutdown (ASGI, lifespan protocol)."""
        await receive()
        started = False
        try:
            async with contextlib.AsyncExitStack() as opened:
                own_tasks = await self._open(opened)
                await send({"type": "lifespan.startup.complete"})
                started = True
                await receive()
                self.stop_streams()
                for task in own_tasks:
                    task.cancel()
        except* AshdError as group:
            text = "; ".join(error.message for error in _errors(group))
            _log.error("coordinator worker can't go on", error=text)
            if not started:
                await send({"type": "lifespan.startup.failed", "message": text})
        except* Exception:  # the worker's last door: a task of ours died, so the worker does
            _log.exception("coordinator worker can't go on")
            if not started:
                await send({"type": "lifespan.startup.failed", "message": "see the log"})
            signal.raise_signal(signal.SIGTERM)
        await send({"type": "lifespan.shutdown.complete"})

    async def _open(self, opened: contextlib.AsyncExitStack) -> list[asyncio.Task[None]]:
        """Opens everything, each thing's closing put on `opened`; the worker's own endless tasks."""
        config = self._config
        db = Database(config.database_url, config.database_pool_size, config.database_timeout)
        await db.open()
        opened.push_async_callback(db.close)
        if missing := await pending(db):
            raise Unavailable(f"the database lacks the migrations {', '.join(missing)}: run `ashd migrate`")
        await ensure_initial_key(db, config)
        coordinator_id = f"{socket.gethostname()}-{os.getpid()}"
        fleet = Fleet(config.internal_secret)
        opened.push_async_callback(fleet.close)
        tasks = await opened.enter_async_context(asyncio.TaskGroup())
        watch = Watch(db)
        dispatcher = Dispatcher(config, db, fleet, Background(tasks))
        self._streams = SessionStreams(config, db, fleet, watch, dispatcher)
        services = Services(
            config=config,
            db=db,
            coordinator_id=coordinator_id,
            started_at=time.monotonic(),
            dispatch=dispatcher,
            streams=self._streams,
        )
        address = await opened.enter_async_context(_registry(config, db, coordinator_id))
        opened.push_async_callback(_forget, db, coordinator_id)
        self._app = build_app(services)
        sweep = Sweep(config, db, fleet, dispatcher)
        _log.info("coordinator worker is up", coordinator=coordinator_id, registry=address)
        return [
            tasks.create_task(watch.run(), name="watch sessions"),
            tasks.create_task(sweep.run(), name="sweep"),
            tasks.create_task(announce(db, coordinator_id, address), name="announce"),
            tasks.create_task(metrics.keep_sampled(services), name="sample metrics"),
        ]


async def _forget(db: Database, coordinator_id: str) -> None:
    with contextlib.suppress(Unavailable):  # announcements age by themselves
        await coordinators.forget(db, coordinator_id)


@contextlib.asynccontextmanager
async def _registry(config: CoordinatorConfig, db: Database, coordinator_id: str) -> AsyncIterator[str]:
    """The registry's server, listening; the address runners reach it at."""
    server = make_server(config.internal_secret, shared_port=True)
    registry_pb2_grpc.add_RunnerRegistryServicer_to_server(RegistryService(db, coordinator_id), server)
    serving = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    for name in ("", _SERVICE):
        await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    with contextlib.ExitStack() as held:
        listen, advertised = _addresses(config, held)
        _listen(server, listen)
        await server.start()
        try:
            yield advertised
        finally:
            await server.stop(grace=0.5)


def _listen(server: aio.Server, address: str) -> None:
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise Unavailable(
            f"the registry can't listen on {address}: {error}. Set another port (ASH_REGISTRY_PORT)."
        ) from None


def _addresses(config: CoordinatorConfig, held: contextlib.ExitStack) -> tuple[str, str]:
    """Where the registry listens, and what runners are told."""
    if config.registry_socket_dir is not None:
        path = _own_socket(config.registry_socket_dir, held)
        return f"unix:{path}", f"unix:{path}"
    host = config.registry_host or config.host
    advertised = config.registry_advertise_host or (socket.gethostname() if host in ("0.0.0.0", "::") else host)
    return f"{_bracketed(host)}:{config.registry_port}", f"{_bracketed(advertised)}:{config.registry_port}"


def _own_socket(folder: Path, held: contextlib.ExitStack) -> Path:
    """The first socket path of the folder that no other worker holds; the names stay the same over restarts.

    RACE: the lock decides, and dies with its holder; the socket file alone would tell nothing.
    """
    for number in range(_MAX_SOCKETS):
        lock = held.enter_context((folder / f"registry-{number}.lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        return folder / f"registry-{number}.sock"
    raise Unavailable(f"all {_MAX_SOCKETS} sockets of {folder} are taken")


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _errors(group: BaseExceptionGroup[AshdError]) -> list[AshdError]:
    found: list[AshdError] = []
    for error in group.exceptions:
        found += _errors(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


class _Patient:
    """Sends to a client, but not for ever: one that takes nothing for `timeout_s` is given up. Its cursor stays
    valid.
    """

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send = send
        self._timeout_s = timeout_s

    async def __call__(self, message: dict[str, Any]) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._send(message)
        except TimeoutError:
            raise OSError(f"the client took nothing for {self._timeout_s:g} s") from None
