"""The ledger: what of a session's turns goes into its journal, and in which words.

Covers: launching, the agent's messages with their timeline entries, settling, closing; and the same for a keeper that
died before it could. Leaves out: the format on disk (journal.py), when any of it happens (keeper.py).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.journal import Position, Reader, Writer, resume_writer
from sandbox.protocol import NO_TURN, Kind, timeline_of

_SAVED_TYPES = {"assistant": "assistant", "user": "tool", "result": "result"}
"""Message objects of an agent that are saved, and the type of their record; `user` alone is the human's."""
_PARTIAL = "stream_event"
_MAX_USAGE_FIELDS = 32


def _payload(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode("ascii")


def _usage_of(result: dict[str, Any]) -> dict[str, Any]:
    """What the turn used, as its result says; nothing if that isn't a small object of numbers."""
    usage = result.get("usage")
    if not isinstance(usage, dict) or len(usage) > _MAX_USAGE_FIELDS:
        return {}
    return {"usage": {name: value for name, value in usage.items() if isinstance(value, int | float)}}


def _dropped(counts: dict[str, int] | None) -> dict[str, Any]:
    return {"dropped": counts} if counts else {}


@dataclass(frozen=True)
class Outcome:
    """How a turn ended; `error` and `code` tell why where it did not complete."""

    name: str  # completed, interrupted, failed, oom, timeout, lost
    error: str = ""
    code: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    """What else is known, as fields of the last event."""


class Ledger:
    """The open turn of a session and the journal it is written to. Nothing is on disk before `writer.flush()`."""

    def __init__(self, writer: Writer, turn: str = NO_TURN) -> None:
        self.writer = writer
        self.turn = turn
        self.closed = False
        self._usage: dict[str, Any] = {}

    def launch(self, turn: str, content: Any) -> None:
        """Opens a turn: from this record on it has been launched and is never launched again. Raises OSError (disk
        full).
        """
        self.writer.flush()
        before = self.writer.last
        self.writer.append(Kind.MESSAGE, "user", _payload({"type": "user", "content": content}), turn)
        try:
            self.writer.flush()
        except OSError:
            self.writer.discard(before)
            raise
        self.turn = turn

    def message(self, message: dict[str, Any], raw: bytes) -> None:
        """A message object of the agent: its timeline entries, then itself, untouched."""
        type_ = message.get("type")
        saved = _SAVED_TYPES.get(type_) if isinstance(type_, str) else None
        if saved is None:
            self.writer.append(Kind.DELTA, _PARTIAL if type_ == _PARTIAL else "message", raw, self.turn)
            return
        if saved == "result":
            self._usage = _usage_of(message)
        for name, data in timeline_of(message):
            self.writer.append(Kind.TIMELINE, name, _payload(data), self.turn)
        self.writer.append(Kind.MESSAGE, saved, raw, self.turn)

    def happened(self, action: str, data: dict[str, Any]) -> None:
        """Something became of the sandbox in the open turn: memory_warning, memory_kill."""
        self.writer.append(Kind.TIMELINE, "lifecycle", _payload({"action": action, **data}), self.turn)

    def settle(self, outcome: Outcome, dropped: dict[str, int] | None = None) -> None:
        """Ends the open turn. `dropped`: how much of what the agent did since the last one could not be kept, by
        kind.
        """
        why = {"error": outcome.error, "code": outcome.code} if outcome.error else {}
        if why:
            self.writer.append(Kind.TIMELINE, "error", _payload(why), self.turn)
        data = {"action": "turn_settled", "turnId": self.turn, "outcome": outcome.name, **self._usage, **why}
        data |= outcome.details | _dropped(dropped)
        self.writer.append(Kind.SETTLED, "lifecycle", _payload(data), self.turn)
        self._usage = {}
        self.turn = NO_TURN

    def close(self, cause: str, details: dict[str, Any] | None = None, dropped: dict[str, int] | None = None) -> None:
        """The last event of this sandbox. `cause`: ended, oom, disk, timeout, exited, killed, lost."""
        data = {"action": "sandbox_closed", "cause": cause, **(details or {}), **_dropped(dropped)}
        self.writer.append(Kind.CLOSED, "lifecycle", _payload(data), NO_TURN)
        self.closed = True


def reopen(folder: Path, *, segment_bytes: int, max_bytes: int) -> Ledger:
    """The ledger of a keeper that died, from its journal `folder`. Raises Corrupt if there is no journal."""
    writer = resume_writer(folder, segment_bytes=segment_bytes, max_bytes=max_bytes)
    ledger = Ledger(writer)
    reader = Reader(folder, Position(0, 0))
    try:
        while records := reader.read():
            for record in records:
                if record.kind is Kind.SETTLED:
                    ledger.turn = NO_TURN
                elif record.kind is Kind.CLOSED:
                    ledger.closed = True
                elif record.turn:
                    ledger.turn = record.turn
    finally:
        reader.close()
    return ledger
