"""How much of the disk one sandbox may take, and whether the runner has any left to give.

Covers: choosing, once, between quotas of the filesystem and looking again and again; ids of projects; what each
sandbox uses; the head-room below which no session is admitted.
Leaves out: how quotas work (quota.py), how looking works (disk_watch.py).

    enforced       what happens at the limit                                   needs
    disk-quota     writing fails at once: ENOSPC or EDQUOT                     root; ext4 or XFS mounted with user or
                                                                               project quotas
    disk-watch     within 2 s writing fails with EFBIG (SIGXFSZ); what goes    nothing
                   on growing above 125 %, and what is beyond 200 %, is
                   ended (`sandbox.disk`)

Inodes are limited too, to one per 16 KiB of the limit and 1024 at least. Counted is the workspace, with the agent's
files in it. What the keeper writes beside it has its own bounds (`journal`), and /tmp of a sandbox is memory.
"""

from __future__ import annotations

import contextlib
import os
import zlib
from dataclasses import replace
from pathlib import Path

from ashd import log
from ashd.runner import quota
from ashd.runner.disk_watch import DiskWatch, Watched, writing_is_stopped
from ashd.runner.quota import Kind, Usage

_log = log.get(__name__)

_MIB = 1024 * 1024
_BYTES_PER_INODE = 16 * 1024
_LEAST_INODES = 1024
_PROJECTS = 1 << 16
_LIMIT_FILE = "disk-limit"


def allowance(most_bytes: int) -> Usage:
    """The limit of a sandbox that may take so many bytes."""
    return Usage(most_bytes, max(_LEAST_INODES, most_bytes // _BYTES_PER_INODE))


def shortage(folder: Path, headroom: int) -> str:
    """What the filesystem of `folder` lacks where it has less than `headroom` bytes left; else nothing."""
    found = os.statvfs(folder)
    left = found.f_bavail * found.f_frsize
    if left >= headroom:
        return ""
    return f"the disk of state_dir has {left // _MIB} MiB left, disk_headroom asks for {headroom // _MIB} MiB"


class Disk:
    """The limits of all sandboxes below one folder, `<folder>/<sandbox>/workspace`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # Another runner on the same filesystem has another range, or finds its ids in use and passes them by.
        self._first_project = (1 << 30) + (zlib.crc32(bytes(folder)) % (1 << 13)) * _PROJECTS
        self._projects: dict[Path, int] = {}
        self._next = 0
        self._kind: Kind | None = None
        self._root = -1
        self.watch = DiskWatch(folder)

    def open(self, *, own_uids: bool) -> None:
        """Finds out what the filesystem gives. `own_uids`: whether each sandbox has a user id of its own."""
        kinds = [Kind.USER, Kind.PROJECT] if own_uids else [Kind.PROJECT]
        if os.geteuid() == 0:
            self._kind = next((kind for kind in kinds if quota.works(self._folder, kind)), None)
        if self._kind is not None:
            self._root = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    @property
    def enforced(self) -> str:
        return "disk-watch" if self._kind is None else "disk-quota"

    def close(self) -> None:
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    # ------------------------------------------------------------ one sandbox

    def limit(self, sandbox: Watched, most_bytes: int) -> None:
        """Limits a sandbox, whose workspace is made and empty, or limits it anew. Raises OSError."""
        most = allowance(most_bytes)
        if self._kind is not None:
            handle = os.open(sandbox.workspace, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                quota.set_limits(self._root, self._kind, self._id_of(sandbox, handle), most)
            finally:
                os.close(handle)
        elif (known := self.watch.get(sandbox.workspace)) is not None:
            known.most = most
            _remember(sandbox.workspace, most_bytes)
        else:
            self.watch.watch(replace(sandbox, most=most))
            _remember(sandbox.workspace, most_bytes)

    def adopt(self, sandbox: Watched) -> None:
        """Takes over a live sandbox of an earlier supervisor: its quota is as it was, its limit if watched noted."""
        with contextlib.suppress(OSError):
            if self._kind is Kind.PROJECT:
                self._projects[sandbox.workspace] = quota.project_of(sandbox.workspace)
            elif self._kind is None:
                most, is_stopped = _remembered(sandbox), writing_is_stopped(sandbox)
                self.watch.watch(replace(sandbox, most=most, is_stopped=is_stopped, looked_at=float("-inf")))

    def forget(self, workspace: Path, uid: int | None) -> None:
        """Gives back the limit and the id of a sandbox whose folder is gone."""
        self.watch.forget(workspace)
        owner = self._projects.pop(workspace, 0) if self._kind is Kind.PROJECT else uid
        if self._kind is not None and owner:
            with contextlib.suppress(OSError):
                quota.set_limits(self._root, self._kind, owner, Usage(0, 0))

    def usage_of(self, workspace: Path, uid: int | None) -> int:
        """Bytes a sandbox takes: by its quota, or when it was last looked at. Costs next to nothing."""
        if self._kind is None:
            known = self.watch.get(workspace)
            return known.used.bytes if known is not None else 0
        owner = self._projects.get(workspace, 0) if self._kind is Kind.PROJECT else uid
        if not owner:
            return 0
        try:
            return quota.usage(self._root, self._kind, owner).bytes
        except OSError:
            return 0

    # ------------------------------------------------------------ ids

    def _id_of(self, sandbox: Watched, workspace: int) -> int:
        if self._kind is Kind.USER:
            assert sandbox.uid is not None
            return sandbox.uid
        if sandbox.workspace not in self._projects:
            project = self._free_project()
            quota.set_project(workspace, project)
            self._projects[sandbox.workspace] = project
        return self._projects[sandbox.workspace]

    def _free_project(self) -> int:
        """The id longest unused that nothing on this filesystem belongs to. Raises OSError where there is none."""
        taken = set(self._projects.values())
        for _ in range(_PROJECTS):
            self._next = self._next % (_PROJECTS - 1) + 1
            project = self._first_project + self._next
            if project not in taken and quota.usage(self._root, Kind.PROJECT, project) == Usage(0, 0):
                return project
        raise OSError(f"all {_PROJECTS} project ids of {self._folder} are in use")


def _remember(workspace: Path, most_bytes: int) -> None:
    """Beside the workspace, for the next supervisor; a session's own limit is known to nobody else."""
    (workspace.parent / _LIMIT_FILE).write_text(str(most_bytes))


def _remembered(sandbox: Watched) -> Usage:
    try:
        return allowance(int((sandbox.workspace.parent / _LIMIT_FILE).read_text()))
    except (OSError, ValueError):
        return sandbox.most
