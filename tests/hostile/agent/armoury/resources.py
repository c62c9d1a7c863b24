"""Attacks that eat: memory by every road, processes, threads, descriptors, disk, inodes, time.

Each one stops by itself at a bound well above the sandbox's limits (tests/hostile/scene.py), and says so.

Sources: cgroups(7), getrlimit(2), tmpfs(5), memfd_create(2), sysvipc(7), unix(7).
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from .weapons import Facts, call, deadly, in_the_agent, libc, needs, refused_with, syscall

MIB = 1024 * 1024
FAR_TOO_MUCH = 3
"""Times its limit."""

# ---------------------------------------------------------------- memory


@deadly
@needs("cgroup-memory", "rlimits")
def hoard_memory_in_small_steps(facts: Facts) -> str:
    most, hoard = FAR_TOO_MUCH * facts.limits.memory, []
    for number in range(most // MIB):
        hoard += [bytearray([number % 256]) * MIB]
    return f"holds {len(hoard)} MiB"


@deadly
@in_the_agent
def hoard_memory_in_the_agent_itself(facts: Facts) -> str:
    return hoard_memory_in_small_steps(facts)


@deadly
@refused_with(errno.ENOMEM)
def hoard_memory_in_one_huge_step(facts: Facts) -> str:
    return _fill(facts, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


@deadly
@needs("cgroup-memory")
@refused_with(errno.ENOMEM)
def hoard_memory_that_is_shared(facts: Facts) -> str:
    return _fill(facts, mmap.MAP_SHARED | mmap.MAP_ANONYMOUS)


def _fill(facts: Facts, flags: int) -> str:
    """Asks for far more than it touches."""
    most = FAR_TOO_MUCH * facts.limits.memory
    with mmap.mmap(-1, 8 * most, flags=flags) as region:
        for at in range(0, most, mmap.PAGESIZE):
            region[at] = 1
    return f"holds {most // MIB} MiB"


@deadly
@needs("cgroup-memory")
def hoard_memory_in_many_processes(facts: Facts) -> str:
    """Each of them below the limit."""
    children, share = 12, facts.limits.memory // 4
    reports, report = os.pipe()
    for _ in range(children):
        if os.fork() == 0:
            hoard = bytearray(b"x") * share
            os.write(report, b"." if hoard else b"")
            time.sleep(10)
            os._exit(0)
    return _all_report(reports, children, f"{children} processes hold {share // MIB} MiB each")


def _all_report(reports: int, children: int, gained: str) -> str:
    """What is gained when all of them say so in time and are all alive together."""
    os.set_blocking(reports, False)
    heard, deadline = 0, time.monotonic() + 8
    while heard < children and time.monotonic() < deadline:
        with contextlib.suppress(BlockingIOError):
            heard += len(os.read(reports, 64))
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(-1, os.WNOHANG)[0]:
                return ""  # one had to go
        time.sleep(0.02)
    return gained if heard == children else ""


@deadly
def fill_temporary_folders(facts: Facts) -> str:
    """tmpfs is memory: /tmp, /var/tmp and /dev/shm one after the other, then all together."""
    written, most = 0, FAR_TOO_MUCH * facts.limits.memory
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        with contextlib.suppress(OSError), open(f"{folder}/fill-{os.getpid()}", "wb") as file:
            while written < most:
                file.write(b"x" * MIB)
                file.flush()
                written += MIB
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        with contextlib.suppress(OSError):
            os.unlink(f"{folder}/fill-{os.getpid()}")
    return f"wrote {written // MIB} MiB" if written >= most else ""


@deadly
@needs("cgroup-memory")
@refused_with(errno.ENOMEM, errno.EFBIG)
def hoard_memory_in_memfds(facts: Facts) -> str:
    most = FAR_TOO_MUCH * facts.limits.memory
    files = [os.memfd_create("hoard") for _ in range(8)]
    written = 0
    while written < most:
        written += os.write(files[written // MIB % 8], b"x" * MIB)
    return f"holds {written // MIB} MiB"


@deadly
@needs("cgroup-memory")
@refused_with(errno.ENOMEM, errno.ENOSPC)
def hoard_memory_in_system_v_segments(facts: Facts) -> str:
    libc.shmat.restype = ctypes.c_void_p
    most, held, numbers = FAR_TOO_MUCH * facts.limits.memory, 0, []
    try:
        while held < most:
            numbers.append(call("shmget", 0, 8 * MIB, 0o1600))
            ctypes.memset(libc.shmat(numbers[-1], None, 0), 1, 8 * MIB)
            held += 8 * MIB
    finally:
        for number in numbers:
            call("shmctl", number, 0, None)
    return f"holds {held // MIB} MiB"


@deadly
@needs("cgroup-memory")
def hoard_memory_in_pipes_and_sockets(facts: Facts) -> str:
    """Memory of the kernel's, as much as its descriptors carry."""
    held, most = 0, FAR_TOO_MUCH * facts.limits.memory
    kept = []
    with contextlib.suppress(OSError):
        while held < most:
            ends = os.pipe()
            kept.append(ends)
            with contextlib.suppress(OSError):
                fcntl.fcntl(ends[1], fcntl.F_SETPIPE_SZ, MIB)
            os.set_blocking(ends[1], False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    held += os.write(ends[1], b"x" * 65536)
    return f"holds {held // MIB} MiB" if held >= most else ""


@refused_with(errno.ENOMEM, errno.EAGAIN)
def lock_memory(facts: Facts) -> str:
    most = FAR_TOO_MUCH * facts.limits.memory
    libc.mmap.restype = ctypes.c_void_p
    at = libc.mmap(None, ctypes.c_size_t(most), 0, 0x22, -1, 0)  # nothing may touch it, so nothing is there yet
    call("mlock", ctypes.c_void_p(at), ctypes.c_size_t(most))
    return "locked"


@deadly
def recurse_without_end(facts: Facts) -> str:
    """A stack that wants to grow: lists in lists, compared by code in C."""
    resource.setrlimit(resource.RLIMIT_STACK, (resource.getrlimit(resource.RLIMIT_STACK)[1],) * 2)
    sys.setrecursionlimit(10**9)
    left: list[object] = []
    right: list[object] = []
    for _ in range(10**6):
        left, right = [left], [right]
    try:
        os._exit(left == right)  # not to be freed one by one, if it should ever get here
    except (RecursionError, MemoryError):
        os._exit(2)


# ---------------------------------------------------------------- processes, threads, descriptors


def _multiply(start: Callable[[], object], most: int) -> int:
    count = 0
    with contextlib.suppress(OSError, RuntimeError, MemoryError):
        while count < most:
            start()
            count += 1
    return count


def _fork_and_wait() -> None:
    if os.fork() == 0:
        time.sleep(20)
        os._exit(0)


def _spawn_a_sleeper() -> None:
    os.posix_spawn("/bin/sleep", ["sleep", "20"], os.environ)


@deadly
@needs("cgroup-pids")
def fork_many(facts: Facts) -> str:
    most = FAR_TOO_MUCH * facts.limits.processes
    count = _multiply(_fork_and_wait, most)
    return f"has {count} children" if count >= facts.limits.processes else ""


@deadly
@needs("cgroup-pids")
def fork_and_exec_many(facts: Facts) -> str:
    most = FAR_TOO_MUCH * facts.limits.processes
    count = _multiply(_spawn_a_sleeper, most)
    return f"has {count} children" if count >= facts.limits.processes else ""


@deadly
@needs("cgroup-pids")
def start_many_threads(facts: Facts) -> str:
    most = FAR_TOO_MUCH * facts.limits.processes
    threading.stack_size(256 * 1024)
    count = _multiply(lambda: threading.Thread(target=time.sleep, args=(2,), daemon=True).start(), most)
    return f"has {count} threads" if count >= facts.limits.processes else ""


@deadly
@needs("cgroup-pids")
def fork_like_a_bomb(facts: Facts) -> str:
    """Every child forks on, for a second; a counter in shared memory bounds them all together."""
    most = FAR_TOO_MUCH * facts.limits.processes
    count = mmap.mmap(-1, mmap.PAGESIZE)
    born = ctypes.c_long.from_buffer(count)
    deadline = time.monotonic() + 1
    root = os.getpid()
    while time.monotonic() < deadline and born.value < most:
        try:
            if os.fork() == 0:
                born.value += 1
        except BlockingIOError:
            time.sleep(0.05)
    if os.getpid() != root:
        time.sleep(5)
        os._exit(0)
    return f"{born.value} processes" if born.value >= most else ""


@deadly
@needs("cgroup-pids")
def fork_like_a_bomb_of_the_shell(facts: Facts) -> str:
    """:(){ :|:& };: with its depth bounded."""
    script = "f() { [ $1 -gt 0 ] && { f $(($1-1)) & f $(($1-1)) & }; sleep 3; }; f 8"
    child = os.posix_spawn("/bin/sh", ["sh", "-c", script], os.environ)
    time.sleep(1)
    pids = [name for name in os.listdir("/proc") if name.isdigit()]
    os.kill(child, signal.SIGKILL)
    return f"{len(pids)} processes" if len(pids) > facts.limits.processes + 1 else ""


@deadly
@in_the_agent
@needs("cgroup-pids")
def fork_in_the_agent_itself(facts: Facts) -> str:
    """Its children stay when the attack is over; the next turn has to work, or the session to end."""
    return fork_many(facts)


def open_many_files(facts: Facts) -> str:
    kept, most = [], 10 * facts.limits.open_files
    try:
        while len(kept) < most:
            kept.append(os.open("/dev/null", os.O_RDONLY))
    except OSError as error:
        if error.errno != errno.EMFILE:
            raise
    finally:
        for number in kept:
            os.close(number)
    return f"opened {len(kept)}" if len(kept) > facts.limits.open_files else ""


def hide_descriptors_in_flight(facts: Facts) -> str:
    """A socket's queue holds descriptors that no process has; unix(7) bounds them by user."""
    most, sent = 10 * facts.limits.open_files, 0
    pairs = []
    try:
        while sent < most:
            pairs.append(socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
            sender = pairs[-1][0]
            sender.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while sent < most:
                    socket.send_fds(sender, [b"x"], [0] * 100)
                    sent += 100
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ETOOMANYREFS, errno.ENOBUFS):
            raise
    finally:
        for pair in pairs:
            pair[0].close()
            pair[1].close()
    return f"{sent} in flight" if sent >= most else ""


def make_many_timers(facts: Facts) -> str:
    """Each is memory of the kernel's; RLIMIT_SIGPENDING bounds them."""
    number = ctypes.c_int()
    made = 0
    with contextlib.suppress(OSError):
        while made < 200_000:
            syscall("timer_create", 0, None, ctypes.byref(number))
            made += 1
    return f"made {made}" if made == 200_000 else ""


# ---------------------------------------------------------------- disk


def _go_on_for(seconds: float, step: Callable[[int], object]) -> int:
    """Steps for so long, at a measured pace, whoever tries to stop it; how many of the last second's worked."""
    began, number, late = time.monotonic(), 0, 0
    while (elapsed := time.monotonic() - began) < seconds:
        try:
            step(number)
            late += elapsed > seconds - 1
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS, errno.EPERM):
                raise
            return 0
        number += 1
        time.sleep(0.05)
    return late


@deadly
def fill_the_disk(facts: Facts) -> str:
    """Five times its limit within four seconds, in files of a size that is allowed; nobody stops it?"""
    piece = b"x" * (facts.limits.disk // 16)

    def write(number: int) -> None:
        Path(f"fill-{number}").write_bytes(piece)

    late = _go_on_for(4, write)
    return f"still wrote {late} pieces in the fourth second" if late else ""


@deadly
def fill_the_disk_with_inodes(facts: Facts) -> str:
    """Empty files: they take no space but theirs in the filesystem's tables."""

    def make(number: int) -> None:
        os.mkdir(f"many-{number}")
        for name in range(400):
            os.close(os.open(f"many-{number}/{name}", os.O_CREAT | os.O_WRONLY))

    late = _go_on_for(4, make)
    return f"still made {late * 400} files in the fourth second" if late else ""


@refused_with(errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
def make_a_sparse_file(facts: Facts) -> str:
    with open("sparse", "wb") as file:
        file.truncate(10 * 1024**4)
    return "ten tebibytes, on paper"


@refused_with(errno.EFBIG, errno.ENOSPC, errno.EDQUOT, errno.EOPNOTSUPP)
def reserve_a_huge_file(facts: Facts) -> str:
    with open("huge", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 4 * 1024**4)
    return "four tebibytes"


@refused_with(errno.EFBIG, errno.ENOSPC, errno.EDQUOT)
def write_a_file_larger_than_allowed(facts: Facts) -> str:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with open("large", "wb") as file:
        file.seek(facts.limits.file_size)
        file.write(b"x")
    return "written"


# ---------------------------------------------------------------- time


def burn_all_processors(facts: Facts) -> str:
    """For two seconds; the neighbour is asked meanwhile (the scene looks)."""
    for _ in range(4 * (os.cpu_count() or 1)):
        if os.fork() == 0:
            deadline = time.monotonic() + 2
            while time.monotonic() < deadline:
                pass
            os._exit(0)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()
    return ""


def exec_with_huge_arguments(facts: Facts) -> str:
    try:
        os.posix_spawn("/bin/true", ["true", *["x" * 100_000] * 500], {})
    except OSError as error:
        if error.errno not in (errno.E2BIG, errno.ENOMEM):
            raise
        return ""
    return "started"
