"""The pure rules: tables without gaps, states without dead ends, cursors that keep their order."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ashd.domain import sandbox, session, turn
from ashd.domain.event import ANNOUNCED, FRAMES_PER_DELTA, Cursor, EventKind
from ashd.domain.restart import Backoff
from ashd.wire.v1 import events_pb2
from sandbox.protocol import Kind


@pytest.mark.parametrize("machine", [session, turn])
def test_a_table_has_no_empty_cell(machine: Any) -> None:
    assert set(machine.TABLE) == {(state, fact) for state in machine.State for fact in machine.Fact}


def reachable(step: Callable[[Any], set[Enum]], start: Enum) -> set[Enum]:
    """All states that can follow `start`."""
    found, new = {start}, [start]
    while new:
        following = step(new.pop()) - found
        found |= following
        new += following
    return found


@pytest.mark.parametrize(("machine", "end"), [(session, session.State.ENDED), (turn, turn.State.SETTLED)])
def test_every_state_can_reach_the_end_and_the_end_is_for_ever(machine: Any, end: Enum) -> None:
    def step(state: Any) -> set[Enum]:
        return {machine.step(state, fact) for fact in machine.Fact}

    for state in machine.State:
        assert end in reachable(step, state)
    assert reachable(step, end) == {end}


def test_deleting_ends_a_session_from_every_state() -> None:
    assert {session.step(state, session.Fact.DELETED) for state in session.State} == {session.State.ENDED}


def test_a_launched_turn_is_never_accepted_again() -> None:
    for state in (turn.State.LAUNCHED, turn.State.SETTLED):
        assert all(turn.step(state, fact) is not turn.State.ACCEPTED for fact in turn.Fact)
    assert turn.step(turn.State.LAUNCHED, turn.Fact.GIVEN_UP) is turn.State.LAUNCHED


def test_a_sandbox_can_end_from_every_state_and_never_comes_back() -> None:
    for state in sandbox.State:
        assert sandbox.step(state, sandbox.Fact.KEEPER_DIED) is sandbox.State.GONE
    assert all(sandbox.step(sandbox.State.GONE, fact) is sandbox.State.GONE for fact in sandbox.Fact)
    with pytest.raises(sandbox.ImpossibleFact):
        sandbox.step(sandbox.State.RUNNING, sandbox.Fact.CLAIMED)  # a sandbox has at most one session in its life


def test_the_numbers_of_event_kinds_agree_in_journal_wire_and_domain() -> None:
    for kind in EventKind:
        assert Kind[kind.name] == kind == events_pb2.EventKind.Value(kind.name)
    assert len(Kind) == len(EventKind) == len(events_pb2.EventKind.values()) - 1


@given(st.integers(0, 10**9), st.integers(0, 10**12), st.integers(0, 2**31))
def test_a_cursor_comes_back_as_it_was_given(epoch: int, seq: int, part: int) -> None:
    cursor = Cursor(epoch, seq, part)
    assert Cursor.parse(str(cursor)) == cursor


@pytest.mark.parametrize("text", ["", "1", "1.2", "1.2.3.4", "a.b.c", "1.2.-3", "１.2.3", "1.2." + "9" * 19, " 1.2.3"])
def test_what_is_no_cursor_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="number"):
        Cursor.parse(text)


@given(st.integers(0, 100), st.integers(1, 1000), st.integers(0, 20))
def test_deltas_come_after_their_event_and_before_the_next_ones_announcement(seq: int, delta: int, block: int) -> None:
    saved, following = (seq, 0), (seq + 1, 0)
    first_frame, last_frame = (seq, delta * FRAMES_PER_DELTA - 1), (seq, delta * FRAMES_PER_DELTA)
    announcement = (seq, ANNOUNCED + block)
    assert saved < first_frame < last_frame < announcement < following
    assert Cursor(1, *last_frame).deltas_seen == delta
    assert Cursor(1, *first_frame).deltas_seen == delta - 1  # its second frame is still to come
    assert Cursor(1, *announcement).deltas_seen >= delta


def test_delays_double_up_to_their_most_and_begin_again_after_a_success() -> None:
    backoff = Backoff(first_s=1, most_s=8)
    assert [backoff.next_s(1.0) for _ in range(5)] == [1, 2, 4, 8, 8]
    assert backoff.next_s(0.0) == 4
    backoff.reset()
    assert backoff.next_s(1.0) == 1
