"""Admission: no session is taken while the host has too little memory or disk left, or is pressed for memory.

Covers: the rule, what sandboxes being started will take, resuming with a margin. Leaves out: reading the memory
(host_memory.py) and the disk (disk.py), slots and draining (supervisor.py).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from ashd.errors import Unavailable
from ashd.runner.host_memory import Reading
from ashd.wire.status import FULL

FRESH_S = 0.1
LEAST_SANDBOX_BYTES = 8 * 1024 * 1024
"""What a sandbox takes before any was looked at: keeper and bridge with a small agent."""
_MIB = 1024 * 1024
_MEMORY, _PRESSURE, _DISK = "memory", "pressure", "disk"
_OFF_PRESSURE = 100


class Admission:
    """Decides whether another sandbox may begin. `refusing` is why not, in a word: memory, pressure, disk; or empty.
    `why` is the same in a sentence.
    """

    def __init__(
        self,
        headroom_bytes: int,
        most_pressure: int,
        read: Callable[[], Reading],
        sandbox_bytes: Callable[[], int],
        disk_shortage: Callable[[], str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`sandbox_bytes`: what a sandbox takes on average, 0 = not known yet; `disk_shortage`: what the disk lacks."""
        self._headroom = headroom_bytes
        self._most_pressure = most_pressure
        self._read = read
        self._sandbox_bytes = sandbox_bytes
        self._disk_shortage = disk_shortage
        self._clock = clock
        self._read_at = -1e9
        self._reading = Reading(0)
        self._no_disk = ""
        self._beginning = 0
        self.refusing = ""
        self.why = ""

    @property
    def statement(self) -> str:
        """What coordinators are told: empty while sessions are admitted."""
        return f"{self.refusing}: {self.why}" if self.refusing else ""

    def allows(self) -> bool:
        """Whether another sandbox may begin now."""
        self._look()
        return not self.refusing

    def check(self) -> None:
        """Raises Unavailable (runner.full) that says what is missing."""
        if not self.allows():
            raise Unavailable(self.why, code=FULL)

    @contextlib.contextmanager
    def beginning(self) -> Iterator[None]:
        """A sandbox is being started: what it will take counts as taken, so that a burst does not overshoot."""
        self._beginning += 1
        try:
            yield
        finally:
            self._beginning -= 1
            self._read_at = -1e9  # from now on it shows in the reading; an older one knows nothing of it

    # ------------------------------------------------------------ the rule

    def _look(self) -> None:
        if self._clock() - self._read_at >= FRESH_S:
            self._reading = self._read()
            self._no_disk = self._disk_shortage()
            self._read_at = self._clock()
        left = self._reading.available_bytes - self._promised_bytes()
        # Once refusing, a little more than the least is asked for: else it would be on and off with each session.
        least = self._headroom + (self._headroom // 16 if self.refusing == _MEMORY else 0)
        most = self._most_pressure * (0.75 if self.refusing == _PRESSURE else 1.0)
        if self._headroom and left < least:
            self._refuse(_MEMORY, self._too_little(left))
        elif self._most_pressure < _OFF_PRESSURE and self._reading.pressure > most:
            self._refuse(_PRESSURE, self._too_pressed())
        elif self._no_disk:
            self._refuse(_DISK, self._no_disk)
        else:
            self.refusing = self.why = ""

    def _refuse(self, reason: str, why: str) -> None:
        self.refusing, self.why = reason, why

    def _promised_bytes(self) -> int:
        return self._beginning * max(self._sandbox_bytes(), LEAST_SANDBOX_BYTES)

    def _too_little(self, left: int) -> str:
        promised = f" beside {self._beginning} sandboxes being started" if self._beginning else ""
        return (
            f"{self._reading.where} has {max(left, 0) // _MIB} MiB of memory left{promised}, "
            f"memory_headroom asks for {self._headroom // _MIB} MiB"
        )

    def _too_pressed(self) -> str:
        return (
            f"tasks of this host waited for memory in {self._reading.pressure:.0f} % of the last 10 s, "
            f"memory_pressure allows {self._most_pressure} %"
        )
