"""The runner's gRPC service: what coordinators may ask of a supervisor, in the wire's words."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from typing import Any

from grpc import aio

from ashd import log
from ashd.config.schema import SandboxLimits
from ashd.errors import AshdError, Fault, Rejected
from ashd.runner.journals import follow
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.supervisor import Claim, Supervisor
from ashd.wire import status
from ashd.wire.convert import event_of
from ashd.wire.v1 import events_pb2, runner_pb2, runner_pb2_grpc
from sandbox.journal import Corrupt, Position

_log = log.get(__name__)

_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_DIGEST = re.compile(r"[0-9a-f]{64}")

Context = aio.ServicerContext[Any, Any]


class RunnerService(runner_pb2_grpc.RunnerServicer):
    """Answers for one supervisor. Every method turns our errors into statuses and nothing else."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    async def StartSession(
        self, request: runner_pb2.StartSessionRequest, context: Context
    ) -> runner_pb2.StartSessionResponse:
        try:
            sandbox = await self._supervisor.start_session(_claim_of(request))
        except AshdError as error:
            _log.warning(
                "session could not be started", session=request.session_id, code=error.code, error=error.message
            )
            await status.abort(context, error)
        return runner_pb2.StartSessionResponse(
            sandbox_id=sandbox.id,
            warm=sandbox.was_warm,
            enforced=sandbox.enforced,
            isolation=sandbox.isolation,
            limits=None if sandbox.limits is None else _limits(sandbox.limits),
        )

    async def StartTurn(
        self, request: runner_pb2.StartTurnRequest, context: Context
    ) -> AsyncIterator[events_pb2.EventBatch]:
        try:
            sandbox = self._supervisor.sandboxes.find(request.session_id, request.epoch)
            if not _UUID.fullmatch(request.turn_id):
                raise Rejected("turn_id must be a uuid")
            asked = _json_of(request.request)
            after = await self._supervisor.start_turn(sandbox, request.turn_id, asked, request.timeout_ms / 1000)
        except AshdError as error:
            await status.abort(context, error)
        async for batch in self._events(sandbox, Position(after, 0), context):
            yield batch

    async def StreamEvents(
        self, request: runner_pb2.StreamEventsRequest, context: Context
    ) -> AsyncIterator[events_pb2.EventBatch]:
        try:
            sandbox = self._supervisor.sandboxes.find(request.session_id, request.epoch)
            if request.after_seq > sandbox.last_seq:
                ahead = f"the cursor names event {request.after_seq}, the session has {sandbox.last_seq}"
                raise Rejected(ahead, code=status.AHEAD)
        except AshdError as error:
            await status.abort(context, error)
        async for batch in self._events(sandbox, Position(request.after_seq, request.after_part), context):
            yield batch

    async def _events(
        self, sandbox: SandboxTask, after: Position, context: Context
    ) -> AsyncIterator[events_pb2.EventBatch]:
        try:
            batches = follow(
                sandbox.journal, after, sandbox.recorded_to, sandbox.grew, sandbox.closed, sandbox.recording
            )
            async for starts_after, records in batches:
                yield events_pb2.EventBatch(
                    events=[event_of(record) for record in records], journal_from_seq=starts_after.seq
                )
        except FileNotFoundError:
            await status.abort(context, Rejected("the sandbox's journal is gone", code=status.NOT_HERE))
        except Corrupt as error:
            sandbox.log.error("journal is corrupt", error=str(error))
            await status.abort(context, Fault(f"the session's journal is corrupt: {error}", code="journal.corrupt"))

    async def InterruptTurn(
        self, request: runner_pb2.InterruptTurnRequest, context: Context
    ) -> runner_pb2.InterruptTurnResponse:
        try:
            sandbox = self._supervisor.sandboxes.find(request.session_id, request.epoch)
            interrupted = await self._supervisor.interrupt(sandbox, request.turn_id)
        except AshdError as error:
            await status.abort(context, error)
        return runner_pb2.InterruptTurnResponse(interrupted=interrupted)

    async def ListSandboxes(
        self, request: runner_pb2.ListSandboxesRequest, context: Context
    ) -> runner_pb2.ListSandboxesResponse:
        return runner_pb2.ListSandboxesResponse(
            sandboxes=[self._listed(sandbox) for sandbox in self._supervisor.sandboxes.all()]
        )

    def _listed(self, sandbox: SandboxTask) -> runner_pb2.Sandbox:
        used = self._supervisor.usage.of(sandbox.id)
        return runner_pb2.Sandbox(
            sandbox_id=sandbox.id,
            session_id=sandbox.session,
            epoch=sandbox.epoch,
            state=sandbox.state.value,
            isolation=sandbox.isolation,
            limits=None if sandbox.limits is None else _limits(sandbox.limits),
            pss_bytes=used.pss_bytes,
            memory_bytes=used.memory_bytes,
            cpu_seconds=used.cpu_s,
            processes=used.processes,
            descriptors=used.descriptors,
            disk_bytes=self._supervisor.disk_bytes(sandbox),
        )

    async def EndSession(
        self, request: runner_pb2.EndSessionRequest, context: Context
    ) -> runner_pb2.EndSessionResponse:
        self._supervisor.end_session(request.session_id, request.epoch, "ended")
        return runner_pb2.EndSessionResponse()


def _claim_of(request: runner_pb2.StartSessionRequest) -> Claim:
    """What the session asks for. Raises Rejected."""
    if not _UUID.fullmatch(request.session_id):
        raise Rejected("session_id must be a uuid")
    if not _DIGEST.fullmatch(request.bundle_digest):  # SECURITY: it becomes the name of a folder
        raise Rejected("bundle_digest must be a SHA-256 in hexadecimal")
    if request.limits.memory_bytes < 0 or request.limits.processes < 0:  # to a cgroup, -1 is "no limit"
        raise Rejected("limits must not be negative")
    return Claim(
        session=request.session_id,
        epoch=request.epoch,
        last_seq=request.last_seq,
        turns=request.turns,
        bundle=request.bundle_digest,
        runtime=request.runtime,
        entry=list(request.entry),
        env=dict(request.env),
        settings=_json_of(request.settings_json),
        memory_bytes=request.limits.memory_bytes,
        processes=request.limits.processes,
        open_files=request.limits.open_files,
        file_size_bytes=request.limits.file_size_bytes,
        cpu_percent=request.limits.cpu_percent,
        disk_bytes=request.limits.disk_bytes,
        network=request.network,
    )


def _limits(limits: SandboxLimits) -> runner_pb2.Limits:
    return runner_pb2.Limits(
        memory_bytes=limits.memory,
        processes=limits.processes,
        open_files=limits.open_files,
        file_size_bytes=limits.file_size,
        cpu_percent=limits.cpu_percent,
        disk_bytes=limits.disk,
    )


def _json_of(text: bytes | str) -> dict[str, Any]:
    """A JSON object; nothing counts as {}. Raises Rejected."""
    try:
        value = json.loads(text) if text else {}
    except (ValueError, RecursionError) as error:
        raise Rejected(f"the settings or request of a session must be JSON: {error}") from None
    if not isinstance(value, dict):
        raise Rejected("the settings or request of a session must be a JSON object")
    return value
