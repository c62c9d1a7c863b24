"""The coordinator's line of ASH_DEBUG_TIMING, one per turn (api.md §6)."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime

from ashd.coordinator.frames import Shown
from ashd.domain.event import EventKind


class TurnTiming:
    """Made when the turn is admitted; writes its line when it has seen the turn's last event."""

    def __init__(self, session: str, sandbox: str | None, started: float) -> None:
        self._session = session
        self._sandbox = sandbox
        self._started = started
        self._admitted_ms = self._elapsed_ms()
        self._first_ms: float | None = None
        self._count = 0

    def _elapsed_ms(self) -> float:
        return round((time.perf_counter() - self._started) * 1000, 3)

    def saw(self, event: Shown) -> None:
        if event.kind is EventKind.MESSAGE and event.type == "user":
            return
        if self._first_ms is None:
            self._first_ms = self._elapsed_ms()
        self._count += 1
        if event.kind is EventKind.SETTLED:
            self._write()

    def _write(self) -> None:
        line = {
            "type": "timing",
            "source": "server",
            "sessionId": self._session,
            "sandboxId": self._sandbox,
            "lookupMs": self._admitted_ms,
            "firstEventMs": self._first_ms,
            "totalMs": self._elapsed_ms(),
            "eventCount": self._count,
            "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
