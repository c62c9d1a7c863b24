"""The python runtime: an agent is a function in the workspace, `agent:turn` unless agent.yaml says otherwise.

The function may be an async generator, a coroutine, a generator or a plain function (the last two run in a thread). It
is imported once; its module's globals live as long as the sandbox.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import sys
import threading
import traceback
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from sandbox.turns import AgentError, Message, Runtime, Session

_QUEUE_LENGTH = 64


class PythonAgent:
    """Calls the agent's function once a turn."""

    def __init__(self, workspace: str, entry: str) -> None:
        self._workspace = workspace
        self._entry = entry
        self._function: Callable[[Message, Session], Any] | None = None

    async def load(self) -> None:
        module_name, _, function_name = self._entry.partition(":")
        sys.path.insert(0, self._workspace)
        try:
            function = getattr(importlib.import_module(module_name), function_name or "turn", None)
        except BaseException as error:  # the door to the agent's module: SystemExit in it is a failure as well
            traceback.print_exc()
            last = traceback.format_exception_only(error)[-1].strip()
            raise AgentError(f"{module_name}.py could not be imported: {last}", "agent.import_failed") from None
        if not callable(function):
            raise AgentError(
                f"{module_name}.py has no function {function_name or 'turn'}(message, session); "
                "define it, or name another as `entry: module:function` in agent.yaml",
                "agent.no_entry",
            )
        self._function = function

    async def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        assert self._function is not None
        function = self._function
        if inspect.isasyncgenfunction(function):
            async with aclosing(function(message, session)) as items:
                async for item in items:
                    yield item
        elif inspect.iscoroutinefunction(function):
            if (item := await function(message, session)) is not None:
                yield item
        else:
            async with aclosing(_in_thread(lambda: function(message, session))) as items:
                async for item in items:
                    yield item

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """`session.memory_kills` tells."""

    async def close(self) -> None:
        """The bridge's end ends the agent."""


async def _in_thread(call: Callable[[], Any]) -> AsyncGenerator[Any]:
    """What a function returns, or what the generator it returns yields, made in a thread of its own.

    The thread waits while nobody takes what it made, and closes the generator when nobody will any more. One that
    never ends does not keep the sandbox alive.
    """
    loop = asyncio.get_running_loop()
    made: asyncio.Queue[tuple[str, Any]] = asyncio.Queue(_QUEUE_LENGTH)
    abandoned = threading.Event()

    def put(kind: str, value: Any) -> None:
        asyncio.run_coroutine_threadsafe(made.put((kind, value)), loop).result()

    def produce() -> None:
        try:
            result = call()
            if inspect.isgenerator(result):
                for item in result:
                    put("item", item)
                    if abandoned.is_set():
                        result.close()
            elif result is not None:
                put("item", result)
            put("end", None)
        except BaseException as error:  # carried over to the turn, which reports it
            put("error", error)

    threading.Thread(target=produce, name="agent turn", daemon=True).start()
    try:
        while True:
            kind, value = await made.get()
            if kind == "item":
                yield value
            elif kind == "error":
                if isinstance(value, Exception):
                    raise value
                raise AgentError(f"the agent raised {type(value).__name__}", "agent.failed")
            else:
                return
    finally:
        abandoned.set()
        while not made.empty():  # whoever waits to put something goes on, and sees that it is abandoned
            made.get_nowait()


def make(claim: dict[str, Any]) -> Runtime:
    entry = claim["entry"][0] if claim["entry"] else "agent:turn"
    return PythonAgent(claim["workspace"], entry)
