"""The echo runtime: answers with what it was asked. For trying out and measuring everything but an agent."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

from sandbox.turns import Message, Runtime, Session


class Echo:
    """Gives the content back, as text or as the content blocks it was."""

    async def load(self) -> None:
        """Nothing to load."""

    async def turn(self, message: Message, session: Session) -> AsyncGenerator[str | dict[str, Any]]:
        if isinstance(message.content, str):
            yield message.content
        else:
            yield {"type": "assistant", "message": {"role": "assistant", "content": message.content}}

    def memory_kill(self, kill: dict[str, Any]) -> None:
        """Nobody to tell."""

    async def close(self) -> None:
        """Nothing to end."""


def make(claim: dict[str, Any]) -> Runtime:
    return Echo()
