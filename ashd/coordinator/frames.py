"""A session's events as the frames of an SSE stream (api.md §4).

Covers: which frames an event is shown as, their names, data and cursors. Leaves out: where events come from
(follow.py), who gets the frames (stream.py).

An agent's message is announced by granular frames, then shown itself. Every frame has a cursor of its own
(domain/event.py), the same whether it comes live or from the database, so that a client cut off between any two frames
misses and doubles nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from ashd.domain.event import ANNOUNCED, FRAMES_PER_DELTA, Cursor, EventKind
from ashd.store.events import Event as SavedEvent
from ashd.wire.v1 import events_pb2

KEEP_ALIVE = b": keep-alive\n\n"

_OWN_NAMES = frozenset(
    {"session_start", "message", "error", "done", "reset", "user_message", "lifecycle"}
    | {"turn_complete", "text_delta", "thinking_delta", "tool_use", "tool_result"}
)
_LOST = {
    "error": "The turn's sandbox was lost with its runner, and the session is paused. What the turn did after its last "
    "event is not known.",
    "code": "turn.lost",
    "retryable": True,
}
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Shown(NamedTuple):
    """An event on its way to a client, from wherever it came."""

    epoch: int
    kind: EventKind
    seq: int
    part: int
    turn: str
    type: str
    payload: bytes


def from_wire(event: events_pb2.Event, epoch: int) -> Shown:
    return Shown(epoch, EventKind(event.kind), event.seq, event.part, event.turn_id, event.type, event.payload)


def from_store(event: SavedEvent) -> Shown:
    payload = event.data.encode("ascii")
    return Shown(event.epoch, EventKind(event.kind), event.seq, 0, event.turn_id or "", event.type, payload)


def encode(name: str, data: bytes, cursor: Cursor) -> bytes:
    """One frame, in one piece."""
    return b"id: %b\nevent: %b\ndata: %b\n\n" % (str(cursor).encode(), name.encode(), data)


def dump(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


class Frames:
    """Turns events, in order, into the frames behind one client's cursor.

    `whole` streams (attach) also show what the user said and the sandbox's end.
    """

    def __init__(self, session: str, after: Cursor, *, whole: bool) -> None:
        self._session = session
        self._after = after.place
        self._whole = whole
        self._thinking_seen = False
        self.cursor = after

    def of(self, event: Shown) -> bytes:
        """The frames of one event that the client has not had; empty if there are none."""
        frames = []
        for place, name, data in self._frames(event):
            if place > self._after:
                self._after = place
                self.cursor = Cursor(event.epoch, *place)
                frames.append(encode(name, data, self.cursor))
        if event.kind is not EventKind.DELTA and (event.seq, 0) > self._after:
            self._after = (event.seq, 0)
        return b"".join(frames)

    def start(self, turn: str | None, version: str) -> bytes:
        """The frame that opens every stream."""
        return encode(
            "session_start", dump({"sessionId": self._session, "version": version, "turnId": turn}), self.cursor
        )

    def reset(self, to: Cursor) -> bytes:
        """What the client had after `to` was never saved and is gone; the stream goes on there."""
        self.cursor, self._after = to, to.place
        return encode("reset", dump({"cursor": str(to)}), to)

    def failed(self, turn: str, error: str, code: str, *, last_seq: int) -> bytes:
        """The end of a turn that never began."""
        shown = encode("error", dump({"error": error, "code": code, "retryable": False}), self.cursor)
        return shown + encode("done", self._done(turn, "failed", last_seq), self.cursor)

    def _done(self, turn: str, outcome: str, last_seq: int) -> bytes:
        return dump({"sessionId": self._session, "turnId": turn, "outcome": outcome, "lastSeq": last_seq})

    def _frames(self, event: Shown) -> Iterator[tuple[tuple[int, int], str, bytes]]:
        """Every frame of an event with its place, whatever the client has had."""
        here = (event.seq, 0)
        if event.kind is EventKind.DELTA:
            yield from self._of_delta(event)
        elif event.kind is EventKind.MESSAGE:
            yield from self._of_message(event)
        elif event.kind is EventKind.SETTLED:
            self._thinking_seen = False
            outcome = json.loads(event.payload).get("outcome", "failed")
            if outcome == "lost":  # settled for a keeper that no longer could, so nothing before it says why
                yield (event.seq - 1, ANNOUNCED), "error", dump(_LOST)
            yield here, "done", self._done(event.turn, outcome, event.seq)
        elif event.kind is EventKind.TIMELINE and event.type == "error":
            why = json.loads(event.payload)
            yield here, "error", dump({"error": why.get("error"), "code": why.get("code"), "retryable": False})
        elif event.type == "lifecycle" and (event.kind is EventKind.TIMELINE or self._whole):
            yield here, "lifecycle", event.payload

    def _of_delta(self, event: Shown) -> Iterator[tuple[tuple[int, int], str, bytes]]:
        part = event.part * FRAMES_PER_DELTA
        if event.type == "stream_event" and (granular := _granular_delta(json.loads(event.payload))) is not None:
            name, data = granular
            self._thinking_seen = self._thinking_seen or name == "thinking_delta"
            yield (event.seq, part - 1), name, dump(data)
        yield (event.seq, part), "message", event.payload

    def _of_message(self, event: Shown) -> Iterator[tuple[tuple[int, int], str, bytes]]:
        here = (event.seq, 0)
        if event.type == "user":
            if self._whole:
                said = json.loads(event.payload)
                yield here, "user_message", dump({"turnId": event.turn, "content": said.get("content")})
            return
        for index, granular in enumerate(self._announcements(event)):
            if granular is not None:
                name, data = granular
                yield (event.seq - 1, ANNOUNCED + index), name, dump(data)
        self._thinking_seen = self._thinking_seen and event.type != "assistant"
        yield here, "message", event.payload

    def _announcements(self, event: Shown) -> Iterator[tuple[str, Any] | None]:
        message = json.loads(event.payload)
        if event.type == "result":
            yield "turn_complete", {"numTurns": message.get("num_turns"), "result": message.get("result")}
            return
        inner = message.get("message")
        content = inner.get("content") if isinstance(inner, dict) else None
        for block in content if isinstance(content, list) else ():
            yield self._of_block(event.type, block) if isinstance(block, dict) else None

    def _of_block(self, type_: str, block: dict[str, Any]) -> tuple[str, Any] | None:
        match type_, block.get("type"):
            case ("assistant", "text"):
                return None
            case ("assistant", "tool_use"):
                return "tool_use", {name: block.get(name) for name in ("id", "name", "input")}
            case ("assistant", "thinking"):
                return None if self._thinking_seen else ("thinking_delta", {"delta": block.get("thinking")})
            case ("assistant", other):
                return _agents_name(other), block
            case (_, "tool_result"):
                return "tool_result", {name: block.get(name) for name in ("tool_use_id", "content", "is_error")}
        return None


def _granular_delta(message: dict[str, Any]) -> tuple[str, Any] | None:
    inner = message.get("event")
    if not isinstance(inner, dict) or inner.get("type") != "content_block_delta":
        return None
    delta = inner.get("delta")
    if not isinstance(delta, dict):
        return None
    match delta.get("type"):
        case "text_delta":
            return "text_delta", {"delta": delta.get("text")}
        case "thinking_delta":
            return "thinking_delta", {"delta": delta.get("thinking")}
        case other:
            return _agents_name(other), delta


def _agents_name(name: object) -> str:
    """A frame's name that an agent chose. SECURITY: it can neither forge our own frames nor begin a line of its own."""
    if isinstance(name, str) and _NAME.fullmatch(name) and name not in _OWN_NAMES:
        return name
    return "block"
