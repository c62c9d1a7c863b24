"""How long it takes to create a session, and to send a message and have its whole answer.

    python loadtest/roundtrip.py --url http://127.0.0.1:4100 --api-key ash_... --messages 200 --concurrency 1 8

Covers: the latency of POST /api/sessions and POST /api/sessions/:id/messages as a client sees it, up to `done`.
Leaves out: throughput at saturation, agents that do something. README.md says what each number means.

Needs nothing but Python; it imports nothing of ashd, so that it measures any server that speaks the API.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import math
import os
import platform
import queue
import re
import secrets
import shlex
import ssl
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

MOST_SESSIONS = 10_000
MOST_MESSAGES = 1_000_000
MOST_CONCURRENCY = 256
MOST_SECONDS = 3600
PROGRESS_PAUSE_S = 0.1
KEPT_ERRORS = 5
SWITCH_INTERVAL_S = 0.0005
"""Threads of this program wait for each other at most so long; Python's own 5 ms would show in the percentiles."""

OK, FAILED, UNUSABLE = 0, 1, 3

_NOT_SHOWN = ("--api-key", "--label", "--note", "--machine", "--commit")

ROOT = Path(__file__).resolve().parents[1]


# ---------------------------------------------------------------- numbers


def percentile(ordered: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all are not above (nearest rank); `ordered` is sorted."""
    if not ordered:
        raise ValueError("no values")
    if not 0 < percent <= 100:
        raise ValueError(f"{percent} is not a percentage above 0")
    return ordered[math.ceil(percent / 100 * len(ordered)) - 1]


@dataclass(frozen=True)
class Summary:
    """Latencies of one kind, in milliseconds."""

    count: int
    min: float
    p50: float
    p95: float
    p99: float
    max: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Summary | None:
        """None when there is nothing to summarise."""
        if not seconds:
            return None
        ms = sorted(value * 1000 for value in seconds)
        points = (ms[0], *(percentile(ms, point) for point in (50, 95, 99)), ms[-1])
        return cls(len(ms), *(round(point, 3) for point in points))


# ---------------------------------------------------------------- the client


class Failure(Exception):
    """A request did not do what it should have. `status` is 0 where there was no answer, or a broken one."""

    def __init__(self, text: str, status: int = 0, code: str = "") -> None:
        super().__init__(text)
        self.status = status
        self.code = code


class Connection:
    """One keep-alive connection. A request leaves in one piece; http.client would send head and body apart."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float) -> None:
        parts = urllib.parse.urlsplit(url)
        assert parts.hostname is not None
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._http = kind(parts.hostname, parts.port, timeout=timeout_s)
        self._head = f"Host: {parts.netloc}\r\nContent-Type: application/json\r\n"
        if api_key:
            self._head += f"Authorization: Bearer {api_key}\r\n"
        self._prefix = parts.path.rstrip("/")

    def open(self) -> None:
        """Connects, so that the first request doesn't pay for it. http.client sets TCP_NODELAY."""
        if self._http.sock is None:
            self._http.connect()

    def close(self) -> None:
        self._http.close()

    def json(self, method: str, path: str, body: Any = None) -> Any:
        """A request and its JSON answer. Raises Failure."""
        response = self._exchange(method, path, body)
        try:
            return json.loads(response.read() or b"null")
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Failure(f"{method} {path}: broken answer: {error!r}") from None

    def turn(self, path: str, body: Any) -> Turn:
        """A message and its stream up to `done`. Raises Failure."""
        started = time.perf_counter()
        response = self._exchange("POST", path, body)
        try:
            turn = _read_turn(response, started)
            response.read()  # what is left is the end of the body; the connection is free again
        except (OSError, http.client.HTTPException, ValueError) as error:
            self.close()
            raise Failure(f"POST {path}: broken stream: {error!r}") from None
        return turn

    def _exchange(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._head}Content-Length: {len(content)}\r\n\r\n"
        try:
            self.open()
            self._http.sock.sendall(head.encode("ascii") + content)
            response = http.client.HTTPResponse(self._http.sock, method=method)
            response.begin()
            if response.status >= 400:
                text, code = _reason(response.read(4096))
                raise Failure(f"{method} {path}: {response.status} {text}", response.status, code)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Failure(f"{method} {path}: {error!r}") from None
        except Failure:
            self.close()
            raise
        return response


@dataclass(frozen=True)
class Turn:
    """What one message's stream was. Times in seconds from the first byte sent."""

    first_frame: float
    first_event: float
    done: float
    outcome: str
    text: str


def _read_turn(response: http.client.HTTPResponse, started: float) -> Turn:
    """Reads frames (WHATWG HTML, Server-sent events) up to `done`. Raises ValueError when it doesn't come."""
    name, data, text = "", b"", ""
    first_frame = first_event = 0.0
    while line := response.readline():
        if line.startswith(b"event:"):
            name = line[6:].strip().decode()
        elif line.startswith(b"data:"):
            data = line[5:].strip()
        elif line == b"\n" and name:
            now = time.perf_counter() - started
            first_frame = first_frame or now
            if name != "session_start":
                first_event = first_event or now
            if name == "done":
                return Turn(first_frame, first_event, now, str(json.loads(data)["outcome"]), text)
            if name == "message":
                text += _assistant_text(json.loads(data))
            name = ""
    raise ValueError("the stream ended without `done`")


def _assistant_text(message: dict[str, Any]) -> str:
    if message.get("type") != "assistant":
        return ""
    return "".join(block.get("text", "") for block in message["message"]["content"])


def _reason(body: bytes) -> tuple[str, str]:
    """Text and code of an error's envelope; of anything else its beginning, and no code."""
    try:
        envelope = json.loads(body)
        return str(envelope["error"]), str(envelope.get("code", ""))
    except (ValueError, KeyError, TypeError, AttributeError):
        return body[:200].decode("utf-8", "replace"), ""


# ---------------------------------------------------------------- one run


@dataclass
class Run:
    """What was asked for and what was measured at one concurrency. Times in seconds."""

    concurrency: int
    sessions: int
    messages: int
    create: list[float] = field(default_factory=list)
    first_frame: list[float] = field(default_factory=list)
    first_event: list[float] = field(default_factory=list)
    done: list[float] = field(default_factory=list)
    delete: list[float] = field(default_factory=list)
    failures: int = 0
    errors: list[str] = field(default_factory=list)
    message_seconds: float = 0.0
    client_cpu_seconds: float = 0.0
    cut_short: bool = False

    def failed(self, error: Exception) -> None:
        self.failures += 1
        if len(self.errors) < KEPT_ERRORS:
            self.errors.append(str(error))

    def report(self) -> dict[str, Any]:
        """As JSON: summaries in milliseconds, and every latency measured, in the order of completion."""
        kinds = ("create", "first_frame", "first_event", "done", "delete")
        summaries = {kind: Summary.of(getattr(self, kind)) for kind in kinds}
        return {
            "concurrency": self.concurrency,
            "sessions": self.sessions,
            "messages": self.messages,
            "failures": self.failures,
            "errors": self.errors,
            "cut_short": self.cut_short,
            "messages_per_second": round(len(self.done) / self.message_seconds, 1) if self.message_seconds else None,
            "client_cpu_ms_per_message": (
                round(self.client_cpu_seconds / len(self.done) * 1000, 3) if self.done else None
            ),
            "summary_ms": {kind: asdict(summary) for kind, summary in summaries.items() if summary},
            "raw_ms": {kind: [round(value * 1000, 3) for value in getattr(self, kind)] for kind in kinds},
        }


class Progress:
    """One line on a terminal, rewritten; nothing elsewhere."""

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._shown = out.isatty()
        self._next = 0.0

    def show(self, text: str, *, now: float | None = None) -> None:
        now = time.monotonic() if now is None else now
        if self._shown and now >= self._next:
            self._next = now + PROGRESS_PAUSE_S
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()

    def clear(self) -> None:
        if self._shown:
            self._out.write("\r\x1b[K")
            self._out.flush()


class Roundtrip:
    """Measures one server with one agent."""

    def __init__(self, options: argparse.Namespace, agent: str, *, echoes: bool, deadline: float) -> None:
        self._options = options
        self._agent = agent
        self._echoes = echoes
        self._deadline = deadline
        self._lock = threading.Lock()
        self._progress = Progress(sys.stderr)

    def run(self, concurrency: int) -> Run:
        """Creates the sessions, sends the messages, deletes the sessions, whatever happens in between."""
        options = self._options
        run = Run(concurrency, options.sessions, options.messages)
        ids: list[str] = []
        try:
            self._each(run, "create", options.sessions, lambda connection, _: self._create(connection, run, ids))
            if ids:
                self._send_all(run, ids)
        finally:
            self._deadline = math.inf  # cleaning up is always worth its time; each request has its own timeout
            paths = [f"/api/sessions/{session}" for session in ids]
            self._each(run, "delete", len(paths), lambda connection, n: self._delete(connection, run, paths[n]))
            self._progress.clear()
        return run

    def _send_all(self, run: Run, ids: list[str]) -> None:
        """Each worker speaks to the sessions of its own in turn: a session takes one message at a time."""
        workers = min(run.concurrency, len(ids))
        mine = [ids[number::workers] for number in range(workers)]
        rounds = [0] * workers

        def send(connection: Connection, number: int, worker: int) -> None:
            session = mine[worker][rounds[worker] % len(mine[worker])]
            rounds[worker] += 1
            self._message(connection, run, session, f"message {number}")

        cpu, started = time.process_time(), time.perf_counter()
        self._each(run, "message", run.messages, send, workers=workers)
        run.message_seconds = time.perf_counter() - started
        run.client_cpu_seconds = time.process_time() - cpu

    def _create(self, connection: Connection, run: Run, ids: list[str]) -> None:
        started = time.perf_counter()
        session = connection.json("POST", "/api/sessions", {"agent": self._agent})["session"]
        took = time.perf_counter() - started
        with self._lock:
            ids.append(session["id"])
            run.create.append(took)
        if session["status"] != "active":
            raise Failure(f"session {session['id']} is {session['status']}")

    def _message(self, connection: Connection, run: Run, session: str, text: str) -> None:
        turn = connection.turn(f"/api/sessions/{session}/messages", {"content": text})
        if turn.outcome != "completed" or (self._echoes and turn.text != text):
            raise Failure(f"session {session}: {turn.outcome}, answered {turn.text[:80]!r}")
        with self._lock:
            run.first_frame.append(turn.first_frame)
            run.first_event.append(turn.first_event)
            run.done.append(turn.done)

    def _delete(self, connection: Connection, run: Run, path: str) -> None:
        started = time.perf_counter()
        connection.json("DELETE", path)
        with self._lock:
            run.delete.append(time.perf_counter() - started)

    def _each(self, run: Run, what: str, count: int, act: Callable[..., None], *, workers: int | None = None) -> None:
        """Does `act` `count` times with as many threads as the run has, each with a connection of its own."""
        numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            numbers.put(number)
        threads = [
            threading.Thread(
                target=self._work, args=(run, numbers, act, worker, workers is not None), name=f"{what} {worker}"
            )
            for worker in range(min(workers or run.concurrency, count))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                begun = count - numbers.qsize()
                self._progress.show(f"concurrency {run.concurrency}: {what} {begun}/{count}, {run.failures} failed")
                thread.join(PROGRESS_PAUSE_S)
        run.cut_short = run.cut_short or numbers.qsize() > 0

    def _work(
        self, run: Run, numbers: queue.SimpleQueue[int], act: Callable[..., None], worker: int, named: bool
    ) -> None:
        connection = Connection(self._options.url, self._options.api_key, self._options.timeout)
        try:
            connection.open()
        except OSError:
            pass  # the first request says so
        while time.monotonic() < self._deadline:
            try:
                number = numbers.get_nowait()
            except queue.Empty:
                break
            try:
                act(connection, number, worker) if named else act(connection, number)
            except Exception as failure:  # an answer of another shape, too, is a failure and not the thread's end
                connection.close()
                with self._lock:
                    run.failed(failure if isinstance(failure, Failure) else Failure(f"broken answer: {failure!r}"))
        connection.close()


# ---------------------------------------------------------------- what is printed and written


_HEADINGS = ("", "n", "min", "p50", "p95", "p99", "max")
_LABELS = {
    "create": "create session",
    "first_frame": "message: first frame",
    "first_event": "message: first event of the agent",
    "done": "message: `done`",
    "delete": "delete session",
}


def table(run: dict[str, Any]) -> list[list[str]]:
    """Rows of text, the headings first."""
    rows = [list(_HEADINGS)]
    for kind, label in _LABELS.items():
        if summary := run["summary_ms"].get(kind):
            rows.append([label, str(summary["count"]), *(f"{summary[name]:.2f}" for name in _HEADINGS[2:])])
    return rows


def printed(run: dict[str, Any]) -> str:
    """A run for a terminal."""
    rows = table(run)
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADINGS))]
    lines = [f"concurrency {run['concurrency']} (milliseconds)"]
    for label, *cells in rows:
        lines.append("  ".join([label.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    return "\n".join([*lines, _remarks(run)])


def _remarks(run: dict[str, Any]) -> str:
    said = [f"{run['failures']} failed"]
    if run["messages_per_second"] is not None:
        said.append(f"{run['messages_per_second']} messages/s")
        said.append(f"{run['client_cpu_ms_per_message']} ms of this client's CPU per message")
    if run["cut_short"]:
        said.append("stopped early by --max-seconds")
    return ", ".join(said) + "".join(f"\n  {error}" for error in run["errors"])


def machine() -> str:
    """This machine in one line: cores, processor, memory, kernel, Python; no names."""
    model = _first_value("/proc/cpuinfo", "model name") or platform.machine()
    memory_kib = int((_first_value("/proc/meminfo", "MemTotal") or "0 kB").split()[0])
    kernel = ".".join(platform.release().split(".")[:2])
    python = ".".join(platform.python_version_tuple()[:2])
    system = f"{platform.system()} {kernel}, Python {python}"
    return f"{os.cpu_count()} CPUs ({model}), {round(memory_kib / 2**20)} GiB, {system}"


def _first_value(path: str, name: str) -> str | None:
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), None)


def commit() -> str:
    """The checkout's commit, marked when files differ from it; `unknown` outside a checkout."""
    git = ["git", "-C", str(ROOT)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "ashd", "sandbox"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name.stdout.strip() + (" with uncommitted changes" if changed.stdout.strip() else "")


def shown_command(argv: Sequence[str], script: str = "roundtrip.py") -> str:
    """The command line without the key, and without what only describes the measurement."""
    shown: list[str] = []
    rest = iter(argv)
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name in _NOT_SHOWN:
            if not equals:
                next(rest, None)
        else:
            shown.append(shlex.quote(argument))
    return " ".join([f"python loadtest/{script}", *shown])


def write_measurement(folder: Path, report: dict[str, Any], today: str) -> Path:
    """Adds a report to the day's: `<date>-roundtrip.json` holds all reports of a day, the .md beside it shows them."""
    folder.mkdir(parents=True, exist_ok=True)
    raw = folder / f"{today}-roundtrip.json"
    reports = json.loads(raw.read_text(encoding="utf-8")) if raw.exists() else []
    reports.append(report)
    raw.write_text(_dumped(reports), encoding="utf-8")
    page = raw.with_suffix(".md")
    page.write_text(rendered(reports, today, raw.name), encoding="utf-8")
    return page


def _dumped(value: Any) -> str:
    """JSON for people and diffs: indented, but each list of numbers on one line."""
    text = json.dumps(value, indent=1)
    return re.sub(r"\[([\d.,\s]+)\]", lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"


def rendered(reports: Sequence[dict[str, Any]], today: str, raw_name: str) -> str:
    """The day's measurement as Markdown."""
    lines = [
        f"# Round trips, {today}",
        "",
        "Written by `loadtest/roundtrip.py --write-measurement`; what each row means is said in",
        "[loadtest/README.md](../../loadtest/README.md). Times are milliseconds.",
        f"All latencies one by one: [{raw_name}]({raw_name}).",
    ]
    for report in reports:
        lines += ["", f"## {report['label']}", ""]
        lines += [
            f"* machine: {report['machine']}",
            f"* commit: {report['commit']}",
            f"* server: ashd {report['version']}",
        ]
        lines += [f"* command: `{report['command']}`"]
        lines += [f"* {report['note']}"] if report["note"] else []
        for run in report["runs"]:
            head, *rows = table(run)
            lines += ["", f"Concurrency {run['concurrency']}: {_remarks(run)}.", ""]
            lines += ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
            lines += ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- the command


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="roundtrip.py",
        description="Latency of session create and message round trip of an ashd server.",
        epilog="exit status: 0 all requests did what they should, 1 some did not, 2 wrong usage, 3 no usable server",
    )
    top.add_argument("--url", default="http://127.0.0.1:4100", help="default: %(default)s")
    top.add_argument("--api-key", default=os.environ.get("ASH_API_KEY"), metavar="KEY", help="default: ASH_API_KEY")
    top.add_argument("--agent", metavar="NAME", help="an agent that is there; default: an echo agent made and removed")
    top.add_argument("--sessions", type=count(MOST_SESSIONS), default=20, metavar="N", help="default: %(default)s")
    top.add_argument(
        "--messages", type=count(MOST_MESSAGES, least=0), default=200, metavar="N", help="in all; default: %(default)s"
    )
    top.add_argument(
        "--concurrency",
        type=count(MOST_CONCURRENCY),
        nargs="+",
        default=[1],
        metavar="N",
        help="clients at once; several numbers are measured one after the other (default: 1)",
    )
    top.add_argument("--max-seconds", type=count(MOST_SECONDS), default=120, metavar="S", help="default: %(default)s")
    top.add_argument(
        "--timeout", type=count(MOST_SECONDS), default=30, metavar="S", help="of a request; default: %(default)s"
    )
    top.add_argument("--json", type=Path, metavar="FILE", help="write the report, raw latencies included")
    top.add_argument(
        "--write-measurement", type=Path, metavar="DIR", help="add the report to DIR/<date>-roundtrip.md and .json"
    )
    top.add_argument("--label", default="Round trips", help="heading of this report in the measurement")
    top.add_argument("--note", default="", help="a line about the server's configuration for the measurement")
    top.add_argument("--commit", default=None, metavar="NAME", help="what the server runs; default: this checkout's")
    top.add_argument("--machine", default=None, metavar="TEXT", help="description of the machine; default: found out")
    return top


def count(most: int, *, least: int = 1) -> Callable[[str], int]:
    """A type of whole numbers for argparse."""

    def checked(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to {most}")
        return value

    return checked


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options, checked. Exits with 2 where they can't be used."""
    top = parser()
    options = top.parse_args(argv)
    url = urllib.parse.urlsplit(options.url)
    if url.scheme not in ("http", "https") or not url.hostname:
        top.error(f"--url {options.url!r} is not like http://127.0.0.1:4100")
    if options.api_key and not (options.api_key.isascii() and options.api_key.isprintable()):
        top.error("--api-key has characters that no key has")
    if max(options.concurrency) > options.sessions:
        top.error("--concurrency needs at least as many --sessions: a session takes one message at a time")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse(argv)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    setup = Connection(options.url, options.api_key, options.timeout)
    agent = options.agent or f"roundtrip-{secrets.token_hex(4)}"
    try:
        version = setup.json("GET", "/health")["version"]
        if options.agent is None:
            _deploy_echo(setup, agent)
    except (Failure, KeyError, TypeError, ssl.SSLError) as failure:
        print(f"{options.url} can't be measured: {failure}", file=sys.stderr)
        return UNUSABLE
    try:
        deadline = time.monotonic() + options.max_seconds
        runs = []
        for concurrency in options.concurrency:
            measured = Roundtrip(options, agent, echoes=options.agent is None, deadline=deadline).run(concurrency)
            runs.append(measured.report())
            print(printed(runs[-1]), end="\n\n", flush=True)
    finally:
        if options.agent is None:
            _remove(options, agent)
    now = datetime.now(UTC)
    report = {
        "label": options.label,
        "note": options.note,
        "at": now.isoformat(timespec="seconds"),
        "machine": options.machine or machine(),
        "commit": options.commit or commit(),
        "version": version,
        "command": shown_command(argv),
        "runs": runs,
    }
    if options.json:
        options.json.write_text(_dumped(report), encoding="utf-8")
    if options.write_measurement:
        print(f"written: {write_measurement(options.write_measurement, report, now.date().isoformat())}")
    return FAILED if any(run["failures"] for run in runs) else OK


def _deploy_echo(connection: Connection, name: str) -> None:
    content = base64.b64encode(b"runtime: echo\n").decode()
    connection.json("POST", "/api/agents", {"name": name, "files": [{"path": "agent.yaml", "content": content}]})


def _remove(options: argparse.Namespace, name: str) -> None:
    """The agent made for this run; the server ends whatever sessions are left of it."""
    connection = Connection(options.url, options.api_key, options.timeout)  # the first one has been idle for long
    try:
        connection.json("DELETE", f"/api/agents/{name}")
    except Failure as failure:
        print(f"agent {name} was not removed: {failure}", file=sys.stderr)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
