"""How turns run inside a sandbox, whatever the runtime.

Covers: the commands of the keeper, one turn at a time, what an agent yields becoming messages, interrupts, the turn's
end. Leaves out: how an agent is loaded and called (runtimes/), everything before the claim (bridge.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import time
import traceback
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sandbox.protocol import MAX_COMMAND_BYTES, LineReader, Malformed, Tag, check_shape

MAX_TEXT = 1024 * 1024
"""Pieces of text are joined into one message up to so many characters, then into the next, so that a long answer costs
no memory.
"""

_MOST_BYTES_A_CHARACTER = 12
_FRAME_AROUND_TEXT = 4096
_MAX_ERROR = 10_000

_MEMORY_KILLS = 100
_KILL_FIELDS = ("victim", "limitBytes", "peakBytes", "scope")

_INTERRUPT_GRACE_S = 1.0


class AgentError(Exception):
    """The agent failed in a way its author should read about; `code` is for programs."""

    def __init__(self, message: str, code: str = "agent.failed") -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Message:
    """What the user asked in one turn. `content` is text or a list of content blocks, `options` the rest of the
    request.
    """

    content: str | list[dict[str, Any]]
    options: dict[str, Any]

    @property
    def text(self) -> str:
        """The content as plain text."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(block["text"] for block in self.content if isinstance(block.get("text"), str))


@dataclass
class Session:
    """What an agent knows of its session.

    `turn` counts from 1; `history` holds the messages so far, oldest first, as {"role", "content"}; `state` is a dict
    that lives as long as the session; `interrupted` is set when the user has asked the turn to stop. `memory_kills`
    tells of processes that were killed for want of memory, oldest first: {"victim": {"name", "pid"}, "limitBytes",
    "peakBytes", "scope"}.
    """

    id: str
    workspace: Path
    settings: dict[str, Any]
    turn: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)
    interrupted: asyncio.Event = field(default_factory=asyncio.Event)
    memory_kills: list[dict[str, Any]] = field(default_factory=list)


class Runtime(Protocol):
    """One way of running an agent."""

    async def load(self) -> None:
        """Gets the agent ready for its first turn. Raises AgentError."""

    def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        """Runs one turn: text pieces and message objects as the agent makes them."""

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """Tells the agent that the kernel has killed a process of its sandbox; `session.memory_kills` has it too."""

    async def close(self) -> None:
        """Ends what the agent runs beside the bridge."""


class Wire:
    """Frames to the keeper, in order. A keeper that doesn't read makes the sender wait."""

    def __init__(self, sock: socket.socket, max_frame: int) -> None:
        self._sock = sock
        self.max_frame = max_frame
        self._lock = asyncio.Lock()
        self._unsent = bytearray()

    async def send(self, tag: bytes, body: dict[str, Any]) -> None:
        """One frame. Raises AgentError for a body that isn't JSON or is larger than a frame may be."""
        try:
            data = tag + json.dumps(body, separators=(",", ":"), allow_nan=False).encode("ascii") + b"\n"
            check_shape(body, data)
        except Malformed as error:
            raise AgentError(f"the agent yielded a message of {error}", "agent.not_json") from None
        except (TypeError, ValueError, RecursionError) as error:
            raise AgentError(f"the agent yielded something that is not JSON: {error}", "agent.not_json") from None
        if len(data) > self.max_frame:
            raise AgentError(
                f"the agent yielded a message of {len(data)} bytes; at most {self.max_frame} are allowed. "
                "Write large results to a file in the workspace instead.",
                "agent.message_too_large",
            )
        async with self._lock:
            # A sender cancelled in mid-frame leaves the rest here for the next one: half a frame would spoil two.
            self._unsent += data
            while self._unsent:
                try:
                    del self._unsent[: self._sock.send(self._unsent)]
                except BlockingIOError:
                    await self._writable()

    async def _writable(self) -> None:
        loop, ready = asyncio.get_running_loop(), asyncio.Event()
        loop.add_writer(self._sock, ready.set)
        try:
            await ready.wait()
        finally:
            loop.remove_writer(self._sock)


class Bridge:
    """Runs the turns of one claimed sandbox."""

    def __init__(self, keeper: socket.socket, claim: dict[str, Any]) -> None:
        keeper.setblocking(False)
        self._keeper = keeper
        self._wire = Wire(keeper, claim["max_frame"])
        self._timing = bool(claim["timing"])
        self._session = Session(claim["session_id"], Path(claim["workspace"]), claim["settings"], turn=claim["turns"])
        self._runtime = make_runtime(claim)
        self._startup = claim["startup"]
        self._turn: asyncio.Task[None] | None = None

    async def serve(self) -> int:
        """Loads the agent, then obeys the keeper until it says end or is gone."""
        try:
            await self._start_up()
            await self._runtime.load()
        except AgentError as error:
            await self._wire.send(Tag.FAILED, {"error": str(error)[:_MAX_ERROR], "code": error.code})
        else:
            await self._wire.send(Tag.READY, {})
        async with asyncio.TaskGroup() as tasks:
            async for command in self._commands():
                if command["type"] == "turn":
                    self._turn = tasks.create_task(self._run_turn(command), name=f"turn {command['turn']}")
                elif command["type"] == "interrupt" and self._turn is not None:
                    tasks.create_task(self._interrupt(self._turn), name="interrupt")
                elif command["type"] == "memory_kill":
                    del self._session.memory_kills[: -_MEMORY_KILLS + 1]
                    self._session.memory_kills.append({name: command[name] for name in _KILL_FIELDS})
                    self._runtime.memory_kill(command)
                elif command["type"] == "end":
                    break
            if self._turn is not None:
                self._session.interrupted.set()
                self._turn.cancel()
            await self._runtime.close()
        return 0

    async def _start_up(self) -> None:
        """The scripts of the agent's folder that are to run before its first turn."""
        for script in self._startup:
            process = await asyncio.create_subprocess_exec("/bin/sh", f"./{script}")
            if code := await process.wait():
                why = f"{script} ended with code {code}; the session's logs hold its output"
                raise AgentError(why, "agent.startup")

    async def _commands(self) -> AsyncGenerator[dict[str, Any]]:
        lines = LineReader(MAX_COMMAND_BYTES)
        loop = asyncio.get_running_loop()
        while data := await loop.sock_recv(self._keeper, 1 << 18):
            for line in lines.feed(data):
                yield json.loads(line)

    async def _interrupt(self, turn: asyncio.Task[None]) -> None:
        """The agent may end its turn in its own way; one that doesn't is cancelled."""
        self._session.interrupted.set()
        await asyncio.wait([turn], timeout=_INTERRUPT_GRACE_S)
        if self._turn is turn:  # else its agent has ended, and only what it said last is on its way
            turn.cancel()

    async def _run_turn(self, command: dict[str, Any]) -> None:
        started = time.perf_counter()
        reap_orphans()
        session = self._session
        session.turn = command["turn"]
        session.interrupted = asyncio.Event()
        message = Message(command["content"], command.get("options") or {})
        answer = Answer(self._wire, session, partial=bool(message.options.get("includePartialMessages")))
        end: dict[str, Any] = {"turn": session.turn}
        try:
            async with aclosing(self._runtime.turn(message, session)) as items:
                async for item in items:
                    await answer.add(item)
            await answer.finish()
        except asyncio.CancelledError:
            if not session.interrupted.is_set():
                end |= {"error": "the agent cancelled its own turn", "code": "agent.failed"}
        except AgentError as error:
            end |= {"error": str(error)[:_MAX_ERROR], "code": error.code}
        except (Exception, SystemExit) as error:  # the door between an agent's code and ours
            traceback.print_exc()
            end |= {"error": _last_line(error)[:_MAX_ERROR], "code": "agent.failed"}
        await answer.flush()  # what was said before it failed was said
        session.history.append({"role": "user", "content": message.content})
        session.history += answer.history
        self._turn = None
        if self._timing:
            await self._wire.send(Tag.TIMING, answer.timing(started))
        await self._wire.send(Tag.END, end)
        reap_orphans()


class Answer:
    """What an agent yields in one turn, on its way to the keeper."""

    def __init__(self, wire: Wire, session: Session, *, partial: bool) -> None:
        self._wire = wire
        self._session = session
        self._partial = partial
        self._max_text = min(MAX_TEXT, max(1, (wire.max_frame - _FRAME_AROUND_TEXT) // _MOST_BYTES_A_CHARACTER))
        self._text: list[str] = []
        self._text_length = 0
        self._last_text = ""
        self._has_result = False
        self._started = time.perf_counter()
        self._first: float | None = None
        self._count = 0
        self.history: list[dict[str, Any]] = []

    async def add(self, item: str | dict[str, Any]) -> None:
        """A piece of text or a message object. Raises AgentError for anything else."""
        if self._first is None:
            self._first = time.perf_counter()
        self._count += 1
        await asyncio.sleep(0)  # an agent that never waits would keep its bridge from hearing an interrupt
        if isinstance(item, str):
            await self._add_text(item)
        elif isinstance(item, dict):
            await self.flush()
            await self._send(item)
        else:
            raise AgentError(
                f"the agent yielded a {type(item).__name__}; yield str for text or dict for a message object",
                "agent.bad_yield",
            )

    async def _add_text(self, piece: str) -> None:
        while piece:
            room = self._max_text - self._text_length
            part, piece = piece[:room], piece[room:]
            if self._partial:
                await self._wire.send(Tag.MESSAGE, partial_text(part))
            self._text.append(part)
            self._text_length += len(part)
            if self._text_length == self._max_text:
                await self.flush()

    async def flush(self) -> None:
        """The pieces of text so far become one assistant message."""
        if self._text:
            blocks = [{"type": "text", "text": "".join(self._text)}]
            self._text, self._text_length = [], 0
            await self._send({"type": "assistant", "message": {"role": "assistant", "content": blocks}})

    async def _send(self, message: dict[str, Any]) -> None:
        await self._wire.send(Tag.MESSAGE, message)
        kind = message.get("type")
        self._has_result = self._has_result or kind == "result"
        inner = message.get("message")
        if kind == "assistant" and isinstance(inner, dict):
            self.history.append({"role": "assistant", "content": inner.get("content")})
            self._last_text = _text_of(inner.get("content")) or self._last_text

    async def finish(self) -> None:
        """The turn is over: what is left of the text, and a result if the agent gave none."""
        await self.flush()
        if not self._has_result:
            elapsed_ms = round((time.perf_counter() - self._started) * 1000)
            await self._send(
                {
                    "type": "result",
                    "subtype": "success",
                    "is_error": False,
                    "result": self._last_text,
                    "num_turns": 1,
                    "duration_ms": elapsed_ms,
                    "session_id": self._session.id,
                }
            )

    def timing(self, started: float) -> dict[str, Any]:
        """The line of ASH_DEBUG_TIMING."""
        now = time.perf_counter()
        return {
            "type": "timing",
            "source": "bridge",
            "cmdParseMs": round((self._started - started) * 1000, 3),
            "sdkFirstTokenMs": round(((self._first or now) - self._started) * 1000, 3),
            "totalMs": round((now - started) * 1000, 3),
            "eventCount": self._count,
        }


def partial_text(piece: str) -> dict[str, Any]:
    delta = {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": piece}}
    return {"type": "stream_event", "event": delta}


def _text_of(content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        return ""
    return "".join(block["text"] for block in content if isinstance(block, dict) and isinstance(block.get("text"), str))


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()


def make_runtime(claim: dict[str, Any]) -> Runtime:
    """The runtime a claim names."""
    import importlib

    module = importlib.import_module(f"sandbox.runtimes.{claim['runtime']}")
    runtime: Runtime = module.make(claim)
    return runtime


def reap_orphans() -> None:
    """Between turns: collects dead processes that were left to us as PID 1.

    Only those that were dead the last time, too: a child the agent itself waits for is collected by then.
    """
    if os.getpid() != 1:
        return
    seen = _zombies()
    for pid in seen & _dead_before - _kept_children:
        try:
            os.waitpid(pid, os.WNOHANG)
        except ChildProcessError:
            continue
    _dead_before.clear()
    _dead_before.update(seen)


def _zombies() -> set[int]:
    found = set()
    for entry in os.scandir("/proc"):
        if not entry.name.isdigit() or entry.name == "1":
            continue
        try:
            state, parent = Path(entry.path, "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if state == "Z" and parent == "1":
            found.add(int(entry.name))
    return found


_kept_children: set[int] = set()
_dead_before: set[int] = set()


def keep_child(pid: int) -> None:
    """A child somebody here waits for by itself."""
    _kept_children.add(pid)
