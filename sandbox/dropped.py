"""What a keeper could not keep of what its agent did, counted by kind until it has been told.

bad_frames, oversized_frames: what no honest bridge sends. messages: said faster than an agent may, after its turn was
asked to stop. deltas: partial output for which the journal had no room. log_lines: past max_log_bytes, or not written
for a full disk. memory_kills: more than one turn's events may tell of.
"""

from __future__ import annotations

from collections import Counter


class Dropped:
    """Totals, and what has been told of them."""

    def __init__(self) -> None:
        self._totals: Counter[str] = Counter()
        self._told: Counter[str] = Counter()

    def count(self, kind: str, number: int = 1) -> None:
        self._totals[kind] += number

    def is_now(self, kind: str, total: int) -> None:
        """The total of a kind that is counted elsewhere."""
        self._totals[kind] = total

    def news(self) -> dict[str, int]:
        """What was dropped since the last time this was asked."""
        news = dict(self._totals - self._told)
        self._told = self._totals.copy()
        return news
