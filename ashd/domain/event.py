"""Events: their kinds, and the places between them that a cursor names.

A session's saved events are numbered densely from 1 (`seq`). Between two of them lie partial outputs (`part` 1, 2, …),
and the frames that a saved event is shown as before itself. All of that is one order, (seq, part), so that one
comparison tells what a client has had:

    4.0      after saved event 4
    4.1 4.2  after the first, the second frame of the deltas behind it
    4.2^30   after the first frame that event 5 is announced with
    5.0      after saved event 5
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

ANNOUNCED = 1 << 30
"""First part of the frames a saved event is announced with; deltas stay below it."""

FRAMES_PER_DELTA = 2
"""A delta is shown as at most two frames: what it says in the API's words, then the agent's object."""


class EventKind(IntEnum):
    """What an event is. The numbers are the wire's and the journal's."""

    MESSAGE = 1  # saved: a message object of the user or the agent
    TIMELINE = 2  # saved: what a message did, in the API's event types
    DELTA = 3  # not saved: partial output
    SETTLED = 4  # saved: the last event of a turn
    CLOSED = 5  # saved: the last event of a sandbox


@dataclass(frozen=True, order=True)
class Cursor:
    """A place in a session's stream, in the clients' hands as `epoch.seq.part`."""

    epoch: int
    seq: int
    part: int = 0

    def __str__(self) -> str:
        return f"{self.epoch}.{self.seq}.{self.part}"

    @classmethod
    def parse(cls, text: str) -> Cursor:
        """The cursor a client sent back; `0` is the beginning. Raises ValueError."""
        if text == "0":
            return cls(0, 0)
        fields = text.split(".")
        if len(fields) != 3:
            raise ValueError(f"{text!r} is not three numbers")
        return cls(*(_number(field) for field in fields))

    @property
    def place(self) -> tuple[int, int]:
        return self.seq, self.part

    @property
    def deltas_seen(self) -> int:
        """How many whole deltas after `seq` a client with this cursor has had."""
        return self.part // FRAMES_PER_DELTA if self.part < ANNOUNCED else ANNOUNCED


def _number(field: str) -> int:
    if not (field.isascii() and field.isdigit() and len(field) <= 18):
        raise ValueError(f"{field!r} is not a number")
    return int(field)
