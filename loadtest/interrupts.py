"""Ctrl-c and SIGTERM: they end what is measured, and never what cleans up after it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def as_interrupts() -> None:
    """From now on SIGTERM is what ctrl-c is: KeyboardInterrupt in the main thread."""
    for number in SIGNALS:
        signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Lets what is inside come to its end; an interrupt that came meanwhile is raised afterwards. Main thread only."""
    came: list[int] = []
    before = {number: signal.signal(number, lambda which, _: came.append(which)) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if came:
        raise KeyboardInterrupt
