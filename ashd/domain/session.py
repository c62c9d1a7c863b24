"""The life of a session (api.md §3): states, facts, and the one table of what follows from what.

The database repeats this law by compare-and-set; tests/integration/test_laws.py holds the two together.
"""

from __future__ import annotations

from enum import Enum


class State(Enum):
    STARTING = "starting"  # placed on a runner, its sandbox not ready yet
    ACTIVE = "active"  # its sandbox takes turns
    PAUSED = "paused"  # no sandbox takes turns; resumable
    STOPPED = "stopped"  # saved on request, sandbox gone; resumable
    ERROR = "error"  # could not be started; resumable
    ENDED = "ended"  # over, for ever


class Fact(Enum):
    READY = "ready"  # the sandbox is ready for turns
    START_FAILED = "start_failed"  # no runner could start it, or not in time
    SANDBOX_CLOSED = "sandbox_closed"  # the sandbox ended by itself, or was lost with its runner
    DELETED = "deleted"  # the user ended the session


TABLE: dict[tuple[State, Fact], State] = {
    (State.STARTING, Fact.READY): State.ACTIVE,
    (State.STARTING, Fact.START_FAILED): State.ERROR,
    (State.STARTING, Fact.SANDBOX_CLOSED): State.PAUSED,
    (State.STARTING, Fact.DELETED): State.ENDED,
    (State.ACTIVE, Fact.READY): State.ACTIVE,
    (State.ACTIVE, Fact.START_FAILED): State.ACTIVE,
    (State.ACTIVE, Fact.SANDBOX_CLOSED): State.PAUSED,
    (State.ACTIVE, Fact.DELETED): State.ENDED,
    (State.PAUSED, Fact.READY): State.PAUSED,
    (State.PAUSED, Fact.START_FAILED): State.PAUSED,
    (State.PAUSED, Fact.SANDBOX_CLOSED): State.PAUSED,
    (State.PAUSED, Fact.DELETED): State.ENDED,
    (State.STOPPED, Fact.READY): State.STOPPED,
    (State.STOPPED, Fact.START_FAILED): State.STOPPED,
    (State.STOPPED, Fact.SANDBOX_CLOSED): State.STOPPED,
    (State.STOPPED, Fact.DELETED): State.ENDED,
    (State.ERROR, Fact.READY): State.ERROR,
    (State.ERROR, Fact.START_FAILED): State.ERROR,
    (State.ERROR, Fact.SANDBOX_CLOSED): State.ERROR,
    (State.ERROR, Fact.DELETED): State.ENDED,
    (State.ENDED, Fact.READY): State.ENDED,
    (State.ENDED, Fact.START_FAILED): State.ENDED,
    (State.ENDED, Fact.SANDBOX_CLOSED): State.ENDED,
    (State.ENDED, Fact.DELETED): State.ENDED,
}


def step(state: State, fact: Fact) -> State:
    """The state after `fact`; a late fact changes nothing."""
    return TABLE[state, fact]
