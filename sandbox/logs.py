"""What an agent writes to stdout and stderr, kept as lines of JSON in a file that can't grow past its bound."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

_MAX_LINE_BYTES = 16 * 1024


class LogFile:
    """Appends log lines `{"index", "level", "text", "ts"}`; past the bound they are counted and dropped, and that is
    said once.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._room = max_bytes
        self._index = 0
        self._partial: dict[str, bytes] = {}
        self._full = False
        self.dropped = 0

    def feed(self, level: str, data: bytes) -> None:
        """Output of the agent as it comes; `level` is stdout or stderr."""
        *lines, rest = (self._partial.pop(level, b"") + data).split(b"\n")
        for line in lines:
            self._write_pieces(level, line)
        if len(rest) > _MAX_LINE_BYTES:
            self._write_pieces(level, rest)
        elif rest:
            self._partial[level] = rest

    def _write_pieces(self, level: str, line: bytes) -> None:
        for start in range(0, max(1, len(line)), _MAX_LINE_BYTES):
            self.write(level, line[start : start + _MAX_LINE_BYTES])

    def close(self) -> None:
        """What stands without its newline counts as a line now."""
        for level, rest in self._partial.items():
            self.write(level, rest)
        self._partial.clear()

    def write(self, level: str, line: bytes | str) -> None:
        """One line of at most _MAX_LINE_BYTES; `level` system is the keeper's own word."""
        if self._full:
            self.dropped += 1
            return
        text = line.decode("utf-8", "replace") if isinstance(line, bytes) else line
        entry = {"index": self._index, "level": level, "text": text[:_MAX_LINE_BYTES], "ts": timestamp()}
        encoded = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        if len(encoded) > self._room:
            self._full = True
            self.dropped += 1
            entry |= {"level": "system", "text": "the log is full; what follows is dropped"}
            encoded = json.dumps(entry, separators=(",", ":")).encode() + b"\n"
        try:
            os.write(self._fd, encoded)
        except OSError:  # a full disk costs log lines, never the session
            self.dropped += 1
            return
        self._room -= len(encoded)
        self._index += 1


def timestamp() -> str:
    """The time as the API writes it: UTC, with milliseconds."""
    instant = time.time()
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(instant)) + f".{int(instant * 1000) % 1000:03d}Z"
