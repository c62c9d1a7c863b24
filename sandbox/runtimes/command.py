"""The command runtime: an agent is any program that speaks JSON lines on its stdin and stdout (docs/agents.md).

One process for the sandbox's life. In: {"type": "turn"}, {"type": "interrupt"}. Out: message objects, {"type": "delta", "text"},
and {"type": "done"} or {"type": "done", "error"} to end the turn. Its stderr goes to the session's logs.
"""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

from sandbox.protocol import LineReader, encode_line
from sandbox.turns import AgentError, Message, Runtime, Session, keep_child

_READ_BYTES = 1 << 18
_END_GRACE_S = 2.0


class CommandAgent:
    """Talks to the agent's process; a process that has died is started again for the next turn."""

    def __init__(self, argv: list[str], max_frame: int) -> None:
        self._argv = argv
        self._max_frame = max_frame
        self._process: asyncio.subprocess.Process | None = None
        self._lines = LineReader(max_frame)
        self._pending: deque[bytes] = deque()

    async def load(self) -> None:
        if not self._argv:
            raise AgentError('agent.yaml names no program: set entry: ["./agent"]', "agent.no_entry")
        await self._start()

    async def _start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        try:
            process = await asyncio.create_subprocess_exec(*self._argv, stdin=pipe, stdout=pipe)
        except OSError as error:
            raise AgentError(f"{self._argv[0]} could not be started: {error.strerror}", "agent.not_started") from None
        keep_child(process.pid)
        self._process, self._lines, self._pending = process, LineReader(self._max_frame), deque()
        return process

    async def turn(self, message: Message, session: Session) -> AsyncIterator[str | dict[str, Any]]:
        process = self._process
        if process is None or process.returncode is not None:
            process = await self._start()
        await self._tell(
            process,
            {
                "type": "turn",
                "turn": session.turn,
                "content": message.content,
                "options": message.options,
                "session": {"id": session.id, "workspace": str(session.workspace), "settings": session.settings},
            },
        )
        interrupt = asyncio.create_task(self._pass_interrupt(process, session), name="pass on an interrupt")
        try:
            while (said := await self._next(process)).get("type") != "done":
                yield said["text"] if said.get("type") == "delta" and isinstance(said.get("text"), str) else said
        finally:
            interrupt.cancel()
        if said.get("error"):
            raise AgentError(str(said["error"]), "agent.failed")

    async def _pass_interrupt(self, process: asyncio.subprocess.Process, session: Session) -> None:
        await session.interrupted.wait()
        await self._tell(process, {"type": "interrupt"})

    async def _tell(self, process: asyncio.subprocess.Process, line: dict[str, Any]) -> None:
        assert process.stdin is not None
        try:
            process.stdin.write(encode_line(line))
            await process.stdin.drain()
        except (BrokenPipeError, ConnectionResetError):
            return  # reading will tell that it is gone

    async def _next(self, process: asyncio.subprocess.Process) -> dict[str, Any]:
        """The next object the program says. Raises AgentError when it says something else or is gone."""
        assert process.stdout is not None
        while not self._pending:
            data = await process.stdout.read(_READ_BYTES)
            if not data:
                code = await process.wait()
                raise AgentError(f"{self._argv[0]} exited with code {code} during the turn", "agent.exited")
            self._pending.extend(self._lines.feed(data))
            if self._lines.oversized:
                self._lines.oversized = 0
                raise AgentError(f"{self._argv[0]} wrote a line of more than {self._max_frame} bytes", "agent.too_large")
        line = self._pending.popleft()
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            said = None
        if not isinstance(said, dict):
            shown = line[:200].decode("utf-8", "replace")
            raise AgentError(f"{self._argv[0]} wrote a line that is not a JSON object: {shown}", "agent.not_json")
        return said

    async def close(self) -> None:
        """Asks the program to end, then lets the jail's end force it."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        process.terminate()
        try:
            await asyncio.wait_for(process.wait(), _END_GRACE_S)
        except TimeoutError:
            process.kill()


def make(claim: dict[str, Any]) -> Runtime:
    return CommandAgent(claim["entry"], claim["max_frame"])
