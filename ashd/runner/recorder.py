"""The way up for saved events: batches of all sessions' events, acknowledged when committed (P1, P2).

Covers: reading what isn't committed yet from the journals, one batch in flight, what an acknowledgement and a fence
mean. Leaves out: the stream it travels on (uplink.py), the transaction that commits it (ashd/coordinator/record.py).

While one batch is being committed the next collects: the slower the database, the larger the batches.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from ashd import log
from ashd.runner.journals import saved
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.supervisor import Supervisor
from ashd.wire.convert import event_of
from ashd.wire.v1 import registry_pb2
from sandbox.journal import Corrupt, Position, Reader

_log = log.get(__name__)

_BATCH_BYTES = 4 * 1024 * 1024
_SESSION_READ_BYTES = 256 * 1024

Send = Callable[[registry_pb2.RecordRequest], Awaitable[registry_pb2.RecordResponse]]


@dataclass
class _Place:
    """Where in a journal the recorder stands."""

    sandbox: SandboxTask
    reader: Reader


class Recorder:
    """Sends what is not committed. A new one, on a new stream, begins again at what was acknowledged."""

    def __init__(self, supervisor: Supervisor, runner_id: str, send: Send) -> None:
        self._supervisor = supervisor
        self._runner_id = runner_id
        self._send = send
        self._places: dict[str, _Place] = {}

    async def run(self) -> None:
        """Until cancelled, or until `send` raises."""
        try:
            while True:
                self._supervisor.has_to_record.clear()
                batch = self._gather()
                if not batch:
                    await self._supervisor.has_to_record.wait()
                    continue
                await self._commit(batch)
        finally:
            for place in self._places.values():
                place.reader.close()

    def _gather(self) -> list[tuple[_Place, registry_pb2.SessionEvents]]:
        """Events of every sandbox that has some, up to the size of a batch; the rest comes with the next."""
        batch, size = [], 0
        for sandbox in list(self._supervisor.to_record.values()):
            if size >= _BATCH_BYTES:
                break
            place = self._place_of(sandbox)
            if place is None:
                continue
            events = self._next_events(place)
            if events is not None:
                batch.append((place, events))
                size += sum(len(event.payload) for event in events.events)
        return batch

    def _place_of(self, sandbox: SandboxTask) -> _Place | None:
        if sandbox.recording.fenced:
            self._forget(sandbox)
            return None
        place = self._places.get(sandbox.id)
        if place is None:
            try:
                reader = Reader(sandbox.journal, Position(sandbox.recording.acked_seq, 0))
            except (OSError, Corrupt) as error:
                sandbox.log.error("journal can't be read", error=str(error))
                self._forget(sandbox)
                return None
            place = self._places[sandbox.id] = _Place(sandbox, reader)
        return place

    def _next_events(self, place: _Place) -> registry_pb2.SessionEvents | None:
        """The sandbox's next saved events; None, and it leaves the list, when there are none."""
        sandbox = place.sandbox
        sandbox.recorded_to = place.reader.place  # where the next turn's readers need not begin before
        try:
            while records := place.reader.read(_SESSION_READ_BYTES):
                if events := saved(records):
                    return registry_pb2.SessionEvents(
                        session_id=sandbox.session, epoch=sandbox.epoch, events=[event_of(record) for record in events]
                    )
        except Corrupt as error:
            sandbox.log.error("journal is corrupt", error=str(error))
        self._supervisor.to_record.pop(sandbox.id, None)
        return None

    async def _commit(self, batch: list[tuple[_Place, registry_pb2.SessionEvents]]) -> None:
        request = registry_pb2.RecordRequest(runner_id=self._runner_id, sessions=[events for _, events in batch])
        response = await self._send(request)
        recorded = {(one.session_id, one.epoch): one.seq for one in response.recorded}
        stale = {(one.session_id, one.epoch) for one in response.stale}
        for place, events in batch:
            sandbox = place.sandbox
            lease = (sandbox.session, sandbox.epoch)
            if lease in stale:
                sandbox.log.warning("lease is over, ending the sandbox")
                self._forget(sandbox)
                self._supervisor.end_session(*lease, "fenced")
                continue
            committed = recorded.get(lease, sandbox.recording.acked_seq)
            sandbox.recording.acknowledge(committed)
            if committed < events.events[-1].seq:
                sandbox.log.error("events were not committed, sending them again", committed=committed)
                self._close_place(sandbox)
                await asyncio.sleep(0.1)  # the coordinator saw a gap; not to ask it in a tight loop

    def _forget(self, sandbox: SandboxTask) -> None:
        self._supervisor.to_record.pop(sandbox.id, None)
        self._close_place(sandbox)

    def _close_place(self, sandbox: SandboxTask) -> None:
        place = self._places.pop(sandbox.id, None)
        if place is not None:
            place.reader.close()
