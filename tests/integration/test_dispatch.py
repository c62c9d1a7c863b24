"""What is asked of a runner over gRPC, and what is made of its answer; the runner is a stand-in, the wire and the
database are real.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from ashd.config.schema import CoordinatorConfig
from ashd.coordinator.background import Background
from ashd.coordinator.dispatch import Dispatcher
from ashd.coordinator.fleet import Fleet
from ashd.errors import AshdError, Unavailable
from ashd.store import agents, runners, sessions
from ashd.store.pool import Database
from ashd.wire import channel, status
from ashd.wire.v1 import runner_pb2, runner_pb2_grpc
from tests.integration.fleet import eventually

SANDBOX = str(uuid.uuid4())


@pytest.fixture(autouse=True)
def _nothing_stays_open() -> Iterator[None]:
    """gRPC closes its descriptors when the last of its objects is collected, which tracebacks put off."""

    def opened() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = opened()
    yield
    eventually(lambda: opened() <= before)


@dataclass
class Runner(runner_pb2_grpc.RunnerServicer):
    """Answers as it is told, and remembers what it was asked."""

    answer: runner_pb2.StartSessionResponse | AshdError
    asked: list[runner_pb2.StartSessionRequest] = field(default_factory=list)

    async def StartSession(self, request: Any, context: Any) -> runner_pb2.StartSessionResponse:  # noqa: N802
        self.asked.append(request)
        if isinstance(self.answer, AshdError):
            await status.abort(context, self.answer)
        return self.answer

    async def ListSandboxes(self, request: Any, context: Any) -> runner_pb2.ListSandboxesResponse:  # noqa: N802
        return runner_pb2.ListSandboxesResponse(sandboxes=[runner_pb2.Sandbox(sandbox_id=SANDBOX)])


@dataclass
class House:
    db: Database
    dispatch: Dispatcher
    folder: Path

    async def agent(self, **spec: Any) -> None:
        put = "INSERT INTO bundles (digest, size_bytes, chunk_count) VALUES ('d', 0, 0) ON CONFLICT DO NOTHING"
        await self.db.execute(put)
        await agents.upsert(self.db, agents.NewAgent(str(uuid.uuid4()), "t", "a", "", "d", json.dumps(spec)))

    async def start(self, **limits: int) -> sessions.Session:
        new = sessions.NewSession(str(uuid.uuid4()), "t", "a", limits=json.dumps(limits))
        return await self.dispatch.start_session(await sessions.create(self.db, new, dead_after_s=30.0))

    @asynccontextmanager
    async def runner(self, name: str, answer: runner_pb2.StartSessionResponse | AshdError) -> AsyncIterator[Runner]:
        runner, server = Runner(answer), channel.make_server("", shared_port=False)
        runner_pb2_grpc.add_RunnerServicer_to_server(runner, server)
        address = f"unix:{self.folder / name}"
        server.add_insecure_port(address)
        await server.start()
        await runners.register(self.db, runners.Registration(name, "h", 1, address, 10))
        try:
            yield runner
        finally:
            await server.stop(None)


@asynccontextmanager
async def a_house(url: str, folder: Path) -> AsyncIterator[House]:
    db, fleet = Database(url, 4, 5.0), Fleet("")
    await db.open()
    try:
        async with asyncio.TaskGroup() as tasks:
            yield House(db, Dispatcher(CoordinatorConfig(), db, fleet, Background(tasks)), folder)
    finally:
        await fleet.close()
        await db.close()


async def test_limits_are_asked_of_the_runner_and_what_holds_is_kept(database_url: str, tmp_path: Path) -> None:
    holds = runner_pb2.Limits(memory_bytes=64 << 20, cpu_percent=200)
    answer = runner_pb2.StartSessionResponse(sandbox_id=SANDBOX, isolation="strict", limits=holds)
    async with a_house(database_url, tmp_path) as house, house.runner("r1", answer) as runner:
        limits = {"memoryMb": 99_999, "cpuPercent": 300, "diskMb": 2, "openFiles": 30}
        await house.agent(runtime="python", network="host", limits=limits)
        session = await house.start(memoryMb=64, maxProcesses=9, fileMb=3)
        asked = runner.asked[0].limits
        assert (asked.memory_bytes, asked.cpu_percent, asked.disk_bytes) == (64 << 20, 300, 2 << 20)
        assert (asked.processes, asked.open_files, asked.file_size_bytes) == (9, 30, 3 << 20)
        assert (session.status, session.isolation) == ("active", "strict")
        assert json.loads(session.effective_limits or "") == {"memoryMb": 64, "cpuPercent": 200}
        (listed,) = await house.dispatch.sandboxes_of(await runners.get(house.db, "r1", 30.0))
        assert listed.sandbox_id == SANDBOX


@pytest.mark.parametrize(
    ("spec", "network"),
    [
        ({"runtime": "claude"}, "host"),
        ({"runtime": "claude", "network": "none"}, "none"),
        ({"runtime": "python"}, ""),
        ({"runtime": "command", "network": "host"}, "host"),
    ],
)
async def test_an_agents_network_is_its_own_word_or_what_its_runtime_needs(
    database_url: str, tmp_path: Path, spec: dict[str, str], network: str
) -> None:
    answer = runner_pb2.StartSessionResponse(sandbox_id=SANDBOX)  # of a version that tells nothing more
    async with a_house(database_url, tmp_path) as house, house.runner("r1", answer) as runner:
        await house.agent(**spec)
        session = await house.start()
        assert (runner.asked[0].network, session.isolation, session.effective_limits) == (network, None, None)


async def test_a_session_no_runner_takes_says_what_each_of_them_said(database_url: str, tmp_path: Path) -> None:
    missing = Unavailable("its bundle is missing", code="bundle.not_stored")
    async with (
        a_house(database_url, tmp_path) as house,
        house.runner("r1", Unavailable("this runner is draining", code=status.FULL)),
        house.runner("r2", missing),
    ):
        await house.agent(runtime="echo")
        with pytest.raises(Unavailable) as caught:
            await house.start()
        assert caught.value.code == "fleet.full"
        assert "r1 refused: this runner is draining; r2 refused: its bundle is missing" in caught.value.message
        (failed,) = await sessions.list_newest(house.db, "t")
        assert (failed.status, failed.status_cause) == ("error", caught.value.message)
        assert await house.db.fetch_value("SELECT sum(active)::int FROM runners") == 0
        gone = replace(await runners.get(house.db, "r1", 30.0), id="gone", address="unix:/nowhere")
        with pytest.raises(Unavailable, match="runner gone does not answer"):
            await house.dispatch.sandboxes_of(gone)
