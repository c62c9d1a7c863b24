"""How much space and how many inodes a folder takes, asked of a tree that may be made to mislead or exhaust who asks.

Covers: walking by descriptor, never through a link; trees of any depth with a bounded number of descriptors; counting
no further than makes a difference; files that are deleted but still open.
Leaves out: what follows from the answer (disk_watch.py).

Not seen: a deleted file that is only mapped, or whose descriptor lies in a socket. Where that matters, use quotas.

Sources: openat(2), stat(2) (st_blocks is in units of 512 bytes whatever the filesystem), proc_pid_fd(5).
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ashd.runner.quota import Usage

_HELD = 64
"""Folders, from the top, that are held open while what is below them is looked at. Deeper ones are found again by
their "..", which is believed only if it is the folder it was.
"""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_UNCLOSED = 0o700

Identity = tuple[int, int]


def usage_of(folder: Path, stop_at: Usage, processes: Iterable[int] = ()) -> Usage:
    """What the tree and the deleted files held open by `processes` take; at most a little more than `stop_at`, where
    counting ends. What vanishes or moves meanwhile may be missed, or be counted twice.
    """
    tally = _Tally(stop_at)
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        top = os.open(folder, _FOLDER)
        try:
            tally.add(os.fstat(top))
            device = os.fstat(top).st_dev
        except BaseException:
            os.close(top)
            raise
        _walk(top, tally)
        for pid in processes:
            _add_deleted(pid, device, tally)
    return Usage(tally.bytes, tally.inodes)


@dataclass
class _Tally:
    stop_at: Usage
    bytes: int = 0
    inodes: int = 0
    _linked: set[Identity] = field(default_factory=set)

    @property
    def is_enough(self) -> bool:
        return self.bytes > self.stop_at.bytes or self.inodes > self.stop_at.inodes

    def add(self, found: os.stat_result) -> None:
        """Counts an inode; one with several names once."""
        if found.st_nlink != 1 and not stat.S_ISDIR(found.st_mode):
            identity = (found.st_dev, found.st_ino)
            if identity in self._linked:
                return
            self._linked.add(identity)
        self.bytes += found.st_blocks * 512
        self.inodes += 1


@dataclass
class _Level:
    """A folder on the way down: the descriptor, while it is held, and the folders in it not yet looked at."""

    handle: int | None
    identity: Identity
    rest: list[str]


def _walk(top: int, tally: _Tally) -> None:
    """Counts what is below an open folder, which it closes."""
    path = [_enter(top, tally)]
    here = top
    try:
        while path and not tally.is_enough:
            level = path[-1]
            if not level.rest:
                here = _up(path, here)
                continue
            child = _open_child(here, level.rest.pop())
            if child is None:
                continue
            if len(path) >= _HELD:
                os.close(here)
                level.handle = None
            path.append(_enter(child, tally))
            here = child
    finally:
        for handle in {level.handle for level in path} - {None}:
            os.close(handle)  # type: ignore[arg-type]


def _enter(folder: int, tally: _Tally) -> _Level:
    """Counts what is in an open folder."""
    found = os.fstat(folder)
    below = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            try:
                member = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            tally.add(member)
            if stat.S_ISDIR(member.st_mode) and member.st_dev == found.st_dev:
                below.append(entry.name)
            if tally.is_enough:
                break
    return _Level(folder, (found.st_dev, found.st_ino), below)


def _open_child(parent: int, name: str) -> int | None:
    """An open folder below; None if it is none any more."""
    try:
        return os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        return _reopen_to_its_user(parent, name)
    except OSError:
        return None


def _reopen_to_its_user(parent: int, name: str) -> int | None:
    """A folder closed to its own user would be a place to hide things from a runner that is the same user, so it is
    opened to it again. SECURITY: by descriptor, of a folder and of nothing a link leads to.
    """
    try:
        handle = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    except OSError:
        return None
    try:
        os.chmod(f"/proc/self/fd/{handle}", stat.S_IMODE(os.fstat(handle).st_mode) | _UNCLOSED)
        return os.open(f"/proc/self/fd/{handle}", _FOLDER & ~os.O_NOFOLLOW)
    except OSError:
        return None
    finally:
        os.close(handle)


def _up(path: list[_Level], here: int) -> int:
    """Leaves a folder that is done; the open one above it, or where that has moved away, the nearest one still held."""
    path.pop()
    if not path:
        os.close(here)
        return -1
    level = path[-1]
    if level.handle is None:
        above = _open_parent(here, level.identity)
        if above is None:
            while path[-1].handle is None:
                path.pop()
        else:
            level.handle = above
    os.close(here)
    handle = path[-1].handle
    assert handle is not None
    return handle


def _open_parent(folder: int, identity: Identity) -> int | None:
    """RACE: a folder moved since it was entered has another parent, which may be outside of the tree."""
    try:
        parent = os.open("..", _FOLDER, dir_fd=folder)
    except OSError:
        return None
    found = os.fstat(parent)
    if (found.st_dev, found.st_ino) == identity:
        return parent
    os.close(parent)
    return None


def _add_deleted(pid: int, device: int, tally: _Tally) -> None:
    """Counts files without a name that a process holds open."""
    with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/fd") as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                found = entry.stat()
                if found.st_nlink == 0 and found.st_dev == device and stat.S_ISREG(found.st_mode):
                    tally.add(found)
            if tally.is_enough:
                return
