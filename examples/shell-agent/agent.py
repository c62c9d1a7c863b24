"""Runs each message as a shell command in its workspace and streams what the command prints.

The working directory lasts from turn to turn: `cd` works as in a terminal. An interrupt stops the command and what it
started.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

READ_BYTES = 64 * 1024
STOP_GRACE_S = 0.5  # less than the second an interrupted agent has before its turn is cancelled
LAST_WORDS_S = 0.2

# However the command ends, the shell leaves its working directory in the file $2.
SCRIPT = 'trap \'pwd -P >"$2"\' EXIT\neval "$1"'

_folder: Path | None = None


async def turn(message: Any, session: Any) -> AsyncIterator[str | dict[str, Any]]:
    """Runs one command: its output as it comes, then how it ended."""
    global _folder
    folder = _folder if _is_there(_folder) else session.workspace
    command = message.text.strip()
    if not command:
        yield "Send a shell command, for example: ls -l"
        return
    with tempfile.NamedTemporaryFile() as left_in:
        async with Command(command, folder, left_in.name) as running:
            stopper = asyncio.create_task(running.stop_when(session.interrupted), name="stop when interrupted")
            try:
                async for text in running.output():
                    yield text
            finally:
                stopper.cancel()
        if where := left_in.read().decode("utf-8", "surrogateescape").rstrip("\n"):
            _folder = Path(where)
    if running.code:
        yield f"[{describe(running.code)}]\n"
    yield {
        "type": "result",
        "subtype": "success" if running.code == 0 else "error_during_execution",
        "is_error": running.code != 0,
        "result": describe(running.code),
        "num_turns": 1,
        "session_id": session.id,
    }


def _is_there(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir()


def describe(code: int) -> str:
    """An exit code in words."""
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


class Command:
    """A command in a process group of its own. Leaving it kills what is still in the foreground of it."""

    def __init__(self, command: str, folder: Path, left_in: str) -> None:
        self._argv = ["/bin/sh", "-c", SCRIPT, "sh", command, left_in]
        self._folder = folder

    async def __aenter__(self) -> Command:
        read_end, write_end = os.pipe()
        self._output = asyncio.StreamReader()
        self._transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(self._output), os.fdopen(read_end, "rb", buffering=0)
        )
        try:
            self._process = await asyncio.create_subprocess_exec(
                *self._argv,
                cwd=self._folder,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=write_end,
                stderr=write_end,
                start_new_session=True,
            )
        except BaseException:
            self._transport.close()
            raise
        finally:
            os.close(write_end)
        self._ended = asyncio.create_task(self._process.wait(), name="wait for the command")
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._ended.done():
            self._signal(signal.SIGKILL)
        self.code = await self._ended
        self._transport.close()

    async def output(self) -> AsyncIterator[str]:
        """What the command prints until it ends. What it left running in the background is not waited for."""
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while data := await self._read():
            if text := decoder.decode(data):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    async def _read(self) -> bytes:
        reading = asyncio.ensure_future(self._output.read(READ_BYTES))
        try:
            await asyncio.wait([reading, self._ended], return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                await asyncio.wait([reading], timeout=LAST_WORDS_S)
            return reading.result() if reading.done() else b""
        finally:
            reading.cancel()

    async def stop_when(self, interrupted: asyncio.Event) -> None:
        """Asks the command to stop, as ^C does, then forces it."""
        await interrupted.wait()
        self._signal(signal.SIGINT)
        await asyncio.sleep(STOP_GRACE_S)
        self._signal(signal.SIGKILL)

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)
