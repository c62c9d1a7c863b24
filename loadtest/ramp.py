"""Sessions of one agent, more and more of them, until the server takes no more.

Covers: the agents, creating in steps, sampling between steps, telling a refusal from a failure, cleaning up.
Leaves out: starting a server (installation.py), reading the host (host_memory.py), tables (ceiling_report.py).

Every request has a timeout, every loop a deadline or a count: a ramp ends whatever the server does.
"""

from __future__ import annotations

import base64
import contextlib
import queue
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from host_memory import Host, Sample, Watch
from interrupts import undisturbed
from roundtrip import Connection, Failure, Progress, Summary

MIB = 1024 * 1024
REFUSALS = 3
"""So many refusals on end, a pause between them, are the ceiling: one alone may be a moment's pressure."""
REFUSAL_PAUSE_S = 1.0
FAILURES = 4
"""So many failures on end without a session in between: it would never work."""
IDLE_S = 3.0
"""How long the sandboxes' processor time is watched while nobody asks them anything."""
CLEAN_UP_S = 180.0
GONE_S = 20.0
JOIN_PAUSE_S = 0.1
PAGE = 1000

COUNTED = ("sandboxes_pss_bytes", "platform_growth_bytes", "kernel_growth_bytes")
"""What together is the memory that can be laid to the sandboxes' door, whatever others on the host do meanwhile."""
FULL = ("fleet.full", "runner.full")

_TURN = """

async def turn(message, session):
    yield "here"
"""

_HEAP = 'HEAP = bytearray(b"\\x5a") * ({mib} << 20)  # written, so every page of it is there\n'

_SUBPROCESS = """import subprocess

CHILD = subprocess.Popen(
    ["python3", "-c", "heap = bytearray(b'\\\\x5a') * (64 << 20); print('there', flush=True); input()"],
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
)
if CHILD.stdout.readline() != b"there\\n":
    raise RuntimeError("the child could not get its memory")
"""

AGENTS = {
    "idle": _TURN,
    "heap64": _HEAP.format(mib=64) + _TURN,
    "heap256": _HEAP.format(mib=256) + _TURN,
    "subprocess": _SUBPROCESS + _TURN,
}
"""agent.py of each: nothing; 64 or 256 MiB of its own, written to; a Python of its own as a child that holds 64 MiB."""


@dataclass(frozen=True)
class Server:
    url: str
    api_key: str | None
    timeout_s: float

    def connection(self) -> Connection:
        return Connection(self.url, self.api_key, self.timeout_s)


@dataclass(frozen=True)
class Bounds:
    """Where a ramp ends even if the server would take more. `deadline` is of time.monotonic()."""

    sessions: int
    deadline: float
    step: int
    concurrency: int
    least_available: int
    """Bytes of this host's memory below which the ramp stops by itself; what protects a host others use as well."""


@dataclass(frozen=True)
class Stop:
    """Why a ramp ended."""

    reason: str
    """refused (no room, the normal end), unavailable, failing, sessions, minutes, available, interrupted"""
    detail: str = ""


@dataclass
class Step:
    """What one step of creates came to."""

    latencies_s: list[float] = field(default_factory=list)
    refusal: Failure | None = None
    failure: Failure | None = None


@dataclass
class Ramped:
    """What a ramp found. Bytes; growth is since before the first session."""

    stop: Stop
    sessions: int = 0
    steps: list[dict[str, Any]] = field(default_factory=list)
    create_s: list[float] = field(default_factory=list)
    refusals: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    active_at_end: int = 0
    idle_cpu_percent: dict[str, float] = field(default_factory=dict)
    platform_pss: int = 0
    left: list[str] = field(default_factory=list)
    lost_after_bytes: int = 0

    def report(self) -> dict[str, Any]:
        return {
            "stop": asdict(self.stop),
            "sessions": self.sessions,
            "active_at_end": self.active_at_end,
            "refusals": self.refusals,
            "failures": dict(self.failures),
            "create_ms": asdict(summary) if (summary := Summary.of(self.create_s)) else None,
            "per_sandbox_bytes": per_sandbox(self.steps),
            "platform_pss_bytes": self.platform_pss,
            "idle_cpu_percent": self.idle_cpu_percent,
            "lost_after_bytes": self.lost_after_bytes,
            "left": self.left,
            "steps": self.steps,
        }


def per_sandbox(steps: Sequence[dict[str, Any]]) -> dict[str, int] | None:
    """What one more sandbox cost, by each way of counting; None where that can't be said."""
    counts = [step["sandboxes"] for step in steps]
    if len(set(counts)) < 2:
        return None
    kinds = ("lost_bytes", "keepers_pss_bytes", *COUNTED)
    each = {kind: round(slope(counts, [step[kind] for step in steps])) for kind in kinds}
    return {**each, "counted_bytes": sum(each[kind] for kind in COUNTED)}


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line that fits best (least squares). Raises ValueError when all `xs` are one."""
    mean_x, mean_y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - mean_x) ** 2 for x in xs)
    if spread == 0:
        raise ValueError("one point has no slope")
    return sum((x - mean_x) * (y - mean_y) for x, y in zip(xs, ys, strict=True)) / spread


def is_refusal(failure: Failure) -> bool:
    """Whether the server said that it has no room, rather than that something is wrong."""
    return failure.status == 503 and (failure.code in FULL or "capacity" in str(failure))


class Reporter:
    """How far a ramp is: one line on a terminal, a line a step elsewhere."""

    def __init__(self, out: TextIO = sys.stderr) -> None:
        self._out = out
        self._line = Progress(out)

    def moving(self, text: str) -> None:
        """Shown while it lasts, on a terminal only."""
        self._line.show(text)

    def step(self, text: str) -> None:
        if self._out.isatty():
            self._line.show(text)
        else:
            print(text, file=self._out, flush=True)

    def done(self, text: str) -> None:
        self._line.clear()
        print(text, file=self._out, flush=True)


class Ramp:
    """Creates sessions of one agent on one server, watches this host, and removes all it made."""

    def __init__(
        self,
        server: Server,
        agent: str,
        memory_limit_mb: int | None,
        bounds: Bounds,
        watch: Watch,
        *,
        reporter: Reporter | None = None,
    ) -> None:
        self._server = server
        self._kind = agent
        self._limit_mb = memory_limit_mb
        self._bounds = bounds
        self._watch = watch
        self._reporter = reporter or Reporter()
        self._agent = f"ceiling-{secrets.token_hex(4)}"
        self._ids: list[str] = []
        self._lock = threading.Lock()
        self._halt = threading.Event()
        self._found = Ramped(Stop("interrupted"))

    def run(self) -> Ramped:
        """All of it. Raises Failure when not even the agent can be deployed."""
        self._deploy()
        try:
            self._before = self._watch.sample(())
            self._found.platform_pss = self._before.platform_pss
            self._found.steps.append(self._row(self._before, Step()))
            with contextlib.suppress(KeyboardInterrupt):
                self._found.stop = self._climb()
                self._look_around()
        finally:
            with undisturbed():
                self._clean_up()
        return self._found

    # ------------------------------------------------------------ upwards

    def _climb(self) -> Stop:
        """Step by step until something ends it; that is the answer."""
        refusals = failures = 0
        while True:
            if (stop := self._bound()) is not None:
                return stop
            # A refusal or a failure is tried again alone: a whole step of them would say no more.
            cautious = refusals or failures
            room = self._bounds.sessions - len(self._ids)
            step = self._create(1 if cautious else min(self._bounds.step, room))
            refusals = 0 if step.refusal is None else 1 if step.latencies_s else refusals + 1
            failures = 0 if step.failure is None or step.latencies_s else failures + 1
            if step.latencies_s:
                self._note(step)
            if step.refusal is not None and refusals >= REFUSALS:
                return Stop("refused" if is_refusal(step.refusal) else "unavailable", str(step.refusal))
            if step.failure is not None and failures >= FAILURES:
                return Stop("failing", str(step.failure))
            if refusals or failures:
                time.sleep(REFUSAL_PAUSE_S)

    def _bound(self) -> Stop | None:
        if len(self._ids) >= self._bounds.sessions:
            return Stop("sessions", f"{self._bounds.sessions} sessions asked for")
        if time.monotonic() > self._bounds.deadline:
            return Stop("minutes", "the time asked for is over")
        if (available := Host.now().available) < self._bounds.least_available:
            return Stop("available", f"{available // MIB} MiB of this host left")
        return None

    def _create(self, count: int) -> Step:
        """So many sessions, several at a time; fewer when one is refused."""
        step, over = Step(), threading.Event()

        def create(connection: Connection, _: int) -> None:
            if over.is_set() or time.monotonic() > self._bounds.deadline:
                return
            try:
                took = self._one(connection)
            except Failure as failure:
                self._failed(step, failure)
                over.set()
            else:
                with self._lock:
                    step.latencies_s.append(took)

        self._each(count, create)
        return step

    def _one(self, connection: Connection) -> float:
        """A session that has taken a turn; how long its creation took. Raises Failure when it was not created."""
        started = time.perf_counter()
        session = connection.json("POST", "/api/sessions", {"agent": self._agent})["session"]
        took = time.perf_counter() - started
        with self._lock:
            self._ids.append(session["id"])
            self._found.create_s.append(took)
        try:
            outcome = connection.turn(f"/api/sessions/{session['id']}/messages", {"content": "there?"}).outcome
        except Failure as failure:
            outcome = failure.code or "no answer"
        if outcome != "completed":
            self._count(f"turn: {outcome}")
        return took

    def _failed(self, step: Step, failure: Failure) -> None:
        """503 is the server's word for `not now`; anything else is a failure of this one create."""
        with self._lock:
            if failure.status == 503:
                self._found.refusals += 1
                step.refusal = failure
            else:
                step.failure = failure
        if failure.status != 503:
            self._count(f"create: {failure.code or failure.status or 'no answer'}")

    def _count(self, what: str) -> None:
        with self._lock:
            self._found.failures[what] += 1

    def _note(self, step: Step) -> None:
        row = self._row(self._watch.sample(set(self._ids)), step)
        self._found.steps.append(row)
        create = row["create_ms"]
        self._reporter.step(
            f"{self._kind}, limit {named(self._limit_mb)}: {row['sandboxes']} sandboxes, "
            f"{row['lost_bytes'] // MIB} MiB gone, {row['available_bytes'] // MIB} MiB left, "
            f"create p50 {create['p50']:.0f} ms, p95 {create['p95']:.0f} ms"
        )

    def _row(self, sample: Sample, step: Step) -> dict[str, Any]:
        before, summary = self._before, Summary.of(step.latencies_s)
        return {
            "sessions": len(self._ids),
            "sandboxes": sample.sandboxes,
            "processes": sample.processes,
            "available_bytes": sample.host.available,
            "lost_bytes": before.host.available - sample.host.available,
            "kernel_growth_bytes": sample.host.kernel - before.host.kernel,
            "sandboxes_pss_bytes": sample.sandboxes_pss,
            "keepers_pss_bytes": sample.keepers_pss,
            "platform_growth_bytes": sample.platform_pss - before.platform_pss,
            "create_ms": asdict(summary) if summary else None,
        }

    # ------------------------------------------------------------ at the top

    def _look_around(self) -> None:
        """Whether all are still there, and what they cost while nothing happens."""
        before, at = self._watch.cpu_s(set(self._ids)), time.monotonic()
        time.sleep(IDLE_S)
        after, passed = self._watch.cpu_s(set(self._ids)), time.monotonic() - at
        percents = (round((new - old) / passed * 100, 1) for old, new in zip(before, after, strict=True))
        self._found.idle_cpu_percent = dict(zip(("sandboxes", "platform"), percents, strict=True))
        with contextlib.suppress(Failure):
            self._found.active_at_end = len(set(self._listed("active")) & set(self._ids))

    def _listed(self, status: str) -> list[str]:
        """Ids of our sessions in a state, whoever knows of them."""
        connection, found = self._server.connection(), list[str]()
        while True:
            path = f"/api/sessions?agent={self._agent}&status={status}&limit={PAGE}&offset={len(found)}"
            page = [session["id"] for session in connection.json("GET", path)["sessions"]]
            found += page
            if len(page) < PAGE:
                connection.close()
                return found

    # ------------------------------------------------------------ and down

    def _deploy(self) -> None:
        yaml = "runtime: python\nturn_timeout: 30s\n"
        if self._limit_mb is not None:
            yaml += f"limits:\n  memoryMb: {self._limit_mb}\n"
        texts = {"agent.yaml": yaml, "agent.py": AGENTS[self._kind]}
        files = [{"path": path, "content": base64.b64encode(text.encode()).decode()} for path, text in texts.items()]
        self._server.connection().json("POST", "/api/agents", {"name": self._agent, "files": files})

    def _clean_up(self) -> None:
        """Nothing of ours is left on the server; what is, is said. Bounded by CLEAN_UP_S and GONE_S."""
        self._halt.clear()
        self._found.sessions = len(self._ids)
        self._end_sessions()
        try:
            self._server.connection().json("DELETE", f"/api/agents/{self._agent}")
        except Failure as failure:
            self._found.left.append(f"agent {self._agent}: {failure}")
        deadline = time.monotonic() + GONE_S
        while (after := self._watch.sample(set(self._ids))).sandboxes and time.monotonic() < deadline:
            time.sleep(JOIN_PAUSE_S)
        if after.sandboxes:
            self._found.left.append(f"{after.sandboxes} sandboxes")
        if self._found.steps:
            self._found.lost_after_bytes = self._before.host.available - after.host.available

    def _end_sessions(self) -> None:
        """Ours, and those whose creation we never heard the end of."""
        deadline = time.monotonic() + CLEAN_UP_S
        ids = {*self._ids}
        for status in ("starting", "active", "paused", "error"):
            with contextlib.suppress(Failure):
                ids.update(self._listed(status))
        mine, kept = sorted(ids), list[str]()

        def end(connection: Connection, number: int) -> None:
            try:
                if time.monotonic() > deadline:
                    raise Failure("no time left")
                connection.json("DELETE", f"/api/sessions/{mine[number]}")
            except Failure as failure:
                with self._lock:
                    kept.append(str(failure))
            self._reporter.moving(f"{self._kind}: ending session {number} of {len(mine)}")

        self._each(len(mine), end)
        if kept:
            self._found.left.append(f"{len(kept)} sessions; the first: {kept[0]}")

    # ------------------------------------------------------------ several at a time

    def _each(self, count: int, act: Callable[[Connection, int], None]) -> None:
        """Does `act` for each number below `count`, with as many threads as asked for, each with its connection."""
        numbers: queue.SimpleQueue[int] = queue.SimpleQueue()
        for number in range(count):
            numbers.put(number)

        def work() -> None:
            connection = self._server.connection()
            while not self._halt.is_set():
                try:
                    act(connection, numbers.get_nowait())
                except queue.Empty:
                    break
            connection.close()

        threads = [threading.Thread(target=work, name=f"ramp {n}") for n in range(min(self._bounds.concurrency, count))]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():  # WAITS: each request has its timeout, and `act` its deadline
                    thread.join(JOIN_PAUSE_S)
        except KeyboardInterrupt:
            self._halt.set()
            for thread in threads:
                thread.join()
            raise


def named(memory_limit_mb: int | None) -> str:
    return "none" if memory_limit_mb is None else f"{memory_limit_mb} MiB"
