"""A journal gives back what was written: from any place, over segment borders, while it grows, after a torn end."""

from __future__ import annotations

import errno
import os
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.journal import Corrupt, Position, Reader, Writer, resume_writer
from sandbox.protocol import NO_TURN, Kind, Record

TURNS = [NO_TURN, str(uuid.UUID(int=1)), str(uuid.UUID(int=2**128 - 1))]
entries = st.lists(
    st.tuples(st.sampled_from(Kind), st.text("abc_", max_size=10), st.binary(max_size=300), st.sampled_from(TURNS)),
    max_size=60,
)
MANY = 10_000_000
START = Position(0, 0)


def writer(folder: Path, *, start: int = 0, segment_bytes: int = 512, max_bytes: int = MANY) -> Writer:
    return Writer(folder, Position(start, 0), acked_seq=start, segment_bytes=segment_bytes, max_bytes=max_bytes)


def read_all(folder: Path, after: Position = START, max_bytes: int = 1024) -> list[Record]:
    reader = Reader(folder, after)
    try:
        found = []
        while records := reader.read(max_bytes):
            found += records
        return found
    finally:
        reader.close()


@settings(deadline=None)
@given(entries, st.lists(st.booleans()), st.integers(1, 2000), st.integers(1, 400))
def test_what_is_written_is_read_back_from_any_place(
    written: list[tuple[Kind, str, bytes, str]], flushes: list[bool], segment_bytes: int, read_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "journal")
        journal = writer(folder, start=7, segment_bytes=segment_bytes)
        records = []
        for i, (kind, type_, payload, turn) in enumerate(written):
            records.append(journal.append(kind, type_, payload, turn))
            if i < len(flushes) and flushes[i]:
                journal.flush()
        journal.flush()
        journal.close()
        assert read_all(folder, Position(7, 0), read_bytes) == records
        for record in records:
            after = Position(record.seq, record.part)
            assert read_all(folder, after, read_bytes) == [r for r in records if (r.seq, r.part) > after]


@settings(deadline=None)
@given(entries, st.integers(1, 2000))
def test_a_reader_that_follows_sees_every_record_once(
    written: list[tuple[Kind, str, bytes, str]], segment_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "journal")
        journal = writer(folder, segment_bytes=segment_bytes)
        reader = Reader(folder, Position(0, 0))
        records, seen = [], []
        for kind, type_, payload, turn in written:
            records.append(journal.append(kind, type_, payload, turn))
            journal.flush()
            seen += reader.read()
        while more := reader.read():
            seen += more
        assert seen == records
        reader.close()
        journal.close()


@settings(deadline=None)
@given(entries.filter(bool), st.integers(0, 400), st.integers(1, 2000))
def test_a_torn_end_is_cut_off_and_numbering_goes_on(
    written: list[tuple[Kind, str, bytes, str]], torn: int, segment_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "journal")
        journal = writer(folder, segment_bytes=segment_bytes)
        records = [journal.append(*entry) for entry in written]
        journal.flush()
        journal.close()
        last = max(folder.glob("*.seg"))
        os.truncate(last, max(0, last.stat().st_size - torn))
        kept = read_all(folder)
        assert kept == records[: len(kept)]
        resumed = resume_writer(folder, segment_bytes=segment_bytes, max_bytes=MANY)
        assert resumed.last >= (Position(kept[-1].seq, kept[-1].part) if kept else Position(0, 0))
        closing = resumed.append(Kind.CLOSED, "lifecycle", b"{}", NO_TURN)
        resumed.flush()
        resumed.close()
        assert read_all(folder) == [*kept, closing]


def test_damage_in_the_middle_is_noticed(tmp_path: Path) -> None:
    journal = writer(tmp_path, segment_bytes=MANY)
    for _ in range(3):
        journal.append(Kind.MESSAGE, "assistant", b"x" * 50, NO_TURN)
    journal.flush()
    journal.close()
    (segment,) = tmp_path.glob("*.seg")
    damaged = bytearray(segment.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    segment.write_bytes(damaged)
    with pytest.raises(Corrupt):
        read_all(tmp_path)


def test_a_folder_without_a_journal_is_no_journal(tmp_path: Path) -> None:
    with pytest.raises(Corrupt):
        Reader(tmp_path, Position(0, 0))
    with pytest.raises(Corrupt):
        resume_writer(tmp_path, segment_bytes=1, max_bytes=1)


def fill(journal: Writer, kind: Kind, count: int) -> list[Record]:
    records = []
    for _ in range(count):
        records.append(journal.append(kind, "x", b"y" * 100, NO_TURN))
        journal.flush()
    return records


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.seg"))


def is_blocked(journal: Writer) -> bool:
    return journal.blocked


def test_a_full_journal_drops_deltas_and_keeps_every_saved_event(tmp_path: Path) -> None:
    journal = writer(tmp_path, max_bytes=5000)
    fill(journal, Kind.DELTA, 100)
    saved = fill(journal, Kind.MESSAGE, 10)
    fill(journal, Kind.DELTA, 100)
    saved += fill(journal, Kind.MESSAGE, 10)
    assert journal.dropped_deltas > 0
    assert [record for record in read_all(tmp_path) if record.kind is Kind.MESSAGE] == saved
    journal.close()


def test_only_segments_of_acknowledged_events_are_trimmed(tmp_path: Path) -> None:
    journal = writer(tmp_path, max_bytes=4000)
    records = fill(journal, Kind.MESSAGE, 40)
    assert is_blocked(journal)
    assert read_all(tmp_path) == records
    journal.acknowledge(30)
    assert not is_blocked(journal)
    assert size(tmp_path) < 4000
    left = read_all(tmp_path)
    assert left == records[-len(left) :]
    assert left[0].seq <= 31
    journal.close()


def test_a_partial_acknowledgement_is_enough_to_go_on(tmp_path: Path) -> None:
    journal = writer(tmp_path, max_bytes=4000)
    fill(journal, Kind.MESSAGE, 40)
    journal.acknowledge(15)  # frees less than the journal is over its bound, more than it is over the stop
    assert size(tmp_path) > 4000
    assert not journal.blocked
    journal.close()


def test_a_reader_left_behind_by_trimming_goes_on_at_the_oldest_record(tmp_path: Path) -> None:
    journal = writer(tmp_path, max_bytes=4000)
    records = fill(journal, Kind.MESSAGE, 5)
    reader = Reader(tmp_path, Position(0, 0))
    assert reader.read(200) == records[:1]
    for _ in range(50):
        records += fill(journal, Kind.MESSAGE, 1)
        journal.acknowledge(journal.last.seq)
        assert not journal.blocked
    seen = []
    while more := reader.read():
        seen += more
    assert seen[-1] == records[-1]
    assert [record.seq for record in seen] == sorted({record.seq for record in seen})
    assert reader.starts_after.seq > 0
    reader.close()
    journal.close()


def test_a_segment_trimmed_while_a_reader_goes_there_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal = writer(tmp_path)
    records = fill(journal, Kind.MESSAGE, 12)
    journal.close()
    reader = Reader(tmp_path, Position(0, 0))
    second = sorted(tmp_path.glob("*.seg"))[1]
    real_open = os.open

    def racing_open(path: Path, *rest: int) -> int:
        if path == second:
            second.unlink(missing_ok=True)
        return real_open(path, *rest)

    monkeypatch.setattr(os, "open", racing_open)
    seen = []
    while more := reader.read():
        seen += more
    assert seen[0] == records[0]
    assert seen[-1] == records[-1]
    assert len(seen) < len(records)
    reader.close()


@settings(deadline=None)
@given(entries.filter(bool), st.integers(0, 400))
def test_a_full_disk_loses_nothing(written: list[tuple[Kind, str, bytes, str]], room: int) -> None:
    real_write = os.write
    left = [room]

    def full_disk(fd: int, data: memoryview) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real_write(fd, data[: left[0]])
        left[0] -= count
        return count

    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        folder = Path(name, "journal")
        journal = writer(folder)
        patch.setattr(os, "write", full_disk)
        records, failed = [], 0
        for entry in written:
            records.append(journal.append(*entry))
            try:
                journal.flush()
            except OSError:
                failed += 1
            seen = read_all(folder)
            assert seen == records[: len(seen)]
        left[0] = MANY
        journal.flush()
        assert read_all(folder) == records
        journal.close()


def test_no_room_for_another_segment_is_no_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = writer(tmp_path)
    records = fill(journal, Kind.MESSAGE, 3)

    def no_inode(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", no_inode)
        records += fill(journal, Kind.MESSAGE, 10)
    segments = len(list(tmp_path.glob("*.seg")))
    records += fill(journal, Kind.MESSAGE, 10)
    assert len(list(tmp_path.glob("*.seg"))) > segments
    assert read_all(tmp_path) == records
    journal.close()
