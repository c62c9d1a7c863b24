"""A session's journal: an append-only file of numbered records, cut into segments, with one writer and any number of
readers.

Covers: numbering, the format on disk, bounds, following a journal that grows. Leaves out: who writes (keeper.py) and
what becomes of the records (ashd.runner).

A segment is named after the position before its first record, `<seq>-<part>.seg`, so that a reader finds its place by
names alone. A record is a fixed header (length, CRC-32, seq, part, kind, length of type, turn), the type and the
payload. Records are written whole in one append; a torn one (host crash) fails its CRC and ends the journal there.
Nothing is synced to the device: the journal survives the death of every process, the database survives the death of
the host.
"""

from __future__ import annotations

import itertools
import os
import struct
import uuid
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from sandbox.protocol import NO_TURN, Kind, Record

# length of type + payload, CRC-32 of all that follows it, seq, part, kind, length of type, turn
_HEADER = struct.Struct("<IIqIBB16s")
_CRC_START = 8
_SUFFIX = ".seg"
_READ_BYTES = 256 * 1024
MAX_RECORD_BYTES = 256 * 1024 * 1024
_NO_TURN_BYTES = bytes(16)


class Position(NamedTuple):
    """A place between records: after saved event `seq` and `part` deltas behind it. Ordered."""

    seq: int
    part: int


class Place(NamedTuple):
    """Where a reader stands: behind the record at `after`, at `offset` of the segment that begins at `segment`."""

    after: Position
    segment: Position
    offset: int


class Corrupt(Exception):
    """A record that can't be what the writer wrote."""


def _encode(record: Record) -> bytes:
    name = record.type.encode("ascii")
    turn = uuid.UUID(record.turn).bytes if record.turn else _NO_TURN_BYTES
    body = name + record.payload
    head = _HEADER.pack(len(body), 0, record.seq, record.part, record.kind, len(name), turn)[_CRC_START:]
    return struct.pack("<II", len(body), zlib.crc32(body, zlib.crc32(head))) + head + body


def _decode(buffer: bytes, offset: int) -> tuple[Record, int] | None:
    """The record at `offset` and where the next begins; None while it isn't all there."""
    if len(buffer) - offset < _HEADER.size:
        return None
    length, crc, seq, part, kind, name_length, turn = _HEADER.unpack_from(buffer, offset)
    if length > MAX_RECORD_BYTES or name_length > length:
        raise Corrupt(f"impossible record length {length}")
    body_at = offset + _HEADER.size
    end = body_at + length
    if len(buffer) < end:
        return None
    if zlib.crc32(buffer[offset + _CRC_START : end]) != crc:
        raise Corrupt(f"checksum of the record after {seq}.{part} does not match")
    name_end = body_at + name_length
    turn_text = NO_TURN if turn == _NO_TURN_BYTES else str(uuid.UUID(bytes=turn))
    return Record(Kind(kind), seq, part, turn_text, buffer[body_at:name_end].decode("ascii"), buffer[name_end:end]), end


def _segment_name(position: Position) -> str:
    return f"{position.seq:016d}-{position.part:010d}{_SUFFIX}"


def _segments(folder: Path) -> list[tuple[Position, Path]]:
    """Segments in order, each with the position before its first record."""
    found = []
    for name in os.listdir(folder):  # PERF: once for each turn and batch; glob costs several times as much
        if name.endswith(_SUFFIX):
            seq, _, part = name.removesuffix(_SUFFIX).partition("-")
            found.append((Position(int(seq), int(part)), folder / name))
    return sorted(found)


class Writer:
    """The only writer of a journal; numbers what it appends.

    `last` is the position after the newest record. Records collect in memory until `flush`, which appends them in one
    write; an OSError from it (disk full) leaves them collected, so that a later flush writes them all.
    """

    def __init__(self, folder: Path, start: Position, *, acked_seq: int, segment_bytes: int, max_bytes: int) -> None:
        """Opens the segment of `folder` that goes on from `start`; events up to `acked_seq` are committed."""
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.last = start
        self.dropped_deltas = 0
        self._segment_bytes = segment_bytes
        self._max_bytes = max_bytes
        self._pending = bytearray()
        self._acked_seq = acked_seq
        self._untrimmable = False
        self._total = sum(path.stat().st_size for _, path in _segments(folder))
        self._open_segment()

    def _open_segment(self) -> None:
        path = self.folder / _segment_name(self.last)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def append(self, kind: Kind, type_: str, payload: bytes, turn: str) -> Record:
        """Numbers one record and collects it. A delta for which there is no room is numbered, counted and dropped."""
        if kind is Kind.DELTA:
            self.last = Position(self.last.seq, self.last.part + 1)
        else:
            self.last = Position(self.last.seq + 1, 0)
        record = Record(kind, *self.last, turn, type_, payload)
        if kind is Kind.DELTA and not self._has_room(self._max_bytes):
            self.dropped_deltas += 1
        else:
            self._pending += _encode(record)
        return record

    @property
    def blocked(self) -> bool:
        """True while saved events alone overfill the journal: read no more from the agent until some are
        acknowledged.
        """
        return not self._has_room(self._max_bytes + self._max_bytes // 4)

    def _has_room(self, most: int) -> bool:
        """Whether less than `most` bytes are held, once old segments that may go have gone."""
        if self._held >= most and not self._untrimmable:
            self._trim()
            self._untrimmable = self._held >= self._max_bytes  # PERF: until an acknowledgement or another segment
        return self._held < most

    @property
    def _held(self) -> int:
        return self._total + len(self._pending)

    def flush(self) -> bool:
        """Appends what was collected; True if that was anything."""
        if not self._pending:
            return False
        written = 0
        try:
            while written < len(self._pending):
                written += os.write(self._fd, memoryview(self._pending)[written:])
        except OSError:
            os.ftruncate(self._fd, self._size)  # no reader ever sees half a batch as the whole
            raise
        self._size += written
        self._total += written
        self._pending.clear()
        if self._size >= self._segment_bytes:
            self._begin_segment()
        return True

    def _begin_segment(self) -> None:
        before = self._fd
        try:
            self._open_segment()
        except OSError:
            return  # no room for another file: this one goes on, and the next flush tries again
        os.close(before)
        self._untrimmable = False

    def discard(self, back_to: Position) -> None:
        """Forgets what was collected since the last flush, which left the journal at `back_to`."""
        self._pending.clear()
        self.last = back_to

    def acknowledge(self, seq: int) -> None:
        """Saved events up to `seq` are committed; segments that hold nothing newer may go when room is needed."""
        self._acked_seq = max(self._acked_seq, seq)
        self._untrimmable = False

    def _trim(self) -> None:
        """Deletes old segments whose saved events are all committed, until there is room."""
        segments = _segments(self.folder)
        for (_, path), (following, _) in itertools.pairwise(segments):
            if self._held < self._max_bytes or following.seq > self._acked_seq:
                return
            self._total -= path.stat().st_size
            path.unlink()

    def close(self) -> None:
        os.close(self._fd)


def resume_writer(folder: Path, *, segment_bytes: int, max_bytes: int) -> Writer:
    """A writer that goes on after the last whole record of a dead writer's journal; a torn tail is cut off."""
    start, path = _last_segment(folder)
    position, size = start, 0
    for record, end in _scan(path):
        position, size = Position(record.seq, record.part), end
    os.truncate(path, size)
    writer = Writer(folder, start, acked_seq=0, segment_bytes=segment_bytes, max_bytes=max_bytes)
    writer.last = position
    return writer


def _last_segment(folder: Path) -> tuple[Position, Path]:
    segments = _segments(folder)
    if not segments:
        raise Corrupt(f"no journal in {folder}")
    return segments[-1]


def _scan(path: Path) -> Iterator[tuple[Record, int]]:
    """The whole records of one segment, each with the offset behind it; stops at a torn one."""
    buffer = path.read_bytes()
    offset = 0
    try:
        while (decoded := _decode(buffer, offset)) is not None:
            record, offset = decoded
            yield record, offset
    except Corrupt:
        return


class Reader:
    """Follows a journal from a position on; one descriptor, no more memory than one read.

    `read` returns what is there and [] when that is nothing yet. Where segments it still wanted were trimmed, it goes
    on at the oldest record left: `starts_after` tells.
    """

    def __init__(self, folder: Path, after: Position, near: Place | None = None) -> None:
        """`near` is where another reader of this journal stood: where it helps, the search begins there."""
        self._folder = folder
        self._after = after
        self._last_names: list[str] = []  # when this segment was the last
        while True:
            segments = _segments(folder)
            if not segments:
                raise Corrupt(f"no journal in {folder}")
            earlier = [entry for entry in segments if entry[0] <= after]
            self.starts_after = segments[0][0]
            position, path = earlier[-1] if earlier else segments[0]
            if self._open(position, path):
                break
        if near is not None and near.segment == position and near.after <= after:
            self._offset = near.offset

    @property
    def place(self) -> Place:
        """Where this reader stands."""
        return Place(self._after, self._segment, self._offset)

    def _open(self, position: Position, path: Path) -> bool:
        """RACE: False if the writer has trimmed the segment since we saw its name; a look at the names shows a newer
        one.
        """
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        self._segment = position
        self._offset = 0
        return True

    def read(self, max_bytes: int = _READ_BYTES) -> list[Record]:
        """The next records, about `max_bytes` of them (at least one if there is one). Raises Corrupt."""
        while True:
            records = self._read_segment(max_bytes)
            if records:
                return records
            following = self._following_segment()
            if following is None:
                return []
            # RACE: the writer may have appended to this segment between our read and its opening of the next.
            records = self._read_segment(max_bytes)
            if records:
                return records
            finished = self._fd
            if self._open(*following):
                os.close(finished)

    def _read_segment(self, max_bytes: int) -> list[Record]:
        records: list[Record] = []
        want = max_bytes
        while not records:
            buffer = os.pread(self._fd, want, self._offset)
            consumed = 0
            while (decoded := _decode(buffer, consumed)) is not None:
                record, consumed = decoded
                if (record.seq, record.part) > self._after:
                    records.append(record)
            self._offset += consumed
            if consumed == 0:
                if len(buffer) < want:
                    return []
                want *= 2  # one record larger than the read
        last = records[-1]
        self._after = Position(last.seq, last.part)
        return records

    def _following_segment(self) -> tuple[Position, Path] | None:
        names = os.listdir(self._folder)
        if names == self._last_names:  # PERF: asked each time a reader has caught up, and mostly nothing is new
            return None
        segments = _segments(self._folder)
        if segments:
            self.starts_after = segments[0][0]
        following = next((entry for entry in segments if entry[0] > self._segment), None)
        self._last_names = names if following is None else []
        return following

    def close(self) -> None:
        os.close(self._fd)
