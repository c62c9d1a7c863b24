"""`ashd runner`: one supervisor, its gRPC service and its link up, from start to drained end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_health.v1.health import SERVICE_NAME as HEALTH_SERVICE
from grpc_reflection.v1alpha import reflection
from setproctitle import setproctitle

from ashd import log
from ashd.config.data_dir import default_data_dir
from ashd.config.schema import RunnerConfig
from ashd.errors import AshdError, Unavailable
from ashd.runner.service import RunnerService
from ashd.runner.supervisor import Supervisor
from ashd.runner.uplink import Identity, Uplink
from ashd.runner.workspace import BundleCache
from ashd.wire.channel import make_server
from ashd.wire.v1 import runner_pb2, runner_pb2_grpc

_log = log.get(__name__)

_SERVICE = runner_pb2.DESCRIPTOR.services_by_name["Runner"].full_name


def serve(config: RunnerConfig) -> int:
    """Runs a runner until SIGTERM or SIGINT. Returns the exit code: 0 after an orderly end, 1 if it could not start."""
    log.setup(config.log)
    setproctitle("ashd: runner supervisor")
    code = 0
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(config))
    except* AshdError as group:
        for error in group.exceptions:
            _log.error("runner could not go on", error=str(error))
        code = 1
    return code


async def _run(config: RunnerConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    state_dir = _state_dir(config)
    identity = _identity(config, state_dir)
    uplink = Uplink(config, identity, config.internal_secret)
    bundles = BundleCache(state_dir / "bundles", uplink.fetch_bundle)
    supervisor = Supervisor(config, state_dir, identity.runner_id, bundles)
    async with asyncio.TaskGroup() as tasks:
        await supervisor.run(tasks)
        async with _serving(config, supervisor):
            tasks.create_task(uplink.run(supervisor), name="uplink")
            _log.info("runner is up", runner=identity.runner_id, address=identity.address, enforces=supervisor.enforced)
            await stop.wait()
            await _drain(config, supervisor, uplink)
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.cancel()  # uplink, zygote, warm pool, and what waits for a database that is away
    _log.info("runner is down", runner=identity.runner_id)


@contextlib.asynccontextmanager
async def _serving(config: RunnerConfig, supervisor: Supervisor) -> AsyncIterator[None]:
    """The runner's gRPC service, with health checking and reflection, as long as the context lasts."""
    server = make_server(config.internal_secret, shared_port=False)
    runner_pb2_grpc.add_RunnerServicer_to_server(RunnerService(supervisor), server)
    serving = HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(serving, server)
    for name in ("", _SERVICE):
        await serving.set(name, health_pb2.HealthCheckResponse.SERVING)
    reflection.enable_server_reflection((_SERVICE, HEALTH_SERVICE, reflection.SERVICE_NAME), server)
    address = _listen_address(config)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise Unavailable(
            f"the runner can't listen on {address}: {error}. Another runner may be running; "
            "stop it or set another port (ASH_RUNNER_PORT)."
        ) from None
    await server.start()
    try:
        yield
    finally:
        await server.stop(grace=1.0)


async def _drain(config: RunnerConfig, supervisor: Supervisor, uplink: Uplink) -> None:
    """Takes nothing new, lets open turns end, ends the sandboxes and says goodbye."""
    _log.info("runner is draining", live=len(list(supervisor.sandboxes.live())))
    supervisor.draining = True
    supervisor.capacity_changed.set()
    await supervisor.settle_open_turns(config.drain_timeout)
    await supervisor.end_all("drained")
    await uplink.deregister()


def _state_dir(config: RunnerConfig) -> Path:
    folder = config.state_dir or default_data_dir(os.environ) / "runner"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder.resolve()


def _identity(config: RunnerConfig, state_dir: Path) -> Identity:
    advertised = config.advertise_host or (socket.gethostname() if config.host in ("0.0.0.0", "::") else config.host)
    address = f"unix:{config.socket}" if config.socket else f"{_bracketed(advertised)}:{config.port}"
    return Identity(_runner_id(config, state_dir), advertised, config.port, address)


def _runner_id(config: RunnerConfig, state_dir: Path) -> str:
    """The configured id; else the one of this state_dir's first start, so that a restarted runner is the same
    runner.
    """
    if config.runner_id:
        return config.runner_id
    kept = state_dir / "runner-id"
    if not kept.exists():
        new = kept.with_suffix(".new")
        new.write_text(f"runner-{socket.gethostname()}-{os.getpid()}\n")
        new.rename(kept)
    return kept.read_text().strip()


def _listen_address(config: RunnerConfig) -> str:
    return f"unix:{config.socket}" if config.socket else f"{_bracketed(config.host)}:{config.port}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
