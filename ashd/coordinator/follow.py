"""Following a session: its saved events from the database, the rest from its runner's journal, across every break.

Covers: gaps, broken streams, restarted supervisors, sessions that pause, move or end. Leaves out: what clients see
(frames.py).

A follower yields each event once, in order, and after each batch knows its place; whatever happens next, it goes on
from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Any

import grpc
from grpc import aio

from ashd import log
from ashd.coordinator import metrics
from ashd.coordinator.fleet import Fleet, is_live
from ashd.coordinator.frames import Shown, from_store, from_wire
from ashd.coordinator.runner_stream import CALLEE, RunnerStream
from ashd.coordinator.watch import Watch
from ashd.domain.restart import Backoff
from ashd.errors import Unavailable
from ashd.store import events, sessions
from ashd.store.pool import Database
from ashd.wire.status import AHEAD, error_of
from ashd.wire.v1 import events_pb2, runner_pb2

_log = log.get(__name__)

_PAGE = 500
_RUNNER_PATIENCE_S = 5.0
_SILENCE_S = 10.0
_LOOK_S = 0.2


class Discarded(Exception):
    """Events this follower has given out were of a lease that ended before they were saved; `seq` is the last that
    still holds.
    """

    def __init__(self, epoch: int, seq: int) -> None:
        super().__init__(f"events after {seq} were discarded")
        self.epoch = epoch
        self.seq = seq


class Follower:
    """Follows one session from a place on. `place` is (seq, part) of the last event given out, `epoch` its lease."""

    def __init__(
        self, db: Database, fleet: Fleet, watch: Watch, session: str, epoch: int, place: tuple[int, int]
    ) -> None:
        self._db = db
        self._fleet = fleet
        self._watch = watch
        self._session = session
        self._backoff = Backoff(first_s=0.05, most_s=1.0)
        self._answered = float("-inf")
        self.epoch = epoch
        self.place = place

    async def batches(
        self, stream: RunnerStream | None, location: sessions.Location | None
    ) -> AsyncGenerator[list[Shown]]:
        """Batches of events until the session has ended; an empty one is a sign that the runner has answered.

        `stream` is one that is open already, under `self.epoch`; without one, `location` says where to begin.
        Raises Discarded; goes on when called again.
        """
        while True:
            if stream is None and location is not None and is_live(location):
                stream = self._open(location)
            if stream is not None:
                async for batch in self._from_runner(stream):
                    yield batch
            stream = None
            location = await self._watch.where(self._session)
            if location is None:
                return
            if not self._may_answer_soon(location):
                async for batch in self._from_database(location):
                    yield batch
            if location.status == "ended" and self.place[0] >= location.last_seq:
                return

    def _may_answer_soon(self, location: sessions.Location) -> bool:
        """Whether the runner is only just away, and its journal, which has the deltas too, is worth waiting for."""
        same = is_live(location) and location.epoch == self.epoch
        return same and time.monotonic() < self._answered + _RUNNER_PATIENCE_S

    def _open(self, location: sessions.Location) -> RunnerStream:
        self.epoch = location.epoch
        request = runner_pb2.StreamEventsRequest(
            session_id=self._session, epoch=self.epoch, after_seq=self.place[0], after_part=self.place[1]
        )
        runner = self._fleet.runner(location.runner_address)
        metrics.RUNNER_RECONNECTS.inc()
        return RunnerStream(runner.StreamEvents(request, metadata=self._fleet.metadata), "StreamEvents")

    async def _from_runner(self, stream: RunnerStream) -> AsyncIterator[list[Shown]]:
        """What the runner sends until its stream ends, for whatever reason."""
        try:
            while (batch := await self._next(stream)) is not None:
                self._backoff.reset()
                self._answered = time.monotonic()
                if batch.HasField("journal_from_seq") and batch.journal_from_seq > self.place[0]:
                    async for missing in self._saved_events(batch.journal_from_seq):
                        yield missing
                fresh = [event for event in batch.events if (event.seq, event.part) > self.place]
                self._move(fresh)
                yield [from_wire(event, self.epoch) for event in fresh]
        except aio.AioRpcError as failed:
            # A turn's own stream (StartTurn) is of the same kind, and counts here when it breaks later.
            metrics.runner_failed("StreamEvents", failed.code())
            error = error_of(failed, CALLEE)
            if error.code == AHEAD:
                await self._step_back()
            if failed.code() is not grpc.StatusCode.UNAVAILABLE:
                _log.info("runner ended a stream", session=self._session, code=error.code, error=error.message)
            await asyncio.sleep(self._backoff.next_s(random.random()))
        finally:
            stream.close()

    async def _next(self, stream: RunnerStream) -> events_pb2.EventBatch | None:
        """The runner's next batch; None when its stream is over, or the session no longer is where the stream is from.

        WAITS: a silent stream is the rule while a session idles. But a host that is cut off is silent too, so from time
        to time the database is asked whether the session is still there.
        """
        while True:
            try:
                return await stream.next(_SILENCE_S)
            except TimeoutError:
                asked = asyncio.ensure_future(self._watch.where(self._session))
            try:
                while not asked.done():  # the database may be away; the runner may speak meanwhile
                    with contextlib.suppress(TimeoutError):
                        return await stream.next(_LOOK_S)
                location = asked.result()
            finally:
                asked.cancel()
            if location is None or not is_live(location) or location.epoch != self.epoch:
                return None

    async def _step_back(self) -> None:
        """The runner has less than the client was given, or says it was: only what is saved holds."""
        holds = await self._patiently(lambda: events.last_seq_up_to(self._db, self._session, self.epoch))
        self.place = (holds, 0)
        raise Discarded(self.epoch, holds)

    def _move(self, fresh: list[events_pb2.Event]) -> None:
        if fresh:
            self.place = (fresh[-1].seq, fresh[-1].part)

    async def _from_database(self, location: sessions.Location) -> AsyncIterator[list[Shown]]:
        """Saved events we have not had, as far as the database has them."""
        if location.epoch > self.epoch:
            await self._check_place(location)
        async for batch in self._saved_events(location.last_seq):
            yield batch

    async def _check_place(self, location: sessions.Location) -> None:
        """A new lease: what we gave out under the old one holds as far as it was saved."""
        holds = await self._patiently(lambda: events.last_seq_up_to(self._db, self._session, self.epoch))
        self.epoch = location.epoch
        if self.place > (holds, 0):
            self.place = (holds, 0)
            raise Discarded(self.epoch, holds)

    async def _saved_events(self, up_to: int) -> AsyncIterator[list[Shown]]:
        while self.place[0] < up_to:
            after = self.place[0]
            page = await self._patiently(lambda after=after: events.page(self._db, self._session, after, _PAGE))
            if not page:
                return
            self.place = (page[-1].seq, 0)
            yield [from_store(event) for event in page]

    async def _patiently(self, ask: Any) -> Any:
        """Asks the database until it answers. WAITS: as long as the client does; keep-alives flow meanwhile."""
        while True:
            try:
                return await ask()
            except Unavailable as error:
                _log.warning("database does not answer a stream", session=self._session, error=error.message)
                await asyncio.sleep(self._backoff.next_s(random.random()))
