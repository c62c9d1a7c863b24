"""A child process that can't outlive its parent: started, watched by its pidfd, asked to end, then killed.

Covers: dropping root, the death signal, forwarding and remembering its output, stopping within a deadline.
Leaves out: whether to start it again (keep.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_PDEATHSIG = 1
_REMEMBERED_BYTES = 8192
_READ_BYTES = 65536


class Child:
    """One started process. It has a session of its own, so that ctrl-c in a terminal reaches only its parent.

    `death_signal` is what the kernel sends it when this process is gone (prctl(2), PR_SET_PDEATHSIG). What it writes to
    stdout and stderr goes to our stderr, unless `quiet`; its end is remembered for an error message.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str | Path],
        *,
        death_signal: signal.Signals,
        env: Mapping[str, str],
        uid: int | None = None,
        quiet: bool = False,
    ) -> None:
        self.name = name
        parent = os.getpid()

        def die_with_parent() -> None:
            # ORDER: runs after setuid, which would clear the death signal. FORK: the parent has no threads.
            _LIBC.prctl(_PR_SET_PDEATHSIG, death_signal)
            # RACE: a parent that died before the line above will send nothing.
            if os.getppid() != parent:
                os._exit(1)

        self._process = subprocess.Popen(
            [str(argument) for argument in argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=dict(env),
            cwd=None if uid is None else "/",  # another user id may not enter ours
            user=uid,
            group=uid,
            extra_groups=None if uid is None else [],
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        self.pid = self._process.pid
        self._pidfd = os.pidfd_open(self.pid)
        self._quiet = quiet
        self._output: deque[bytes] = deque()
        self._exited = asyncio.get_running_loop().create_future()
        assert self._process.stdout is not None, "stdout was asked for as a pipe"
        self._pipe = self._process.stdout
        os.set_blocking(self._pipe.fileno(), False)
        asyncio.get_running_loop().add_reader(self._pipe.fileno(), self._forward)
        asyncio.get_running_loop().add_reader(self._pidfd, self._reap)

    @property
    def has_ended(self) -> bool:
        return self._exited.done()

    async def exited(self) -> int:
        """Its return code, negative for a signal, once it has ended; any number of tasks may wait."""
        code: int = await asyncio.shield(self._exited)
        return code

    async def stop(self, ask: signal.Signals, *, timeout_s: float) -> int:
        """Ask, wait, kill, reap: it ends within `timeout_s` or is forced to. Harmless when it has ended."""
        self._signal(ask)
        try:
            return await asyncio.wait_for(self.exited(), timeout_s)
        except TimeoutError:
            self._signal(signal.SIGKILL)
            return await self.exited()

    async def finish(self, *, timeout_s: float) -> int:
        """Its return code when it ends by itself in time; else, or when we are cancelled, it is killed."""
        try:
            return await asyncio.wait_for(self.exited(), timeout_s)
        except TimeoutError:
            return await self.stop(signal.SIGKILL, timeout_s=0)
        except asyncio.CancelledError:
            await self.stop(signal.SIGKILL, timeout_s=0)
            raise

    def last_lines(self, count: int = 12) -> list[str]:
        """The end of what it wrote."""
        return b"".join(self._output).decode("utf-8", "replace").splitlines()[-count:]

    def _signal(self, number: signal.Signals) -> None:
        if not self.has_ended:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def _reap(self) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._forward()
        loop.remove_reader(self._pipe.fileno())
        # Its own children may still hold the other end, so the end of the file is not waited for.
        self._pipe.close()
        self._exited.set_result(self._process.wait())

    def _forward(self) -> None:
        try:
            content = os.read(self._pipe.fileno(), _READ_BYTES)
        except BlockingIOError:
            return
        if not content:
            asyncio.get_running_loop().remove_reader(self._pipe.fileno())
            return
        self._output.append(content)
        while len(self._output) > 1 and sum(map(len, self._output)) > _REMEMBERED_BYTES:
            self._output.popleft()
        if not self._quiet:
            with contextlib.suppress(OSError):  # whoever read our stderr has gone; that is no reason to stop serving
                sys.stderr.buffer.write(content)
                sys.stderr.buffer.flush()
