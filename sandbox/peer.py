"""One end of a stream socket in a keeper's selector: reads when asked to, never blocks on writing."""

from __future__ import annotations

import selectors
import socket
from collections.abc import Callable

READ_BYTES = 64 * 1024
"""At once. More would keep a keeper from its supervisor for longer, where it is thousands of tiny frames."""
_REST_READS = 64


class Peer:
    """A non-blocking stream socket with a bounded buffer for what it doesn't take yet.

    `received` gets each piece of bytes, and b"" once when the other side has closed; after that, and after `close`,
    nothing.
    """

    def __init__(
        self, sock: socket.socket, selector: selectors.BaseSelector, received: Callable[[bytes], None], max_backlog: int
    ) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._selector = selector
        self._received = received
        self._max_backlog = max_backlog
        self._backlog = bytearray()
        self._reading = True
        self._waiting = False
        self._drained = False
        self.closed = False
        selector.register(sock, selectors.EVENT_READ, self._ready)

    @property
    def idle(self) -> bool:
        """Nothing waits to be taken by the other side."""
        return not self._backlog

    def send(self, data: bytes) -> None:
        """Sends now what the other side takes and the rest later; one that lets more than max_backlog wait is cut
        off.
        """
        if self.closed:
            return
        self._backlog += data
        self._write()
        if len(self._backlog) > self._max_backlog:
            self.close()

    def pause_reading(self, paused: bool) -> None:
        """Stops taking what the other side sends, which makes it wait; or goes on."""
        if self.closed or self._reading != paused:
            return
        self._reading = not paused
        self._watch()

    def read_rest(self) -> None:
        """Takes what a dead sender left, which is at most what a socket's buffer holds."""
        for _ in range(_REST_READS):
            if self.closed:
                return
            self._read()
            if self._drained:
                return

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            if self._sock.fileno() in self._selector.get_map():
                self._selector.unregister(self._sock)
            self._sock.close()

    def _ready(self, mask: int) -> None:
        # RACE: an event handled before this one, in the same round of the selector, may have closed us.
        if mask & selectors.EVENT_WRITE and not self.closed:
            self._write()
        if mask & selectors.EVENT_READ and not self.closed:
            self._read()

    def _read(self) -> None:
        self._drained = False
        try:
            data = self._sock.recv(READ_BYTES)
        except BlockingIOError:
            self._drained = True
            return
        except OSError:
            data = b""
        if not data:
            self._drained = True
            self.close()
        self._received(data)

    def _write(self) -> None:
        waited = self._waiting
        try:
            while self._backlog:
                sent = self._sock.send(self._backlog)
                del self._backlog[:sent]
        except BlockingIOError:
            pass
        except OSError:
            self._backlog.clear()  # closed by the other side; reading will tell
        self._waiting = bool(self._backlog)
        if self._waiting != waited:
            self._watch()

    def _watch(self) -> None:
        """Tells the selector what we wait for now: to read, to write what is held, both or neither."""
        wanted = (selectors.EVENT_READ if self._reading else 0) | (selectors.EVENT_WRITE if self._backlog else 0)
        registered = self._sock.fileno() in self._selector.get_map()
        if wanted and registered:
            self._selector.modify(self._sock, wanted, self._ready)
        elif wanted:
            self._selector.register(self._sock, wanted, self._ready)
        elif registered:
            self._selector.unregister(self._sock)
