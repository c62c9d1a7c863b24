"""Real zygotes, keepers and jails for tests, and the supervisor's side of the conversation with them.

A test asks a `Host` for sandboxes and talks to their keepers as a supervisor would. When the host is left, it ends them
all and counts: no process, cgroup, folder or descriptor may be left over.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import pytest

from ashd.config.schema import RunnerConfig
from ashd.runner import cgroup, workspace
from ashd.runner.selftest import levels_for, setup_for
from ashd.runner.zygote_process import PRELOADED, command
from sandbox.journal import Corrupt, Position, Reader
from sandbox.protocol import Kind, Record, encode_line

PATIENCE = float(os.environ.get("ASHD_TEST_PATIENCE", "1"))  # more where processors are emulated
DEADLINE_S = 20.0 * PATIENCE
KIB, MIB = 1024, 1024 * 1024
KILL_TIMEOUT_S = 1.0
BOUNDS = {
    "max_frame": MIB,
    "segment_bytes": MIB,
    "max_journal_bytes": 8 * MIB,
    "max_log_bytes": 256 * KIB,
    "kill_timeout_s": KILL_TIMEOUT_S,
    "max_events_per_s": 100_000,
}
_uids = itertools.count(1_000_000 + os.getpid() % 100_000 * 1000)  # no other test run's, nor a runner's
T = TypeVar("T")


def until(look: Callable[[], T], what: str, within_s: float = DEADLINE_S) -> T:
    """The first true answer of `look`, asked again and again; fails the test when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (answer := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {what}")
        time.sleep(0.005)
    return answer


def is_running(pid: int) -> bool:
    """Whether a process lives; a zombie doesn't."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def status_of(pid: int, field: str) -> list[str]:
    """The words of one line of /proc/PID/status."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return line.split()[1:]
    raise KeyError(field)


def text_of(records: list[Record]) -> str:
    """What the agent said in whole messages."""
    messages = [json.loads(record.payload) for record in records if record.type == "assistant"]
    return "".join(block["text"] for message in messages for block in message["message"]["content"])


class Zygote:
    """A running zygote; `shown` is what its self-test showed, `level` the isolation it gives."""

    def __init__(self, isolation: str = "auto", within: Path | None = None) -> None:
        """`within`: where to keep its state, and a folder sandboxes may read; its own folder there is `folder`."""
        self.folder = Path(tempfile.mkdtemp(prefix="ashd-zygote-", dir=within))
        self.folder.chmod(0o711)
        visible = (*RunnerConfig().visible, *([str(within)] if within else []))
        config = RunnerConfig(isolation=isolation, visible=visible)
        state_dir = self.folder / "runner"
        state_dir.mkdir()
        self.setup = setup_for(config, state_dir)
        self._ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._ours.settimeout(DEADLINE_S)
        with theirs:
            self.process = subprocess.Popen(pass_fds=[theirs.fileno()], **command(theirs))
        order = {"levels": levels_for(config), "setup": vars(self.setup), "modules": PRELOADED}
        self._ours.send(json.dumps(order).encode())
        self.shown: dict[str, Any] = json.loads(self._ours.recv(256 * KIB))["ready"]
        self.level: str = self.shown["level"]

    def fork(self, request: dict[str, Any]) -> int:
        self._ours.send(json.dumps(request).encode())
        pid: int = json.loads(self._ours.recv(64 * KIB))["pid"]
        return pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ours.close()
        assert self.process.wait(DEADLINE_S) in (0, -signal.SIGKILL)
        shutil.rmtree(self.folder)


class Connection:
    """A supervisor's connection to one keeper. `hello` is what the keeper said first."""

    def __init__(self, folder: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(DEADLINE_S)
        handle = os.open(folder, os.O_PATH)
        try:  # through the descriptor, because a socket's path may have 107 bytes only
            until(lambda: self._try_connect(f"/proc/self/fd/{handle}/keeper.sock"), "the keeper listens")
        finally:
            os.close(handle)
        self._lines = self._socket.makefile("rb")
        self._numbers = itertools.count(1)
        self.hello: dict[str, Any] = self.next()["hello"]

    def _try_connect(self, path: str) -> bool:
        try:
            self._socket.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return False
        return True

    def next(self) -> dict[str, Any]:
        """What the keeper says next. Raises EOFError when it has hung up."""
        line = self._lines.readline()
        if not line.endswith(b"\n"):
            raise EOFError
        said: dict[str, Any] = json.loads(line)
        return said

    def wait_for(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """Hears the keeper out until it says what is waited for."""
        while not is_it(said := self.next()):
            pass
        return said

    def send(self, raw: bytes) -> None:
        self._socket.sendall(raw)

    def tell(self, command: str, **fields: Any) -> int:
        """Gives a command and returns its number."""
        number = next(self._numbers)
        self.send(encode_line({"cmd": command, "re": number, **fields}))
        return number

    def call(self, command: str, **fields: Any) -> dict[str, Any]:
        """Gives a command and returns the keeper's answer."""
        number = self.tell(command, **fields)
        return self.wait_for(lambda said: said.get("re") == number)

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Sandbox:
    """One sandbox, from its supervisor's side."""

    def __init__(
        self, host: Host, *, bounds: Mapping[str, float], memory: int, processes: int, cpu: int, jailed: bool
    ) -> None:
        self.id = uuid.uuid4().hex
        self.session = str(uuid.uuid4())
        self.folder = host.folder / self.id
        self.workspace = self.folder / "workspace"
        self.journal = self.folder / "journal"
        self.uid = next(_uids) if os.geteuid() == 0 else None
        self.level = host.zygote.level if jailed else "none"
        self.has_namespaces = self.level == "strict"
        self.inside = "/workspace" if self.has_namespaces else str(self.workspace)
        self._host = host
        self._turns: list[str] = []
        self._connection: Connection | None = None
        self._pid_namespace = ""
        self._make_folder()
        groups = cgroup.create(host.hierarchies, self.id, memory, processes, cpu) if jailed else []
        controllers = cgroup.controllers(host.hierarchies) if groups else []
        self.has_tools_apart = "cgroup-memory" in controllers and host.zygote.shown["tools"]
        self.has_memory_limit = "cgroup-memory" in controllers
        self.has_process_limit = "cgroup-pids" in controllers or self.uid is not None
        self.dies_with_its_keeper = self.has_namespaces or bool(groups)
        self._rlimits = {"NOFILE": 256, "CORE": 0, "FSIZE": 64 * MIB} | ({} if groups else {"DATA": memory})
        if self.uid is not None:
            self._rlimits["NPROC"] = processes
        jail = {
            "level": self.level,
            "template": host.zygote.setup.template,
            "folder": str(self.folder),
            "uid": self.uid,
            "cgroups": [str(group) for group in groups],
            "visible": host.zygote.setup.visible,
        }
        request = {"sandbox": self.id, "folder": str(self.folder), "jail": jail, "bounds": {**BOUNDS, **bounds}}
        if groups:
            request["memory"] = cgroup.memory_group(host.hierarchies, self.id)
        self.keeper = host.zygote.fork(request)

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700 if self.has_namespaces or self.uid is None else 0o711)
        for folder in (self.workspace, self.folder / "scratch"):
            folder.mkdir(mode=0o700)
            if self.uid is not None:
                os.chown(folder, self.uid, self.uid)

    # ------------------------------------------------------------ talking to the keeper

    @property
    def connection(self) -> Connection:
        if self._connection is None:
            return self.connect()
        return self._connection

    def connect(self) -> Connection:
        """A new connection, as of a new supervisor; the one before is forgotten."""
        self.hang_up()
        self._connection = Connection(self.folder)
        return self._connection

    def hang_up(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def wait_until_warm(self) -> None:
        if self.connection.hello["life"] == "jailing":
            self.connection.wait_for(lambda said: said.get("life") == "warm")
        self._pid_namespace = os.readlink(f"/proc/{self.keeper}/ns/pid_for_children")

    def claim(self, files: Mapping[str, str | bytes], runtime: str = "python", **fields: Any) -> dict[str, Any]:
        """Gives the sandbox to a session with this agent; the keeper's answer."""
        self.wait_until_warm()
        self._lay_out(files)
        agent = {
            "session_id": self.session,
            "turns": 0,
            "runtime": runtime,
            "entry": [],
            "env": {},
            "settings": {},
            "path": f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin",
            "startup": [name for name in ("install.sh", "startup.sh") if name in files],
            "network": "none",
            "rlimits": self._rlimits,
            "max_frame": BOUNDS["max_frame"],
            "timing": False,
            "real_sdk": True,
        }
        last_seq = fields.pop("last_seq", 0)
        return self.connection.call(
            "claim", session=self.session, epoch=1, last_seq=last_seq, agent={**agent, **fields}
        )

    def _lay_out(self, files: Mapping[str, str | bytes]) -> None:
        bundle = self._host.folder / f"{self.id}.bundle"
        bundle.mkdir()
        for name, content in files.items():
            path = bundle / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
            path.chmod(0o755)
        workspace.lay_out(bundle, self.workspace, self.uid)
        shutil.rmtree(bundle)

    def start_turn(
        self, content: Any, *, timeout_s: float = 60.0 * PATIENCE, turn: str = "", **options: Any
    ) -> dict[str, Any]:
        """Starts a turn; the keeper's answer."""
        turn = turn or str(uuid.uuid4())
        self._turns.append(turn)
        request = {"content": content, "options": options}
        return self.connection.call("turn", turn=turn, request=request, timeout_s=timeout_s)

    def turn(self, content: Any, *, timeout_s: float = 60.0 * PATIENCE, **options: Any) -> list[Record]:
        """Runs a turn to its end; its records."""
        answer = self.start_turn(content, timeout_s=timeout_s, **options)
        assert "error" not in answer, answer
        return self.settled()

    def interrupt(self) -> bool:
        return bool(self.connection.call("interrupt", turn="")["interrupted"])

    def end(self) -> None:
        """Asks the sandbox to end and waits until its keeper is gone."""
        self.connection.tell("end")
        self.wait_until_gone()

    def wait_until_gone(self) -> None:
        until(lambda: not is_running(self.keeper), "the keeper has ended")

    # ------------------------------------------------------------ looking

    def records(self, after: int = 0) -> list[Record]:
        """All that is in the journal now."""
        try:
            reader = Reader(self.journal, Position(after, 0))
        except (Corrupt, FileNotFoundError):
            return []
        try:
            found: list[Record] = []
            while records := reader.read():
                found += records
            return found
        finally:
            reader.close()

    def settled(self) -> list[Record]:
        """Waits until the newest turn is settled; its records."""
        turn = self._turns[-1]

        def look() -> list[Record]:
            records = [record for record in self.records() if record.turn == turn]
            return records if records and records[-1].kind is Kind.SETTLED else []

        return until(look, "the turn is settled")

    def saved(self) -> list[Record]:
        return [record for record in self.records() if record.kind is not Kind.DELTA]

    def logs(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "logs").read_text().splitlines()]

    def log_text(self) -> str:
        return "\n".join(entry["text"] for entry in self.logs())

    def processes(self) -> set[int]:
        """Every living process inside: of the sandbox's user, or working in its folder."""
        return {pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if self._is_inside(pid)}

    def _is_inside(self, pid: int) -> bool:
        try:
            if self.uid is not None:
                return int(status_of(pid, "Uid")[0]) == self.uid and is_running(pid)
            if self.has_namespaces:
                return os.readlink(f"/proc/{pid}/ns/pid") == self._pid_namespace and is_running(pid)
            return os.readlink(f"/proc/{pid}/cwd").startswith(str(self.workspace)) and is_running(pid)
        except (OSError, KeyError):
            return False


class Host:
    """A state folder with the sandboxes of one test. Leaving it ends them all, and fails if anything is left."""

    def __init__(self, zygote: Zygote) -> None:
        self.zygote = zygote
        self.hierarchies = cgroup.find(f"ashd-test/{os.getpid()}")
        self._sandboxes: list[Sandbox] = []

    def sandbox(
        self,
        *,
        memory: int = 256 * MIB,
        processes: int = 64,
        cpu: int = 400,
        jailed: bool = True,
        **bounds: float,
    ) -> Sandbox:
        """A new sandbox. `jailed=False`: one as on a host that allows neither namespaces nor cgroups."""
        made = Sandbox(self, bounds=bounds, memory=memory, processes=processes, cpu=cpu, jailed=jailed)
        self._sandboxes.append(made)
        return made

    def agent(self, source: str, **limits: Any) -> Sandbox:
        """A sandbox whose agent.py is `source`, ready for turns."""
        made = self.sandbox(**limits)
        assert made.claim({"agent.py": source}) == {"re": 1, "ready": True}
        return made

    def __enter__(self) -> Self:
        self.folder = Path(tempfile.mkdtemp(prefix="ashd-sandboxes-"))
        self.folder.chmod(0o711)
        self._descriptors = len(os.listdir("/proc/self/fd"))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        left = [what for made in self._sandboxes for what in self._end(made)]
        shutil.rmtree(self.folder)
        opened = len(os.listdir("/proc/self/fd")) - self._descriptors
        for hierarchy in self.hierarchies:
            hierarchy.parent.rmdir()
            with contextlib.suppress(OSError):  # another test run's are in it
                hierarchy.parent.parent.rmdir()
        if kind is None:
            assert not left, left
            assert opened <= 0, f"{opened} descriptors left open"  # fewer: garbage of an earlier test was collected

    def _end(self, made: Sandbox) -> list[str]:
        """Ends a sandbox as a supervisor would; what would not end."""
        left = []
        if is_running(made.keeper):
            if made.dies_with_its_keeper:
                os.kill(made.keeper, signal.SIGKILL)
            else:
                made.connect().tell("end")
            made.wait_until_gone()
        made.hang_up()
        try:
            until(lambda: not made.processes(), "nothing runs inside", within_s=3.0)
        except pytest.fail.Exception:
            left.append(f"processes {made.processes()}")
            for pid in made.processes():
                os.kill(pid, signal.SIGKILL)
        if not asyncio.run(cgroup.remove(self.hierarchies, made.id)):
            left.append(f"cgroups of {made.id}")
        complaints = (made.folder / "keeper.log").read_text()
        return left + ([f"keeper's complaints: {complaints}"] if complaints else [])
