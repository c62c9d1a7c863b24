"""The runner's link up: to one coordinator at a time, its home; when that breaks, to the next.

Covers: finding coordinators, Register, Heartbeat, carrying the recorder's batches, fetching bundles, Deregister.
Leaves out: which events are sent (recorder.py), what commands do (supervisor.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import urllib.request
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import psutil
from grpc import aio
from grpc.aio import EOF  # type: ignore[attr-defined]

from ashd import __version__, log
from ashd.config.schema import RunnerConfig
from ashd.domain.restart import Backoff
from ashd.domain.sandbox import State
from ashd.errors import AshdError, Unavailable
from ashd.runner.recorder import Recorder
from ashd.runner.supervisor import Supervisor
from ashd.wire.channel import Metadata, bearer, open_channel
from ashd.wire.status import error_of
from ashd.wire.v1 import registry_pb2
from ashd.wire.v1.registry_pb2_grpc import RunnerRegistryStub

if TYPE_CHECKING:
    from ashd.wire.v1.registry_pb2_grpc import RunnerRegistryAsyncStub  # a name of the stubs' only

_log = log.get(__name__)

_ASK_TIMEOUT_S = 10.0
_RECORD_TIMEOUT_S = 60.0
_HEARTBEATS_PER_INVENTORY = 3
_MIN_PAUSE_S = 0.5


@dataclass(frozen=True)
class Identity:
    """Who this runner is to coordinators."""

    runner_id: str
    host: str
    port: int
    address: str


class Uplink:
    """Keeps the runner registered, heard and recorded."""

    def __init__(self, config: RunnerConfig, identity: Identity, secret: str) -> None:
        self._config = config
        self._identity = identity
        self._metadata: Metadata = bearer(secret)
        self._stub: RunnerRegistryAsyncStub | None = None
        self._linked = asyncio.Event()
        self._beats = 0

    # ------------------------------------------------------------ homes

    async def run(self, supervisor: Supervisor) -> None:
        """Links to a coordinator, and to another whenever that breaks, until cancelled."""
        backoff = Backoff()
        while True:
            try:
                for address in await self._addresses():
                    await self._live_with(address, supervisor, backoff)
            except AshdError as error:
                _log.warning("no coordinator can be asked", server=self._config.server_url, error=error.message)
            await asyncio.sleep(backoff.next_s(random.random()))

    async def _addresses(self) -> list[str]:
        """The registry's addresses, in random order. Raises Unavailable."""
        url = self._config.server_url
        scheme, _, rest = url.partition("://")
        if scheme == "grpc":
            addresses = [address.strip() for address in rest.split(",") if address.strip()]
        else:
            try:
                addresses = await asyncio.to_thread(self._ask_for_addresses, url)
            except (OSError, ValueError, KeyError) as error:
                raise Unavailable(f"{url} did not tell the registry's addresses: {error}") from None
        random.shuffle(addresses)
        return addresses

    def _ask_for_addresses(self, url: str) -> list[str]:
        request = urllib.request.Request(url.rstrip("/") + "/api/internal/registry")  # noqa: S310 (config allows http only)
        for name, value in self._metadata:
            request.add_header(name, value)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=_ASK_TIMEOUT_S) as response:
            addresses: list[str] = json.load(response)["addresses"]
            return addresses

    async def _live_with(self, address: str, supervisor: Supervisor, backoff: Backoff) -> None:
        """Registers with one coordinator and stays until the link breaks."""
        async with open_channel(address) as channel:
            stub = RunnerRegistryStub(channel)
            try:
                async with asyncio.TaskGroup() as link:
                    await self._register(stub, supervisor)
                    self._stub = stub
                    self._linked.set()
                    backoff.reset()
                    link.create_task(self._beat(stub, supervisor), name="heartbeat")
                    link.create_task(self._record(stub, supervisor), name="record")
            except* aio.AioRpcError as group:
                failed = _first(group)
                error = error_of(failed, f"coordinator {address}")
                _log.warning("link to the coordinator broke", coordinator=address, error=error.message)
            except* (EOFError, TimeoutError) as group:
                _log.warning("link to the coordinator broke", coordinator=address, error=repr(_first(group)))
            finally:
                self._stub = None
                self._linked.clear()

    async def _register(self, stub: Any, supervisor: Supervisor) -> None:
        me = self._identity
        response = await stub.Register(
            registry_pb2.RegisterRequest(
                runner_id=me.runner_id,
                host=me.host,
                port=me.port,
                max_sandboxes=self._config.max_sandboxes,
                address=me.address,
                version=__version__,
                enforced=supervisor.enforced,
                isolation=supervisor.isolation,
                leases=_leases(supervisor),
            ),
            metadata=self._metadata,
            timeout=_ASK_TIMEOUT_S,
        )
        for recorded in response.recorded:
            sandbox = supervisor.sandboxes.of_lease(recorded.session_id, recorded.epoch)
            if sandbox is not None:
                sandbox.recording.acknowledge(recorded.seq)
        _end_stale(supervisor, response.stale)
        _log.info("registered", coordinator=response.coordinator_id, runner=me.runner_id)

    async def deregister(self) -> None:
        """Says goodbye, so that sessions are paused at once. Best effort: without it the sweep does the same later."""
        if self._stub is None:
            return
        request = registry_pb2.DeregisterRequest(runner_id=self._identity.runner_id)
        with contextlib.suppress(aio.AioRpcError):
            await self._stub.Deregister(request, metadata=self._metadata, timeout=_ASK_TIMEOUT_S)

    # ------------------------------------------------------------ what flows

    async def _beat(self, stub: Any, supervisor: Supervisor) -> None:
        call = stub.Heartbeat(metadata=self._metadata)
        while True:
            supervisor.capacity_changed.clear()
            response = await _exchange(call, self._heartbeat(supervisor), _ASK_TIMEOUT_S)
            _end_stale(supervisor, response.stale)
            supervisor.draining = supervisor.draining or response.drain
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(supervisor.capacity_changed.wait(), self._config.heartbeat_interval)
                await asyncio.sleep(_MIN_PAUSE_S)  # many changes at once are one heartbeat

    def _heartbeat(self, supervisor: Supervisor) -> registry_pb2.HeartbeatRequest:
        memory, count = psutil.virtual_memory(), supervisor.sandboxes.count
        request = registry_pb2.HeartbeatRequest(
            runner_id=self._identity.runner_id,
            counts=registry_pb2.Counts(
                warming=count(State.WARMING, State.CLAIMED),
                warm=count(State.WARM),
                running=count(State.RUNNING),
                waiting=count(State.WAITING),
                warm_hits=supervisor.pool.hits,
                cold_starts=supervisor.pool.cold_starts,
            ),
            memory=registry_pb2.Memory(
                total_bytes=memory.total,
                used_bytes=memory.total - memory.available,
                per_sandbox_bytes=supervisor.usage.mean_pss(),
            ),
            draining=supervisor.draining,
            usage=_usage(supervisor),
            refusing=supervisor.admission.statement,
            orphans=supervisor.orphans,
            kills=supervisor.kills,
        )
        if self._beats % _HEARTBEATS_PER_INVENTORY == 0:
            request.inventory.CopyFrom(registry_pb2.Inventory(leases=_leases(supervisor)))
        self._beats += 1
        return request

    async def _record(self, stub: Any, supervisor: Supervisor) -> None:
        call = stub.Record(metadata=self._metadata)

        async def send(request: registry_pb2.RecordRequest) -> registry_pb2.RecordResponse:
            answer: registry_pb2.RecordResponse = await _exchange(call, request, _RECORD_TIMEOUT_S)
            return answer

        for sandbox in supervisor.sandboxes.live():  # a new stream begins at what was acknowledged
            if sandbox.last_seq > sandbox.recording.acked_seq:
                supervisor.to_record[sandbox.id] = sandbox
        await Recorder(supervisor, self._identity.runner_id, send).run()

    async def fetch_bundle(self, digest: str) -> AsyncIterator[bytes]:
        """A bundle's archive from the home coordinator, in chunks. Raises NotFound, Unavailable."""
        try:
            await asyncio.wait_for(self._linked.wait(), _ASK_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable(
                "this runner has no coordinator to fetch the agent from", code="runner.unlinked"
            ) from None
        assert self._stub is not None
        try:
            request = registry_pb2.FetchBundleRequest(digest=digest)
            async for chunk in self._stub.FetchBundle(request, metadata=self._metadata, timeout=_RECORD_TIMEOUT_S):
                yield chunk.data
        except aio.AioRpcError as failed:
            raise error_of(failed, "the coordinator") from None


async def _exchange(call: Any, request: Any, timeout_s: float) -> Any:
    """One message up a stream and one down. Raises AioRpcError, EOFError, TimeoutError: the link is broken."""
    try:
        async with asyncio.timeout(timeout_s):
            await call.write(request)
            response = await call.read()
    except asyncio.InvalidStateError:  # the stream ended before we wrote: its status says why
        response = EOF
    if response is EOF:
        raise EOFError(f"the coordinator ended the stream: {await call.code()}")
    return response


def _first(group: BaseExceptionGroup[Any]) -> Any:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner


def _leases(supervisor: Supervisor) -> list[registry_pb2.SessionLease]:
    return [
        registry_pb2.SessionLease(session_id=session, epoch=epoch) for session, epoch in supervisor.sandboxes.leases()
    ]


def _end_stale(supervisor: Supervisor, stale: Any) -> None:
    for lease in stale:
        _log.warning("lease is over, ending the sandbox", session=lease.session_id, epoch=lease.epoch)
        supervisor.end_session(lease.session_id, lease.epoch, "fenced")


def _usage(supervisor: Supervisor) -> registry_pb2.Usage:
    total = supervisor.usage.total()
    return registry_pb2.Usage(
        pss_bytes=total.pss_bytes,
        cpu_seconds=total.cpu_s,
        processes=total.processes,
        descriptors=total.descriptors,
        disk_bytes=sum(supervisor.disk_bytes(sandbox) for sandbox in supervisor.sandboxes.all()),
    )
