"""Processes as /proc shows them: whose they are by where they work, and what is below one.

Leaves out: what they use (usage.py). Processes come and go while one looks: whatever can't be read any more is left
out.

Sources: proc(5).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_CHUNK_BYTES = 16384
_REMOVED = " (deleted)"


def working_in(folder: Path) -> list[int]:
    """Those whose working folder is `folder` itself; it need not be there any more."""
    wanted = str(folder)
    return [pid for pid, where in _working_folders() if where.removesuffix(_REMOVED) == wanted]


def by_sandbox(root: Path) -> dict[int, str]:
    """Those who work in a folder of `root` or deeper, removed ones too, and the name of that folder."""
    prefix = f"{root}/"
    below = ((pid, where[len(prefix) :]) for pid, where in _working_folders() if where.startswith(prefix))
    return {pid: rest.removesuffix(_REMOVED).partition("/")[0] for pid, rest in below}


def _working_folders() -> Iterator[tuple[int, str]]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                yield int(name), os.readlink(f"/proc/{name}/cwd")


def children(pid: int) -> list[int]:
    """Of all its threads; empty if it is gone."""
    found: list[int] = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            found += map(int, read(f"/proc/{pid}/task/{thread}/children").split())
    return found


def tree(pid: int) -> list[int]:
    """It and all below it."""
    found, look_at = [], [pid]
    while look_at:
        found.append(look_at.pop())
        look_at += children(found[-1])
    return found


def user_of(pid: int) -> int | None:
    """Its real user id; None if it is gone."""
    with contextlib.suppress(OSError, IndexError):
        return int(read(f"/proc/{pid}/status").partition(b"\nUid:")[2].split(None, 1)[0])
    return None


def has_terminal(pid: int) -> bool:
    """Whether it belongs to somebody's terminal; no process of a sandbox does."""
    with contextlib.suppress(OSError, IndexError):
        return int(stat_fields(pid)[4]) != 0
    return False


def stat_fields(pid: int) -> list[bytes]:
    """Fields 3 (state) and following of /proc/PID/stat; the second may hold blanks and brackets. Raises OSError."""
    return read(f"/proc/{pid}/stat").rpartition(b")")[2].split()


def read(path: str) -> bytes:
    """A file of the kernel's. PERF: without a file object, which costs more than the reading. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        data = os.read(descriptor, _CHUNK_BYTES)
        while more := os.read(descriptor, _CHUNK_BYTES):  # lists come a page at a time
            data += more
        return data
    finally:
        os.close(descriptor)
