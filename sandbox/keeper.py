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
import os
import selectors
import signal
import sys
import time
import traceback
from collections import OrderedDict
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict

from sandbox import jail, outcomes
from sandbox.dropped import Dropped
from sandbox.execs import AGENT, FOREVER
from sandbox.frames import Frames, agents_code, text_of, timing_of
from sandbox.journal import Position, Writer
from sandbox.ledger import Ledger, Outcome
from sandbox.logs import LogFile, timestamp
from sandbox.memory import Group, Kill, Memory, protect
from sandbox.pace import Pace
from sandbox.processes import Processes
from sandbox.protocol import Malformed, Tag, encode_line
from sandbox.reception import Reception, Refused
from sandbox.title import set_title

_DISK_RETRY_S = 0.5
_REMEMBERED_TURNS = 1024
_MAX_COMPLAINTS = 100
_CLAIMED_COLD_WITHIN_S = 0.1  # a sandbox made for a session gets it at once
_BAD_FRAMES_AN_EVENT = 10  # cost as much as one, where an agent's pace is kept
_MAX_KILLS = 100
_EVENTS_PER_S = 500
_EXECS_PER_S = 1000


class Bounds(TypedDict):
    """What a sandbox may make its keeper hold, and how long it may take to end."""

    max_frame: int
    segment_bytes: int
    max_journal_bytes: int
    max_log_bytes: int
    kill_timeout_s: float
    max_events_per_s: NotRequired[float]
    max_execs_per_s: NotRequired[float]


class Request(TypedDict):
    """What the zygote is asked for."""

    sandbox: str
    folder: str
    jail: dict[str, Any]
    bounds: Bounds
    memory: NotRequired[Group | None]


class Life(Enum):
    """Where a sandbox stands, as its keeper sees it."""

    JAILING = "jailing"  # the bridge is giving up its privileges
    WARM = "warm"  # jailed, waiting for a session
    LOADING = "loading"  # claimed, the agent is being loaded
    READY = "ready"  # loaded; a turn may be open
    ENDING = "ending"  # on its way out, forced when the deadline passes


def run(request: Request) -> NoReturn:
    """Becomes the keeper of one sandbox. FORK: called in a fresh child of the zygote; never returns."""
    code = 1
    try:
        os.setsid()
        protect()
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
        self._life = Life.JAILING
        self._session: dict[str, Any] = {}
        self._ledger: Ledger | None = None
        self._launched: OrderedDict[str, int] = OrderedDict()  # turn -> seq before its first event
        self._turn_number = 0
        self._interrupted_as = ""  # the outcome of a turn we asked to stop
        self._cause = ""  # why the sandbox ends, where we know it before it does
        self._agent_kill: Kill | None = None  # of this turn; one of an earlier turn explains nothing now
        self._kills_told = 0
        self._turn_deadline = self._kill_deadline = self._disk_retry_at = self._watch_memory_at = FOREVER
        self._complaints = 0
        self._timing_wanted = self._timing_due = False
        self._grew = False
        self._selector = selectors.DefaultSelector()
        self._dropped = Dropped()
        self._frames = Frames(self._bounds["max_frame"], self._take_frame, self._drop)
        self._pace = Pace(self._bounds.get("max_events_per_s", _EVENTS_PER_S))
        self._logs = LogFile(Path("logs"), self._bounds["max_log_bytes"])
        group = request.get("memory")
        self._memory = Memory(group, killed=self._memory_killed, warned=self._memory_warned)
        self._processes = Processes(
            jail.JailSpec.from_json(request["jail"]),
            self._selector,
            self._logs,
            self._from_bridge,
            tools=Path(group["folder"], "tools") if group else None,
            execs_per_s=self._bounds.get("max_execs_per_s", _EXECS_PER_S),
            died=self._memory.died,
        )
        self._bridge, self._execs = self._processes.bridge, self._processes.execs
        commands = {
            "claim": self._claim,
            "turn": self._start_turn,
            "interrupt": self._stop_turn,
            "acked": self._acknowledge,
            "note": self._note,
            "end": self._stop,
        }
        self._supervisor = Reception("keeper.sock", self._selector, self._standing, commands)

    # ------------------------------------------------------------ the loop

    def serve(self) -> None:
        """Runs until the jail is dead and everything it said is in the journal."""
        set_title(f"ashd: keeper (warm) {self._sandbox[:8]}")
        while not self._processes.exited:
            for key, mask in self._selector.select(self._timeout()):
                key.data(mask)
            self._meet_deadlines()
            self._write_journal()
        self._finish()

    def _timeout(self) -> float | None:
        now = time.monotonic()
        names_at = self._execs.deadline if self._execs else FOREVER
        go_on_at = self._pace.resume_at if self._pace.resume_at > now else FOREVER
        deadlines = (self._turn_deadline, self._kill_deadline, self._disk_retry_at, self._memory.deadline)
        first = min(*deadlines, self._watch_memory_at, names_at, go_on_at)
        return None if first == FOREVER else max(0.0, first - now)

    def _meet_deadlines(self) -> None:
        now = time.monotonic()
        if now >= self._turn_deadline:
            self._interrupt(outcomes.TIMEOUT)
        if now >= self._kill_deadline:
            self._kill_deadline = FOREVER
            self._force()
        if self._execs and now >= self._execs.deadline:
            self._execs.catch_up()
        if now >= self._watch_memory_at:
            self._watch_memory()
        if now >= self._memory.deadline:
            self._memory.look()

    def _interrupt(self, outcome: str) -> None:
        """Asks the open turn to stop; forces the sandbox to end if it doesn't in time."""
        self._turn_deadline = FOREVER
        self._interrupted_as = outcome
        self._kill_deadline = time.monotonic() + self._bounds["kill_timeout_s"]
        self._bridge.send(encode_line({"type": "interrupt"}))

    def _end(self, cause: str) -> None:
        """Asks the whole sandbox to end; forces it if it doesn't in time."""
        if self._life is not Life.ENDING:
            self._life = Life.ENDING
            self._cause = cause
            self._turn_deadline = FOREVER
            self._interrupted_as = self._interrupted_as or outcomes.of_cause(cause)  # whatever the bridge will say
            grace_s = 0.0 if cause == outcomes.DISK else self._bounds["kill_timeout_s"]  # it would only write more
            self._kill_deadline = time.monotonic() + grace_s
            self._bridge.send(encode_line({"type": "end"}))

    def _force(self) -> None:
        self._cause = self._cause or self._interrupted_as
        self._logs.write("system", "the sandbox did not end in time and is killed")
        self._processes.kill()

    def _write_journal(self) -> None:
        """Appends what was collected and rings; while it is full, or the agent is too fast, the agent has to wait."""
        if self._ledger is None:
            return
        try:
            self._grew = self._ledger.writer.flush() or self._grew
            self._disk_retry_at = FOREVER
        except OSError as error:
            if self._disk_retry_at == FOREVER:
                self._complain(f"the journal can't be written ({error.strerror}); the agent waits")
            self._disk_retry_at = time.monotonic() + _DISK_RETRY_S
        # One that was asked to stop is heard: its kill deadline bounds what it may say meanwhile.
        too_fast = not self._interrupted_as and time.monotonic() < self._pace.resume_at
        self._bridge.pause_reading(self._disk_retry_at != FOREVER or self._ledger.writer.blocked or too_fast)
        # PERF: one bell is enough while the supervisor hasn't taken the last one.
        if self._grew and self._supervisor.is_waiting:
            self._grew = False
            self._supervisor.tell({"grew": self._ledger.writer.last.seq, "open_turn": self._ledger.turn})

    # ------------------------------------------------------------ the supervisor's commands

    def _standing(self) -> dict[str, Any]:
        last = self._ledger.writer.last.seq if self._ledger else 0
        turn = self._ledger.turn if self._ledger else ""
        return {**self._session, "life": self._life.value, "last_seq": last, "open_turn": turn, "pid": os.getpid()}

    def _claim(self, command: dict[str, Any]) -> None:
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
        self._supervisor.answer_later(command)
        set_title(f"ashd: keeper {command['session']}")
        self._memory.begin()
        self._watch_memory_at = FOREVER
        self._bridge.send(encode_line({"type": "claim", **agent}))

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
        self._look_at_memory()
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
        self._agent_kill, self._kills_told = None, 0
        self._memory.begin_turn()
        self._timing_due = self._timing_wanted
        self._turn_deadline = time.monotonic() + command["timeout_s"]
        self._bridge.send(encode_line({"type": "turn", "turn": self._turn_number, **request}))
        return {"after_seq": before}

    def _stop_turn(self, command: dict[str, Any]) -> dict[str, Any]:
        open_turn = self._ledger.turn if self._ledger else ""
        if not open_turn or command["turn"] not in ("", open_turn):
            return {"interrupted": False}
        if not self._interrupted_as:
            self._interrupt(outcomes.INTERRUPTED)
        return {"interrupted": True}

    def _acknowledge(self, command: dict[str, Any]) -> None:
        if self._ledger is not None:
            self._ledger.writer.acknowledge(command["seq"])

    def _note(self, command: dict[str, Any]) -> None:
        """A line in the session's log about what its sandbox was limited in."""
        self._complain(command["text"])

    def _stop(self, command: dict[str, Any]) -> dict[str, Any]:
        self._end(command.get("cause", "ended"))
        return {"ending": True}

    # ------------------------------------------------------------ the bridge: believe nothing

    def _from_bridge(self, data: bytes) -> None:
        if not data:  # it has closed its end, and most likely is dying; one that isn't can't be used any more
            self._kill_deadline = min(self._kill_deadline, time.monotonic() + self._bounds["kill_timeout_s"])
        before = self._ledger.writer.last.seq if self._ledger else 0
        bad = self._frames.feed(data)
        if self._ledger is not None:
            self._pace.spend(self._ledger.writer.last.seq - before + bad // _BAD_FRAMES_AN_EVENT)

    def _take_frame(self, tag: bytes, body: dict[str, Any], raw: bytes) -> None:
        if tag == Tag.MESSAGE and self._interrupted_as and time.monotonic() < self._pace.resume_at:
            self._drop("messages", "dropped what was said too fast after the turn was asked to stop")
        elif tag == Tag.MESSAGE and self._ledger and self._ledger.turn:
            self._ledger.message(body, raw)
        elif tag == Tag.END and self._ledger and self._ledger.turn and body.get("turn") == self._turn_number:
            self._settle(body)
        elif tag == Tag.JAILED and self._life is Life.JAILING:
            self._live(Life.WARM)
            self._watch_memory_at = time.monotonic() + _CLAIMED_COLD_WITHIN_S
        elif tag == Tag.READY and self._life is Life.LOADING:
            self._live(Life.READY)
            self._watch_memory_at = 0.0  # once this is said
            self._supervisor.answer({"ready": True})
        elif tag == Tag.FAILED and self._life is Life.LOADING:
            error = text_of(body, "error", "the agent could not be loaded")
            self._supervisor.answer({"error": error, "code": agents_code(body, "agent.not_loaded")})
            self._end("not_loaded")
        elif tag == Tag.TIMING and self._timing_due:
            self._timing_due = False
            measured = timing_of(body) | {"sessionId": self._session["session"], "timestamp": timestamp()}
            self._supervisor.tell({"timing": measured})
        else:
            raise Malformed(f"a frame {tag!r} that has no place now")

    def _live(self, life: Life) -> None:
        self._life = life
        self._supervisor.tell({"life": life.value})

    def _settle(self, end: dict[str, Any]) -> None:
        self._look_at_memory()
        self._settle_as(outcomes.of_end(end, self._interrupted_as, self._agent_kill))
        if self._life is Life.READY:
            self._kill_deadline = FOREVER

    def _settle_as(self, outcome: Outcome) -> None:
        assert self._ledger is not None
        dropped = self._news_of_dropped()
        self._ledger.settle(outcome, dropped)
        if dropped:
            self._logs.write("system", "dropped: " + ", ".join(f"{count} {kind}" for kind, count in dropped.items()))
        self._interrupted_as = ""
        self._agent_kill = None
        self._turn_deadline = FOREVER

    def _drop(self, kind: str, why: str) -> None:
        self._dropped.count(kind)
        self._complain(why)

    def _news_of_dropped(self) -> dict[str, int]:
        if self._ledger is not None:
            self._dropped.is_now("deltas", self._ledger.writer.dropped_deltas)
        self._dropped.is_now("log_lines", self._logs.dropped)
        return self._dropped.news()

    def _complain(self, text: str) -> None:
        """A line in the session's log about what its agent did wrong; an agent that goes on and on is heard no more."""
        self._complaints += 1
        if self._complaints <= _MAX_COMPLAINTS:
            self._logs.write("system", text)

    # ------------------------------------------------------------ memory

    def _watch_memory(self) -> None:
        self._watch_memory_at = FOREVER
        for descriptor in self._memory.watch():
            self._selector.register(descriptor, selectors.EVENT_READ, self._memory_changed)

    def _memory_changed(self, _: int) -> None:
        if self._execs:
            self._execs.learn_names(early=True)
        self._memory.look()

    def _look_at_memory(self) -> None:
        """Whatever was killed until now has been told of."""
        if self._execs:
            self._execs.collect()
        self._memory.look_for_all()

    def _memory_warned(self, used_bytes: int, limit_bytes: int) -> None:
        if self._ledger and self._ledger.turn:
            self._ledger.happened("memory_warning", {"usedBytes": used_bytes, "limitBytes": limit_bytes})

    def _memory_killed(self, kill: Kill) -> None:
        if kill.scope == AGENT:
            self._agent_kill = kill
        if self._kills_told == _MAX_KILLS:
            self._dropped.count("memory_kills")
            return
        self._kills_told += 1
        if kill.scope != AGENT:
            self._supervisor.tell({"kill": f"{kill.scope}_oom"})
        self._logs.write("system", f"the {kill.scope} used {kill}")
        if self._ledger and self._ledger.turn:
            self._ledger.happened("memory_kill", kill.to_json())
        self._bridge.send(encode_line({"type": "memory_kill", **kill.to_json()}))

    # ------------------------------------------------------------ the end

    def _finish(self) -> None:
        """The jail's first process is dead: take its last words, settle, close, and leave nothing running."""
        status = self._processes.end()  # ORDER: nothing is left to say more, so the last words can be read to their end
        self._bridge.pause_reading(False)
        self._bridge.read_rest()
        if os.WIFSIGNALED(status):
            self._memory.died(self._processes.as_program(), os.WTERMSIG(status))
        self._look_at_memory()
        self._processes.log_last_words()
        cause, outcome = outcomes.of_death(status, self._cause, self._interrupted_as, self._agent_kill)
        if self._ledger is not None:
            if self._ledger.turn:
                self._settle_as(outcome)
            self._ledger.close(cause, outcome.details, self._news_of_dropped())
            self._write_last_words(self._ledger.writer)
            self._supervisor.tell({"grew": self._ledger.writer.last.seq, "open_turn": self._ledger.turn})
        why = f"the sandbox ended while the agent was loaded: {outcome.error}"
        self._supervisor.answer({"error": why, "code": outcome.code})
        self._supervisor.tell({"closed": cause})

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


def _write_whole(path: Path, data: bytes) -> None:
    """A file that is there whole or not at all."""
    new = path.with_suffix(".new")
    new.write_bytes(data)
    new.rename(path)
