"""The supervisor's side of the zygote: keeps one alive and asks it to fork.

FORK: the supervisor never forks; it executes the zygote, which does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import sandbox
from ashd import log
from ashd.domain.restart import Backoff
from ashd.errors import SandboxFailed, Unavailable
from sandbox.selftest import Setup

_log = log.get(__name__)

PRELOADED = (
    "asyncio",
    "asyncio.subprocess",
    "importlib",
    "inspect",
    "json",
    "logging",
    "subprocess",
    "threading",
    "sandbox.turns",
    "sandbox.runtimes.claude",
    "sandbox.runtimes.command",
    "sandbox.runtimes.echo",
    "sandbox.runtimes.python",
)
_MAX_ANSWER_BYTES = 256 * 1024
_PACKAGE = Path(sandbox.__file__).parent


def interpreter_folders() -> list[str]:
    """What every sandbox must be able to read to run at all: the interpreter, its packages, and the room `sandbox`."""
    return [sys.prefix, sys.base_prefix, str(_PACKAGE)]


def command(control: socket.socket) -> dict[str, Any]:
    """How subprocess.Popen starts a zygote that is controlled by the other end of `control`."""
    return {
        "args": [sys.executable, "-m", "sandbox.zygote", str(control.fileno())],
        "stdin": subprocess.DEVNULL,
        # SECURITY: nothing of the supervisor's environment goes any further
        "env": {"PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONPATH": str(_PACKAGE.parent)},
    }


class ZygoteProcess:
    """One zygote at a time; a dead one is replaced at once, live sandboxes don't notice.

    `shown` is what the last one's self-test showed: {"level", "findings", "missed"}.
    """

    def __init__(self, levels: list[str], setup: Setup, answer_timeout_s: float) -> None:
        self._order = {"levels": levels, "setup": asdict(setup), "modules": PRELOADED}
        self._answer_timeout_s = answer_timeout_s
        self._asking = asyncio.Lock()  # one question at a time: answers carry no number
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self.shown: dict[str, Any] = {}

    @property
    def pid(self) -> int | None:
        """Of the zygote there is now."""
        return None if self._process is None else self._process.pid

    @property
    def is_ready(self) -> bool:
        """Its self-test is over, and what it forks are keepers."""
        return self._socket is not None

    async def run(self, started: asyncio.Event) -> None:
        """Keeps a zygote running until cancelled; `started` is set when the first one is ready."""
        backoff = Backoff()
        try:
            while True:
                try:
                    await self._start()
                    started.set()
                    backoff.reset()
                    await self._wait()
                except (OSError, ValueError) as error:
                    _log.error("zygote could not be started", error=str(error))
                _log.warning("zygote is gone, starting another")
                self._stop()
                await asyncio.sleep(backoff.next_s(random.random()))
        finally:
            self._stop()

    async def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)
        with theirs:
            # WAITS: not: it returns once the exec is done, and asyncio's own way would start a thread for the waiting.
            self._process = subprocess.Popen(pass_fds=[theirs.fileno()], **command(theirs))  # noqa: ASYNC220
        try:
            ours.send(json.dumps(self._order).encode())
            answer = await self._receive(ours)
        except BaseException:
            ours.close()
            raise
        self.shown = answer["ready"]
        self._socket = ours  # ORDER: only now, or whoever asks for a fork would get the answer meant for us

    async def _receive(self, control: socket.socket) -> dict[str, Any]:
        loop = asyncio.get_running_loop()
        data = await asyncio.wait_for(loop.sock_recv(control, _MAX_ANSWER_BYTES), self._answer_timeout_s)
        if not data:
            raise OSError("the zygote closed its socket")
        answer: dict[str, Any] = json.loads(data)
        return answer

    async def _wait(self) -> None:
        assert self._process is not None
        pidfd = os.pidfd_open(self._process.pid)
        dead = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, dead.set)
        try:
            await dead.wait()
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
            self._process.wait()  # WAITS: for a killed process only
            self._process = None

    async def fork(self, request: dict[str, Any]) -> int:
        """A new keeper's pid. Raises Unavailable while there is no zygote, SandboxFailed if the fork fails."""
        async with self._asking:
            if self._socket is None:
                raise Unavailable("the zygote is being started again", code="zygote.away")
            try:
                await asyncio.get_running_loop().sock_sendall(self._socket, json.dumps(request).encode())
                answer = await self._receive(self._socket)
            except (OSError, TimeoutError) as error:
                self._kill()
                raise Unavailable(f"the zygote did not answer: {error}", code="zygote.away") from None
        if "error" in answer:
            raise SandboxFailed(f"no sandbox could be forked: {answer['error']}", code="sandbox.not_forked")
        pid: int = answer["pid"]
        return pid

    def _kill(self) -> None:
        """A zygote that doesn't answer is of no use: `run` replaces it."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()
