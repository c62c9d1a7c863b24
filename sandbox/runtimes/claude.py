"""The claude runtime: agents that are a CLAUDE.md.

With `ASH_REAL_SDK=0` a mock answers, for tests and for trying out without a key. Without it, turns need the Claude
Agent SDK, which this version does not run yet: the first turn says so.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sandbox.turns import AgentError, Message, Runtime, Session

_NO_KEY = (
    "This agent needs a key for the model and has none: set ANTHROPIC_API_KEY in the agent's env or the session's "
    "extraEnv, or start the runner with ASH_REAL_SDK=0 for a mock."
)
_NO_SDK = (
    "This version of ashd does not run the Claude Agent SDK yet. Start the runner with ASH_REAL_SDK=0 for a mock, "
    "or bring the agent's own loop as agent.py (runtime python) or as a program (runtime command)."
)


class Mock:
    """Answers with the turn's number and the prompts so far."""

    async def load(self) -> None:
        """Nothing to load."""

    async def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        prompts = [_text(entry["content"]) for entry in session.history if entry["role"] == "user"]
        resumed = "[Resumed session] " if session.turn > 1 else ""
        yield f"{resumed}[Mock] Turn {session.turn} | History: {' | '.join([*prompts, message.text])}"

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """Nobody to tell."""

    async def close(self) -> None:
        """Nothing to end."""


class Unavailable:
    """Stands where the model would be, and says what is missing."""

    def __init__(self, env: dict[str, str]) -> None:
        self._env = env

    async def load(self) -> None:
        """Loads, so that files and settings of the session can be looked at."""

    async def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        if not self._env.get("ANTHROPIC_API_KEY") and not self._env.get("CLAUDE_CODE_USE_BEDROCK"):
            raise AgentError(_NO_KEY, "claude.no_key")
        if session.turn:  # always: what makes this a generator comes after
            raise AgentError(_NO_SDK, "claude.not_available")
        yield ""

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """Nobody to tell."""

    async def close(self) -> None:
        """Nothing to end."""


def _text(content: Any) -> str:
    return Message(content, {}).text


def make(claim: dict[str, Any]) -> Runtime:
    return Unavailable(claim["env"]) if claim["real_sdk"] else Mock()
