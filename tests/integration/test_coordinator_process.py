"""The coordinator as processes: master and workers under signals."""

from __future__ import annotations

import time

from tests.integration.fleet import Fleet, eventually


def test_a_coordinator_stopped_while_its_workers_load_ends_at_once(fleet: Fleet) -> None:
    fleet.add_coordinator()
    part = fleet.coordinators[0]
    assert part.stop() == 0
    for _ in range(3):
        part.start()
        eventually(lambda: part.children("ashd: coordinator worker"), every_s=0.005)
        asked = time.monotonic()
        assert part.stop() == 0
        assert time.monotonic() - asked < 10  # and not graceful_timeout, 30 s
