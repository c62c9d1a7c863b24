"""What the agent executes: announced by the kernel to the keeper, which puts it into the cgroup of tools.

Covers: the filter that makes each execve of a sandbox wait for its keeper's word, the keeper's answers, and what it
remembers of the programs. Leaves out: the groups and their limits (ashd.runner), what happens when one is killed
(memory.py), which system calls are denied (seccomp.py).

The keeper never forbids anything, and a process it can't move stays where it is: an agent that gets round this harms
itself alone, because its own group is then the one that is full. While the keeper is stopped, executing waits.

Sources: seccomp_unotify(2), seccomp(2), Documentation/userspace-api/seccomp_filter.rst, pidfd_open(2), proc(5).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import selectors
import socket
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sandbox.pace import Pace

TOOL, AGENT = "tool", "agent"
_TOOLS_FIRST = 1000
"""oom_score_adj of a tool: where agent and tools together fill the sandbox, a tool is the one to go."""

_MACHINES = {"x86_64": (0xC000003E, 317, 59, 322), "aarch64": (0xC00000B7, 277, 221, 281)}
"""By uname's machine: its AUDIT_ARCH, and its numbers of seccomp, execve and execveat."""

_SET_MODE_FILTER = 1
_NEW_LISTENER = 1 << 3
_WAIT_KILLABLE = 1 << 5  # Linux 5.19: a signal handler of the waiting process doesn't make it ask again
_RET_USER_NOTIF = 0x7FC00000
_RET_ALLOW = 0x7FFF0000
_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_OFFSET_NUMBER, _OFFSET_ARCH = 0, 4
_RECEIVE, _SEND, _IS_VALID = 0xC0502100, 0xC0182101, 0x40082102
_CONTINUE = 1
_NOTIFICATION = struct.Struct("=QI")  # id, pid; what follows, flags and seccomp_data, isn't needed
_ANSWER = struct.Struct("=QqiI")
_NOTIFICATION_ROOM = 256

CHANNEL = 4
"""The bridge's descriptor of its socket to the keeper's `Execs`, until `report_to_keeper`."""
_channel: socket.socket | None = None
_HERE = b"L"
_NEXT_IS_AGENT = b"A"
_REMEMBERED = 256
_MOST_READS = 64
_NAME_AFTER_S, _LAST_NAME_AFTER_S = 0.02, 2.0
FOREVER = float("inf")


# ------------------------------------------------------------ inside the jail


def report_to_keeper() -> None:
    """Makes every execve and execveat of this process and its children wait for the keeper at the other end of CHANNEL;
    where there is no keeper that wants it, or the kernel can't, does nothing.

    Needs no_new_privs.
    """
    global _channel  # of a process that is one bridge
    try:
        _channel = socket.socket(fileno=CHANNEL)
        listener = _install_filter()
        socket.send_fds(_channel, [_HERE], [listener])
        os.close(listener)
    except (OSError, KeyError):
        _channel = None


def announce_agent() -> None:
    """Says that what this process starts next is the agent itself, no tool."""
    if _channel is not None:
        with contextlib.suppress(OSError):  # full, or the keeper is gone: then it counts as a tool
            _channel.send(_NEXT_IS_AGENT, socket.MSG_DONTWAIT)


def _install_filter() -> int:
    """The listener of a new filter that asks about execve and execveat and allows all else. Raises OSError."""
    arch, seccomp, execve, execveat = _MACHINES[os.uname().machine]
    program = b"".join(
        struct.pack("=HBBI", *instruction)
        for instruction in (
            (_LOAD, 0, 0, _OFFSET_ARCH),
            (_JUMP_IF_EQUAL, 0, 3, arch),  # calls of another architecture are not watched
            (_LOAD, 0, 0, _OFFSET_NUMBER),
            (_JUMP_IF_EQUAL, 2, 0, execve),
            (_JUMP_IF_EQUAL, 1, 0, execveat),
            (_RETURN, 0, 0, _RET_ALLOW),
            (_RETURN, 0, 0, _RET_USER_NOTIF),
        )
    )
    code = ctypes.create_string_buffer(program, len(program))
    header = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None, use_errno=True)
    for flags in (_NEW_LISTENER | _WAIT_KILLABLE, _NEW_LISTENER):
        listener: int = libc.syscall(
            ctypes.c_long(seccomp), ctypes.c_long(_SET_MODE_FILTER), ctypes.c_long(flags), ctypes.byref(header)
        )
        if listener >= 0:
            return listener
    raise OSError(ctypes.get_errno(), "seccomp(SECCOMP_FILTER_FLAG_NEW_LISTENER)")


def probe() -> bool:
    """Whether this kernel lets us watch what is executed; tried in a throw-away child."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
            _install_filter()
            code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == 0


# ------------------------------------------------------------ the keeper's side


@dataclass
class Program:
    """A process that has executed something."""

    pid: int
    """The one it has inside its jail."""
    scope: str
    """TOOL or AGENT: whose cgroup it is in."""
    name: str = ""


class Execs:
    """Answers for each program the agent executes, in a keeper's selector.

    `died` hears of the end of each remembered program, with the signal that killed it where that can be known.
    SECURITY: remembers at most _REMEMBERED programs; those beyond are moved all the same. Answers `per_s` a second on
    average, because asking costs a sandbox less than answering costs us; those beyond wait. Waits for nobody, and so
    never reads a process's memory, where a page may be made to keep its reader: names are asked of the kernel, once
    what is executed has begun.
    """

    def __init__(
        self,
        selector: selectors.BaseSelector,
        channel: socket.socket,
        bridge_pid: int,
        tools: Path,
        per_s: float,
        died: Callable[[Program, int | None], None],
    ) -> None:
        self.deadline = FOREVER
        """When `catch_up` wants to be called."""
        self._pace = Pace(per_s)
        self._is_paused = False
        self._selector = selector
        self._channel = channel
        self._bridge_pid = bridge_pid
        self._tools = os.open(tools / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        self._died = died
        self._programs: dict[int, tuple[Program, int]] = {}  # by pid, with a pidfd
        self._unnamed: dict[int, tuple[float, float]] = {}  # when to ask for whose name, and how long after that again
        self._agent_is_next = False
        self._listener = -1
        self._pending = select.poll()
        channel.setblocking(False)
        selector.register(channel, selectors.EVENT_READ, self._receive_listener)

    def _receive_listener(self, _: int) -> None:
        """SECURITY: descriptors are taken once, of a bridge that runs no agent's code yet."""
        self._selector.unregister(self._channel)
        try:
            descriptors = socket.recv_fds(self._channel, len(_HERE), 1)[1]
        except OSError:
            return
        if descriptors:
            self._listener = descriptors[0]
            self._pending.register(self._listener, select.POLLIN)
            self._selector.register(self._listener, selectors.EVENT_READ, self._answer)

    def collect(self) -> None:
        """Notices now who has died, without waiting for the selector's turn."""
        for pid in list(self._programs):
            self._remembered(pid)

    def catch_up(self) -> None:
        """What is due: names, and answers again after a pause."""
        self.deadline = FOREVER
        self.learn_names()
        if self._is_paused:
            if time.monotonic() < self._pace.resume_at:
                self.deadline = self._pace.resume_at
            else:
                self._is_paused = False
                self._selector.register(self._listener, selectors.EVENT_READ, self._answer)

    def learn_names(self, *, early: bool = False) -> None:
        """Asks the kernel what the newest programs are called; again a little later, for they begin by the name of who
        executed them. `early`: of all at once, because one of them may be about to die.
        """
        now = time.monotonic()
        for pid, (due, pause) in list(self._unnamed.items()):
            if due > now and not early:
                continue
            self._programs[pid][0].name = _name_of(pid)
            if pause > _LAST_NAME_AFTER_S:
                del self._unnamed[pid]
            else:
                self._unnamed[pid] = now + pause, pause * 4
        self.deadline = min([self.deadline, *(due for due, _ in self._unnamed.values())])

    def _answer(self, _: int) -> None:
        """Hears of one execve that is about to be, and lets it be."""
        events = self._pending.poll(0)
        if not events or not events[0][1] & select.POLLIN:  # nothing to receive: receiving would wait
            if events:  # nobody is left inside
                self._selector.unregister(self._listener)
            return
        notification = bytearray(_NOTIFICATION_ROOM)
        try:
            fcntl.ioctl(self._listener, _RECEIVE, notification)
        except OSError:  # killed before we came to it
            return
        number, pid = _NOTIFICATION.unpack_from(notification)
        with contextlib.suppress(OSError, ValueError, KeyError):  # what can't be done for it can't: it may go on
            self._place(number, pid)
        with contextlib.suppress(OSError):
            fcntl.ioctl(self._listener, _SEND, bytearray(_ANSWER.pack(number, 0, 0, _CONTINUE)))
        self._pace.spend(1)
        if self._pace.resume_at > time.monotonic():
            self._is_paused = True
            self._selector.unregister(self._listener)
            self.deadline = min(self.deadline, self._pace.resume_at)

    def _place(self, number: int, pid: int) -> None:
        """Puts a process that is about to execute where it belongs, and remembers it. Raises OSError."""
        program = self._remembered(pid)
        proc = os.open(f"/proc/{pid}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        pidfd = -1
        try:
            pidfd = os.pidfd_open(pid)
            # RACE: while the notification is valid its process waits for us, so `pid`, `proc` and `pidfd` are its. It
            # can only be killed from here on, and a pid freed now is not given out again within microseconds.
            fcntl.ioctl(self._listener, _IS_VALID, struct.pack("=Q", number))
            if program is None:
                program = self._meet(pid, proc)
                pidfd = self._remember(pid, program, pidfd)
        finally:
            if pidfd >= 0:
                os.close(pidfd)
            os.close(proc)
        if pid in self._programs:
            due = time.monotonic() + _NAME_AFTER_S
            self._unnamed[pid] = due, _NAME_AFTER_S * 4
            self.deadline = min(self.deadline, due)

    def _meet(self, pid: int, proc: int) -> Program:
        """A process that executes for the first time; one that executes again stays where it is."""
        parent, inner_pid = _relations(proc)
        scope = self._scope_of(parent)
        if scope == TOOL:
            os.write(self._tools, str(pid).encode())
            _write_at(proc, "oom_score_adj", str(_TOOLS_FIRST))
        return Program(inner_pid, scope)

    def _scope_of(self, parent: int) -> str:
        """Whether it is the agent, announced by the bridge, or a tool."""
        with contextlib.suppress(BlockingIOError):  # ORDER: announced before it was forked, so the word is there by now
            for _ in range(_MOST_READS):  # whoever fills it on and on isn't waited for
                self._agent_is_next = _NEXT_IS_AGENT in self._channel.recv(4096)
        if parent == self._bridge_pid and self._agent_is_next:
            self._agent_is_next = False
            return AGENT
        return TOOL

    def _remembered(self, pid: int) -> Program | None:
        if pid not in self._programs:
            return None
        program, pidfd = self._programs[pid]
        alive = select.poll()
        alive.register(pidfd, select.POLLIN)
        if not alive.poll(0):
            return program
        self._forget(pid)  # it died, and its number is another's by now
        return None

    def _remember(self, pid: int, program: Program, pidfd: int) -> int:
        """Takes `pidfd` where there is room; else returns it."""
        if len(self._programs) >= _REMEMBERED:
            return pidfd
        self._programs[pid] = program, pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, partial(self._has_died, pid))
        return -1

    def _has_died(self, pid: int, _: int) -> None:
        if pid in self._programs:  # RACE: forgotten in the same round of the selector
            self._forget(pid)

    def _forget(self, pid: int) -> None:
        program, pidfd = self._programs.pop(pid)
        self._unnamed.pop(pid, None)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        signal, name = _last_of(pid)
        program.name = name or program.name
        self._died(program, signal)


def _name_of(pid: int) -> str:
    try:
        name = Path(f"/proc/{pid}/comm").read_text("utf-8", "replace")
    except OSError:
        return ""
    return "".join(char for char in name if char.isprintable())


def _last_of(pid: int) -> tuple[int | None, str]:
    """Of a dead process nobody has waited for yet: the signal that killed it (0 = none) and its name; else nothing."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None, ""
    return (int(fields[49]) & 0x7F, _name_of(pid)) if fields[0] == b"Z" else (None, "")


def _relations(proc: int) -> tuple[int, int]:
    """A process's parent, and the pid it has in its innermost namespace."""
    file = os.open("status", os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        status = os.read(file, 4096)
    finally:
        os.close(file)
    _, _, parent = status.partition(b"\nPPid:")
    _, _, pids = parent.partition(b"\nNSpid:")
    return int(parent.partition(b"\n")[0]), int(pids.partition(b"\n")[0].split()[-1])


def _write_at(proc: int, name: str, value: str) -> None:
    file = os.open(name, os.O_WRONLY | os.O_CLOEXEC, dir_fd=proc)
    try:
        os.write(file, value.encode())
    finally:
        os.close(file)
