"""A stream of one session's events from its runner, while it is open."""

from __future__ import annotations

import asyncio
from typing import Any

from grpc import aio

from ashd.coordinator import metrics
from ashd.errors import Unavailable
from ashd.wire.status import error_of
from ashd.wire.v1 import events_pb2

CALLEE = "the runner"

Call = aio.UnaryStreamCall[Any, events_pb2.EventBatch]


class RunnerStream:
    """Batches of events, in order. Waiting for one may be given up without losing it, or the stream."""

    def __init__(self, call: Call, method: str) -> None:
        self._call = call
        self._method = method
        self._reading: asyncio.Task[Any] | None = None
        self._held: events_pb2.EventBatch | None = None

    async def opened(self, timeout_s: float) -> RunnerStream:
        """The stream, once the runner has answered; its first batch comes at once, whatever the session does.

        Raises what the runner answered instead, and Unavailable when it is silent; the stream is closed then.
        """
        try:
            self._held = await self.next(timeout_s)
        except aio.AioRpcError as failed:
            metrics.runner_failed(self._method, failed.code())
            raise error_of(failed, CALLEE) from None
        except BaseException as error:
            self.close()
            if isinstance(error, TimeoutError):
                raise Unavailable(f"{CALLEE} is silent", code="peer.unavailable") from None
            raise
        if self._held is None:
            raise Unavailable(f"{CALLEE} ended the stream at once", code="peer.unavailable")
        return self

    async def next(self, timeout_s: float) -> events_pb2.EventBatch | None:
        """The next batch; None when the runner has ended the stream. Raises TimeoutError (ask again), AioRpcError."""
        if self._held is not None:
            held, self._held = self._held, None
            return held
        if self._reading is None:  # cancelling a read would cancel the call, so it is left to itself: see close
            self._reading = asyncio.ensure_future(self._call.read())
        done, _ = await asyncio.wait([self._reading], timeout=timeout_s)
        if not done:
            raise TimeoutError
        batch, self._reading = self._reading.result(), None
        return batch if isinstance(batch, events_pb2.EventBatch) else None

    def close(self) -> None:
        """Ends the stream; the runner's side ends with it."""
        self._call.cancel()
        if self._reading is not None:
            self._reading.cancel()  # one that has failed already counts as seen from here on (asyncio.Task.cancel)
