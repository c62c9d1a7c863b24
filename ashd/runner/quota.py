"""Hard limits of space and inodes, held by the filesystem: quotas of a user id or of a project (ext4, XFS).

Covers: whether a filesystem enforces quotas, limits and use of one id, making a folder a project's.
Leaves out: which sandbox gets which id (disk.py), and what is done where there are no quotas (disk_watch.py).

A user id's quota can't be shaken off: files stay their owner's. A project's can by whoever owns the files, with
FS_IOC_FSSETXATTR, FS_IOC_SETFLAGS or file_setattr(2); it holds only as long as the jail's seccomp filter denies these.
A user over its quota reads EDQUOT ("Disk quota exceeded") from the kernel, a project ENOSPC on XFS and EDQUOT on ext4.

Sources: quotactl(2); linux/quota.h, linux/dqblk_xfs.h, linux/fs.h (struct fsxattr), and fs/quota/quota.c, which is
where "any of Linux' quota formats answers to the generic commands" is true since 2.6.36. Needs Linux 5.14
(quotactl_fd: no device node, so it works in containers), CAP_SYS_ADMIN, and ext4 mounted with usrquota or prjquota
(XFS: uquota or pquota). Numbers and layouts are those of x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import struct
import tempfile
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

_SYS_QUOTACTL_FD = 443  # the same on all architectures
_Q_GETQUOTA, _Q_SETQUOTA, _Q_XGETQSTAT = 0x800007, 0x800008, 0x5805
_FS_IOC_FSGETXATTR, _FS_IOC_FSSETXATTR = 0x801C581F, 0x401C5820
_FS_XFLAG_PROJINHERIT = 0x200
_LIMITS_ONLY = 5  # QIF_LIMITS: which fields of an if_dqblk are meant

_DQBLK = struct.Struct("<8QI4x")
"""struct if_dqblk: hard and soft limit of blocks (KiB), bytes used, hard and soft limit of inodes, inodes used, two
grace times, valid fields.
"""
_FSXATTR = struct.Struct("<5I8x")
"""struct fsxattr: flags, extent size, extents, project id, CoW extent size."""
_QSTAT = struct.Struct("<bxHbxxx")
"""The beginning of struct fs_quota_stat: version, flags, padding."""

_libc = ctypes.CDLL(None, use_errno=True)


class Kind(IntEnum):
    """Whose quota it is (USRQUOTA, PRJQUOTA)."""

    USER = 0
    PROJECT = 2


_ENFORCED = {Kind.USER: 1 << 1, Kind.PROJECT: 1 << 5}  # FS_QUOTA_UDQ_ENFD, FS_QUOTA_PDQ_ENFD


@dataclass(frozen=True)
class Usage:
    """Space and inodes: used by somebody, or the most they may use."""

    bytes: int
    inodes: int

    def exceeds(self, most: Usage, share: float = 1.0) -> bool:
        return self.bytes > most.bytes * share or self.inodes > most.inodes * share


def works(folder: Path, kind: Kind) -> bool:
    """Whether the filesystem of `folder` enforces quotas of this kind: a limit is set on a trial folder of an id that
    nobody else has, read back, and taken away.
    """
    of = (1 << 31) - 2 - os.getpid() % (1 << 20)  # of no sandbox: a living one would lose its limit
    trial = Path(tempfile.mkdtemp(prefix=".quota-trial-", dir=folder))
    handle = os.open(trial, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    most = Usage(1 << 20, 16)
    try:
        if kind is Kind.PROJECT:
            set_project(handle, of)
        else:
            os.chown(handle, of, -1)
        set_limits(handle, kind, of, most)
        try:
            limits, used = _get(handle, kind, of)
            return limits == most and used.inodes >= 1 and _is_enforced(handle, kind)
        finally:
            set_limits(handle, kind, of, Usage(0, 0))
    except OSError:
        return False
    finally:
        os.close(handle)
        trial.rmdir()


def set_limits(handle: int, kind: Kind, of: int, most: Usage) -> None:
    """Limits an id on the filesystem of an open file; 0 = no limit. Raises OSError."""
    blocks = -(-most.bytes // 1024)
    _quotactl(handle, _Q_SETQUOTA, kind, of, _DQBLK.pack(blocks, 0, 0, most.inodes, 0, 0, 0, 0, _LIMITS_ONLY))


def usage(handle: int, kind: Kind, of: int) -> Usage:
    """What an id uses on the filesystem of an open file, kept by the kernel. Raises OSError."""
    try:
        return _get(handle, kind, of)[1]
    except FileNotFoundError:  # XFS has never heard of it
        return Usage(0, 0)


def set_project(handle: int, project: int) -> None:
    """Makes an open, empty folder and all that will be made in it the project's. Raises OSError."""
    flags, extent, extents, _, cow = _FSXATTR.unpack(fcntl.ioctl(handle, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))
    wanted = _FSXATTR.pack(flags | _FS_XFLAG_PROJINHERIT, extent, extents, project, cow)
    fcntl.ioctl(handle, _FS_IOC_FSSETXATTR, wanted)


def project_of(folder: Path) -> int:
    """The project a folder belongs to; 0 = none. Raises OSError."""
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        project: int = _FSXATTR.unpack(fcntl.ioctl(handle, _FS_IOC_FSGETXATTR, bytes(_FSXATTR.size)))[3]
        return project
    finally:
        os.close(handle)


def _get(handle: int, kind: Kind, of: int) -> tuple[Usage, Usage]:
    fields = _DQBLK.unpack(_quotactl(handle, _Q_GETQUOTA, kind, of, bytes(_DQBLK.size)))
    return Usage(fields[0] * 1024, fields[3]), Usage(fields[2], fields[5])


def _is_enforced(handle: int, kind: Kind) -> bool:
    """ext4 may count without enforcing (feature `quota`, mounted without prjquota); limits can be set then, too."""
    flags = _QSTAT.unpack_from(_quotactl(handle, _Q_XGETQSTAT, kind, 0, bytes(256)))[1]
    return bool(flags & _ENFORCED[kind])


def _quotactl(handle: int, command: int, kind: Kind, of: int, content: bytes) -> bytes:
    """quotactl_fd(2); `content` is what the kernel reads, the answer what it leaves there."""
    area = ctypes.create_string_buffer(content, len(content))
    if _libc.syscall(_SYS_QUOTACTL_FD, handle, command << 8 | kind, of, area) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return area.raw
