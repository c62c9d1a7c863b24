"""Which system calls code in a sandbox may make.

Covers: the list of what is refused and why, and the filter made of it. Leaves out: when it is loaded (jail.py: last).

Agents and their tools (compilers, git, interpreters, browsers, package managers) need most of Linux, so the list names
what they do not need and what widens a hole in the kernel; what is newer than this list is refused as well. A refused
call fails with EPERM; one that programs try and can do without (io_uring, clone3, newer ones) with ENOSYS, so that they
fall back. Calls of another architecture (32 bit, x32) are unknown here.

Sources: seccomp(2), Documentation/userspace-api/seccomp_filter.rst, <linux/audit.h>, syscalls(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import struct

from sandbox.syscalls import ARCHITECTURE, call

_REFUSED: dict[str, tuple[int, int]] = {
    # the view of the file system: numbers on x86_64 and aarch64, -1 where there is none
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    # other namespaces
    "setns": (308, 268),
    # other processes
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "process_madvise": (440, 440),
    "kcmp": (312, 272),
    "pidfd_getfd": (438, 438),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    # the kernel itself
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "syslog": (103, 116),
    "lookup_dcookie": (212, 18),
    "iopl": (172, -1),
    "ioperm": (173, -1),
    "modify_ldt": (154, -1),
    "memfd_secret": (447, 447),
    # keys, which a user's processes share whatever their namespace
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    # the machine's settings
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "acct": (163, 89),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "quotactl": (179, 60),
    "quotactl_fd": (443, 443),
    "vhangup": (153, 58),
    "fanotify_init": (300, 262),
}
_ABSENT: dict[str, tuple[int, int]] = {
    "clone3": (435, 435),  # its flags lie in memory, where a filter can't look; libraries fall back to clone
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
}
_NEWEST = 466
"""Calls numbered above were not there when the list was made."""

_CLONE = (56, 220)
_UNSHARE = (272, 97)
_IOCTL = (16, 29)
_SOCKET = (41, 198)
_PERSONALITY = (135, 92)

_NEW_NAMESPACES = 0x7E020000
_NEW_TIME_NAMESPACE = 0x80
_REFUSED_IOCTLS = (0x5412, 0x541C)  # TIOCSTI and TIOCLINUX: typing into somebody's terminal
_PERSONALITIES = (0x0, 0x8, 0x20000, 0x20008, 0xFFFFFFFF)  # Linux, 32 bit Linux, their uname26, and asking

_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_NETLINK_ROUTE = 0

_LD_WORD, _JEQ, _JGT, _JSET, _RET = 0x20, 0x15, 0x25, 0x45, 0x06
_NR, _ARCH, _ARGUMENT = 0, 4, 16  # offsets in struct seccomp_data; an argument's low half on little endian
_AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_ALLOW = 0x7FFF0000
_ERRNO = 0x00050000
_SET_MODE_FILTER = 1
_TSYNC = 1


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


def _returns(action: int) -> bytes:
    return _instruction(_RET, action)


def _fails(number: int) -> bytes:
    return _returns(_ERRNO | number)


def _when(number: int, then: bytes) -> bytes:
    """`then`, which must end in a return, for one system call."""
    return _instruction(_JEQ, number, 0, len(then) // 8) + then


def _argument(index: int) -> bytes:
    return _instruction(_LD_WORD, _ARGUMENT + 8 * index)


def _only(values: tuple[int, ...], otherwise: int) -> bytes:
    """Allows what was loaded if it is one of `values`, else fails."""
    return b"".join(_instruction(_JEQ, value, 0, 1) + _returns(_ALLOW) for value in values) + _fails(otherwise)


def _none_of(values: tuple[int, ...]) -> bytes:
    refused = b"".join(_instruction(_JEQ, value, 0, 1) + _fails(errno.EPERM) for value in values)
    return refused + _returns(_ALLOW)


def _without_flags(mask: int) -> bytes:
    return _instruction(_JSET, mask, 0, 1) + _fails(errno.EPERM) + _returns(_ALLOW)


def _families(*, internet: bool) -> bytes:
    """Sockets of this host's own kind, the internet's, and asking the kernel for addresses and routes."""
    allowed = (_AF_UNIX, _AF_INET, _AF_INET6) if internet else (_AF_UNIX,)
    routes_only = _argument(2) + _only((_NETLINK_ROUTE,), errno.EPROTONOSUPPORT)
    return _argument(0) + _when(_AF_NETLINK, routes_only) + _only(allowed, errno.EAFNOSUPPORT)


@functools.cache
def program(architecture: str = ARCHITECTURE, *, internet: bool = True) -> bytes:
    """The filter, as an array of struct sock_filter. Raises OSError on an architecture it does not know.

    PERF: what looks at arguments comes first; of all other calls the kernel remembers the answer by number.
    """
    if architecture not in _AUDIT_ARCH:
        raise OSError(errno.ENOSYS, f"there is no system call filter for {architecture}")
    column = list(_AUDIT_ARCH).index(architecture)
    code = _instruction(_LD_WORD, _ARCH) + _instruction(_JEQ, _AUDIT_ARCH[architecture], 1, 0) + _fails(errno.ENOSYS)
    code += _instruction(_LD_WORD, _NR) + _instruction(_JGT, _NEWEST, 0, 1) + _fails(errno.ENOSYS)
    code += _when(_CLONE[column], _argument(0) + _without_flags(_NEW_NAMESPACES))
    code += _when(_UNSHARE[column], _argument(0) + _without_flags(_NEW_NAMESPACES | _NEW_TIME_NAMESPACE))
    code += _when(_IOCTL[column], _argument(1) + _none_of(_REFUSED_IOCTLS))
    code += _when(_SOCKET[column], _families(internet=internet))
    code += _when(_PERSONALITY[column], _argument(0) + _only(_PERSONALITIES, errno.EPERM))
    for calls, failure in ((_ABSENT, errno.ENOSYS), (_REFUSED, errno.EPERM)):
        for numbers in calls.values():
            number = numbers[column]
            if number >= 0:
                code += _when(number, _fails(failure))
    return code + _returns(_ALLOW)


def load(code: bytes) -> None:
    """Puts a filter on this process and what it starts, for good. Needs no_new_privs. Raises OSError."""
    instructions = ctypes.create_string_buffer(code, len(code))
    fprog = struct.pack("=HxxxxxxQ", len(code) // 8, ctypes.addressof(instructions))  # struct sock_fprog, 64 bit
    call("seccomp", _SET_MODE_FILTER, _TSYNC, fprog)
