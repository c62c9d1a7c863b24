"""What a bridge says to its keeper: taken from the other side of the jail, and believed in nothing.

Covers: cutting bytes into frames, counting what isn't one, texts and numbers made fit to be passed on. Leaves out: what
a frame means now (keeper.py), JSON that may be believed (protocol.py).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from sandbox.protocol import LineReader, Malformed, parse_object

_TIMING_FIELDS = ("cmdParseMs", "sdkFirstTokenMs", "totalMs", "eventCount")
_AGENTS_CODE = re.compile(r"(agent|claude)\.[a-z_]{1,40}")
_MAX_TEXT = 10_000


class Frames:
    """Cuts what a bridge sends into frames of at most `max_frame` bytes.

    `take` gets each frame's tag, object and ASCII bytes, and raises Malformed for one that has no place now; `drop`
    hears of each that is dropped: its kind, and why.
    """

    def __init__(
        self,
        max_frame: int,
        take: Callable[[bytes, dict[str, Any], bytes], None],
        drop: Callable[[str, str], None],
    ) -> None:
        self._max_frame = max_frame
        self._take = take
        self._drop = drop
        self._lines = LineReader(max_frame)

    def feed(self, data: bytes) -> int:
        """Bytes as they come; how many frames of them were bad.

        PERF: what is no object at first sight is dropped without an exception: 100,000 of them fit into one read.
        """
        bad = 0
        for line in self._lines.feed(data):
            if line[1:2] != b"{":
                bad += 1
                self._drop("bad_frames", "dropped a malformed frame: no JSON object")
                continue
            try:
                body, raw = parse_object(line[1:])
                if len(raw) > self._max_frame:
                    raise Malformed(f"{len(raw)} bytes once written in ASCII")
                self._take(line[:1], body, raw)
            except Malformed as error:
                bad += 1
                self._drop("bad_frames", f"dropped a malformed frame: {error}")
        for _ in range(self._lines.oversized):
            self._drop("oversized_frames", f"dropped a frame of more than {self._max_frame} bytes")
        self._lines.oversized = 0
        return bad


def text_of(body: dict[str, Any], name: str, default: str) -> str:
    """A text from inside, fit for databases and headers: bounded, without NUL and lone surrogates."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        return default
    return value[:_MAX_TEXT].replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def timing_of(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a timing line, where they are numbers."""
    measured = {name: body[name] for name in _TIMING_FIELDS if isinstance(body.get(name), int | float)}
    return {"type": "timing", "source": "bridge", **measured}


def agents_code(body: dict[str, Any], default: str) -> str:
    """The code a bridge gives a failure. SECURITY: it may blame the agent in detail, but never us."""
    code = body.get("code")
    return code if isinstance(code, str) and _AGENTS_CODE.fullmatch(code) else default
