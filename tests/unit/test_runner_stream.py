"""RunnerStream: what is left of a stream when it and its client end at the same moment."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from ashd.coordinator.runner_stream import Call, RunnerStream
from ashd.wire.v1 import events_pb2


class FakeCall:
    """A call whose only read ends when the test says how."""

    def __init__(self) -> None:
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.was_cancelled = False

    async def read(self) -> Any:
        return await self.answer

    def cancel(self) -> None:
        self.was_cancelled = True


async def complaints_of(work: Callable[[FakeCall, RunnerStream], Awaitable[None]]) -> list[str]:
    """What asyncio has to say about tasks that `work` left behind."""
    complaints: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context["message"]))
    call = FakeCall()
    await work(call, RunnerStream(cast(Call, call), "StreamEvents"))
    assert call.was_cancelled
    del call
    await asyncio.sleep(0.01)  # callbacks run, and let go of the task
    gc.collect()
    return complaints


async def left_waiting(stream: RunnerStream) -> None:
    with pytest.raises(TimeoutError):
        await stream.next(0.0)


async def test_a_stream_that_breaks_just_as_its_client_leaves_is_no_complaint() -> None:
    async def breaks(call: FakeCall, stream: RunnerStream) -> None:
        await left_waiting(stream)
        call.answer.set_exception(ConnectionError("the runner is gone"))
        await asyncio.sleep(0.01)  # the read has failed, and nobody has asked for it
        stream.close()

    assert await complaints_of(breaks) == []


async def test_a_stream_that_breaks_while_it_is_closed_is_no_complaint() -> None:
    async def breaks(call: FakeCall, stream: RunnerStream) -> None:
        await left_waiting(stream)
        call.answer.set_exception(ConnectionError("the runner is gone"))
        stream.close()
        await asyncio.sleep(0.01)

    assert await complaints_of(breaks) == []


async def test_a_batch_that_was_not_waited_for_is_the_next_one() -> None:
    async def is_late(call: FakeCall, stream: RunnerStream) -> None:
        await left_waiting(stream)
        call.answer.set_result(batch := events_pb2.EventBatch(journal_from_seq=7))
        assert await stream.next(5.0) is batch
        stream.close()

    assert await complaints_of(is_late) == []
