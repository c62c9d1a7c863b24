"""Following journals: many readers of one sandbox's journal, woken when it grows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

from sandbox.journal import Place, Position, Reader
from sandbox.protocol import Kind, Record


class Bell:
    """Wakes everyone who waits, each time it rings.

    Take `next_ring()` before looking at what the bell is about, then wait for it: a ring in between is not missed.
    """

    def __init__(self) -> None:
        self._ring = asyncio.Event()

    def ring(self) -> None:
        self._ring.set()
        self._ring = asyncio.Event()

    def next_ring(self) -> asyncio.Event:
        return self._ring


class Recording:
    """How much of one sandbox's journal is committed, and when it changes.

    `acked_seq`: saved events up to it are committed. `fenced`: its epoch is over, nothing of it will ever be committed.
    """

    def __init__(self, acked_seq: int) -> None:
        self.acked_seq = acked_seq
        self.fenced = False
        self.changed = Bell()

    def acknowledge(self, seq: int) -> None:
        if seq > self.acked_seq:
            self.acked_seq = seq
            self.changed.ring()

    def fence(self) -> None:
        self.fenced = True
        self.changed.ring()

    async def covers(self, seq: int) -> bool:
        """Waits until `seq` is committed (True) or never will be (False). WAITS: as long as the database is away."""
        while True:
            ring = self.changed.next_ring()
            if self.acked_seq >= seq:
                return True
            if self.fenced:
                return False
            await ring.wait()


async def follow(
    folder: Path,
    after: Position,
    near: Place | None,
    grew: Bell,
    closed: asyncio.Event,
    recording: Recording,
) -> AsyncIterator[tuple[Position, list[Record]]]:
    """Batches of a journal's records after a position, then live, each with the position before which nothing is left.
    The first is empty and comes at once.

    A record that ends a turn or the sandbox is given out only once it is committed (P1). Ends when the sandbox has
    closed and all is given out, or when its epoch is over.
    """
    reader = Reader(folder, after, near)
    try:
        yield reader.starts_after, []
        while True:
            ring, last_round = grew.next_ring(), closed.is_set()
            while records := reader.read():
                for batch in _up_to_each_end(records):
                    if batch[-1].kind in (Kind.SETTLED, Kind.CLOSED) and not await recording.covers(batch[-1].seq):
                        return
                    yield reader.starts_after, batch
            if last_round:
                return
            await ring.wait()
    finally:
        reader.close()


def _up_to_each_end(records: list[Record]) -> list[list[Record]]:
    """Cut so that a record which has to wait for its commit keeps none waiting that stands before it."""
    batches: list[list[Record]] = []
    current: list[Record] = []
    for record in records:
        if record.kind in (Kind.SETTLED, Kind.CLOSED):
            if current:
                batches.append(current)
            batches.append([record])
            current = []
        else:
            current.append(record)
    if current:
        batches.append(current)
    return batches


def saved(records: list[Record]) -> list[Record]:
    """The records that go to the database."""
    return [record for record in records if record.kind is not Kind.DELTA]
