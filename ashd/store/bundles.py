"""Tables bundles and bundle_chunks: immutable archives by digest, in pieces that are never all in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import BinaryIO

from ashd.errors import Fault, NotFound
from ashd.store.pool import Database, Tx

CHUNK_BYTES = 1024 * 1024

EXISTS = "SELECT chunk_count FROM bundles WHERE digest = %(digest)s"
# RACE: who stores the same digest at the same time waits here for the first, and then finds it done.
INSERT = """
INSERT INTO bundles (digest, size_bytes, chunk_count) VALUES (%(digest)s, %(size)s, %(chunks)s) ON CONFLICT DO NOTHING
"""
INSERT_CHUNK = "INSERT INTO bundle_chunks (digest, number, data) VALUES (%(digest)s, %(number)s, %(data)s)"
CHUNK = "SELECT data FROM bundle_chunks WHERE digest = %(digest)s AND number = %(number)s"


async def store(db: Database, digest: str, archive: Path, *, deadline: float) -> bool:
    """Store the tar.gz at `archive` under `digest` in one transaction; False when that digest is stored already."""
    if await db.fetch_value(EXISTS, {"digest": digest}, deadline=deadline) is not None:
        return False
    size = (await asyncio.to_thread(archive.stat)).st_size
    chunks = -(-size // CHUNK_BYTES)

    async def work(tx: Tx) -> bool:
        if await tx.execute(INSERT, {"digest": digest, "size": size, "chunks": chunks}) == 0:
            return False
        with await asyncio.to_thread(_open, archive) as source:
            for number in range(chunks):
                data = await asyncio.to_thread(source.read, CHUNK_BYTES)
                await tx.execute(INSERT_CHUNK, {"digest": digest, "number": number, "data": data})
        return True

    return await db.run(work, deadline=deadline)


async def read(db: Database, digest: str) -> AsyncIterator[bytes]:
    """The tar.gz of a digest, piece by piece; no connection is held between the pieces. Raises NotFound."""
    count = await db.fetch_value(EXISTS, {"digest": digest})
    if count is None:
        raise NotFound("Bundle not found", code="bundle.not_found")
    for number in range(count):
        data = await db.fetch_value(CHUNK, {"digest": digest, "number": number})
        if data is None:
            raise Fault(f"Bundle {digest} lacks its piece {number}")
        yield bytes(data)


def _open(archive: Path) -> BinaryIO:
    return archive.open("rb")
