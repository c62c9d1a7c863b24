"""The command runtime: an agent is any program that speaks JSON lines on its stdin and stdout (docs/agents.md).

One process for the sandbox's life. In: {"type": "turn"}, {"type": "interrupt"}, {"type": "memory_kill"}. Out:
message objects, {"type": "delta", "text"}, and {"type": "done"} or {"type": "done", "error"} to end the turn. Its
stderr goes to the session's logs.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections import deque
from collections.abc import AsyncGenerator
from typing import Any

from sandbox.execs import announce_agent
from sandbox.protocol import LineReader, encode_line
from sandbox.turns import AgentError, Message, Runtime, Session, keep_child

_READ_BYTES = 1 << 18
_END_GRACE_S = 2.0
_LAST_WORDS_S = 0.2
_COLLECT_ROUNDS = 100
_COLLECT_PAUSE_S = 0.01


class Program:
    """The agent's process, in a process group of its own.

    Whether it is dead is asked of the kernel, because asyncio's `wait` also waits for whoever else holds its pipes
    open.
    """

    def __init__(self, process: asyncio.subprocess.Process, max_line: int) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self.stdin, self._stdout = process.stdin, process.stdout
        self._process = process
        self._lines = LineReader(max_line)
        self._pending: deque[bytes] = deque()
        self._dead = asyncio.get_running_loop().create_future()
        self._watch()

    def _watch(self) -> None:
        try:
            pidfd = os.pidfd_open(self._process.pid)
        except ProcessLookupError:
            self._dead.set_result(None)
            return
        loop = asyncio.get_running_loop()

        def died() -> None:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._dead.set_result(None)

        loop.add_reader(pidfd, died)

    @property
    def is_dead(self) -> bool:
        return self._dead.done()

    async def died(self, within_s: float) -> bool:
        """Whether it is dead, at the latest after so long."""
        await asyncio.wait([self._dead], timeout=within_s)
        return self.is_dead

    async def exit_code(self) -> int | None:
        """Of a dead program. asyncio, which collects it in a thread, knows a moment later than we do of its death."""
        for _ in range(_COLLECT_ROUNDS):
            if self._process.returncode is not None:
                break
            await asyncio.sleep(_COLLECT_PAUSE_S)
        return self._process.returncode

    async def tell(self, line: dict[str, Any]) -> None:
        """Writes one line. WAITS: until the program takes it."""
        try:
            self.stdin.write(encode_line(line))
            await self.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return  # reading will tell that it is gone

    async def next_line(self) -> bytes | None:
        """The next line it says; None when it is dead or has closed its stdout. Raises AgentError for one too long."""
        while not self._pending:
            data = await self._read()
            if not data:
                return None
            self._pending.extend(self._lines.feed(data))
            if self._lines.oversized:
                raise AgentError(
                    f"the agent wrote a line of more than {self._lines.max_line} bytes", "agent.message_too_large"
                )
        return self._pending.popleft()

    async def _read(self) -> bytes:
        reading = asyncio.ensure_future(self._stdout.read(_READ_BYTES))
        try:
            await asyncio.wait([reading, self._dead], return_when=asyncio.FIRST_COMPLETED)
            if (
                not reading.done()
            ):  # dead; a child it left behind may hold the pipe open, so only what is in there counts
                await asyncio.wait([reading], timeout=_LAST_WORDS_S)
            return reading.result() if reading.done() else b""
        finally:
            reading.cancel()

    def signal(self, number: signal.Signals) -> None:
        """To the program and what it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class CommandAgent:
    """Talks to the agent's program; one that is gone, or left a turn unfinished, is started again for the next turn."""

    def __init__(self, argv: list[str], max_line: int) -> None:
        self._argv = argv
        self._max_line = max_line
        self._program: Program | None = None

    async def load(self) -> None:
        if not self._argv:
            raise AgentError('agent.yaml names no program: set entry: ["./agent"]', "agent.no_entry")
        await self._start()

    async def _start(self) -> Program:
        pipe = asyncio.subprocess.PIPE
        announce_agent()
        try:
            process = await asyncio.create_subprocess_exec(*self._argv, stdin=pipe, stdout=pipe, start_new_session=True)
        except OSError as error:
            raise AgentError(f"{self._argv[0]} could not be started: {error.strerror}", "agent.not_started") from None
        keep_child(process.pid)
        self._program = Program(process, self._max_line)
        return self._program

    async def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        program = self._program
        if program is None or program.is_dead:
            program = await self._start()
        interrupt = asyncio.create_task(_pass_interrupt(program, session), name="pass on an interrupt")
        said: dict[str, Any] = {}
        try:
            await program.tell(
                {
                    "type": "turn",
                    "turn": session.turn,
                    "content": message.content,
                    "options": message.options,
                    "session": {"id": session.id, "workspace": str(session.workspace), "settings": session.settings},
                }
            )
            while (said := await self._next(program)).get("type") != "done":
                yield said["text"] if said.get("type") == "delta" and isinstance(said.get("text"), str) else said
        finally:
            interrupt.cancel()
            if said.get("type") != "done":  # what it still says of this turn must not be taken for the next one's
                program.signal(signal.SIGKILL)
                self._program = None
        if said.get("error"):
            raise AgentError(str(said["error"]), "agent.failed")

    async def _next(self, program: Program) -> dict[str, Any]:
        """The next object the program says. Raises AgentError when it says something else or is gone."""
        line = await program.next_line()
        if line is None:
            if await program.died(_LAST_WORDS_S):
                raise AgentError(
                    f"{self._argv[0]} exited with code {await program.exit_code()} during the turn", "agent.exited"
                )
            raise AgentError(f"{self._argv[0]} closed its stdout during the turn", "agent.exited")
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            shown = line[:200].decode("utf-8", "replace")
            raise AgentError(f"{self._argv[0]} wrote a line that is not a JSON object: {shown}", "agent.not_json")
        return said

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """A line on its stdin, taken when it reads; a keeper tells of so many only that none has to wait here."""
        if self._program is not None and not self._program.is_dead:
            self._program.stdin.write(encode_line(kill))

    async def close(self) -> None:
        """Asks the program to end; what doesn't is forced by the end of the jail."""
        if self._program is not None and not self._program.is_dead:
            self._program.signal(signal.SIGTERM)
            await self._program.died(_END_GRACE_S)


async def _pass_interrupt(program: Program, session: Session) -> None:
    await session.interrupted.wait()
    await program.tell({"type": "interrupt"})


def make(claim: dict[str, Any]) -> Runtime:
    return CommandAgent(claim["entry"], claim["max_frame"])
