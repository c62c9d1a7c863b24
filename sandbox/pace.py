"""How fast an agent may do what costs its keeper: so many a second, averaged over ten."""

from __future__ import annotations

import time

_AVERAGED_OVER_S = 10.0
_PAUSE_S = 0.1


class Pace:
    """What has been taken beyond the rate is waited for, so that nothing is lost and the average holds."""

    def __init__(self, per_s: float) -> None:
        self._rate = max(1.0, per_s)
        self._left = self._most = self._rate * _AVERAGED_OVER_S
        self._counted_at = time.monotonic()
        self.resume_at = 0.0
        """When the next may be taken; in the past where none have to wait."""

    def spend(self, number: int) -> None:
        """So many were taken."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._counted_at) * self._rate) - number
        self._counted_at = now
        if self._left < 0:
            self.resume_at = now - self._left / self._rate + _PAUSE_S
