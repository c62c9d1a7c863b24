"""Streams of a session's events to clients: the reply to a message, and attaching with replay (api.md §4).

Covers: the order of frames, keep-alives, the end of a stream, what happens when the worker stops. Leaves out: finding
the events (follow.py), their frames (frames.py), launching (dispatch.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator

from falcon import HTTP_204
from falcon.asgi import Request, Response

from ashd import __version__
from ashd.config.schema import CoordinatorConfig
from ashd.coordinator import metrics
from ashd.coordinator.dispatch import Dispatcher, Launch
from ashd.coordinator.fleet import Fleet
from ashd.coordinator.follow import Discarded, Follower
from ashd.coordinator.frames import KEEP_ALIVE, Frames
from ashd.coordinator.runner_stream import RunnerStream
from ashd.coordinator.timing import TurnTiming
from ashd.coordinator.watch import Watch
from ashd.domain.event import Cursor, EventKind
from ashd.errors import AshdError, Rejected, Unavailable
from ashd.store import events, sessions, turns
from ashd.store.pool import Database
from ashd.wire.status import AHEAD
from ashd.wire.v1 import runner_pb2

_CHUNK_BYTES = 64 * 1024
_ANSWER_TIMEOUT_S = 5.0
_HAND_OVER = b": this coordinator is stopping; reconnect with the last id\n\n"


class SessionStreams:
    """Opens the streams of one worker."""

    def __init__(
        self, config: CoordinatorConfig, db: Database, fleet: Fleet, watch: Watch, dispatcher: Dispatcher
    ) -> None:
        self._config = config
        self._db = db
        self._fleet = fleet
        self._watch = watch
        self._dispatcher = dispatcher
        self._timed = config.debug_timing
        self.open: set[_Paced] = set()

    def stop(self) -> None:
        """Every stream ends with a last comment; clients go on elsewhere with their cursor."""
        for stream in self.open:
            stream.stop()

    # ------------------------------------------------------------ the reply to a message

    async def post_message(self, req: Request, resp: Response, admitted: turns.Admitted) -> None:
        """Launches the turn, unless that was done before, and streams it from its start to its `done`."""
        self._send(resp, self._turn_chunks(admitted, time.perf_counter()))

    async def launch(self, admitted: turns.Admitted) -> None:
        """Launches the turn with nobody listening."""
        if admitted.turn.state == "accepted":
            self._dispatcher.launch_unwatched(_launch_of(admitted))

    async def _turn_chunks(self, admitted: turns.Admitted, admitted_at: float) -> AsyncGenerator[bytes]:
        turn = admitted.turn
        timing = TurnTiming(turn.session_id, admitted.sandbox_id, admitted_at) if self._timed else None
        last_seq = turn.first_seq - 1 if turn.first_seq is not None else admitted.last_seq
        start = Cursor(admitted.epoch, last_seq)
        frames = Frames(turn.session_id, start, whole=False)
        yield frames.start(turn.id, __version__)
        if turn.state == "settled" and turn.first_seq is None:  # asked for again, and never launched
            why = turn.error or "The turn was not run."
            yield frames.failed(turn.id, why, turn.error_code or "turn.not_run", last_seq=turn.last_seq or last_seq)
            return
        try:
            stream = await self._launched(admitted)
        except AshdError as error:
            yield frames.failed(turn.id, error.message, error.code, last_seq=last_seq)
            return
        follower = Follower(self._db, self._fleet, self._watch, turn.session_id, admitted.epoch, start.place)
        first = True
        async with contextlib.aclosing(_chunks(frames, follower, stream, None, until=turn.id, timing=timing)) as chunks:
            async for chunk in chunks:
                if first and not admitted.replayed:  # a request repeated is not a turn admitted
                    metrics.FIRST_EVENT_SECONDS.observe(time.perf_counter() - admitted_at)
                first = False
                yield chunk
        if not admitted.replayed:
            metrics.TURN_SECONDS.observe(time.perf_counter() - admitted_at)

    async def _launched(self, admitted: turns.Admitted) -> RunnerStream | None:
        """The stream of a turn just launched; None for one that is followed from where the session is now.

        Raises Rejected, NotFound: it was refused and is settled.
        """
        if admitted.turn.state != "accepted":
            return None
        launch, settled = _launch_of(admitted), False
        try:
            stream = await self._dispatcher.launch(launch)
            settled = True
            return stream
        except Unavailable:
            return None
        except AshdError:
            settled = True
            raise
        finally:
            if not settled:  # the client has left, or the runner was long away: the turn is to run all the same
                self._dispatcher.launch_unwatched(launch)

    # ------------------------------------------------------------ attaching

    async def attach(self, req: Request, resp: Response, session: sessions.Session, cursor: str | None) -> None:
        """Replays what came after `cursor` (None: the live end), then follows. Raises Rejected for one that can't
        be.
        """
        after = Cursor(session.epoch, session.last_seq) if cursor is None else _parse(cursor)
        if after.epoch > session.epoch or (session.runner_id is None and after.seq > session.last_seq):
            raise Rejected("The cursor names an event this session does not have", code="cursor.ahead")
        if cursor is not None and after.place > (0, 0):
            metrics.CLIENT_RECONNECTS.inc()
        if session.status == "ended" and after.seq >= session.last_seq:
            resp.status = HTTP_204  # to an EventSource: there is nothing more, do not come again
            return
        frames = Frames(session.id, after, whole=True)
        opening = frames.start(session.open_turn_id, __version__)
        holds = await events.last_seq_up_to(self._db, session.id, after.epoch)
        if after.epoch < session.epoch and after.place > (holds, 0):
            after = Cursor(session.epoch, holds)
            opening += frames.reset(after)
        place = (after.seq, after.deltas_seen)
        follower = Follower(self._db, self._fleet, self._watch, session.id, session.epoch, place)
        stream = await self._opened(session, place)
        self._send(resp, self._attached_chunks(opening, frames, follower, stream, session))

    async def _opened(self, session: sessions.Session, place: tuple[int, int]) -> RunnerStream | None:
        """The runner's stream, so that a cursor it refuses is refused; None where it can't be had now."""
        if session.status != "active" or session.runner_address is None:
            return None
        request = runner_pb2.StreamEventsRequest(
            session_id=session.id, epoch=session.epoch, after_seq=place[0], after_part=place[1]
        )
        runner = self._fleet.runner(session.runner_address)
        call = runner.StreamEvents(request, metadata=self._fleet.metadata)
        try:
            return await RunnerStream(call, "StreamEvents").opened(_ANSWER_TIMEOUT_S)
        except AshdError as error:
            if error.code == AHEAD:
                raise Rejected("The cursor names an event this session does not have", code=AHEAD) from None
            return None

    async def _attached_chunks(
        self, opening: bytes, frames: Frames, follower: Follower, stream: RunnerStream | None, session: sessions.Session
    ) -> AsyncGenerator[bytes]:
        yield opening
        location = sessions.Location(
            session.id,
            session.status,
            session.epoch,
            session.runner_id,
            session.runner_address,
            session.last_seq,
            session.open_turn_id,
        )
        async with contextlib.aclosing(_chunks(frames, follower, stream, location)) as chunks:
            async for chunk in chunks:
                yield chunk

    # ------------------------------------------------------------ sending

    def _send(self, resp: Response, chunks: AsyncGenerator[bytes]) -> None:
        resp.content_type = "text/event-stream"
        resp.set_header("Cache-Control", "no-cache")
        resp.set_header("X-Accel-Buffering", "no")
        resp.stream = _Paced(self.open, chunks, self._config.keep_alive_interval)


async def _chunks(
    frames: Frames,
    follower: Follower,
    stream: RunnerStream | None,
    location: sessions.Location | None,
    *,
    until: str | None = None,
    timing: TurnTiming | None = None,
) -> AsyncGenerator[bytes]:
    """The frames of what a follower finds, several to a chunk; until the session ends, or the turn `until` does."""
    while True:
        try:
            async with contextlib.aclosing(follower.batches(stream, location)) as batches:
                async for batch in batches:
                    chunk = bytearray()
                    for event in batch:
                        chunk += frames.of(event)
                        if timing is not None:
                            timing.saw(event)
                        if event.kind is EventKind.SETTLED and event.turn == until:
                            yield bytes(chunk)
                            return
                        if len(chunk) >= _CHUNK_BYTES:
                            yield bytes(chunk)
                            chunk.clear()
                    if chunk:
                        yield bytes(chunk)
            return
        except Discarded as discarded:
            stream = location = None
            yield frames.reset(Cursor(discarded.epoch, discarded.seq))


class _Paced:
    """A stream as Falcon takes it: chunks as they come, a comment after each silence, a last one when the worker
    stops.
    """

    def __init__(self, open_streams: set[_Paced], chunks: AsyncGenerator[bytes], interval_s: float) -> None:
        self._open_streams = open_streams
        self._chunks = chunks
        self._interval_s = interval_s
        self._next: asyncio.Task[bytes] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._stopping = self._over = False
        open_streams.add(self)
        metrics.SSE_CONNECTIONS.set(len(open_streams))

    def stop(self) -> None:
        """Ends the stream at once, with its cursor valid."""
        self._stopping = True
        self._release()

    def __aiter__(self) -> _Paced:
        return self

    async def __anext__(self) -> bytes:
        if self._over:
            raise StopAsyncIteration
        if self._next is None:
            self._next = asyncio.ensure_future(anext(self._chunks))  # owned by this object: see close
        await self._wait(self._next)
        if self._next.done():
            chunk, self._next = self._next, None
            return chunk.result()
        if self._stopping:
            self._over = True
            return _HAND_OVER
        return KEEP_ALIVE

    async def _wait(self, chunk: asyncio.Task[bytes]) -> None:
        """Until there is a chunk, silence has lasted, or we are to stop. PERF: asyncio.wait costs several times as
        much.
        """
        if chunk.done() or self._stopping:
            return
        loop = asyncio.get_running_loop()
        self._waiter = loop.create_future()
        silence = loop.call_later(self._interval_s, self._release)
        chunk.add_done_callback(self._release)
        try:
            await self._waiter
        finally:
            silence.cancel()
            chunk.remove_done_callback(self._release)

    def _release(self, _: object = None) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def close(self) -> None:
        """Called by Falcon when the stream is over, for whatever reason."""
        self._open_streams.discard(self)
        metrics.SSE_CONNECTIONS.set(len(self._open_streams))
        if self._next is not None:
            self._next.cancel()
            await asyncio.wait([self._next])
        await self._chunks.aclose()


def _parse(cursor: str) -> Cursor:
    try:
        return Cursor.parse(cursor)
    except ValueError:
        raise Rejected(
            "The cursor must be the id of a frame of this session's stream (epoch.seq.part), or 0",
            code="cursor.invalid",
        ) from None


def _launch_of(admitted: turns.Admitted) -> Launch:
    turn = admitted.turn
    return Launch(turn.session_id, turn.id, admitted.epoch, admitted.runner_address, admitted.request, turn.timeout_ms)
