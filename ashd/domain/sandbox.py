"""The life of a sandbox as its runner sees it."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    WARMING = "warming"  # being forked and jailed
    WARM = "warm"  # ready for whichever session comes
    CLAIMED = "claimed"  # given to a session, its agent being loaded
    WAITING = "waiting"  # ready, between turns
    RUNNING = "running"  # in a turn
    ENDING = "ending"  # asked to end
    GONE = "gone"  # its keeper is dead


class Fact(Enum):
    FORKED = "forked"
    CLAIMED = "claimed"
    LOADED = "loaded"
    TURN_LAUNCHED = "turn_launched"
    TURN_SETTLED = "turn_settled"
    TOLD_TO_END = "told_to_end"
    KEEPER_DIED = "keeper_died"


_ANY = {Fact.TOLD_TO_END: State.ENDING, Fact.KEEPER_DIED: State.GONE}

TABLE: dict[State, dict[Fact, State]] = {
    State.WARMING: {Fact.FORKED: State.WARM, **_ANY},
    State.WARM: {Fact.CLAIMED: State.CLAIMED, **_ANY},
    State.CLAIMED: {Fact.LOADED: State.WAITING, **_ANY},
    State.WAITING: {Fact.LOADED: State.WAITING, Fact.TURN_LAUNCHED: State.RUNNING, **_ANY},
    State.RUNNING: {Fact.TURN_SETTLED: State.WAITING, Fact.TURN_LAUNCHED: State.RUNNING, **_ANY},
    State.ENDING: {
        Fact.FORKED: State.ENDING,
        Fact.LOADED: State.ENDING,
        Fact.TURN_LAUNCHED: State.ENDING,
        Fact.TURN_SETTLED: State.ENDING,
        **_ANY,
        Fact.TOLD_TO_END: State.ENDING,
    },
    State.GONE: dict.fromkeys(Fact, State.GONE),
}

LIVE = frozenset({State.CLAIMED, State.WAITING, State.RUNNING, State.ENDING})
"""States in which a sandbox belongs to a session and takes a slot."""


class ImpossibleFact(Exception):
    """A fact that can't happen in this state: a bug in who reported it."""


def step(state: State, fact: Fact) -> State:
    """The state after `fact`. Raises ImpossibleFact."""
    try:
        return TABLE[state][fact]
    except KeyError:
        raise ImpossibleFact(f"{fact.name} while {state.name}") from None
