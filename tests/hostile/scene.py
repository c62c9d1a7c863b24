"""The scene of an attack: a fleet, a neighbour who must notice nothing, a host that is looked at, and an attacker.

Covers: who is there, what the attacker is told, carrying out one attack, and looking at everybody afterwards.
Leaves out: the attacks (agent/armoury/), which of them are expected to end how (test_*.py).
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import socket
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest

from tests.hostile.agent.armoury import files, kernel, network, output, processes, resources
from tests.integration.fleet import KEY, SECRET, Api, Fleet, Stream, eventually, free_port

HERE = Path(__file__).parent
MIB = 1024 * 1024
RUNTIMES = ("python", "command")
FAMILIES: dict[str, ModuleType] = {
    module.__name__.rpartition(".")[2]: module for module in (files, kernel, network, output, processes, resources)
}

LIMITS = {"memory": 128 * MIB, "processes": 64, "open_files": 256, "file_size": 16 * MIB, "disk": 48 * MIB}
"""Of every sandbox here: small, so that reaching them is cheap."""
JOURNAL = {"frame": 1 * MIB, "log": MIB // 4, "events_per_s": 100}
TURN_TIMEOUT_S = 20
UPLOAD = 16 * MIB
"""Largest bundle."""

RUNNER_CONFIG = f"""
uid_range: 230000-230199
warm_sandboxes: 1
kill_timeout: 2s
heartbeat_interval: 1s
limits:
  memory: {LIMITS["memory"]}
  processes: {LIMITS["processes"]}
  open_files: {LIMITS["open_files"]}
  file_size: {LIMITS["file_size"]}
  disk: {LIMITS["disk"]}
journal:
  max_bytes: 16MiB
  max_frame: {JOURNAL["frame"]}
  max_log_bytes: {JOURNAL["log"]}
  max_events_per_s: {JOURNAL["events_per_s"]}
"""

NEIGHBOUR = '''
import ctypes, json, os, pathlib, signal, socket, sys

libc = ctypes.CDLL(None, use_errno=True)
turns, heard, doors = 0, [], []


def settle(told):
    """Leaves its secret wherever a neighbour of its could look, and opens doors that nobody may come through."""
    secret = pathlib.Path("secret.txt").read_text()
    for folder in ("/tmp", "/var/tmp", "/dev/shm"):
        pathlib.Path(folder, "neighbour").write_text(secret)
    libc.shmat.restype = ctypes.c_void_p
    number = libc.shmget(told["key"], 4096, 0o1666)
    ctypes.memmove(libc.shmat(number, None, 0), secret.encode(), len(secret))
    libc.msgget(told["key"], 0o1666), libc.semget(told["key"], 1, 0o1666)
    for family, address in ((socket.AF_UNIX, "\\0" + told["abstract"]), (socket.AF_INET, ("127.0.0.1", told["port"]))):
        door = socket.socket(family)
        door.setblocking(False)
        door.bind(address)
        door.listen()
        doors.append(door)
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGCONT, signal.SIGIO, signal.SIGURG):
        signal.signal(number, lambda number, frame: heard.append(number))


def came_in():
    count = 0
    for door in doors:
        try:
            while door.accept():
                count += 1
        except BlockingIOError:
            pass
    return count


async def turn(message, session):
    global turns
    told = json.loads(message.text)
    if told:
        settle(told)
    turns += 1
    yield json.dumps({
        "turns": turns,
        "secret": os.environ["NEIGHBOURS_SECRET"],
        "file": pathlib.Path("secret.txt").read_text(),
        "workspace": sorted(os.listdir(".")),
        "shared": {folder: sorted(os.listdir(folder)) for folder in ("/tmp", "/var/tmp", "/dev/shm")},
        "ipc": [len(open(f"/proc/sysvipc/{name}").readlines()) - 1 for name in ("shm", "msg", "sem")],
        "processes": sum(name.isdigit() for name in os.listdir("/proc")),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "processors": sorted(os.sched_getaffinity(0)),
        "host": os.uname().nodename,
        "heard": heard,
        "came in": came_in(),
    })
'''


@dataclass
class Verdict:
    """What an attack says of itself, and how its turn ended."""

    verdict: str
    """denied, did, died (its process), broken (it, not the jail), or none when its turn did not get so far."""
    detail: str
    outcome: str
    text: str
    stream: Stream


class Scene:
    """One coordinator, one runner, one neighbour; attackers are made as they are needed."""

    def __init__(self, fleet: Fleet, database_url: str) -> None:
        self.fleet = fleet
        self.mark = f"hostile-{uuid.uuid4().hex[:12]}"
        self.api: Api = fleet.add_coordinator(f"max_upload: {UPLOAD}\n")
        self.runner = fleet.add_runner(RUNNER_CONFIG, ASH_LOG_FORMAT="json")
        self.secrets = {name: f"{name}-{uuid.uuid4().hex}" for name in ("environment", "file", "host")}
        self._database_folder = database_url.rpartition("host=")[2]
        self._attackers: dict[str, str] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._log_at = 0
        self.host = Host(fleet, self.mark, self.secrets["host"])
        self._skip_unless_strict()
        self._settle_neighbour()
        for runtime in RUNTIMES:
            self.api.deploy(f"attacker-{runtime}", self.agent_files(runtime))
        self.zygote = self.neighbours_keeper.ppid()

    # ------------------------------------------------------------ what the host lets the runner enforce

    @property
    def reported(self) -> dict[str, Any]:
        """What the runner says of itself in GET /api/internal/runners."""
        return self.fleet.listed_runners()[0]

    def _skip_unless_strict(self) -> None:
        isolation = self.reported.get("isolation", "strict" if os.geteuid() == 0 else "none")
        if isolation != "strict":
            pytest.skip(f"the runner reports isolation {isolation}, enforced {self.reported.get('enforced')}")

    def skip_unless_enforced(self, needed: tuple[str, ...]) -> None:
        """Where the runner doesn't say what it enforces, everything is asked of it."""
        enforced = self.reported.get("enforced")
        if enforced is not None and needed and not set(needed) & set(enforced):
            pytest.skip(f"needs {' or '.join(needed)}; the runner enforces {', '.join(enforced)}")

    # ------------------------------------------------------------ the neighbour

    def _settle_neighbour(self) -> None:
        files = {"agent.py": NEIGHBOUR, "secret.txt": self.secrets["file"]}
        self.api.deploy("neighbour", files)
        self.neighbour = self.api.session("neighbour", extraEnv={"NEIGHBOURS_SECRET": self.secrets["environment"]})
        self.told = {
            "key": 0x5EC00000 + os.getpid() % 0xFFFF,
            "abstract": f"neighbour-{self.mark}",
            "queue": "neighbour",
            "port": free_port(),
        }
        self.neighbours_keeper = self.fleet.keeper_of(self.neighbour)
        self._last_report = self._ask_neighbour(self.told)
        assert self._last_report["secret"] == self.secrets["environment"]
        assert self._last_report["file"] == self.secrets["file"]

    def _ask_neighbour(self, told: Any = None) -> dict[str, Any]:
        stream = self.api.send(self.neighbour, json.dumps(told))
        assert stream.status == 200, stream.error
        assert stream.done["outcome"] == "completed", stream.frames
        report: dict[str, Any] = json.loads(_text_of(stream))
        return report

    # ------------------------------------------------------------ the attacker

    def agent_files(self, runtime: str, turn_timeout_s: int = TURN_TIMEOUT_S) -> dict[str, str]:
        """The attacker as an agent's files."""
        folder = HERE / "agent"
        files = {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.py")}
        entry = 'entry: ["python3", "agent.py"]\n' if runtime == "command" else ""
        files["agent.yaml"] = (
            f"runtime: {runtime}\n{entry}turn_timeout: {turn_timeout_s}s\n"
            f"limits:\n  memoryMb: {LIMITS['memory'] // MIB}\n  maxProcesses: {LIMITS['processes']}\n"
            f"env:\n  HOSTILE_MARK: {self.mark}\n"
        )
        return files

    def attacker(self, runtime: str) -> str:
        """The standing attacker of that runtime; another one where the last one did not survive."""
        session = self._attackers.get(runtime)
        if session is None or self.api.get_session(session)["status"] != "active":
            session = self._attackers[runtime] = self.api.session(f"attacker-{runtime}")
        return session

    def session(self, runtime: str) -> str:
        """An attacker of the test's own."""
        return self.api.session(f"attacker-{runtime}")

    def dismiss(self, runtime: str) -> None:
        """Ends the attacker of that runtime."""
        if session := self._attackers.pop(runtime, None):
            self.end(session)

    def end(self, session: str) -> None:
        """Ends a session for good and waits until its keeper is gone."""
        keepers = self.fleet.keepers_of(session)
        answer = self.api.call("DELETE", f"/api/sessions/{session}")
        assert (answer.status, answer.body["session"]["status"]) == (200, "ended"), answer
        eventually(lambda: not any(keeper.is_running() for keeper in keepers))

    def order(self, name: str, session: str) -> str:
        """What tells an attacker to carry out an attack."""
        return json.dumps({"attack": name, "facts": self.facts(session)})

    def attack(self, name: str, session: str, **options: Any) -> Verdict:
        """Carries one attack out, as a turn of that session, read to its end."""
        stream = self.api.send(session, self.order(name, session), **options)
        assert stream.status == 200, stream.error
        return self.verdict_of(stream)

    def assert_answers(self, session: str) -> None:
        """The session has another turn in it, and its events are numbered without a gap."""
        assert self.attack("output.say_hello", session).text.startswith("hello ")
        numbers = [event["sequence"] for event in self.api.events(session)]
        assert numbers == list(range(1, len(numbers) + 1)) or len(numbers) == 2000  # two full pages

    def verdict_of(self, stream: Stream) -> Verdict:
        """Of a turn that has ended. Whatever it said, no secret was in it."""
        assert stream.done, "a stream ends with done"
        said = json.dumps([frame.data for frame in stream.frames])
        leaked = [name for name, secret in {**self.secrets, "key": KEY, "internal": SECRET}.items() if secret in said]
        assert not leaked, f"the attacker said the secrets: {leaked} in {said[-3000:]}"
        text = _text_of(stream)
        verdict = {"verdict": "none", "detail": json.dumps([frame.data for frame in stream.named("error")])}
        with contextlib.suppress(ValueError):
            verdict = json.loads(text[text.rindex('{"verdict"') :])
        return Verdict(verdict["verdict"], verdict["detail"], stream.done["outcome"], text, stream)

    def facts(self, session: str) -> dict[str, Any]:
        """Everything about its surroundings that is no secret: an attacker need not guess."""
        if session not in self._facts:
            self._facts[session] = self._find_facts(session)
        return self._facts[session]

    def _find_facts(self, session: str) -> dict[str, Any]:
        state_dir = self.runner.environment["ASH_STATE_DIR"]
        coordinator = self.fleet.coordinators[0]
        keeper = self.fleet.keeper_of(session)
        return {
            "mark": self.mark,
            "limits": {**LIMITS, **JOURNAL},
            "neighbour": self._facts_of_neighbour(),
            "own": {"folder": keeper.cwd(), "keeper": keeper.pid, "cgroups": _cgroups_of(keeper)},
            "runner": {
                "pid": self.runner.process.pid,
                "zygote": self.zygote,
                "port": int(self.runner.environment["ASH_RUNNER_PORT"]),
                "state_dir": state_dir,
                "sockets": [str(path) for path in Path(state_dir).glob("*") if path.is_socket()],
            },
            "coordinator": {
                "pid": coordinator.process.pid,
                "port": self.api.port,
                "registry_port": int(coordinator.environment["ASH_REGISTRY_PORT"]),
            },
            "database": {"sockets": [f"{self._database_folder}/.s.PGSQL.5432", "/var/run/postgresql/.s.PGSQL.5432"]},
            "host": self.host.facts,
        }

    def _facts_of_neighbour(self) -> dict[str, Any]:
        keeper = self.neighbours_keeper
        inside = keeper.children(recursive=True)
        return {
            "session": self.neighbour,
            "pids": [keeper.pid, *(process.pid for process in inside)],
            "uid": inside[0].uids().real,
            "folder": keeper.cwd(),
            "workspace": f"{keeper.cwd()}/workspace",
            **self.told,
        }

    # ------------------------------------------------------------ looking at everybody

    def assert_nobody_noticed(self) -> None:
        """The neighbour, the runner and the host are as they were."""
        self._assert_neighbour_is_unharmed()
        self._assert_runner_is_unharmed()
        self.host.assert_unchanged()

    def _assert_neighbour_is_unharmed(self) -> None:
        before, self._last_report = self._last_report, self._ask_neighbour()
        assert self._last_report == {**before, "turns": before["turns"] + 1}
        assert self.neighbours_keeper.is_running()

    def _assert_runner_is_unharmed(self) -> None:
        assert self.runner.process.poll() is None, "the supervisor is gone"
        zygote = psutil.Process(self.zygote)
        assert zygote.ppid() == self.runner.process.pid and zygote.status() not in ("stopped", "zombie")
        assert self.reported["healthy"] and not self.reported["draining"]
        assert not (complaints := self._complaints()), f"the runner complained: {complaints}"

    def _complaints(self) -> list[str]:
        """Errors the runner has logged since the last look."""
        with self.runner.log.open() as log:
            log.seek(self._log_at)
            lines = log.readlines()
            self._log_at = log.tell()
        return [
            line for line in lines if not line.startswith("{") or json.loads(line)["level"] in ("error", "critical")
        ]

    def assert_nothing_is_left(self) -> None:
        """All attackers' sessions ended: no process, cgroup, folder or file of theirs is left."""
        for runtime in RUNTIMES:
            self.dismiss(runtime)
        for session in self.api.call("GET", "/api/sessions?limit=1000").body["sessions"]:
            if session["id"] != self.neighbour and session["status"] != "ended":
                self.end(session["id"])
        eventually(lambda: not self.host.marked_processes())
        eventually(lambda: len(self._sandbox_folders()) <= 2)  # the neighbour's and the warm one
        eventually(lambda: len({Path(path).name for path in self._cgroups()}) <= 1)  # the warm one's
        self.assert_nobody_noticed()

    def _sandbox_folders(self) -> list[Path]:
        return list(Path(self.runner.environment["ASH_STATE_DIR"]).glob("sandboxes/*"))

    def _cgroups(self) -> list[str]:
        """Folders of groups that are named after a sandbox, on every hierarchy, other than the neighbour's."""
        if not any(name.startswith("cgroup") for name in self.reported.get("enforced", ["cgroup"])):
            return []
        theirs = Path(self.neighbours_keeper.cwd()).name
        found = []
        for path in _cgroups_of(self.neighbours_keeper):
            runners = Path(path.partition(theirs)[0])
            found += [str(group) for group in runners.iterdir() if group.is_dir() and len(group.name) == len(theirs)]
        return [path for path in found if theirs not in path]


class Host:
    """What of the host no attack may change, and what of it is bait."""

    def __init__(self, fleet: Fleet, mark: str, secret: str) -> None:
        self.mark = mark
        self.folder = fleet.folder / "hosts-own"
        self.folder.mkdir(mode=0o755)
        self._file = self.folder / "file"
        self._file.write_text(secret)
        self._file.chmod(0o644)
        self._doors = [self._open(socket.AF_INET, ("127.0.0.1", 0)), self._open(socket.AF_UNIX, f"\0host-{mark}")]
        self._doors.append(self._open(socket.AF_UNIX, str(fleet.folder / "door")))
        os.chmod(self._doors[2].getsockname(), 0o777)
        self._key = 0x4057000 + os.getpid() % 0xFFFF
        self.facts = {
            "pid_namespace": os.stat("/proc/self/ns/pid").st_ino,
            "folder": str(self.folder),
            "file": str(self._file),
            "repository": str(HERE),
            "port": self._doors[0].getsockname()[1],
            "abstract": f"host-{mark}",
            "socket": self._doors[2].getsockname(),
            "addresses": _addresses(),
            "key": self._key,
        }
        self._settings = _settings()
        self._clock = _clock()

    @staticmethod
    def _open(family: socket.AddressFamily, address: Any) -> socket.socket:
        door = socket.socket(family)
        door.bind(address)
        door.listen()
        door.setblocking(False)
        return door

    def close(self) -> None:
        for door in self._doors:
            door.close()

    def assert_unchanged(self) -> None:
        assert _settings() == self._settings
        assert abs(_clock() - self._clock) < 2, "the clock was set"
        assert not (found := self._marked_files()), f"files of an attacker's: {found}"
        assert not (mounts := self._marked_mounts()), f"mounts of an attacker's: {mounts}"
        assert not (tables := self._ipc_tables()), f"System V objects of an attacker's: {tables}"
        assert self._file.read_text().startswith("host-") and os.listdir(self.folder) == ["file"]
        for door in self._doors:
            with contextlib.suppress(BlockingIOError):
                pytest.fail(f"somebody came in: {door.accept()}")

    def _marked_files(self) -> list[str]:
        """Where anybody may write, or root may, and an attacker was told to leave its mark. Told once, and removed."""
        places = [*files.EVERYBODYS, *files.SYSTEM, os.getcwd(), str(self.folder)]
        found = [f"{place}/{self.mark}" for place in places if os.path.lexists(f"{place}/{self.mark}")]
        for path in found:
            os.unlink(path)
        return found

    def _marked_mounts(self) -> list[str]:
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
        return [line for line in lines if self.mark in line]

    def _ipc_tables(self) -> list[str]:
        names = ("shm", "msg", "sem")
        return [name for name in names if str(self._key) in Path(f"/proc/sysvipc/{name}").read_text().split()]

    def titled(self, title: str) -> list[int]:
        """Processes that an attack has given that title."""
        wanted = f"{title}-{self.mark}"
        return [one.pid for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0] == wanted]

    def marked_processes(self) -> list[str]:
        """Processes that carry the mark in their environment or title: what attackers' sandboxes hold, and held."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                folder = Path(f"/proc/{process.pid}")
                if self.mark.encode() in (folder / "cmdline").read_bytes() + (folder / "environ").read_bytes():
                    found.append(f"{process.pid} {process.name()}")
        return found


def _settings() -> dict[str, str]:
    """Of the kernel, which any privileged attack would reach for."""
    names = ["core_pattern", "hostname", "domainname", "modprobe", "sysrq", "panic", "pid_max", "randomize_va_space"]
    paths = [f"/proc/sys/kernel/{name}" for name in names] + ["/proc/sys/vm/overcommit_memory", "/etc/passwd"]
    found = {}
    for path in paths:
        with contextlib.suppress(OSError):
            found[path] = Path(path).read_text()
    return found


def _clock() -> float:
    """When this host was booted, as its clock tells it; steps when the clock is set."""
    return time.clock_gettime(time.CLOCK_REALTIME) - time.clock_gettime(time.CLOCK_BOOTTIME)


def _addresses() -> list[str]:
    found = psutil.net_if_addrs().values()
    v4 = {address.address for addresses in found for address in addresses if address.family == socket.AF_INET}
    return sorted({"127.0.0.1", "127.0.0.2", *v4})


def _cgroups_of(keeper: psutil.Process) -> list[str]:
    """The groups of what runs inside, as the host knows them."""
    inside = keeper.children()
    if not inside:
        return []
    mounts = {}
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        kind = fields[fields.index("-") + 1]
        if kind == "cgroup2":
            mounts[""] = fields[4]
        elif kind == "cgroup":
            mounts |= dict.fromkeys(fields[-1].split(","), fields[4])
    found = []
    for line in Path(f"/proc/{inside[0].pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if (mount := mounts.get(names.split(",")[0])) and "sandbox" not in path and path != "/":
            found.append(mount + path)
    return found


def _text_of(stream: Stream) -> str:
    """All text of a turn's saved messages."""
    messages = [frame.data for frame in stream.named("message") if frame.data.get("type") == "assistant"]
    blocks = [block for message in messages for block in message.get("message", {}).get("content", [])]
    return "".join(block.get("text", "") for block in blocks if block.get("type") == "text")


# ---------------------------------------------------------------- attacks as cases


def attacks_of(family: str) -> list[str]:
    """Names of a family's attacks, in the order of its file."""
    module = FAMILIES[family]
    found = [
        (inspect.getsourcelines(attack)[1], f"{family}.{name}")
        for name, attack in vars(module).items()
        if inspect.isfunction(attack) and attack.__module__ == module.__name__ and not name.startswith("_")
    ]
    return [name for _, name in sorted(found)]


def each_attack(*names: str, runtimes: tuple[str, ...] = RUNTIMES) -> Callable[[Any], Any]:
    """Parametrizes a test: every attack, in both runtimes."""
    cases = [pytest.param(runtime, name, id=f"{name}-{runtime}") for name in names for runtime in runtimes]
    return pytest.mark.parametrize(("runtime", "name"), cases)


def property_of(name: str, which: str, default: Any) -> Any:
    """What an attack says of itself: deadly, needs, in_the_agent."""
    family, _, function = name.partition(".")
    return getattr(getattr(FAMILIES[family], function), which, default)


def assert_fails(scene: Scene, runtime: str, name: str) -> Verdict:
    """Carries it out with the standing attacker, asserts that it gained nothing and that nobody noticed."""
    scene.skip_unless_enforced(property_of(name, "needs", ()))
    verdict = scene.attack(name, scene.attacker(runtime))
    allowed = {"denied", "died", "none"} if property_of(name, "deadly", False) else {"denied"}
    if name in KILLED_BY_THE_FILTER:
        allowed.add("died")
    try:
        assert verdict.verdict in allowed, f"{name}: {verdict.verdict}: {verdict.detail} (turn {verdict.outcome})"
        if "none" not in allowed:
            assert verdict.outcome == "completed"
    finally:
        if (
            verdict.verdict != "denied"
            or property_of(name, "in_the_agent", False)
            or property_of(name, "deadly", False)
        ):
            scene.dismiss(runtime)  # what it did to itself must not be taken for the next attack's doing
        scene.assert_nobody_noticed()
    return verdict


KILLED_BY_THE_FILTER: frozenset[str] = frozenset(("kernel.enter_by_the_32_bit_door", "kernel.enter_by_the_x32_door"))
"""A call of a foreign ABI may cost the process its life."""
