"""Keepers whose zygote has died become children of the supervisor, and are collected when they end.

Without this they would go to the host's init, or, where the runner is process 1 of a container, to it, and stay as
zombies.

Sources: prctl(2) PR_SET_CHILD_SUBREAPER, wait(2).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36
_INTERVAL_S = 1.0


async def collect_orphans(own_child: Callable[[], int | None]) -> None:
    """Until cancelled: collects dead children, except `own_child`, whose owner waits for it.

    Looks once a second, at as many children as there are orphans, mostly none; SIGCHLD belongs to uvloop.
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    while True:
        _collect(own_child())
        await asyncio.sleep(_INTERVAL_S)


def _collect(spared: int | None) -> None:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for pid in {int(text) for text in children} - {spared}:
        with contextlib.suppress(ChildProcessError):
            os.waitpid(pid, os.WNOHANG)
