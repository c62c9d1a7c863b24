"""The way up for saved events: batches of all sessions' events, acknowledged when committed (P1, P2).

Covers: reading what isn't committed yet from the journals, one batch in flight, what an acknowledgement and a fence
mean. Leaves out: the stream it travels on (uplink.py), the transaction that commits it (ashd/coordinator/record.py).

While one batch is being committed the next collects: the slower the database, the larger the batches.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ashd.runner.journals import saved
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.supervisor import Supervisor
from ashd.wire.convert import event_of
from ashd.wire.v1 import registry_pb2
from sandbox.journal import Corrupt, Place, Position, Reader

_BATCH_BYTES = 4 * 1024 * 1024
_SESSION_READ_BYTES = 256 * 1024
_GAP_PAUSE_S = 0.1

Send = Callable[[registry_pb2.RecordRequest], Awaitable[registry_pb2.RecordResponse]]


@dataclass(frozen=True)
class _Part:
    """One sandbox's share of a batch, and where its recorder stands when that is committed."""

    sandbox: SandboxTask
    events: registry_pb2.SessionEvents
    then: Place


class Recorder:
    """Sends what is not committed. A new one, on a new stream, begins again at what was acknowledged."""

    def __init__(self, supervisor: Supervisor, runner_id: str, send: Send) -> None:
        self._supervisor = supervisor
        self._runner_id = runner_id
        self._send = send

    async def run(self) -> None:
        """Until cancelled, or until `send` raises."""
        while True:
            self._supervisor.has_to_record.clear()
            if batch := self._gather():
                await self._commit(batch)
            else:
                await self._supervisor.has_to_record.wait()

    def _gather(self) -> list[_Part]:
        """Events of every sandbox that has some, up to the size of a batch; the rest comes with the next."""
        batch, size = [], 0
        for sandbox in list(self._supervisor.to_record.values()):
            if size >= _BATCH_BYTES:
                break
            part = None if sandbox.recording.fenced else self._next_part(sandbox)
            if part is None:
                self._supervisor.to_record.pop(sandbox.id, None)
            else:
                batch.append(part)
                size += sum(len(event.payload) for event in part.events.events)
        return batch

    def _next_part(self, sandbox: SandboxTask) -> _Part | None:
        """The sandbox's next saved events, if there are any. Deltas on the way to them are passed for good."""
        acked = Position(sandbox.recording.acked_seq, 0)
        try:
            with contextlib.closing(Reader(sandbox.journal, acked, sandbox.recorded_to)) as reader:
                while records := reader.read(_SESSION_READ_BYTES):
                    if events := [event_of(record) for record in saved(records)]:
                        share = registry_pb2.SessionEvents(
                            session_id=sandbox.session, epoch=sandbox.epoch, events=events
                        )
                        return _Part(sandbox, share, reader.place)
                    sandbox.recorded_to = reader.place
        except Corrupt as error:
            sandbox.log.error("journal is corrupt, ending the sandbox", error=str(error))
            self._supervisor.end_session(sandbox.session, sandbox.epoch, "journal_corrupt")
        except OSError as error:  # tried again when the journal grows, or on the next link
            sandbox.log.error("journal can't be read", error=str(error))
        return None

    async def _commit(self, batch: list[_Part]) -> None:
        request = registry_pb2.RecordRequest(runner_id=self._runner_id, sessions=[part.events for part in batch])
        response = await self._send(request)
        recorded = {(one.session_id, one.epoch): one.seq for one in response.recorded}
        stale = {(one.session_id, one.epoch) for one in response.stale}
        for part in batch:
            lease = (part.sandbox.session, part.sandbox.epoch)
            if lease in stale:
                part.sandbox.log.warning("lease is over, ending the sandbox")
                self._supervisor.end_session(*lease, "fenced")
            elif recorded.get(lease, 0) >= part.events.events[-1].seq:
                part.sandbox.recorded_to = part.then
                part.sandbox.acknowledge(recorded[lease])
            else:  # a gap: the coordinator has less than we were told, so we begin again where it stands
                part.sandbox.log.error("events were not committed, sending them again", committed=recorded.get(lease))
                part.sandbox.recorded_to = None
                part.sandbox.recording.acked_seq = recorded.get(lease, 0)
                await asyncio.sleep(_GAP_PAUSE_S)
