"""The keeper: outside the jail, parent of the jail's first process, and the only one that writes the session's journal.

Covers: the life of one sandbox, from its fork to its last event; believing nothing that comes from inside.
Leaves out: the jail itself (jail.py), what runs in it (bridge.py), the words of the journal (ledger.py), where its
records go (ashd.runner).

It outlives its supervisor: the next one connects to keeper.sock and is told where things stand. One thread, one
selector. Its death ends the jail (PDEATHSIG), so killing it is the last resort that always works. Its folder:

    keeper.sock   where the supervisor connects      session.json  whose sandbox this is, once claimed
    lock          held (flock) while the keeper lives  logs          what the agent wrote to stdout and stderr
    journal/      numbered records                   keeper.log    the keeper's own complaints
    workspace/    the agent's working folder
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import selectors
import signal
import socket
import sys
import time
import traceback
from collections import OrderedDict
from collections.abc import Callable
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypedDict

from sandbox import bridge, jail, syscalls
from sandbox.journal import Position, Writer
from sandbox.ledger import Ledger, Outcome
from sandbox.logs import LogFile, timestamp
from sandbox.peer import READ_BYTES, Peer
from sandbox.protocol import MAX_COMMAND_BYTES, LineReader, Malformed, Tag, encode_line, parse_object
from sandbox.title import set_title

_DISK_RETRY_S = 0.5
_REMEMBERED_TURNS = 1024
_MAX_COMPLAINTS = 100
_KILL_ROUNDS = 100
_LAST_LOG_READS = 16  # of READ_BYTES: more than a pipe can be made to hold
_FOREVER = float("inf")
_TIMING_FIELDS = ("cmdParseMs", "sdkFirstTokenMs", "totalMs", "eventCount")
_AGENTS_CODE = re.compile(r"(agent|claude)\.[a-z_]{1,40}")


class Bounds(TypedDict):
    """What a sandbox may make its keeper hold, and how long it may take to end."""

    max_frame: int
    segment_bytes: int
    max_journal_bytes: int
    max_log_bytes: int
    kill_timeout_s: float


class Request(TypedDict):
    """What the zygote is asked for."""

    sandbox: str
    folder: str
    jail: dict[str, Any]
    bounds: Bounds


class Life(Enum):
    """Where a sandbox stands, as its keeper sees it."""

    JAILING = "jailing"  # the bridge is giving up its privileges
    WARM = "warm"  # jailed, waiting for a session
    LOADING = "loading"  # claimed, the agent is being loaded
    READY = "ready"  # loaded; a turn may be open
    ENDING = "ending"  # on its way out, forced when the deadline passes


class Refused(Exception):
    """A command that can't be obeyed now; `code` goes back to the supervisor."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def run(request: Request) -> NoReturn:
    """Becomes the keeper of one sandbox. FORK: called in a fresh child of the zygote; never returns."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.chdir(request["folder"])
        lock = _own_descriptors()
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        Keeper(request).serve()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _own_descriptors() -> int:
    """Closes everything inherited, sets up stdio, and returns the descriptor of our lock file.

    SECURITY: nothing of the zygote's or the supervisor's passes this point.
    """
    os.closerange(3, 65536)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    complaints = os.open("keeper.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(complaints, 1)
    os.dup2(complaints, 2)
    os.closerange(3, 16)
    return os.open("lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)


class Keeper:
    """One sandbox's keeper."""

    def __init__(self, request: Request) -> None:
        self._sandbox = request["sandbox"]
        self._bounds = request["bounds"]
        self._spec = jail.JailSpec.from_json(request["jail"])
        self._life = Life.JAILING
        self._session: dict[str, Any] = {}
        self._ledger: Ledger | None = None
        self._launched: OrderedDict[str, int] = OrderedDict()  # turn -> seq before its first event
        self._turn_number = 0
        self._interrupted_as = ""  # the outcome of a turn we asked to stop
        self._oom_kills_before = 0  # of this turn; a tool killed in an earlier one explains nothing now
        self._cause = ""  # why the sandbox ends, where we know it before it does
        self._claim_reply: int | None = None
        self._turn_deadline = self._kill_deadline = self._disk_retry_at = _FOREVER
        self._complaints = 0
        self._timing_wanted = self._timing_due = False
        self._grew = False
        self._exited = False
        self._selector = selectors.DefaultSelector()
        self._supervisor: Peer | None = None
        self._frames = LineReader(self._bounds["max_frame"])
        self._logs = LogFile(Path("logs"), self._bounds["max_log_bytes"])
        self._spawn_bridge()
        self._listen()

    # ------------------------------------------------------------ the processes

    def _spawn_bridge(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        out, err = os.pipe2(os.O_CLOEXEC), os.pipe2(os.O_CLOEXEC)
        self._output = {out[0]: "stdout", err[0]: "stderr"}
        if self._spec.level == jail.STRICT:
            syscalls.unshare(syscalls.CLONE_NEWPID)  # for the next child only: the bridge becomes PID 1
        else:
            syscalls.become_subreaper()
        self._bridge_pid = os.fork()
        if self._bridge_pid == 0:
            bridge.run(self._spec, theirs.detach(), out[1], err[1])  # FORK: never returns
        theirs.close()
        self._bridge = Peer(ours, self._selector, self._from_bridge, MAX_COMMAND_BYTES + READ_BYTES)
        for read_end, write_end in (out, err):
            os.close(write_end)
            os.set_blocking(read_end, False)
            self._selector.register(read_end, selectors.EVENT_READ, partial(self._log_output, read_end))
        self._bridge_exit = os.pidfd_open(self._bridge_pid)
        self._selector.register(self._bridge_exit, selectors.EVENT_READ, self._bridge_exited)

    def _bridge_exited(self, _: int) -> None:
        self._exited = True

    def _log_output(self, pipe: int, _: int = 0) -> bool:
        """Takes what the agent has written to one of its outputs; False when that is nothing."""
        try:
            data = os.read(pipe, READ_BYTES)
        except BlockingIOError:
            return False
        if data:
            self._logs.feed(self._output[pipe], data)
        else:
            self._selector.unregister(pipe)
            os.close(pipe)
            del self._output[pipe]
        return bool(data)

    # ------------------------------------------------------------ the loop

    def serve(self) -> None:
        """Runs until the jail is dead and everything it said is in the journal."""
        set_title(f"ashd: keeper (warm) {self._sandbox[:8]}")
        while not self._exited:
            for key, mask in self._selector.select(self._timeout()):
                key.data(mask)
            self._meet_deadlines()
            self._write_journal()
        self._finish()

    def _timeout(self) -> float | None:
        first = min(self._turn_deadline, self._kill_deadline, self._disk_retry_at)
        return None if first == _FOREVER else max(0.0, first - time.monotonic())

    def _meet_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._turn_deadline:
            self._interrupt("timeout")
        if now >= self._kill_deadline:
            self._kill_deadline = _FOREVER
            self._force()

    def _interrupt(self, outcome: str) -> None:
        """Asks the open turn to stop; forces the sandbox to end if it doesn't in time."""
        self._turn_deadline = _FOREVER
        self._interrupted_as = outcome
        self._kill_deadline = time.monotonic() + self._bounds["kill_timeout_s"]
        self._bridge.send(encode_line({"type": "interrupt"}))

    def _end(self, cause: str) -> None:
        """Asks the whole sandbox to end; forces it if it doesn't in time."""
        if self._life is not Life.ENDING:
            self._life = Life.ENDING
            self._cause = cause
            self._turn_deadline = _FOREVER
            self._interrupted_as = self._interrupted_as or "interrupted"  # whatever the bridge will say of an open turn
            self._kill_deadline = time.monotonic() + self._bounds["kill_timeout_s"]
            self._bridge.send(encode_line({"type": "end"}))

    def _force(self) -> None:
        self._cause = self._cause or self._interrupted_as
        self._logs.write("system", "the sandbox did not end in time and is killed")
        os.kill(self._bridge_pid, signal.SIGKILL)  # the child isn't reaped before _finish: the pid is its own

    def _write_journal(self) -> None:
        """Appends what was collected and rings; while the disk is full the agent has to wait."""
        if self._ledger is None:
            return
        try:
            self._grew = self._ledger.writer.flush() or self._grew
            self._disk_retry_at = _FOREVER
        except OSError as error:
            if self._disk_retry_at == _FOREVER:
                self._complain(f"the journal can't be written ({error.strerror}); the agent waits")
            self._disk_retry_at = time.monotonic() + _DISK_RETRY_S
        self._bridge.pause_reading(self._disk_retry_at != _FOREVER or self._ledger.writer.blocked)
        # PERF: one bell is enough while the supervisor hasn't taken the last one.
        if self._grew and self._supervisor is not None and self._supervisor.idle:
            self._grew = False
            self._tell({"grew": self._ledger.writer.last.seq, "open_turn": self._ledger.turn})

    # ------------------------------------------------------------ the supervisor

    def _listen(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        with_umask = os.umask(0o077)
        listener.bind("keeper.sock")  # relative: the path of a socket may have 107 bytes only
        os.umask(with_umask)
        listener.listen(4)
        listener.setblocking(False)

        def accept(_: int) -> None:
            try:
                connection, _address = listener.accept()
            except OSError:
                return
            self._meet(connection)

        self._selector.register(listener, selectors.EVENT_READ, accept)

    def _meet(self, connection: socket.socket) -> None:
        """A supervisor has come: it takes the place of the one before, and is told where things stand."""
        if self._supervisor is not None:
            self._supervisor.close()
        commands = LineReader(MAX_COMMAND_BYTES)

        def received(data: bytes) -> None:
            for line in commands.feed(data):
                self._obey(json.loads(line))

        self._supervisor = Peer(connection, self._selector, received, READ_BYTES)
        self._claim_reply = None
        self._tell({"hello": self._standing()})

    def _standing(self) -> dict[str, Any]:
        last = self._ledger.writer.last.seq if self._ledger else 0
        turn = self._ledger.turn if self._ledger else ""
        return {**self._session, "life": self._life.value, "last_seq": last, "open_turn": turn, "pid": os.getpid()}

    def _tell(self, message: dict[str, Any]) -> None:
        if self._supervisor is not None:
            self._supervisor.send(encode_line(message))

    def _obey(self, command: dict[str, Any]) -> None:
        """One command of the supervisor; the answer carries its `re`."""
        re = command.get("re")
        try:
            obey = self._commands.get(command["cmd"])
            if obey is None:  # a newer supervisor's; it must not cost the session
                raise Refused("command.unknown", f"this keeper does not know the command {command['cmd']}")
            answer = obey(self, command)
        except Refused as refusal:
            answer = {"error": str(refusal), "code": refusal.code}
        if answer is not None:
            self._tell({"re": re, **answer})

    def _claim(self, command: dict[str, Any]) -> dict[str, Any] | None:
        """Gives the sandbox to a session, once. Answered when the agent is loaded."""
        if self._life is not Life.WARM:
            raise Refused("sandbox.taken", f"this sandbox is {self._life.value}")
        agent = command["agent"]
        self._session = {"session": command["session"], "epoch": command["epoch"]}
        start = Position(command["last_seq"], 0)
        writer = Writer(
            Path("journal"),
            start,
            acked_seq=start.seq,
            segment_bytes=self._bounds["segment_bytes"],
            max_bytes=self._bounds["max_journal_bytes"],
        )
        self._ledger = Ledger(writer)
        self._turn_number = agent["turns"]
        self._timing_wanted = agent["timing"]
        _write_whole(Path("session.json"), encode_line(self._session))
        self._life = Life.LOADING
        self._claim_reply = command["re"]
        set_title(f"ashd: keeper {command['session']}")
        self._bridge.send(encode_line({"type": "claim", **agent}))
        return None

    def _loaded(self, answer: dict[str, Any]) -> None:
        if self._claim_reply is not None:
            self._tell({"re": self._claim_reply, **answer})
            self._claim_reply = None

    def _start_turn(self, command: dict[str, Any]) -> dict[str, Any]:
        """Launches a turn at most once: asked for it again, says where it began."""
        turn, ledger = command["turn"], self._ledger
        if turn in self._launched:
            return {"after_seq": self._launched[turn]}
        if self._life is not Life.READY or ledger is None:
            raise Refused("sandbox.gone", f"this sandbox is {self._life.value}")
        if ledger.turn:
            raise Refused("turn.open", f"turn {ledger.turn} is open")
        request = command["request"]
        before = ledger.writer.last.seq
        try:
            ledger.launch(turn, request["content"])
        except OSError as error:
            raise Refused("disk.full", f"the journal can't be written: {error.strerror}") from None
        self._grew = True
        self._launched[turn] = before
        if len(self._launched) > _REMEMBERED_TURNS:
            self._launched.popitem(last=False)
        self._turn_number += 1
        self._interrupted_as = ""
        self._oom_kills_before = _oom_kills(self._spec.cgroups)
        self._timing_due = self._timing_wanted
        self._turn_deadline = time.monotonic() + command["timeout_s"]
        self._bridge.send(encode_line({"type": "turn", "turn": self._turn_number, **request}))
        return {"after_seq": before}

    def _stop_turn(self, command: dict[str, Any]) -> dict[str, Any]:
        open_turn = self._ledger.turn if self._ledger else ""
        if not open_turn or command["turn"] not in ("", open_turn):
            return {"interrupted": False}
        if not self._interrupted_as:
            self._interrupt("interrupted")
        return {"interrupted": True}

    def _acknowledge(self, command: dict[str, Any]) -> None:
        if self._ledger is not None:
            self._ledger.writer.acknowledge(command["seq"])

    def _stop(self, command: dict[str, Any]) -> dict[str, Any]:
        self._end(command.get("cause", "ended"))
        return {"ending": True}

    _commands: ClassVar[dict[str, Callable[[Keeper, dict[str, Any]], dict[str, Any] | None]]] = {
        "claim": _claim,
        "turn": _start_turn,
        "interrupt": _stop_turn,
        "acked": _acknowledge,
        "end": _stop,
    }

    # ------------------------------------------------------------ the bridge: believe nothing

    def _from_bridge(self, data: bytes) -> None:
        if not data:  # it has closed its end, and most likely is dying; one that isn't can't be used any more
            self._kill_deadline = min(self._kill_deadline, time.monotonic() + self._bounds["kill_timeout_s"])
        for line in self._frames.feed(data):
            try:
                self._take_frame(line[:1], line[1:])
            except Malformed as error:
                self._complain(f"dropped a malformed frame: {error}")
        if self._frames.oversized:
            self._frames.oversized = 0
            self._complain(f"dropped a frame of more than {self._bounds['max_frame']} bytes")

    def _take_frame(self, tag: bytes, raw: bytes) -> None:
        body, raw = parse_object(raw)
        if len(raw) > self._bounds["max_frame"]:
            raise Malformed(f"{len(raw)} bytes once written in ASCII")
        if tag == Tag.MESSAGE and self._ledger and self._ledger.turn:
            self._ledger.message(body, raw)
        elif tag == Tag.END and self._ledger and self._ledger.turn and body.get("turn") == self._turn_number:
            self._settle(body)
        elif tag == Tag.JAILED and self._life is Life.JAILING:
            self._live(Life.WARM)
        elif tag == Tag.READY and self._life is Life.LOADING:
            self._live(Life.READY)
            self._loaded({"ready": True})
        elif tag == Tag.FAILED and self._life is Life.LOADING:
            error = _text(body, "error", "the agent could not be loaded")
            self._loaded({"error": error, "code": _agents_code(body, "agent.not_loaded")})
            self._end("not_loaded")
        elif tag == Tag.TIMING and self._timing_due:
            self._timing_due = False
            self._tell(
                {"timing": {**_timing_of(body), "sessionId": self._session["session"], "timestamp": timestamp()}}
            )
        else:
            raise Malformed(f"a frame {tag!r} that has no place now")

    def _live(self, life: Life) -> None:
        self._life = life
        self._tell({"life": life.value})

    def _settle(self, end: dict[str, Any]) -> None:
        assert self._ledger is not None
        error = _text(end, "error", "")
        if self._interrupted_as:
            outcome = Outcome(self._interrupted_as, *_WHY.get(self._interrupted_as, ("", "")))
        elif error:
            outcome = Outcome("failed", error, _agents_code(end, "agent.failed"))
        else:
            outcome = Outcome("completed")
        self._ledger.settle(outcome)
        self._interrupted_as = ""
        self._turn_deadline = _FOREVER
        if self._life is Life.READY:
            self._kill_deadline = _FOREVER

    def _complain(self, text: str) -> None:
        """A line in the session's log about what its agent did wrong; an agent that goes on and on is heard no more."""
        self._complaints += 1
        if self._complaints <= _MAX_COMPLAINTS:
            self._logs.write("system", text)

    # ------------------------------------------------------------ the end

    def _finish(self) -> None:
        """The jail's first process is dead: take its last words, settle, close, and leave nothing running."""
        _, status = os.waitpid(self._bridge_pid, 0)
        self._end_descendants()  # ORDER: before its last words are read, or what it left behind could go on for ever
        self._bridge.pause_reading(False)
        self._bridge.read_rest()
        self._close_logs()
        cause, outcome = self._verdict(status)
        if self._ledger is not None:
            if self._ledger.turn:
                self._ledger.settle(outcome)
            self._ledger.close(cause)
            self._write_last_words(self._ledger.writer)
            self._tell({"grew": self._ledger.writer.last.seq, "open_turn": self._ledger.turn})
        self._loaded({"error": f"the sandbox ended while the agent was loaded: {outcome.error}", "code": outcome.code})
        self._tell({"closed": cause})

    def _close_logs(self) -> None:
        for pipe in list(self._output):
            for _ in range(_LAST_LOG_READS):
                if not self._log_output(pipe):
                    break
        self._logs.close()

    def _verdict(self, status: int) -> tuple[str, Outcome]:
        """The cause of the sandbox's end, and with it the outcome of a turn that was open."""
        if self._cause == "timeout":
            return "timeout", Outcome("timeout", *_WHY["timeout"])
        if self._cause:
            return self._cause, Outcome(self._interrupted_as or "interrupted")
        if _oom_kills(self._spec.cgroups) > self._oom_kills_before:
            return "oom", Outcome("oom", *_WHY["oom"])
        if os.WIFSIGNALED(status):
            name = signal.Signals(os.WTERMSIG(status)).name
            return "killed", Outcome("failed", f"The sandbox was killed by {name}.", "sandbox.killed")
        code = os.waitstatus_to_exitcode(status)
        return "exited", Outcome("failed", f"The agent's process exited with code {code}.", "sandbox.exited")

    def _end_descendants(self) -> None:
        """Without a pid namespace, what the jail's first process left behind is our child now (subreaper)."""
        children = Path(f"/proc/self/task/{os.getpid()}/children")
        for _ in range(_KILL_ROUNDS):  # each round makes orphans of the next
            for pid in map(int, children.read_text().split()):
                try:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                except (ProcessLookupError, ChildProcessError, PermissionError):
                    continue

    def _write_last_words(self, writer: Writer) -> None:
        deadline = time.monotonic() + self._bounds["kill_timeout_s"]
        while time.monotonic() < deadline:
            try:
                writer.flush()
                return
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                time.sleep(_DISK_RETRY_S)  # the next supervisor settles what we couldn't


_WHY = {
    "timeout": ("The turn took longer than it may.", "turn.timeout"),
    "oom": ("The agent used more memory than its limit and was killed.", "sandbox.oom"),
}


def _text(body: dict[str, Any], name: str, default: str) -> str:
    """A text from inside, fit for databases and headers: bounded, without NUL and lone surrogates."""
    value = body.get(name)
    if not isinstance(value, str) or not value:
        return default
    return value[:10_000].replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def _timing_of(body: dict[str, Any]) -> dict[str, Any]:
    """The fields of a timing line, where they are numbers."""
    measured = {name: body[name] for name in _TIMING_FIELDS if isinstance(body.get(name), int | float)}
    return {"type": "timing", "source": "bridge", **measured}


def _agents_code(body: dict[str, Any], default: str) -> str:
    """The code a bridge gives a failure. SECURITY: it may blame the agent in detail, but never us."""
    code = body.get("code")
    return code if isinstance(code, str) and _AGENTS_CODE.fullmatch(code) else default


def _oom_kills(cgroups: list[str]) -> int:
    """How many processes of these cgroups the kernel killed for want of memory (memory.events, memory.oom_control)."""
    for folder in cgroups:
        for name in ("memory.events", "memory.oom_control"):
            try:
                lines = Path(folder, name).read_text().splitlines()
            except OSError:
                continue
            for line in lines:
                key, _, value = line.partition(" ")
                if key == "oom_kill":
                    return int(value)
    return 0


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.rename(path)
