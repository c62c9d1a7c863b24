"""The HTTP client of ashd's own commands: JSON requests, uploads, and server-sent events, on the standard library.

Covers: the error envelope (api: Conventions) as exceptions, and following a turn through broken connections.
Leaves out: what is printed about it (commands/).
"""

from __future__ import annotations

import contextlib
import http.client
import json
import time
import urllib.parse
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

from ashd.errors import AshdError

DEFAULT_SERVER = "http://127.0.0.1:4100"
ANSWER_TIMEOUT_S = 10.0
STREAM_SILENCE_S = 60.0
"""A stream sends a comment every 15 s; four missed ones mean that nobody is there."""
REATTACH_TIMEOUT_S = 30.0
REATTACH_PAUSE_S = 0.5


class ServerUnreachable(AshdError):
    """Nothing answered at the server's address, or it stopped in mid-answer."""

    code = "server.unreachable"
    retryable = True


class ServerRefused(AshdError):
    """The server answered with an error; `status`, `code` and `message` are the envelope's."""

    def __init__(self, status: int, message: str, code: str) -> None:
        super().__init__(message, code=code)
        self.status = status


@dataclass(frozen=True)
class Frame:
    """One server-sent event (WHATWG HTML, Server-sent events): `id` is the cursor after it, "" if it has none."""

    event: str
    data: Any
    id: str = ""


class Client:
    """Requests to one server under one key. Every call opens its own connection: commands are short."""

    def __init__(self, server: str, api_key: str | None, *, internal_secret: str | None = None) -> None:
        self.server = server.rstrip("/")
        self._api_key = api_key
        self._internal_secret = internal_secret

    def get(self, path: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> Any:
        return self._json(self._send("GET", path, timeout_s=timeout_s))

    def post(self, path: str, body: Any, *, timeout_s: float = STREAM_SILENCE_S) -> Any:
        return self._json(self._send("POST", path, body=json.dumps(body).encode(), timeout_s=timeout_s))

    def delete(self, path: str) -> Any:
        return self._json(self._send("DELETE", path, timeout_s=STREAM_SILENCE_S))

    def put_file(self, path: str, content: IO[bytes]) -> Any:
        """Send a file from its beginning without holding it in memory."""
        headers = {"Content-Type": "application/gzip", "Content-Length": str(_size(content))}
        return self._json(self._send("PUT", path, body=content, headers=headers, timeout_s=STREAM_SILENCE_S))

    def turn(self, session_id: str, content: str) -> Iterator[Frame]:
        """Send a message and yield its frames up to `done`, whatever happens to the connection on the way.

        A broken stream is taken up again where it broke: by the cursor once there is one, before that by the same
        idempotency key, which never starts a second turn. Raises ServerUnreachable after REATTACH_TIMEOUT_S of trying.
        """
        body = json.dumps({"content": content, "includePartialMessages": True}).encode()
        session = f"/api/sessions/{urllib.parse.quote(session_id, safe='')}"
        start = ("POST", f"{session}/messages", body, {"Idempotency-Key": str(uuid.uuid4())})
        cursor = ""
        deadline = 0.0  # until the server has answered, there is nothing to take up again
        while True:
            follow = ("GET", f"{session}/stream", None, {"Last-Event-ID": cursor})
            method, path, content_bytes, headers = follow if cursor else start
            try:
                stream = self._send(method, path, body=content_bytes, headers=headers)
                deadline = deadline or time.monotonic() + REATTACH_TIMEOUT_S
                for frame in _frames(stream):
                    cursor, deadline = frame.id or cursor, time.monotonic() + REATTACH_TIMEOUT_S
                    yield frame
                    if frame.event == "done":
                        return
            except ValueError:
                raise _not_ashd(self.server, 200) from None
            except (AshdError, OSError, http.client.HTTPException) as error:
                if not deadline or not _may_pass(error):
                    raise
            if time.monotonic() > deadline:
                raise ServerUnreachable(f"The stream from {self.server} ended early and did not come back.")
            time.sleep(REATTACH_PAUSE_S)

    def _send(
        self,
        method: str,
        path: str,
        *,
        body: bytes | IO[bytes] | None = None,
        headers: dict[str, str] | None = None,
        timeout_s: float = STREAM_SILENCE_S,
    ) -> http.client.HTTPResponse:
        """A response with a status below 400; raises ServerRefused for others, ServerUnreachable without one."""
        connection = self._connect(timeout_s)
        try:
            connection.connect()
        except OSError as error:
            raise ServerUnreachable(f"No server answers at {self.server} ({_reason(error)}).") from None
        try:
            connection.request(method, path, body=body, headers=self._headers(path) | (headers or {}))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server may have answered (413) and closed before it took the whole body
        except OSError as error:
            raise ServerUnreachable(f"{self.server} does not take the request ({_reason(error)}).") from None
        try:
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.server} did not answer ({_reason(error)}).") from None
        if response.status >= 400:
            raise _refusal(response)
        return response

    def _connect(self, timeout_s: float) -> http.client.HTTPConnection:
        kinds: dict[str, type[http.client.HTTPConnection]] = {
            "http": http.client.HTTPConnection,
            "https": http.client.HTTPSConnection,
        }
        with contextlib.suppress(ValueError):  # of a port that is none, half a bracket
            url = urllib.parse.urlsplit(self.server)
            if url.scheme in kinds and url.hostname:
                return kinds[url.scheme](url.hostname, url.port, timeout=timeout_s)
        raise AshdError(f'"{self.server}" is not a server: write e.g. http://127.0.0.1:4100', code="usage")

    def _headers(self, path: str) -> dict[str, str]:
        internal = path.startswith("/api/internal/")
        key = (self._internal_secret or self._api_key) if internal else self._api_key
        if key and not (key.isascii() and key.isprintable()):
            raise AshdError("The key has characters that no key has; copy it again.", code="usage")
        return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def _json(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read() or b"null")
        except (OSError, http.client.HTTPException) as error:
            raise ServerUnreachable(f"{self.server} stopped in mid-answer ({_reason(error)}).") from None
        except ValueError:
            raise _not_ashd(self.server, response.status) from None


def _not_ashd(server: str, status: int) -> ServerRefused:
    return ServerRefused(status, f"{server} does not answer like ashd.", "not_ashd")


def _may_pass(error: Exception) -> bool:
    """Whether a turn already begun is worth another attempt after `error`."""
    return not isinstance(error, ServerRefused) or error.status >= 500


def _refusal(response: http.client.HTTPResponse) -> ServerRefused:
    text = response.read(65536)
    try:
        envelope = json.loads(text)
        return ServerRefused(response.status, str(envelope["error"]), str(envelope.get("code", "")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return ServerRefused(response.status, f"{response.status} {response.reason}", "not_ashd")


def _frames(stream: http.client.HTTPResponse) -> Iterator[Frame]:
    """Whole frames only: one that breaks off before its blank line was never sent."""
    fields: dict[str, str] = {}
    for raw in stream:
        line = raw.decode("utf-8").rstrip("\r\n")
        if not line and "data" in fields:
            yield Frame(fields.get("event", "message"), json.loads(fields["data"]), fields.get("id", ""))
        if not line:
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def _size(content: IO[bytes]) -> int:
    end = content.seek(0, 2)
    content.seek(0)
    return end


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error) or type(error).__name__
