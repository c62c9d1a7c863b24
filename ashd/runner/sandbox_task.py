"""One sandbox, seen from the supervisor: its folder, the conversation with its keeper, and what is known of it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ashd import log
from ashd.config.schema import SandboxLimits
from ashd.domain import sandbox as machine
from ashd.domain.sandbox import Fact, State
from ashd.errors import Rejected, SandboxFailed, Unavailable
from ashd.runner import processes
from ashd.runner.journals import Bell, Recording
from sandbox.journal import Place
from sandbox.protocol import MAX_COMMAND_BYTES, NO_TURN, encode_line

_log = log.get(__name__)

_CONNECT_PAUSE_S = 0.005
_KILL_PAUSE_S = 0.02
_MAX_ANSWER_BYTES = 1024 * 1024
_ACKED_EVERY = 16
"""In an open turn the keeper hears of commits every so many events; it needs to, when its journal is full."""


Grew = Callable[["SandboxTask"], None]
"""Told of each growth of a sandbox's journal."""


class SandboxTask:
    """A sandbox and its keeper's connection.

    `session` is empty while nobody has claimed it. `closed` is set when the journal has its last record; `closed_as` is
    why, if the keeper could still say. `limits` are None where a supervisor before us set them.
    """

    def __init__(self, sandbox_id: str, folder: Path, uid: int | None, grew: Grew) -> None:
        self.id = sandbox_id
        self.folder = folder
        self.uid = uid
        self.state = State.WARMING
        self.session = ""
        self.epoch = 0
        self.keeper_pid = 0
        self.last_seq = 0
        self.open_turn = ""
        self.enforced: list[str] = []
        self.isolation = ""
        self.limits: SandboxLimits | None = None
        self.closed_as = ""
        self.kills: Counter[str] = Counter()
        self.was_warm = False
        self.recording = Recording(0)
        self._told_acked = 0
        self.recorded_to: Place | None = None
        self.grew = Bell()
        self.closed = asyncio.Event()
        self.gone = asyncio.Event()
        self._on_growth = grew
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.log = _log.bind(sandbox=sandbox_id)

    @property
    def workspace(self) -> Path:
        return self.folder / "workspace"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def takes_a_slot(self) -> bool:
        return self.state in machine.LIVE

    def learn(self, fact: Fact) -> None:
        """The one place where the state changes."""
        self.state = machine.step(self.state, fact)

    def belong_to(self, session: str, epoch: int, acked_seq: int) -> None:
        """From now on this is that session's sandbox, and nobody else's ever."""
        self.session, self.epoch = session, epoch
        self.last_seq = acked_seq
        self.recording = Recording(acked_seq)
        self.log = _log.bind(sandbox=self.id, session=session, epoch=epoch)

    def acknowledge(self, seq: int) -> None:
        """Events up to `seq` are committed: whoever waits for that goes on, and the journal may be trimmed so far."""
        self.recording.acknowledge(seq)
        if self.open_turn == NO_TURN or seq >= self._told_acked + _ACKED_EVERY:
            self._told_acked = seq
            self.tell("acked", seq=seq)

    # ------------------------------------------------------------ the keeper

    async def connect(self, timeout_s: float) -> dict[str, Any]:
        """Connects to the keeper and returns how it says things stand. Raises SandboxFailed."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        await self._open()
                        break
                    except (FileNotFoundError, ConnectionRefusedError):
                        await asyncio.sleep(_CONNECT_PAUSE_S)  # the keeper is on its way there
                assert self._reader is not None
                hello: dict[str, Any] = json.loads(await self._reader.readline())["hello"]
                if hello["life"] == "jailing":
                    hello |= json.loads(await self._reader.readline())
                    if hello["life"] != "warm" or "closed" in hello:
                        raise SandboxFailed("the jail could not be entered", code="jail.failed")
        except (OSError, TimeoutError, ValueError) as error:
            raise SandboxFailed(f"the keeper does not answer: {error!r}", code="keeper.silent") from None
        self.keeper_pid = hello["pid"]
        return hello

    async def _open(self) -> None:
        if self._writer is not None:
            self._writer.close()
        folder = os.open(self.folder, os.O_PATH | os.O_DIRECTORY)
        try:  # through the descriptor, because a socket's path may have 107 bytes only
            self._reader, self._writer = await asyncio.open_unix_connection(
                f"/proc/self/fd/{folder}/keeper.sock", limit=_MAX_ANSWER_BYTES
            )
        finally:
            os.close(folder)

    async def call(self, command: str, within_s: float, **fields: Any) -> dict[str, Any]:
        """A command to the keeper and its answer. Raises Rejected (the keeper's refusal), Unavailable (no answer)."""
        # A closing connection has to be asked about: uvloop raises RuntimeError for writing to it.
        if self._writer is None or self._writer.is_closing() or self.state is State.GONE:
            raise Unavailable("the sandbox is gone", code="sandbox.gone")
        number = next(self._numbers)
        answer = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(within_s):
                line = encode_line({"cmd": command, "re": number, **fields})
                assert len(line) <= MAX_COMMAND_BYTES
                self._writer.write(line)
                await self._writer.drain()
                result: dict[str, Any] = await answer
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"the keeper does not answer: {error!r}", code="keeper.silent") from None
        finally:
            self._answers.pop(number, None)
        if "error" in result:
            raise Rejected(result["error"], code=result["code"])
        return result

    def tell(self, command: str, **fields: Any) -> None:
        """A command whose answer nobody waits for."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(encode_line({"cmd": command, "re": 0, **fields}))

    async def listen(self) -> None:
        """Takes what the keeper says until it hangs up."""
        assert self._reader is not None
        with contextlib.suppress(ConnectionError):
            while (line := await self._reader.readline()).endswith(b"\n"):
                self._hear(json.loads(line))

    def _hear(self, said: dict[str, Any]) -> None:
        if (number := said.get("re")) is not None:
            waiting = self._answers.get(number)
            if waiting is not None and not waiting.done():
                waiting.set_result(said)
        elif "grew" in said:
            self._grow(said["grew"], said["open_turn"])
        elif said.get("life") == "ready":
            self.learn(Fact.LOADED)
        elif "timing" in said:
            print(json.dumps(said["timing"]), file=sys.stderr, flush=True)
        elif "kill" in said:  # of something inside, which the sandbox survives
            self.kills[said["kill"]] += 1
        elif "closed" in said:
            self.closed_as = said["closed"]
            self.log.info("sandbox closed", cause=said["closed"])

    def catch_up(self, hello: dict[str, Any]) -> None:
        """What a keeper says at a new connection makes good for what was missed on the old one."""
        if self.session:
            self._grow(hello["last_seq"], hello["open_turn"])

    def _grow(self, last_seq: int, open_turn: str) -> None:
        self.last_seq = last_seq
        self._follow_turn(open_turn)
        self.grew.ring()
        self._on_growth(self)

    def _follow_turn(self, open_turn: str) -> None:
        if open_turn and not self.open_turn:
            self.learn(Fact.TURN_LAUNCHED)
        elif self.open_turn and not open_turn:
            self.learn(Fact.TURN_SETTLED)
        self.open_turn = open_turn

    def hang_up(self) -> None:
        """Closes the connection and wakes whoever waits for an answer on it."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(ConnectionError("the keeper hung up"))

    async def end_keeper(self, timeout_s: float) -> None:
        """Kills the keeper if it lives, and waits for its end; it can't ignore that, so `timeout_s` is a formality."""
        deadline = time.monotonic() + timeout_s
        while not self.keeper_is_dead() and time.monotonic() < deadline:
            # RACE: the lock is held, so the keeper lives and what works in its folder can't be a reused pid.
            for pid in processes.working_in(self.folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(_KILL_PAUSE_S)

    def keeper_is_dead(self) -> bool:
        """Whether the keeper's lock is free; it holds it for life."""
        try:
            lock = os.open(self.folder / "lock", os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(lock)
        return True
