"""The processes of one jail as their keeper sees them: the first one's start, what they print, their end.

Covers: forking the bridge with its sockets and pipes, collecting output, killing, what is left behind. Leaves out: what
the first process does (bridge.py), what any of it means for a session (keeper.py).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sandbox import bridge, jail, syscalls
from sandbox.execs import AGENT, Execs, Program
from sandbox.logs import LogFile
from sandbox.peer import READ_BYTES, Peer
from sandbox.protocol import MAX_COMMAND_BYTES

_KILL_ROUNDS = 100
_LAST_LOG_READS = 32  # of READ_BYTES: more than a pipe can be made to hold


class Processes:
    """Forks the bridge into its jail; `bridge` is the socket to it, `exited` whether it is dead.

    With `tools`, a cgroup, what the agent executes goes there; `died` hears of the end of each such program.
    """

    def __init__(
        self,
        spec: jail.JailSpec,
        selector: selectors.BaseSelector,
        logs: LogFile,
        received: Callable[[bytes], None],
        *,
        tools: Path | None,
        execs_per_s: float,
        died: Callable[[Program, int | None], None],
    ) -> None:
        self.exited = False
        self.execs: Execs | None = None
        self._spec = spec
        self._selector = selector
        self._logs = logs
        ours, theirs = socket.socketpair()
        announcements = socket.socketpair() if tools else None
        out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self._output = {out[0]: "stdout", err[0]: "stderr"}
        if spec.level == jail.STRICT:
            syscalls.unshare(syscalls.CLONE_NEWPID)  # for the next child only: the bridge becomes PID 1
        else:
            syscalls.become_subreaper()
        self._pid = os.fork()
        if self._pid == 0:
            execs = announcements[1].detach() if announcements else None
            bridge.run(spec, theirs.detach(), out[1], err[1], execs)  # FORK: never returns
        theirs.close()
        self.bridge = Peer(ours, selector, received, MAX_COMMAND_BYTES + READ_BYTES)
        for read_end, write_end in (out, err):
            os.close(write_end)
            os.set_blocking(read_end, False)
            selector.register(read_end, selectors.EVENT_READ, partial(self._log_output, read_end))
        if announcements and tools:
            announcements[1].close()
            self.execs = Execs(selector, announcements[0], self._pid, tools, execs_per_s, died)
        selector.register(os.pidfd_open(self._pid), selectors.EVENT_READ, self._bridge_exited)

    def _bridge_exited(self, _: int) -> None:
        self.exited = True

    def _log_output(self, pipe: int, _: int = 0) -> bool:
        """Takes what the agent has written to one of its outputs; False when that is nothing."""
        try:
            data = os.read(pipe, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._logs.feed(self._output[pipe], data)
        else:
            self._selector.unregister(pipe)
            os.close(pipe)
            del self._output[pipe]
        return bool(data)

    def as_program(self) -> Program:
        """The bridge, and with it an agent that runs in it, as something that can be killed."""
        return Program(1 if self._spec.level == jail.STRICT else self._pid, AGENT, "python3")

    def kill(self) -> None:
        """Ends the jail by force."""
        os.kill(self._pid, signal.SIGKILL)  # not reaped before `end`: the pid is its own

    def end(self) -> int:
        """Collects the dead bridge and kills what it left behind; its wait status."""
        _, status = os.waitpid(self._pid, 0)
        self._end_descendants()
        return status

    def _end_descendants(self) -> None:
        """Without a pid namespace, what the jail's first process left behind is our child now (subreaper)."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        for _ in range(_KILL_ROUNDS):  # each round makes orphans of the next
            for pid in map(int, children.read_text().split()):
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError, PermissionError):
                    continue

    def log_last_words(self) -> None:
        """What the dead have printed is still in their pipes."""
        for pipe in list(self._output):
            for _ in range(_LAST_LOG_READS):
                if not self._log_output(pipe):
                    break
        self._logs.close()
