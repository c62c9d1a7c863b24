"""Which of several causes a turn's end is put down to."""

from __future__ import annotations

import signal

import pytest

from sandbox import outcomes
from sandbox.dropped import Dropped
from sandbox.memory import Kill
from sandbox.pace import Pace

KILL = Kill("agent", "node", 7, 96 << 20, 96 << 20)
SIGKILLED, SEGV, EXITED_3 = int(signal.SIGKILL), int(signal.SIGSEGV), 3 << 8


@pytest.mark.parametrize(
    ("end", "asked", "kill", "expected"),
    [
        ({}, "", None, ("completed", "")),
        ({}, "", KILL, ("completed", "")),
        ({"error": "no", "code": "agent.bad_yield"}, "", None, ("failed", "agent.bad_yield")),
        ({"error": "no", "code": "sandbox.oom"}, "", None, ("failed", "agent.failed")),
        ({"error": "it exited"}, "", KILL, ("oom", "sandbox.oom")),
        ({"error": "it exited"}, "interrupted", KILL, ("interrupted", "")),
        ({}, "timeout", None, ("timeout", "turn.timeout")),
    ],
)
def test_the_end_a_bridge_tells_is_one_cause_among_others(
    end: dict[str, str], asked: str, kill: Kill | None, expected: tuple[str, str]
) -> None:
    outcome = outcomes.of_end(end, asked, kill)
    assert (outcome.name, outcome.code) == expected


@pytest.mark.parametrize(
    ("status", "cause", "asked", "kill", "expected"),
    [
        (EXITED_3, "", "", None, ("exited", "failed", "sandbox.exited")),
        (EXITED_3, "", "", KILL, ("exited", "failed", "sandbox.exited")),
        (SEGV, "", "", KILL, ("killed", "failed", "sandbox.killed")),
        (SIGKILLED, "", "", None, ("killed", "failed", "sandbox.killed")),
        (SIGKILLED, "", "", KILL, ("oom", "oom", "sandbox.oom")),
        (SIGKILLED, "ended", "", KILL, ("ended", "interrupted", "")),
        (SIGKILLED, "timeout", "timeout", None, ("timeout", "timeout", "turn.timeout")),
        (SIGKILLED, "fenced", "timeout", None, ("fenced", "timeout", "turn.timeout")),
        (SIGKILLED, "disk", "", None, ("disk", "failed", "sandbox.disk")),
    ],
)
def test_a_dead_sandbox_has_one_cause(
    status: int, cause: str, asked: str, kill: Kill | None, expected: tuple[str, str, str]
) -> None:
    found, outcome = outcomes.of_death(status, cause, asked, kill)
    assert (found, outcome.name, outcome.code) == expected


def test_an_oom_names_victim_limit_and_peak() -> None:
    outcome = outcomes.of_death(SIGKILLED, "", "", KILL)[1]
    assert outcome.error == "The agent used more memory than its limit of 96 MiB (peak 96 MiB) and was killed: node"
    assert outcome.details["victim"] == {"name": "node", "pid": 7}


def test_what_was_dropped_is_told_once() -> None:
    dropped = Dropped()
    dropped.count("bad_frames")
    dropped.count("bad_frames")
    dropped.is_now("deltas", 5)
    assert dropped.news() == {"bad_frames": 2, "deltas": 5}
    dropped.is_now("deltas", 7)
    assert dropped.news() == {"deltas": 2}
    assert dropped.news() == {}


def test_a_pace_lets_ten_seconds_worth_pass_at_once_and_then_makes_wait() -> None:
    pace = Pace(100)
    pace.spend(1000)
    assert pace.resume_at == 0
    pace.spend(100)
    assert pace.resume_at > 0
