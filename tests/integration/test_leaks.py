"""Whatever is killed in the middle of a create, nothing of it is left ten seconds later; nor of anything else that
belongs to no sandbox of the runner.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from ashd.runner import cgroup, mounts, processes
from ashd.wire.channel import bearer
from ashd.wire.v1 import runner_pb2
from ashd.wire.v1.runner_pb2_grpc import RunnerStub
from tests.integration import agents
from tests.integration.fleet import SECRET, Answer, Api, Fleet, Part, eventually

RECONCILED_S = 10.0
UIDS = range(1_500_000, 1_500_500)
CREATES = 30


class Census:
    """What there is on this host of one runner's sandboxes."""

    def __init__(self, runner: Part, groups: str) -> None:
        self._runner = runner
        self._groups = groups
        self.state = Path(runner.environment["ASH_STATE_DIR"])
        self.root = self.state / "sandboxes"

    def listed(self) -> list[runner_pb2.Sandbox]:
        """What the runner knows of."""
        with grpc.insecure_channel(f"127.0.0.1:{self._runner.environment['ASH_RUNNER_PORT']}") as channel:
            request = runner_pb2.ListSandboxesRequest()
            return list(RunnerStub(channel).ListSandboxes(request, metadata=bearer(SECRET), timeout=10.0).sandboxes)

    def is_there(self) -> bool:
        """the runner answers"""
        try:
            self.listed()
        except grpc.RpcError:
            return False
        return True

    def strays(self) -> list[str]:
        """What belongs to none of them."""
        known = {sandbox.sandbox_id for sandbox in self.listed()}
        found = [f"folder {folder.name}" for folder in self.root.iterdir() if folder.name not in known]
        found += [f"process {pid}" for pid, name in processes.by_sandbox(self.root).items() if name not in known]
        found += [f"cgroup {group}" for group in self.groups() if group.name not in known]
        found += [
            f"mount {point}" for point in mounts.below(self.root) if point.relative_to(self.root).parts[0] not in known
        ]
        users = {owner for folder in self.root.glob("*/workspace") if (owner := _owner(folder)) is not None}
        found += [f"process {pid} of user {uid}" for pid, uid in self.users().items() if uid not in users]
        return found + [f"staging {folder}" for folder in (self.state / "bundles").glob(".new-*")]

    def groups(self) -> list[Path]:
        """cgroups of its sandboxes."""
        roots = [path for path in (cgroup.ROOT, *cgroup.ROOT.iterdir()) if (path / self._groups).is_dir()]
        runners = [runner for root in roots for runner in (root / self._groups).iterdir() if runner.is_dir()]
        return [group for runner in runners for group in runner.iterdir() if group.is_dir()]

    def users(self) -> dict[int, int]:
        """Processes under user ids of its sandboxes."""
        uids = {int(name): processes.user_of(int(name)) for name in os.listdir("/proc") if name.isdigit()}
        return {pid: uid for pid, uid in uids.items() if uid is not None and uid in UIDS}


def _owner(folder: Path) -> int | None:
    try:
        return folder.stat().st_uid
    except FileNotFoundError:
        return None


@pytest.fixture
def groups() -> Iterator[str]:
    """A cgroup folder of the test's own."""
    name = f"ashd-test/{os.getpid()}-leaks"
    yield name
    for root in (cgroup.ROOT, *cgroup.ROOT.iterdir()):
        with contextlib.suppress(OSError):
            (root / name).rmdir()
            (root / name).parent.rmdir()


def start(fleet: Fleet, groups: str, warm: int) -> tuple[Api, Part, Census]:
    api = fleet.add_coordinator(config="create_timeout: 10s\nsweep_interval: 500ms\nrunner_dead_after: 5s\n")
    config = f'uid_range: "{UIDS.start}-{UIDS.stop - 1}"\ncgroup_parent: "{groups}"\nheartbeat_interval: 1s\n'
    runner = fleet.add_runner(config=config, ASH_WARM_SANDBOXES=str(warm))
    api.deploy("hello", agents.HELLO)
    return api, runner, Census(runner, groups)


# ---------------------------------------------------------------- creates cut short


def kill_supervisor(fleet: Fleet, runner: Part, census: Census) -> None:
    runner.kill()
    runner.start()


def kill_zygote(fleet: Fleet, runner: Part, census: Census) -> None:
    for process in runner.children("ashd: zygote"):
        with contextlib.suppress(psutil.NoSuchProcess):  # the supervisor replaces them as we look
            if process.ppid() == runner.process.pid:
                process.kill()


def kill_newest_keeper(fleet: Fleet, runner: Part, census: Census) -> None:
    keepers = [pids[0] for folder in census.root.iterdir() if (pids := sorted(processes.working_in(folder)))]
    for pid in keepers[-1:]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_all_three(fleet: Fleet, runner: Part, census: Census) -> None:
    kill_newest_keeper(fleet, runner, census)
    kill_zygote(fleet, runner, census)
    kill_supervisor(fleet, runner, census)


KILLS = (kill_supervisor, kill_zygote, kill_newest_keeper, kill_zygote, kill_newest_keeper, kill_all_three)


@pytest.mark.parametrize("warm", [0, 2])
def test_nothing_is_left_of_creates_cut_short_by_sigkill(fleet: Fleet, groups: str, warm: int) -> None:
    api, runner, census = start(fleet, groups, warm)
    chance = random.Random(20261122 + warm)
    for number in range(CREATES // 2):
        create_and_kill(api, KILLS[number % len(KILLS)], chance.uniform(0.0, 0.06), fleet, runner, census)
    eventually(census.is_there)
    eventually(lambda: census.strays() == [], RECONCILED_S)
    eventually(lambda: api.call("GET", "/api/sessions?status=starting").body["sessions"] == [])
    created = eventually(lambda: whole(api.call("POST", "/api/sessions", {"agent": "hello"})))
    assert api.send(created["session"]["id"], "there").done["outcome"] == "completed"
    for session in api.call("GET", "/api/sessions?limit=1000").body["sessions"]:
        api.call("DELETE", f"/api/sessions/{session['id']}")
    eventually(lambda: len(census.listed()) == warm, RECONCILED_S)
    eventually(lambda: census.strays() == [], RECONCILED_S)
    assert runner.stop() == 0
    assert census.groups() == [] and census.users() == {}
    assert list(census.root.iterdir()) == [] and mounts.below(census.state) == []


def whole(answer: Answer) -> Any:
    """the session is created"""
    assert answer.status in (201, 503), answer
    return answer.body if answer.status == 201 else None


def create_and_kill(
    api: Api,
    kill: Callable[[Fleet, Part, Census], None],
    after_s: float,
    fleet: Fleet,
    runner: Part,
    census: Census,
) -> None:
    """A create, and a kill so long after it was sent. It succeeds, or says that it can be tried again."""
    eventually(census.is_there)
    answers: list[Answer] = []
    creating = threading.Thread(
        target=lambda: answers.append(api.call("POST", "/api/sessions", {"agent": "hello"})), daemon=True
    )
    creating.start()
    time.sleep(after_s)  # the moment of the kill is what is being tried
    kill(fleet, runner, census)
    creating.join(timeout=60)
    assert [answer.status for answer in answers] in ([201], [503]), answers


# ---------------------------------------------------------------- orphans of other kinds


def test_what_belongs_to_no_sandbox_is_removed_counted_and_the_rest_left_alone(fleet: Fleet, groups: str) -> None:
    api, runner, census = start(fleet, groups, warm=1)
    session = api.session("hello")
    eventually(lambda: len(census.listed()) == 2)
    known = {sandbox.sandbox_id for sandbox in census.listed()}
    assert known == set(processes.by_sandbox(census.root).values())  # their keepers are found
    beside = sleeping_in(fleet.folder / "runner-0-of-somebody-else" / "sandboxes" / "x")
    stray = sleeping_in(census.root / str(uuid.uuid4()))
    (census.state / "bundles" / ".new-cut-short").mkdir()
    (census.root / str(uuid.uuid4()) / "workspace").mkdir(parents=True)
    kinds = {"process", "folder", "staging"} | with_a_group(census, runner) | with_a_mount(census)
    try:
        assert len(census.strays()) >= len(kinds)
        eventually(lambda: census.strays() == [], RECONCILED_S)
        eventually(lambda: stray.poll() is not None, RECONCILED_S)
        said = runner.log.read_text()
        assert {kind for kind in kinds if f"kind={kind}" not in said} == set()
        assert beside.poll() is None
        counted = eventually(lambda: fleet.listed_runners()[0]["orphans"])
        assert {kind for kind in kinds if not counted.get(kind)} == set()
    finally:
        for process in (beside, stray):
            process.kill()
            process.wait()
    assert {sandbox.sandbox_id for sandbox in census.listed()} == known
    assert api.send(session, "there").done["outcome"] == "completed"


def sleeping_in(folder: Path) -> subprocess.Popen[bytes]:
    folder.mkdir(parents=True)
    return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(120)"], cwd=folder, start_new_session=True)


def with_a_group(census: Census, runner: Part) -> set[str]:
    """Makes a cgroup that is nobody's beside those of the sandboxes there are, where there are any."""
    for group in census.groups()[:1]:
        (group.parent / str(uuid.uuid4())).mkdir()
        return {"cgroup"}
    return set()


def with_a_mount(census: Census) -> set[str]:
    """Makes a mount in a folder that is nobody's, where we may."""
    point = census.root / str(uuid.uuid4()) / "workspace"
    point.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "none", point], check=False, stderr=subprocess.DEVNULL)
    return {"mount"} if mounted.returncode == 0 else set()


def test_a_folder_that_is_nobodys_gives_its_events_to_the_database_before_it_goes(fleet: Fleet, groups: str) -> None:
    """The keeper of a turn is killed together with its supervisor: what it journaled is saved, then nothing is left."""
    api, runner, census = start(fleet, groups, warm=0)
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "40", read=False, includePartialMessages=True).start()
    stream.wait_for("text_delta", 12)
    keeper = fleet.keeper_of(session)
    runner.process.send_signal(signal.SIGSTOP)
    keeper.kill()
    runner.kill()
    runner.start()
    eventually(lambda: api.get_session(session)["status"] == "paused")
    eventually(lambda: census.strays() == [] and census.listed() == [], RECONCILED_S)
    saved = api.events(session)
    assert [event["sequence"] for event in saved] == list(range(1, len(saved) + 1)) and len(saved) > 3


# ---------------------------------------------------------------- what sandboxes use

HEAVY = {
    "agent.py": """
heap = bytearray()
async def turn(message, session):
    heap.extend(b"x" * (64 << 20))
    sum(range(3_000_000))
    yield "full"
"""
}


def test_the_runner_tells_what_each_sandbox_is_and_uses(fleet: Fleet, groups: str) -> None:
    api, _, census = start(fleet, groups, warm=1)
    api.deploy("heavy", HEAVY)
    session = api.session("heavy", limits={"memoryMb": 256})
    assert api.send(session, "x").done["outcome"] == "completed"

    def heavy() -> runner_pb2.Sandbox | None:
        """the heap was seen"""
        found = [sandbox for sandbox in census.listed() if sandbox.session_id == session]
        return found[0] if found and found[0].pss_bytes > 64 << 20 else None

    seen: runner_pb2.Sandbox = eventually(heavy, timeout_s=90.0)
    assert seen.state == "waiting" and seen.limits.memory_bytes == 256 << 20 and seen.limits.open_files == 1024
    assert seen.processes >= 2 and seen.descriptors > 5 and 0.05 < seen.cpu_seconds < 60.0
    assert seen.memory_bytes == 0 or seen.memory_bytes > 64 << 20
    (spare,) = [sandbox for sandbox in census.listed() if not sandbox.session_id]
    assert spare.state == "warm" and spare.limits.memory_bytes == 512 << 20
    eventually(lambda: fleet.listed_runners()[0]["memory"]["perSandboxMb"] > 16)
    least = {"pssMb": 64, "processes": 4, "descriptors": 10, "cpuSeconds": 0.05}
    eventually(lambda: all(fleet.listed_runners()[0]["usage"][name] >= value for name, value in least.items()))


# ---------------------------------------------------------------- admission


def test_a_runner_without_headroom_refuses_and_says_what_is_missing(fleet: Fleet, groups: str) -> None:
    api = fleet.add_coordinator()
    more = psutil.virtual_memory().total + (1 << 30)
    runner = fleet.add_runner(config=f'cgroup_parent: "{groups}"\n', ASH_MEMORY_HEADROOM=str(more))
    api.deploy("hello", agents.HELLO)
    refused = api.call("POST", "/api/sessions", {"agent": "hello"})
    assert refused.status == 503 and refused.body["retryable"] and refused.headers["Retry-After"]
    assert refused.body["code"] == "fleet.full" and "memory_headroom asks for" in refused.body["error"]
    eventually(lambda: "memory_headroom asks for" in (fleet.listed_runners()[0]["refusing"] or ""))
    assert Census(runner, groups).listed() == []  # no warm ones either
    said = runner.log.read_text()
    assert "refusing=memory" in said and "memory_headroom asks for" in said
