"""The life of a turn: accepted, launched, settled. Launched at most once, settled exactly once (P3)."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    ACCEPTED = "accepted"  # a row in the database; safe to launch
    LAUNCHED = "launched"  # in a keeper's journal; never launched again
    SETTLED = "settled"  # has an outcome


class Fact(Enum):
    LAUNCHED = "launched"  # its first event was recorded
    SETTLED = "settled"  # its last event was recorded
    GIVEN_UP = "given_up"  # it can never be launched: its runner refused it or its session has moved on
    LOST = "lost"  # the sandbox it was launched in is gone without a word


TABLE: dict[tuple[State, Fact], State] = {
    (State.ACCEPTED, Fact.LAUNCHED): State.LAUNCHED,
    (State.ACCEPTED, Fact.SETTLED): State.SETTLED,  # launch and end in one batch
    (State.ACCEPTED, Fact.GIVEN_UP): State.SETTLED,
    (State.ACCEPTED, Fact.LOST): State.SETTLED,
    (State.LAUNCHED, Fact.LAUNCHED): State.LAUNCHED,
    (State.LAUNCHED, Fact.SETTLED): State.SETTLED,
    (State.LAUNCHED, Fact.GIVEN_UP): State.LAUNCHED,
    (State.LAUNCHED, Fact.LOST): State.SETTLED,
    (State.SETTLED, Fact.LAUNCHED): State.SETTLED,
    (State.SETTLED, Fact.SETTLED): State.SETTLED,
    (State.SETTLED, Fact.GIVEN_UP): State.SETTLED,
    (State.SETTLED, Fact.LOST): State.SETTLED,
}


def step(state: State, fact: Fact) -> State:
    """The state after `fact`; a late fact changes nothing."""
    return TABLE[state, fact]
