"""How long to wait before trying again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Backoff:
    """Delays that double from `first_s` to `most_s`; `jitter` in [0, 1) is the caller's chance, so that many don't
    retry at once.
    """

    first_s: float = 0.1
    most_s: float = 5.0
    _failures: int = 0

    def next_s(self, jitter: float) -> float:
        """The delay after one more failure: between half and all of the doubled one."""
        delay = min(self.most_s, self.first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return delay * (0.5 + 0.5 * jitter)

    def reset(self) -> None:
        """It worked: the next failure is the first again."""
        self._failures = 0
