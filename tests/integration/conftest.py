"""Fleets for tests: one shared by tests that harm nothing, and fresh ones for tests that do.
Zygotes, too, and hosts of sandboxes that have no fleet (sandboxes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.integration.fleet import Fleet
from tests.integration.sandboxes import Host, Zygote


def _run(database_url: str) -> Iterator[Fleet]:
    fleet = Fleet(database_url)
    try:
        yield fleet
    finally:
        left = fleet.stop()
    assert not left, f"left behind (see {fleet.folder}): {left}"


@pytest.fixture
def fleet(database_url: str) -> Iterator[Fleet]:
    """An empty fleet of the test's own."""
    yield from _run(database_url)


@pytest.fixture(scope="module")
def shared(new_database: Callable[[], str]) -> Iterator[Fleet]:
    """Two coordinators and two runners, for all tests of a module."""
    for fleet in _run(new_database()):
        fleet.add_coordinator()
        fleet.add_coordinator()
        fleet.add_runner()
        fleet.add_runner()
        yield fleet


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    """The zygote of a module's sandboxes."""
    with Zygote() as running:
        yield running


@pytest.fixture
def host(zygote: Zygote) -> Iterator[Host]:
    """A test's own sandboxes; it fails when they leave anything behind."""
    with Host(zygote) as host:
        yield host
