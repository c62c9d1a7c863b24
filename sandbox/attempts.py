"""What the self-test tries from inside a jail: each attempt raises OSError where it is denied.

Covers: the attempts, the level that has to deny each, and what a host needs that doesn't. Leaves out: the jail they
are made in (selftest.py).

They are harmless where they succeed: they name nothing that exists, or change something to what it is.

Sources: those of jail.py, and docker-run(1) for what containers forbid.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox import root, syscalls
from sandbox.jail import STANDARD, STRICT

DENIALS = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT, errno.ESRCH, errno.EROFS, errno.ECONNREFUSED}
    | {errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}
)
SHARED_MEMORY_KEY = 0x61736864

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bait:
    """What a sandbox must not reach: things of its host, real ones."""

    file: str
    pid: int
    abstract: str
    port: int
    shared_memory: bool


def _call(x86_64: int, aarch64: int, *arguments: int) -> None:
    """A system call with arguments that mean nothing. Denied when it is refused before anybody looks at them."""
    number = x86_64 if syscalls.ARCHITECTURE == "x86_64" else aarch64
    ctypes.set_errno(0)
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments)) < 0:
        failure = ctypes.get_errno()
        if failure in DENIALS:
            raise OSError(failure, os.strerror(failure))


def _read_a_file_of_the_host(bait: Bait) -> None:
    os.close(os.open(bait.file, os.O_RDONLY))


def _write_to_the_system(_: Bait) -> None:
    os.close(os.open("/usr/.ashd-self-test", os.O_WRONLY | os.O_CREAT))
    os.unlink("/usr/.ashd-self-test")


def _see_processes(bait: Bait) -> None:
    os.stat(f"/proc/{bait.pid}")


def _signal_a_process(bait: Bait) -> None:
    os.kill(bait.pid, 0)


def _trace_a_process(bait: Bait) -> None:
    _call(101, 117, 16, bait.pid, 0, 0)  # PTRACE_ATTACH


def _share_memory(bait: Bait) -> None:
    if not bait.shared_memory:
        raise OSError(errno.ENOSYS, "this kernel has no System V shared memory")
    if _libc.shmget(SHARED_MEMORY_KEY, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "shmget")


def _reach_the_network(bait: Bait) -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", bait.port))


def _reach_an_abstract_socket(bait: Bait) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(bait.abstract)


def _hold_a_capability(_: Bait) -> None:
    lines = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(lines[name], 16)]
    if not held and lines["NoNewPrivs"].strip() == "1":
        raise OSError(errno.EPERM, "none, and none to be had")


def _make_a_user_namespace(_: Bait) -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER)


def _mount(_: Bait) -> None:
    syscalls.mount("tmpfs", root.SCRATCH, "tmpfs", 0)


def _change_root(_: Bait) -> None:
    os.chroot("/")


def _make_a_device(_: Bait) -> None:
    os.mknod("device", 0o020600, os.makedev(1, 1))


def _become_root(_: Bait) -> None:
    try:
        os.setuid(0)
    except OSError as error:  # EINVAL: this user namespace has no such user
        raise OSError(errno.EPERM, "setuid") from error


def _set_the_clock(_: Bait) -> None:
    _call(227, 112, 0, 0)


def _load_a_module(_: Bait) -> None:
    _call(175, 105, 0, 0, 0)


def _restart_the_machine(_: Bait) -> None:
    _call(169, 142, 0, 0, 0, 0)  # without the magic numbers: EINVAL if it were allowed


def _use_keys(_: Bait) -> None:
    _call(250, 219, 0, 0, 0)


def _use_bpf(_: Bait) -> None:
    _call(321, 280, 0, 0, 0)


def _use_perf(_: Bait) -> None:
    _call(298, 241, 0, 0, -1, -1, 0)


def _use_userfaultfd(_: Bait) -> None:
    _call(323, 282, -1)


def _use_io_uring(_: Bait) -> None:
    _call(425, 425, 0, 0)


def _open_a_raw_socket(_: Bait) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def _lower_its_oom_score(_: Bait) -> None:
    Path("/proc/self/oom_score_adj").write_text("-1000")


CONTAINER = "in a container: give it CAP_SYS_ADMIN and an unconfined seccomp profile, or a virtual machine of its own"
NO_SUCH_USER = "set uid_range to ids that exist in this user namespace (/proc/self/uid_map)"
_FILTER = "a kernel with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64"
_APART = "run the runner as root, so that each sandbox gets a user id of its own, or on a kernel with Landlock (5.13)"
ATTEMPTS: tuple[tuple[Callable[[Bait], None], str, str], ...] = (
    (_read_a_file_of_the_host, STANDARD, _APART),
    (_signal_a_process, STANDARD, f"{_APART.removesuffix('(5.13)')}(6.12)"),
    (_trace_a_process, STANDARD, _FILTER),
    (_reach_the_network, STANDARD, _FILTER),
    (_hold_a_capability, STANDARD, "run the runner as root or as an ordinary user, not as something in between"),
    (_make_a_user_namespace, STANDARD, _FILTER),
    (_mount, STANDARD, _FILTER),
    (_change_root, STANDARD, _FILTER),
    (_make_a_device, STANDARD, _APART),
    (_become_root, STANDARD, _APART),
    (_set_the_clock, STANDARD, _FILTER),
    (_load_a_module, STANDARD, _FILTER),
    (_restart_the_machine, STANDARD, _FILTER),
    (_use_keys, STANDARD, _FILTER),
    (_use_bpf, STANDARD, _FILTER),
    (_use_perf, STANDARD, _FILTER),
    (_use_userfaultfd, STANDARD, _FILTER),
    (_use_io_uring, STANDARD, _FILTER),
    (_open_a_raw_socket, STANDARD, _FILTER),
    (_lower_its_oom_score, STANDARD, _APART),
    (_write_to_the_system, STRICT, CONTAINER),
    (_see_processes, STRICT, CONTAINER),
    (_share_memory, STRICT, CONTAINER),
    (_reach_an_abstract_socket, STRICT, CONTAINER),
)
