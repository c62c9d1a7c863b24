"""The system calls Python has no function for.

Covers: thin wrappers that raise OSError, and numbers on the architectures sandboxes run on. Leaves out: deciding
anything (jail.py, root.py, landlock.py, seccomp.py).

Sources: syscalls(2), unshare(2), mount(2), pivot_root(2), mount_setattr(2), prctl(2), capset(2); numbers from
<asm/unistd_64.h> (x86_64) and <asm-generic/unistd.h> (aarch64).
"""

from __future__ import annotations

import ctypes
import os
import struct

ARCHITECTURE = os.uname().machine
_COLUMN = {"x86_64": 0, "aarch64": 1}.get(ARCHITECTURE)

_NUMBERS = {
    "pivot_root": (155, 41),
    "capset": (126, 91),
    "seccomp": (317, 277),
    "mount_setattr": (442, 442),
    "landlock_create_ruleset": (444, 444),
    "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446),
}

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MS_SLAVE = 1 << 19
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_CAPBSET_READ = 23
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_AT_FDCWD = -100
_AT_RECURSIVE = 0x8000
_MOUNT_ATTR_RDONLY = 1
_MOUNT_ATTR_NOSUID = 2
_MOUNT_ATTR_NODEV = 4
_LINUX_CAPABILITY_VERSION_3 = 0x20080522

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def number_of(name: str) -> int:
    """The number of a system call here. Raises OSError on an architecture this file does not know."""
    if _COLUMN is None:
        raise OSError(f"system call numbers of {ARCHITECTURE} are not known; x86_64 and aarch64 are")
    return _NUMBERS[name][_COLUMN]


def call(name: str, *arguments: int | bytes | ctypes.Array[ctypes.c_char] | None) -> int:
    """A system call by name; its result. Raises OSError."""
    plain = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return _checked(_libc.syscall(ctypes.c_long(number_of(name)), *plain), name)


def unshare(flags: int) -> None:
    """unshare(2). os.unshare exists from Python 3.12 on only."""
    _checked(_libc.unshare(flags), "unshare")


def prctl(option: int, second: int, third: int = 0, what: str = "prctl") -> None:
    _checked(_libc.prctl(option, ctypes.c_ulong(second), ctypes.c_ulong(third), 0, 0), what)


def mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    """mount(2)."""
    _checked(
        _libc.mount(source.encode(), os.fsencode(target), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount of {source} on {target}",
    )


def bind(source: str, target: str) -> None:
    """Makes `source`, a folder with all that is mounted in it or a file, appear at `target` as well."""
    mount(source, target, "", MS_BIND | MS_REC)


def seal(target: str) -> None:
    """Makes a mount and all below it read-only, without set-user-id programs and device files."""
    attributes = _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV
    attr = struct.pack("=QQQQ", attributes, 0, 0, 0)  # struct mount_attr: set, clear, propagation, user namespace
    call("mount_setattr", _AT_FDCWD, os.fsencode(target), _AT_RECURSIVE, attr, len(attr))


def detach(target: str) -> None:
    """umount2(2): gone from here at once, from the kernel when nobody uses it any more."""
    _checked(_libc.umount2(os.fsencode(target), MNT_DETACH), f"umount of {target}")


def pivot_root_here() -> None:
    """Makes the current folder, a mount of its own, the root; the old root is gone. (pivot_root(2): `.` twice.)"""
    call("pivot_root", b".", b".")
    detach(".")
    os.chdir("/")


def drop_bounding_set() -> None:
    """No capability can come back by executing a file. Needs CAP_SETPCAP, unless it is empty already."""
    with open("/proc/sys/kernel/cap_last_cap", encoding="ascii") as file:
        last = int(file.read())
    for capability in range(last + 1):
        if _libc.prctl(PR_CAPBSET_READ, ctypes.c_ulong(capability), 0, 0, 0) == 1:
            prctl(PR_CAPBSET_DROP, capability, what="prctl(PR_CAPBSET_DROP)")


def clear_capabilities() -> None:
    """This process has none, in no set."""
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL, what="prctl(PR_CAP_AMBIENT)")
    call("capset", struct.pack("=Ii", _LINUX_CAPABILITY_VERSION_3, 0), bytes(24))


def become_subreaper() -> None:
    """Orphans among our descendants become our children, so that none escapes the end of its sandbox."""
    prctl(PR_SET_CHILD_SUBREAPER, 1, what="prctl(PR_SET_CHILD_SUBREAPER)")
