"""Frames: which events clients are shown, and whether everyone is."""

from __future__ import annotations

import pytest

from ashd.coordinator.frames import Frames, Shown
from ashd.domain.event import Cursor, EventKind

KILLED = b'{"action":"memory_kill","victim":"python3"}'
CLOSED = b'{"action":"sandbox_closed","cause":"oom"}'


@pytest.mark.parametrize(
    ("kind", "payload", "whole", "shown"),
    [
        (EventKind.TIMELINE, KILLED, True, True),
        (EventKind.TIMELINE, KILLED, False, True),
        (EventKind.CLOSED, CLOSED, True, True),
        (EventKind.CLOSED, CLOSED, False, False),
    ],
)
def test_whoever_waits_for_a_turn_learns_what_was_killed(
    kind: EventKind, payload: bytes, whole: bool, shown: bool
) -> None:
    frames = Frames("s", Cursor(1, 4), whole=whole)
    event = Shown(1, kind, 5, 0, "t", "lifecycle", payload)
    assert frames.of(event) == (b"id: 1.5.0\nevent: lifecycle\ndata: %b\n\n" % payload if shown else b"")
    assert frames.of(event) == b"", "what a client has had is not sent again"
