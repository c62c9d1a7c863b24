"""Where supervisors come to their keeper: one at a time, the newest, each told at once where things stand.

Covers: the listening socket, commands and their answers. Leaves out: what a command does (keeper.py).
"""

from __future__ import annotations

import json
import os
import selectors
import socket
from collections.abc import Callable, Mapping
from typing import Any

from sandbox.peer import Peer
from sandbox.protocol import MAX_COMMAND_BYTES, LineReader, encode_line

_UNTAKEN_BYTES = 256 * 1024

Command = Callable[[dict[str, Any]], dict[str, Any] | None]


class Refused(Exception):
    """A command that can't be obeyed now; `code` goes back to the supervisor."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class Reception:
    """Listens on `path` in a keeper's selector.

    `standing` is what a supervisor that comes is told; `commands` are what it may ask for, by name: each returns its
    answer, None if that is given later or never, and raises Refused.
    """

    def __init__(
        self,
        path: str,
        selector: selectors.BaseSelector,
        standing: Callable[[], dict[str, Any]],
        commands: Mapping[str, Command],
    ) -> None:
        self._selector = selector
        self._standing = standing
        self._commands = commands
        self._supervisor: Peer | None = None
        self._unanswered: int | None = None
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with_umask = os.umask(0o077)
        self._listener.bind(path)  # relative: the path of a socket may have 107 bytes only
        os.umask(with_umask)
        self._listener.listen(4)
        self._listener.setblocking(False)
        selector.register(self._listener, selectors.EVENT_READ, self._accept)

    @property
    def is_waiting(self) -> bool:
        """A supervisor is there and has taken all it was told."""
        return self._supervisor is not None and self._supervisor.idle

    def tell(self, message: dict[str, Any]) -> None:
        """Says something to the supervisor, if there is one."""
        if self._supervisor is not None:
            self._supervisor.send(encode_line(message))

    def answer_later(self, command: dict[str, Any]) -> None:
        """This command's answer is what `answer` will say, unless another supervisor comes before."""
        self._unanswered = command["re"]

    def answer(self, answer: dict[str, Any]) -> None:
        """Answers the command that waits for it, if there is one."""
        if self._unanswered is not None:
            self.tell({"re": self._unanswered, **answer})
            self._unanswered = None

    def _accept(self, _: int) -> None:
        try:
            connection, _address = self._listener.accept()
        except OSError:
            return
        self._meet(connection)

    def _meet(self, connection: socket.socket) -> None:
        """A supervisor has come: it takes the place of the one before."""
        if self._supervisor is not None:
            self._supervisor.close()
        commands = LineReader(MAX_COMMAND_BYTES)

        def received(data: bytes) -> None:
            for line in commands.feed(data):
                self._obey(json.loads(line))

        self._supervisor = Peer(connection, self._selector, received, _UNTAKEN_BYTES)
        self._unanswered = None
        self.tell({"hello": self._standing()})

    def _obey(self, command: dict[str, Any]) -> None:
        """One command of the supervisor; the answer carries its `re`."""
        try:
            obey = self._commands.get(command["cmd"])
            if obey is None:  # a newer supervisor's; it must not cost the session
                raise Refused("command.unknown", f"this keeper does not know the command {command['cmd']}")
            answer = obey(command)
        except Refused as refusal:
            answer = {"error": str(refusal), "code": refusal.code}
        if answer is not None:
            self.tell({"re": command.get("re"), **answer})
