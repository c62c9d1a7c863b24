"""gunicorn's asyncio worker, with what it leaves out: the backlog, send buffers, our envelope around what it refuses by
itself, and an end that doesn't wait for streams.

Checked against gunicorn 27.0; each override says what it stands in for.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from typing import Any

from gunicorn.asgi.protocol import ASGIProtocol
from gunicorn.glogging import Logger
from gunicorn.workers import gasgi
from setproctitle import setproctitle

from ashd import log
from ashd.coordinator import problems

_log = log.get(__name__)

_HELD_BACK = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})


def hold_signals_over_forks() -> None:
    """For the master: a worker is born with these signals blocked, and unblocks them when its event loop runs.

    RACE: until then, whoever gets a signal forgets it: the master's handler, inherited over the fork, or uvloop's; and
    the master would wait graceful_timeout for a worker that doesn't know. Blocked, it stays pending (signal(7)).
    """
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _HELD_BACK),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _HELD_BACK),
    )


class Connection(ASGIProtocol):  # type: ignore[misc]
    """A client's connection that its worker knows while it is idle: between two requests, kept alive."""

    def _arm_keepalive_timer(self) -> None:
        super()._arm_keepalive_timer()
        self.worker.idle.add(self)

    def _cancel_keepalive_timer(self) -> None:
        super()._cancel_keepalive_timer()
        self.worker.idle.discard(self)

    def _send_error_response(self, status: int, message: str, extra_headers: Iterable[tuple[str, str]] = ()) -> None:
        """What is refused without asking the application, such as a broken request line: our envelope, where gunicorn
        sends plain text.
        """
        request_id, body = str(uuid.uuid4()), problems.unread(status, message)
        _log.info("request refused unread", request=request_id, status=status)
        headers = [
            ("Content-Type", "application/json"),
            ("Content-Length", str(len(body))),
            ("X-Request-Id", request_id),
            *extra_headers,
            ("Connection", "close"),
        ]
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", *(f"{name}: {value}" for name, value in headers)]
        self._safe_write("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    def close_idle(self) -> None:
        """As if its time were over."""
        self._keepalive_timeout()


gasgi.ASGIProtocol = Connection  # the worker makes its connections of this name


class CoordinatorWorker(gasgi.ASGIWorker):  # type: ignore[misc]
    """One coordinator worker. Its application is a `lifespan.Coordinator`."""

    slot = 0
    """Which of the workers of one time this is (slots.py)."""

    _tuned = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.idle: set[Connection] = set()

    def init_process(self) -> None:
        setproctitle("ashd: coordinator worker")
        super().init_process()

    def init_signals(self) -> None:
        super().init_signals()
        self.loop.call_soon(signal.pthread_sigmask, signal.SIG_UNBLOCK, _HELD_BACK)

    def notify(self) -> None:
        """Called each second once the servers listen; the first time, sets what the worker doesn't pass on to its
        sockets.

        create_server() is called without a backlog, so 100 stands whatever was configured; listen(2) again replaces
        it. Connections inherit the send buffer: set, the kernel stops growing it to megabytes for a client that
        doesn't read (tcp(7)).
        """
        super().notify()
        if self._tuned or not self.servers:
            return
        self._tuned = True
        for listener in self.sockets:
            listener.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self.cfg.ashd_send_buffer)
            listener.sock.listen(self.cfg.backlog)

    def handle_exit_signal(self) -> None:
        """SIGTERM: streams end now, each with a valid cursor, and idle connections close; otherwise both would be
        waited for.
        """
        self.asgi.stop_streams()
        super().handle_exit_signal()
        for connection in list(self.idle):
            connection.close_idle()


class CoordinatorLog(Logger):  # type: ignore[misc]
    """gunicorn's own messages, through our log."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.INFO)
        self.access_log.disabled = True

    def reopen_files(self) -> None:
        """We write to stderr only."""
