"""Mounts below a folder, and undoing them.

Covers: this process's mount namespace only; what jails mount is in theirs and vanishes with them.

Sources: proc_pid_mountinfo(5), umount(2).
"""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

_MNT_DETACH = 2
_ESCAPED = re.compile(r"\\([0-7]{3})")
_libc = ctypes.CDLL(None, use_errno=True)


def below(root: Path) -> list[Path]:
    """Mount points below `root`, the innermost first."""
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        points = [_plain(line.split(" ", 5)[4]) for line in file]
    return sorted((Path(point) for point in points if point.startswith(f"{root}/")), reverse=True)


def _plain(escaped: str) -> str:
    return _ESCAPED.sub(lambda code: chr(int(code[1], 8)), escaped)


def detach(point: Path) -> None:
    """Takes it off at once, also while it is in use. Raises OSError."""
    if _libc.umount2(os.fsencode(point), _MNT_DETACH) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"umount {point}: {os.strerror(number)}")
