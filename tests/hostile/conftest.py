"""The scene of a module's attacks: made once, looked over after each attack and when all sessions have ended."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.hostile.scene import Scene
from tests.integration.fleet import Fleet


@pytest.fixture(scope="module")
def scene(new_database: Callable[[], str]) -> Iterator[Scene]:
    url = new_database()
    fleet = Fleet(url)
    made: Scene | None = None
    try:
        made = Scene(fleet, url)
        yield made
        made.assert_nothing_is_left()
    finally:
        if made is not None:
            made.host.close()
        left = fleet.stop()
    assert not left, f"left behind (see {fleet.folder}): {left}"
