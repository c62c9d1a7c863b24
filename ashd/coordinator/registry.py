"""The gRPC registry: where runners report. Served by every worker, on one port that all share or on a socket of its
own.

Covers: Register, Heartbeat, Record, Deregister, FetchBundle, in the wire's words. Leaves out: what they change
(ashd.store).
"""

from __future__ import annotations

import math
import re
from collections.abc import AsyncIterator, Mapping
from typing import Any, NoReturn

from grpc import aio

from ashd import log
from ashd.coordinator import metrics
from ashd.coordinator.record import record
from ashd.coordinator.request import UUID
from ashd.domain.isolation import LEVELS
from ashd.errors import AshdError, NotFound, Rejected
from ashd.store import bundles, runners
from ashd.store.events import Lease
from ashd.store.pool import Database
from ashd.wire import status
from ashd.wire.v1 import registry_pb2, registry_pb2_grpc

_log = log.get(__name__)
RUNNER_ID = re.compile(r"[A-Za-z0-9_.:@-]{1,255}")
_PRINTABLE = re.compile(r"[\x21-\x7e]{0,1023}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

_REASON_LENGTH = 200
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,31}")
_MOST_WORDS = 16

Context = aio.ServicerContext[Any, Any]


class RegistryService(registry_pb2_grpc.RunnerRegistryServicer):
    """Answers runners. Every method turns our errors into statuses and nothing else."""

    def __init__(self, db: Database, coordinator_id: str) -> None:
        self._db = db
        self._coordinator_id = coordinator_id

    async def Register(self, request: registry_pb2.RegisterRequest, context: Context) -> registry_pb2.RegisterResponse:
        try:
            registered = await runners.register(self._db, _registration_of(request), _leases_of(request.leases))
        except AshdError as error:
            await _refuse("Register", context, error)
        metrics.REGISTRATIONS.inc()
        _log.info(
            "runner registered",
            runner=request.runner_id,
            address=request.address,
            leases=len(request.leases),
            stale=len(registered.stale),
        )
        return registry_pb2.RegisterResponse(
            coordinator_id=self._coordinator_id,
            recorded=[
                registry_pb2.Recorded(session_id=one.session_id, epoch=one.epoch, seq=one.last_seq)
                for one in registered.recorded
            ],
            stale=_wire_leases(registered.stale),
        )

    async def Heartbeat(
        self, request_iterator: AsyncIterator[registry_pb2.HeartbeatRequest], context: Context
    ) -> AsyncIterator[registry_pb2.HeartbeatResponse]:
        async for request in request_iterator:
            try:
                if not await runners.heartbeat(self._db, _runner_id(request.runner_id), _report_of(request)):
                    raise NotFound(f"runner {request.runner_id} is not registered; register again")
                stale = await self._compare(request)
            except AshdError as error:
                await _refuse("Heartbeat", context, error)
            yield registry_pb2.HeartbeatResponse(stale=_wire_leases(stale))

    async def _compare(self, request: registry_pb2.HeartbeatRequest) -> list[Lease]:
        """Holds a runner's inventory against the database, both ways."""
        if not request.HasField("inventory"):
            return []
        compared = await runners.compare(self._db, request.runner_id, _leases_of(request.inventory.leases))
        for taken in compared.lost:
            _log.warning("session lost its sandbox", session=taken.session_id, runner=request.runner_id)
        return compared.stale

    async def Record(
        self, request_iterator: AsyncIterator[registry_pb2.RecordRequest], context: Context
    ) -> AsyncIterator[registry_pb2.RecordResponse]:
        async for request in request_iterator:
            try:
                response = await record(self._db, request)
            except AshdError as error:
                _log.error("events were not recorded", runner=request.runner_id, code=error.code, error=error.message)
                await _refuse("Record", context, error)
            yield response

    async def Deregister(
        self, request: registry_pb2.DeregisterRequest, context: Context
    ) -> registry_pb2.DeregisterResponse:
        try:
            taken = await runners.deregister(self._db, _runner_id(request.runner_id))
        except AshdError as error:
            await _refuse("Deregister", context, error)
        _log.info("runner deregistered", runner=request.runner_id, sessions_paused=len(taken))
        return registry_pb2.DeregisterResponse()

    async def FetchBundle(
        self, request: registry_pb2.FetchBundleRequest, context: Context
    ) -> AsyncIterator[registry_pb2.BundleChunk]:
        try:
            if not _DIGEST.fullmatch(request.digest):
                raise NotFound("Bundle not found", code="bundle.not_found")
            async for chunk in bundles.read(self._db, request.digest):
                yield registry_pb2.BundleChunk(data=chunk)
        except AshdError as error:
            await _refuse("FetchBundle", context, error)


async def _refuse(method: str, context: Context, error: AshdError) -> NoReturn:
    """Ends a runner's call with `error`."""
    metrics.registry_refused(method, status.status_of(error))
    await status.abort(context, error)


def _registration_of(request: registry_pb2.RegisterRequest) -> runners.Registration:
    """What a runner says of itself. Raises Rejected."""
    if request.max_sandboxes < 0 or not request.host:
        raise Rejected("a runner needs a host and a max_sandboxes of at least 0")
    if not all(map(_PRINTABLE.fullmatch, (request.host, request.address, request.version, *request.enforced))):
        raise Rejected("host, address, version and what is enforced must be printable ASCII without spaces")
    return runners.Registration(
        id=_runner_id(request.runner_id),
        host=request.host,
        port=request.port,
        address=request.address or f"{request.host}:{request.port}",
        max_sandboxes=request.max_sandboxes,
        version=request.version,
        isolation=request.isolation if request.isolation in LEVELS else "",
        enforced=list(request.enforced),
    )


def _runner_id(given: str) -> str:
    if not RUNNER_ID.fullmatch(given):
        raise Rejected(f"runner_id must match {RUNNER_ID.pattern}")
    return given


def _report_of(request: registry_pb2.HeartbeatRequest) -> runners.Report:
    counts, memory, usage = request.counts, request.memory, request.usage
    return runners.Report(
        warming=counts.warming,
        warm=counts.warm,
        running=counts.running,
        waiting=counts.waiting,
        warm_hits=counts.warm_hits,
        cold_starts=counts.cold_starts,
        memory_total=memory.total_bytes,
        memory_used=memory.used_bytes,
        memory_per_sandbox=memory.per_sandbox_bytes,
        draining=request.draining,
        refusing=reason(request.refusing),
        pss_bytes=usage.pss_bytes,
        cpu_seconds=usage.cpu_seconds if math.isfinite(usage.cpu_seconds) else 0.0,
        processes=usage.processes,
        descriptors=usage.descriptors,
        disk_bytes=usage.disk_bytes,
        orphans=counters(request.orphans),
        kills=counters(request.kills),
    )


def reason(text: str) -> str:
    """A runner's reason as it may be stored and shown: one line, not long."""
    return "".join(char for char in text if char.isprintable())[:_REASON_LENGTH]


def counters(counts: Mapping[str, int]) -> dict[str, int]:
    """A runner's counts by kind. SECURITY: they become labels of metrics, so what is no short word is left out."""
    words = {word: count for word, count in counts.items() if _WORD.fullmatch(word) and count >= 0}
    return dict(sorted(words.items())[:_MOST_WORDS])


def _leases_of(leases: Any) -> list[Lease]:
    """What a runner says it has. Raises Rejected: one id that is none would fail the statement for all."""
    if not all(UUID.fullmatch(lease.session_id) for lease in leases):
        raise Rejected("the session_id of a lease must be a uuid")
    return [Lease(lease.session_id, lease.epoch) for lease in leases]


def _wire_leases(leases: list[Lease]) -> list[registry_pb2.SessionLease]:
    return [registry_pb2.SessionLease(session_id=lease.session_id, epoch=lease.epoch) for lease in leases]
