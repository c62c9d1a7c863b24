"""A real fleet for tests: coordinators and runners as processes of their own, a real Postgres, clients that record
what they saw.

Everything listens on loopback, lives below one temporary folder, and is gone afterwards; `Fleet.stop` says what was
left behind.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import Message
from pathlib import Path
from typing import Any

import psutil

KEY = "ash_test_key_of_the_default_tenant"
SECRET = "test-secret"
PATIENCE_S = 30.0 * float(os.environ.get("ASHD_TEST_PATIENCE", "1"))  # more where processors are emulated


def eventually(what: Callable[[], Any], timeout_s: float = PATIENCE_S, every_s: float = 0.05) -> Any:
    """The first truthy answer of `what`; fails when there is none in time."""
    deadline = time.monotonic() + timeout_s
    while True:
        if answer := what():
            return answer
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {getattr(what, '__doc__', None) or what}"
        time.sleep(every_s)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Frame:
    """One frame of an SSE stream, as it was read."""

    id: str
    event: str
    data: Any

    @property
    def place(self) -> tuple[int, int]:
        _, seq, part = self.id.split(".")
        return int(seq), int(part)


@dataclass
class Answer:
    status: int
    body: Any
    headers: Message


class Api:
    """One coordinator's HTTP API."""

    def __init__(self, port: int, key: str = KEY) -> None:
        self.port = port
        self.key = key

    def call(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        raw: bytes | None = None,
        timeout_s: float = 30.0,
        **headers: str,
    ) -> Answer:
        """One request and its whole answer; JSON where it is JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            connection.request(method, path, *self._content(body, raw, headers))
            response = connection.getresponse()
            text = response.read()
            is_json = response.headers.get_content_type() == "application/json"
            return Answer(response.status, json.loads(text) if is_json and text else text, response.headers)
        finally:
            connection.close()

    def _content(self, body: Any, raw: bytes | None, headers: dict[str, str]) -> tuple[bytes | None, dict[str, str]]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        named.setdefault("Authorization", f"Bearer {self.key}")
        if body is not None:
            named.setdefault("Content-Type", "application/json")
            raw = json.dumps(body).encode()
        return raw, named

    def deploy(self, name: str, files: dict[str, str]) -> Answer:
        """An agent from files."""
        import base64

        packed = [{"path": path, "content": base64.b64encode(text.encode()).decode()} for path, text in files.items()]
        answer = self.call("POST", "/api/agents", {"name": name, "files": packed})
        assert answer.status == 201, answer
        return answer

    def session(self, agent: str, **fields: Any) -> str:
        """A new session's id."""
        answer = self.call("POST", "/api/sessions", {"agent": agent, **fields})
        assert answer.status == 201, answer
        session: str = answer.body["session"]["id"]
        return session

    def get_session(self, session: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/api/sessions/{session}").body["session"]
        return found

    def send(
        self,
        session: str,
        content: Any,
        *,
        read: bool = True,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> Stream:
        """A message; its stream, read to the end unless told otherwise."""
        body = {"content": content, **options}
        stream = Stream(self, "POST", f"/api/sessions/{session}/messages", body, headers or {})
        return stream.read_all() if read else stream

    def attach(self, session: str, after: str | None = None, **headers: str) -> Stream:
        """An attached stream, being read by a thread of its own."""
        query = "" if after is None else f"?after={after}"
        return Stream(self, "GET", f"/api/sessions/{session}/stream{query}", None, headers)

    def events(self, session: str) -> list[dict[str, Any]]:
        """All numbered events of a session: messages and timeline, in order."""
        messages = self.call("GET", f"/api/sessions/{session}/messages?limit=1000").body["messages"]
        timeline = self.call("GET", f"/api/sessions/{session}/events?limit=1000").body["events"]
        return sorted([*messages, *timeline], key=lambda event: int(event["sequence"]))


class Stream:
    """An SSE stream, read in a thread into `frames`; `ended` is set when the server or `close` has ended it."""

    def __init__(self, api: Api, method: str, path: str, body: Any, headers: dict[str, str]) -> None:
        self.frames: list[Frame] = []
        self.comments: list[str] = []
        self.ended = threading.Event()
        self._connection = http.client.HTTPConnection("127.0.0.1", api.port, timeout=60)
        self._connection.request(method, path, *api._content(body, None, dict(headers)))
        self._response = self._connection.getresponse()
        self.status = self._response.status
        self.headers = self._response.headers
        self.error = json.loads(self._response.read() or b"null") if self.status != 200 else None
        self._thread: threading.Thread | None = None

    def start(self) -> Stream:
        """Reads on in a thread."""
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def read_all(self) -> Stream:
        if self.status == 200:
            self._read()
        return self

    def _read(self) -> None:
        try:
            for frame in self._parse():
                self.frames.append(frame)
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass  # cut: what was read is what the test looks at
        finally:
            self.ended.set()

    def _parse(self) -> Iterator[Frame]:
        fields: dict[str, str] = {}
        while line := self._response.readline():
            text = line.decode("ascii").rstrip("\n")
            if text.startswith(":"):
                self.comments.append(text)
            elif text:
                name, _, value = text.partition(": ")
                fields[name] = value
            elif fields:
                yield Frame(fields["id"], fields["event"], json.loads(fields["data"]))
                fields = {}

    def close(self) -> None:
        """Hangs up."""
        with contextlib.suppress(OSError, AttributeError):
            self._connection.sock.shutdown(socket.SHUT_RDWR)
        self._connection.close()

    def named(self, event: str) -> list[Frame]:
        return [frame for frame in self.frames if frame.event == event]

    def wait_for(self, event: str, count: int = 1) -> Frame:
        """The count-th frame of that name."""
        return eventually(lambda: self.named(event)[count - 1 :], PATIENCE_S)[0]

    @property
    def last_id(self) -> str:
        return self.frames[-1].id

    @property
    def text(self) -> str:
        """All partial text."""
        return "".join(frame.data["delta"] for frame in self.named("text_delta"))

    @property
    def done(self) -> dict[str, Any]:
        (frame,) = self.named("done")
        assert frame is self.frames[-1]
        data: dict[str, Any] = frame.data
        return data


@dataclass
class Part:
    """One process of ours, with the arguments to start it again."""

    name: str
    arguments: list[str]
    environment: dict[str, str]
    log: Path
    process: subprocess.Popen[bytes] = field(init=False)

    def start(self) -> None:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "ashd", *self.arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, how: signal.Signals = signal.SIGKILL) -> None:
        self.process.send_signal(how)
        self.process.wait(timeout=PATIENCE_S)

    def stop(self) -> int:
        """SIGTERM and its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise

    def children(self, title: str) -> list[psutil.Process]:
        """Live processes below this one whose title begins so."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if " ".join(child.cmdline()).startswith(title):
                        found.append(child)
        return found


class Fleet:
    """Coordinators and runners on one database."""

    def __init__(self, database_url: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ashd-fleet-"))
        self.folder.chmod(0o711)
        self.database_url = database_url
        self.coordinators: list[Part] = []
        self.runners: list[Part] = []
        self.apis: list[Api] = []

    def add_coordinator(self, config: str = "", **variables: str) -> Api:
        """One more coordinator, ready; `config` is the text of its file."""
        number = len(self.coordinators)
        file = self.folder / f"coordinator-{number}.yaml"
        file.write_text(config)
        port, registry = free_port(), free_port()
        part = self._part(
            f"coordinator-{number}",
            ["coordinator", "-c", str(file)],
            ASH_PORT=str(port),
            ASH_REGISTRY_PORT=str(registry),
            ASH_DATABASE_URL=self.database_url,
            ASH_API_KEY=KEY,
            ASH_DATA_DIR=str(self.folder / f"coordinator-{number}"),
            **variables,
        )
        self.coordinators.append(part)
        api = Api(port)
        self.apis.append(api)
        self.start_coordinator(number)
        return api

    def start_coordinator(self, number: int) -> None:
        """Starts it, for the first time or again on its ports, and waits until it is ready."""
        self.coordinators[number].start()
        eventually(lambda: self._is_ready(number))

    def _is_ready(self, number: int) -> bool:
        """the coordinator is ready"""
        assert self.coordinators[number].process.poll() is None, self.coordinators[number].log.read_text()[-3000:]
        with contextlib.suppress(OSError, http.client.HTTPException):
            return self.apis[number].call("GET", "/ready").status == 200
        return False

    def add_runner(self, config: str = "", **variables: str) -> Part:
        """One more runner, registered; `config` is the text of its file."""
        number = len(self.runners)
        file = self.folder / f"runner-{number}.yaml"
        file.write_text(config)
        server = ",".join(f"127.0.0.1:{part.environment['ASH_REGISTRY_PORT']}" for part in self.coordinators)
        part = self._part(
            f"runner-{number}",
            ["runner", "-c", str(file)],
            **{
                "ASH_RUNNER_ID": f"runner-{number}",
                "ASH_RUNNER_PORT": str(free_port()),
                "ASH_SERVER_URL": f"grpc://{server}",
                "ASH_STATE_DIR": str(self.folder / f"runner-{number}"),
                "ASH_REAL_SDK": "0",
                **variables,
            },
        )
        self.runners.append(part)
        part.start()
        self.wait_for_runners(len(self.runners))
        return part

    def wait_for_runners(self, count: int) -> None:
        eventually(lambda: sum(runner["healthy"] for runner in self.listed_runners()) >= count)

    def listed_runners(self) -> list[dict[str, Any]]:
        answer = self.apis[0].call("GET", "/api/internal/runners", Authorization=f"Bearer {SECRET}")
        runners: list[dict[str, Any]] = answer.body["runners"]
        return runners

    def _part(self, name: str, arguments: list[str], **variables: str) -> Part:
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "ASH_INTERNAL_SECRET": SECRET,
            "ASH_LOG_FORMAT": "console",
            "PYTHONPATH": os.pathsep.join([*sys.path[:1], os.environ.get("PYTHONPATH", "")]),
            **variables,
        }
        return Part(name, arguments, environment, self.folder / f"{name}.log")

    def keepers(self) -> list[psutil.Process]:
        """Keepers of this fleet's runners, live ones."""
        processes = psutil.process_iter(["cmdline", "cwd"])
        return [one for one in processes if str(one.info["cwd"] or "").startswith(str(self.folder))]

    def keepers_of(self, session: str) -> list[psutil.Process]:
        title, processes = f"ashd: keeper {session}", psutil.process_iter(["cmdline"])
        return [one for one in processes if " ".join(one.info["cmdline"] or []).strip() == title]

    def keeper_of(self, session: str) -> psutil.Process:
        (keeper,) = self.keepers_of(session)
        return keeper

    def stop(self) -> list[str]:
        """Ends everything; what was left behind, which should be nothing."""
        left: list[str] = []
        for part in [*self.runners, *self.coordinators]:
            try:
                if part.process.poll() is None and (code := part.stop()) != 0:
                    left.append(f"{part.name} ended with {code}")
            except subprocess.TimeoutExpired:
                left.append(f"{part.name} did not end")
        left += [f"process {process.pid} {process.info['cmdline']}" for process in self.keepers()]
        for process in self.keepers():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for runner in self.runners:
            left += [str(folder) for folder in Path(runner.environment["ASH_STATE_DIR"]).glob("sandboxes/*")]
        if not left:
            shutil.rmtree(self.folder)
        return left
