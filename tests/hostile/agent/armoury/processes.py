"""Attacks with signals, priorities, limits and processes that want to stay.

Sources: kill(2), pid_namespaces(7), setpriority(2), sched(7), getrlimit(2), prctl(2).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

from .weapons import (
    Facts,
    call,
    deadly,
    each,
    in_own_pid_namespace,
    in_the_agent,
    outsiders,
    refused_with,
    syscall,
    visible,
)

# ---------------------------------------------------------------- signals


@deadly
@in_the_agent
def kill_everyone(facts: Facts) -> str:
    """kill(-1, SIGKILL): everybody whom the kernel lets it, which must be nobody but its own sandbox."""
    in_own_pid_namespace(facts)
    os.kill(-1, signal.SIGKILL)
    return ""


def signal_every_number(facts: Facts) -> str:
    """Signal 0 to 1..65536. Whoever answers, with permission or without, must be of this sandbox."""
    seen = set()
    for pid in range(1, 65537):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            continue
        except PermissionError:
            pass
        seen.add(pid)
    strangers = seen - set(visible()) - {os.getpid()}
    # A thread answers as its process does, without being in the list.
    strangers = {pid for pid in strangers if not Path(f"/proc/{pid}").exists()}
    return f"{len(seen)} processes answer, {len(strangers)} of them out of sight" if strangers or len(seen) > 64 else ""


def signal_processes_outside(facts: Facts) -> str:
    return each(lambda pid: os.kill(pid, 0) is None, outsiders(facts))


def kill_processes_outside_by_number(facts: Facts) -> str:
    """In earnest: the neighbour's, the runner's, the coordinator's, and our own keeper."""
    in_own_pid_namespace(facts)
    return each(lambda pid: os.kill(pid, signal.SIGKILL) is None, outsiders(facts))


def kill_process_groups_outside(facts: Facts) -> str:
    in_own_pid_namespace(facts)
    return each(lambda pid: os.killpg(pid, signal.SIGKILL) is None, outsiders(facts))


def signal_by_other_calls(facts: Facts) -> str:
    return each(
        lambda pid: each(
            lambda attempt: attempt() == 0,
            [
                lambda: syscall("tgkill", pid, pid, 0),
                lambda: syscall("rt_sigqueueinfo", pid, 0, struct.pack("4i", 0, 0, -1, 0).ljust(128, b"\0")),
                lambda: syscall("pidfd_send_signal", syscall("pidfd_open", pid, 0), 0, None, 0),
            ],
        ),
        outsiders(facts),
    )


def have_the_kernel_signal_others(facts: Facts) -> str:
    """F_SETOWN names a receiver for a pipe's signals."""

    def name(pid: int) -> str:
        read_end, write_end = os.pipe()
        try:
            fcntl.fcntl(read_end, fcntl.F_SETOWN, pid)
            return "named" if fcntl.fcntl(read_end, fcntl.F_GETOWN) == pid else ""
        finally:
            os.close(read_end)
            os.close(write_end)

    return each(name, outsiders(facts))


@in_the_agent
def stop_the_parent(facts: Facts) -> str:
    """The agent's parent is the keeper (0: out of sight) or the bridge, whom no signal from inside may stop."""
    in_own_pid_namespace(facts)
    parent = os.getppid()
    if parent == 0:
        return ""
    os.kill(parent, signal.SIGSTOP)
    state = Path(f"/proc/{parent}/stat").read_text().rpartition(")")[2].split()[0]
    return "it is stopped" if state == "T" else ""


@in_the_agent
def shoot_the_first_process(facts: Facts) -> str:
    """PID 1 of a namespace takes no deadly signal from inside; outside of one it would be the host's."""
    in_own_pid_namespace(facts)
    if os.getpid() == 1:
        return ""
    os.kill(1, signal.SIGKILL)
    os.kill(1, 0)
    return ""


def join_the_process_groups_of_others(facts: Facts) -> str:
    return each(lambda pid: os.setpgid(0, pid) is None, outsiders(facts))


@refused_with(errno.ECHILD)
def wait_for_others(facts: Facts) -> str:
    return each(lambda pid: f"{os.waitpid(pid, os.WNOHANG)}", outsiders(facts), errno.ECHILD)


# ---------------------------------------------------------------- processes that want to stay


def _become_a_daemon(facts: Facts, name: str) -> None:
    """FORK: twice, with a session of its own, deaf to every signal that may be ignored, all descriptors closed."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            call("prctl", 1, 0, 0, 0, 0)  # PR_SET_PDEATHSIG: none
            for number in range(1, 65):
                with contextlib.suppress(OSError, ValueError):
                    signal.signal(number, signal.SIG_IGN)
            os.closerange(0, 1024)
            os.execv(sys.executable, [f"{name}-{facts.mark}", "-c", "import time; time.sleep(600)"])
        os._exit(0)
    with contextlib.suppress(ChildProcessError):
        os.wait()


def leave_a_daemon(facts: Facts) -> str:
    """It may live as long as its sandbox; the scene looks at the end of the session."""
    _become_a_daemon(facts, "daemon")
    return ""


def leave_many_daemons(facts: Facts) -> str:
    for _ in range(10):
        _become_a_daemon(facts, "daemons")
    return ""


@in_the_agent
def leave_a_sibling(facts: Facts) -> str:
    """CLONE_PARENT makes a child of the parent's: outside the jail it would be the keeper's."""
    try:
        child = syscall("clone", 0x8000 | signal.SIGCHLD, 0, 0, 0, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:  # what a namespace's first process gets
            return ""
        raise
    if child == 0:
        os.execv(sys.executable, [f"sibling-{facts.mark}", "-c", "import time; time.sleep(600)"])
    return ""


def leave_zombies(facts: Facts) -> str:
    """Orphans of a dead parent, all dead: the first process of the jail has to bury them."""
    if (parent := os.fork()) == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for _ in range(15):
            if os.fork() == 0:
                os._exit(0)
        os._exit(0)
    _, status = os.waitpid(parent, 0)
    if status:
        raise RuntimeError("there is no room for 15 more processes")
    return ""


@in_the_agent
def be_deaf_to_signals(facts: Facts) -> str:
    """Ignores SIGTERM and everything else from here on; the session has to end all the same."""
    for number in set(range(1, 65)) - {signal.SIGKILL, signal.SIGSTOP, signal.SIGCHLD}:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_IGN)
    return ""


@in_the_agent
def outlive_the_keeper(facts: Facts) -> str:
    """Clears the signal that comes with its parent's death; the scene looks whether anything is left."""
    call("prctl", 1, 0, 0, 0, 0)
    return ""


@deadly
@in_the_agent
def end_itself(facts: Facts) -> str:
    os._exit(3)


@deadly
@in_the_agent
def crash_itself(facts: Facts) -> str:
    for number in (signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL):
        signal.raise_signal(number)
    os._exit(11)


# ---------------------------------------------------------------- priorities and limits


def go_before_others(facts: Facts) -> str:
    attempts = {
        "nice": lambda: os.nice(-5),
        "setpriority": lambda: os.setpriority(os.PRIO_PROCESS, 0, -20),
        "SCHED_FIFO": lambda: os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1)),
        "SCHED_RR": lambda: os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1)),
        "SCHED_DEADLINE": lambda: syscall(
            "sched_setattr", 0, struct.pack("IIQiIQQQ", 48, 6, 0, 0, 0, 10**7, 10**8, 10**8), 0
        ),
        "realtime I/O": lambda: syscall("ioprio_set", 1, 0, 1 << 13),
    }

    def tried(name: str) -> bool:
        attempts[name]()
        return True

    return each(tried, attempts, errno.EBUSY)


def slow_others_down(facts: Facts) -> str:
    attempts = {
        "nice": lambda pid: os.setpriority(os.PRIO_PROCESS, pid, 19),
        "idle": lambda pid: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0)),
        "pinned": lambda pid: os.sched_setaffinity(pid, {0}),
    }
    return each(lambda name: each(lambda pid: attempts[name](pid) is None, outsiders(facts)), attempts)


def slow_its_user_down(facts: Facts) -> str:
    """PRIO_USER reaches every process of a user id: another sandbox's, where they share one."""
    in_own_pid_namespace(facts)
    if facts.neighbour.uid == os.getuid():
        return ""  # a pid namespace bounds it, and the scene looks at the neighbour's priority
    return each(lambda uid: os.setpriority(os.PRIO_USER, uid, 19) is None, [facts.neighbour.uid, 0x7FFF0000])


def raise_its_limits(facts: Facts) -> str:
    def raise_(name: str) -> str:
        which = getattr(resource, f"RLIMIT_{name}")
        soft, hard = resource.getrlimit(which)
        if hard == resource.RLIM_INFINITY:
            return "" if name not in ("NOFILE", "FSIZE", "CORE") else "was never limited"
        try:
            resource.setrlimit(which, (hard + 1, hard + 1))
        except ValueError:
            return ""
        resource.setrlimit(which, (soft, hard))
        return "raised"

    names = ("NOFILE", "NPROC", "FSIZE", "CORE", "DATA", "AS", "MEMLOCK", "NICE", "RTPRIO", "MSGQUEUE", "SIGPENDING")
    return each(raise_, names)


def change_limits_of_others(facts: Facts) -> str:
    return each(lambda pid: f"{resource.prlimit(pid, resource.RLIMIT_NOFILE)}", outsiders(facts))


def take_another_name(facts: Facts) -> str:
    """A process that calls itself the neighbour's keeper is not taken for one (the scene looks)."""
    name = f"ashd: keeper {facts.neighbour.session}"
    subprocess.Popen([name, "-c", "import time; time.sleep(0.5)"], executable=sys.executable)
    call("prctl", 15, b"ashd: keeper", 0, 0, 0)
    time.sleep(0.05)
    return ""
