"""What supervisor, keeper and bridge say to each other, and the bounds that keep a hostile bridge harmless.

Covers: the record kinds of a journal, the frames a bridge sends, bounded line splitting, JSON that may be believed,
and which timeline entries an agent's message stands for.
Leaves out: how records lie on disk (journal.py), who reads which socket (keeper.py, bridge.py, ashd.runner).

Three conversations, all of them lines ended by a newline:

    supervisor -> keeper   {"cmd": …}          claim, turn, interrupt, acked, end        (keeper.sock)
    keeper -> supervisor   {"re": …} {"grew": …} {"state": …}                            (keeper.sock)
    keeper -> bridge       {"type": …}         claim, turn, interrupt, memory_kill, end  (socketpair)
    bridge -> keeper       one tag byte, then JSON: see `Tag`                            (the same socketpair)

The first three come from our own processes. The last comes from inside the jail and is believed in nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

MAX_JSON_DEPTH = 100
"""Nesting an agent's message may have; deeper ones could exhaust the stack of a later reader."""

MAX_JSON_VALUES = 100_000
"""Values an agent's message may consist of. A parsed value takes up to a hundred times the room of its text, in a
keeper that no cgroup limits."""

MAX_COMMAND_BYTES = 160 * 1024 * 1024
"""Longest line from a supervisor: a message of the API's 50 MiB, every two bytes of it escaped to six."""

NO_TURN = ""


class Kind(IntEnum):
    """What a journal record is. Numbers are those of the wire's EventKind."""

    MESSAGE = 1  # saved: a message object of the user or the agent
    TIMELINE = 2  # saved: what a message did, in the API's event types
    DELTA = 3  # not saved: partial output before the next saved record
    SETTLED = 4  # saved: the last event of a turn
    CLOSED = 5  # saved: the last event of a sandbox


class Record(NamedTuple):
    """One numbered entry of a journal; `payload` is one line of ASCII JSON."""

    kind: Kind
    seq: int
    part: int
    turn: str
    type: str
    payload: bytes


class Tag:
    """First byte of a frame from the bridge."""

    JAILED = b"J"  # {}: the bridge has given up its privileges and waits for a session
    READY = b"R"  # {}: the agent is loaded
    FAILED = b"X"  # {"error", "code"}: it could not be loaded
    MESSAGE = b"M"  # a message object of the agent
    END = b"E"  # {"turn", "error"?, "code"?}: the turn is over
    TIMING = b"T"  # how long the steps of a turn took; asked for with `timing`


class Malformed(ValueError):
    """A frame that is not what its sender should have sent; it is dropped and counted."""


def encode_line(message: dict[str, Any]) -> bytes:
    """A JSON object as one ASCII line."""
    return json.dumps(message, separators=(",", ":")).encode("ascii") + b"\n"


def _reject_constant(name: str) -> Any:
    raise Malformed(f"{name} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Malformed("a number too large to be written again")
    return value


def parse_object(raw: bytes) -> tuple[dict[str, Any], bytes]:
    """A JSON object from untrusted bytes, and the same object as ASCII bytes on one line.

    Raises Malformed for anything else: invalid UTF-8, NaN, numbers too large to convert, nesting past MAX_JSON_DEPTH,
    more than MAX_JSON_VALUES.
    """
    if _values_exceed(raw, MAX_JSON_VALUES):
        raise Malformed(f"more than {MAX_JSON_VALUES} values")
    try:
        value = json.loads(raw.decode("utf-8"), parse_constant=_reject_constant, parse_float=_finite)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise Malformed(f"not JSON: {type(error).__name__}") from None
    if not isinstance(value, dict):
        raise Malformed(f"a JSON {type(value).__name__}, not an object")
    _check_depth(value, raw)
    if raw.isascii() and b"\r" not in raw:
        return value, raw
    return value, json.dumps(value, separators=(",", ":")).encode("ascii")


def check_shape(value: dict[str, Any], raw: bytes) -> None:
    """Raises Malformed if `value`, whose JSON is `raw`, is larger or deeper than a keeper takes."""
    if _values_exceed(raw, MAX_JSON_VALUES):
        raise Malformed(f"more than {MAX_JSON_VALUES} values")
    _check_depth(value, raw)


def _check_depth(value: dict[str, Any], raw: bytes) -> None:
    # PERF: counting brackets is one pass in C; only a message with very many of them is walked.
    if raw.count(b"[") + raw.count(b"{") > MAX_JSON_DEPTH and _depth_exceeds(value, MAX_JSON_DEPTH):
        raise Malformed(f"nested deeper than {MAX_JSON_DEPTH} levels")


def _values_exceed(raw: bytes, limit: int) -> bool:
    """Whether a JSON text holds more values than `limit`, told without parsing it."""
    if _count_marks(raw) <= limit:
        return False  # PERF: true of nearly every message
    unescaped = raw.replace(b"\\\\", b"").replace(b'\\"', b"")  # now every quote begins or ends a string
    if unescaped.count(b'"') > 2 * limit:
        return True
    return _count_marks(b" ".join(unescaped.split(b'"')[::2])) > limit


def _count_marks(raw: bytes) -> int:
    """As many values as a JSON text can hold; brackets, commas and colons inside of strings are counted along."""
    return sum(raw.count(mark) for mark in (b",", b":", b"[", b"{"))


def _depth_exceeds(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [
            child
            for node in level
            if isinstance(node, dict | list)
            for child in (node.values() if isinstance(node, dict) else node)
        ]
        if not level:
            return False
    return True


class LineReader:
    """Splits a byte stream into lines, however it is cut, holding at most `max_line` bytes.

    A longer line is skipped to its end and counted in `oversized`.
    """

    def __init__(self, max_line: int) -> None:
        self.max_line = max_line
        self.oversized = 0
        self._held = bytearray()
        self._skipping = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        """The lines completed by `data`, without their newline."""
        *complete, rest = data.split(b"\n")
        for piece in complete:
            if self._take(piece):
                yield bytes(self._held)
            self._held.clear()
            self._skipping = False
        if rest:
            self._take(rest)

    def _take(self, piece: bytes) -> bool:
        if self._skipping:
            return False
        if len(self._held) + len(piece) > self.max_line:
            self.oversized += 1
            self._skipping = True
            self._held.clear()
            return False
        self._held += piece
        return True


def timeline_of(message: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The timeline entries (type, data) an agent's message stands for; total over any JSON object."""
    kind = message.get("type")
    if kind == "result":
        return [("turn_complete", {"numTurns": message.get("num_turns"), "result": message.get("result")})]
    if kind not in ("assistant", "user"):
        return []
    return [entry for block in content_blocks(message) if (entry := _timeline_entry(kind, block)) is not None]


def _timeline_entry(kind: str, block: dict[str, Any]) -> tuple[str, dict[str, Any]] | None:
    match (kind, block.get("type")):
        case ("assistant", "text"):
            return "text", {"text": block.get("text")}
        case ("assistant", "thinking"):
            return "reasoning", {"thinking": block.get("thinking")}
        case ("assistant", "tool_use"):
            return "tool_start", {
                "toolName": block.get("name"),
                "toolId": block.get("id"),
                "input": block.get("input"),
            }
        case ("user", "tool_result"):
            return "tool_result", {name: block.get(name) for name in ("tool_use_id", "content", "is_error")}
    return None


def content_blocks(message: dict[str, Any]) -> list[dict[str, Any]]:
    """The content blocks of a message object; a string content counts as one text block. Total over any JSON object."""
    inner = message.get("message")
    content = inner.get("content") if isinstance(inner, dict) else None
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if isinstance(content, list):
        return [block for block in content if isinstance(block, dict)]
    return []
