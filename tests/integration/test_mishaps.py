"""What rarely goes wrong, each once: a damaged journal, user ids running out, cursors nobody gave, lost answers."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import psycopg
import pytest

from ashd.wire.status import NOT_HERE
from ashd.wire.v1 import events_pb2, registry_pb2, runner_pb2
from ashd.wire.v1.registry_pb2_grpc import RunnerRegistryStub
from ashd.wire.v1.runner_pb2_grpc import RunnerServicer, add_RunnerServicer_to_server
from tests.integration import agents
from tests.integration.fleet import SECRET, Fleet, Part, eventually

# ---------------------------------------------------------------- a damaged journal


def test_a_damaged_journal_costs_its_own_session_only(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    runner = fleet.add_runner("heartbeat_interval: 1s\n")
    api.deploy("slow", agents.SLOW)
    damaged, other = api.session("slow"), api.session("slow")
    with psycopg.connect(fleet.database_url, autocommit=True) as conn:  # else missing in its runner's list is forgiven
        conn.execute("UPDATE sessions SET placed_at = now() - interval '1 hour'")
    stream = api.send(damaged, "200", read=False, includePartialMessages=True).start()
    stream.wait_for("text_delta", 3)
    keeper = fleet.keeper_of(damaged)
    (segment,) = journal_of(runner, damaged).glob("*.seg")
    with segment.open("ab") as journal:
        journal.write(b"\xff" * 100)
    assert stream.ended.wait(30)
    assert stream.frames[-1].event == "done" and stream.frames[-1].data["outcome"] == "lost"
    eventually(lambda: not keeper.is_running())
    eventually(lambda: api.get_session(damaged)["status"] == "paused")
    saved = api.events(damaged)
    assert [event["sequence"] for event in saved] == list(range(1, len(saved) + 1))
    assert api.send(other, "1").done["outcome"] == "completed"
    eventually(lambda: not journal_of(runner, damaged))
    said = runner.log.read_text().count("journal is corrupt, ending the sandbox")
    assert said == 1  # and not once for each look at it


def journal_of(runner: Part, session: str) -> Any:
    """The folder of the session's journal; None when there is none."""
    for lease in Path(runner.environment["ASH_STATE_DIR"]).glob("sandboxes/*/session.json"):
        if json.loads(lease.read_text())["session"] == session:
            return lease.parent / "journal"
    return None


# ---------------------------------------------------------------- user ids

TWO_IDS = "uid_range: 300200-300201\nwarm_sandboxes: 0\nheartbeat_interval: 1s\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give user ids")
def test_when_all_user_ids_are_taken_the_next_runner_is_asked_and_they_come_back(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    small = fleet.add_runner(TWO_IDS, ASH_MAX_SANDBOXES="100")
    if "'uid'" not in small.log.read_text():
        pytest.skip("this host gives sandboxes no user id")
    api.deploy("hello", agents.HELLO)
    first, second = api.session("hello"), api.session("hello")
    refused = api.call("POST", "/api/sessions", {"agent": "hello"})
    assert refused.status == 503 and refused.body["retryable"]
    assert "user ids" in small.log.read_text()
    fleet.add_runner(ASH_MAX_SANDBOXES="2")
    third = api.session("hello")  # the small one has more room by its own count, so it is asked first
    assert [api.get_session(one)["runnerId"] for one in (first, second, third)] == ["runner-0", "runner-0", "runner-1"]
    for _ in range(5):
        api.call("DELETE", f"/api/sessions/{first}")
        eventually(lambda: len(list(Path(small.environment["ASH_STATE_DIR"]).glob("sandboxes/*"))) == 1)
        first = api.session("hello")
        assert api.get_session(first)["runnerId"] == "runner-0"
    assert api.send(first, "you").done["outcome"] == "completed"


# ---------------------------------------------------------------- cursors


@pytest.mark.parametrize("ahead", ["1.999.0", "1.999.7"])
def test_a_cursor_ahead_of_its_runner_is_reset_when_the_runner_is_back(fleet: Fleet, ahead: str) -> None:
    api, runner = fleet.add_coordinator(), fleet.add_runner()
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    last = api.send(session, "you").done["lastSeq"]
    assert api.attach(session, after=ahead).status == 400  # the runner is there to ask
    runner.kill()
    stream = api.attach(session, after=ahead).start()  # nobody is, so the client is believed
    assert stream.status == 200
    runner.start()
    assert stream.wait_for("reset").data == {"cursor": f"1.{last}.0"}
    assert api.send(session, "again").done["outcome"] == "completed"
    stream.wait_for("done")
    assert stream.named("user_message")[0].place == (last + 1, 0)  # nothing of before, nothing left out
    stream.close()


# ---------------------------------------------------------------- lost answers


class Forgetful(RunnerServicer):
    """A runner that runs a turn and records it, yet never answers its launch; afterwards the sandbox is gone."""

    def __init__(self, registry: str) -> None:
        self.registry = registry
        self.launches: list[str] = []

    def StartSession(self, request: Any, context: Any) -> runner_pb2.StartSessionResponse:
        return runner_pb2.StartSessionResponse(sandbox_id=str(uuid.uuid4()))

    def StartTurn(self, request: Any, context: Any) -> Iterator[events_pb2.EventBatch]:
        self.launches.append(request.turn_id)
        if len(self.launches) > 1:
            context.set_trailing_metadata((("ashd-code", NOT_HERE),))
            context.abort(grpc.StatusCode.NOT_FOUND, "the sandbox is gone")
        self._record(request)
        context.abort(grpc.StatusCode.UNAVAILABLE, "the answer is lost")
        yield events_pb2.EventBatch()

    def _record(self, request: Any) -> None:
        user = json.dumps({"type": "user", "content": "you"}).encode()
        end = json.dumps({"action": "turn_settled", "turnId": request.turn_id, "outcome": "completed"}).encode()
        events = [
            events_pb2.Event(seq=1, kind=events_pb2.MESSAGE, type="user", turn_id=request.turn_id, payload=user),
            events_pb2.Event(seq=2, kind=events_pb2.SETTLED, type="lifecycle", turn_id=request.turn_id, payload=end),
        ]
        share = registry_pb2.SessionEvents(session_id=request.session_id, epoch=request.epoch, events=events)
        with grpc.insecure_channel(self.registry) as channel:
            metadata = (("authorization", f"Bearer {SECRET}"),)
            (answer,) = RunnerRegistryStub(channel).Record(
                iter([registry_pb2.RecordRequest(sessions=[share])]), metadata=metadata, timeout=10
            )
        assert not answer.stale


@contextmanager
def forgetful_runner(fleet: Fleet) -> Iterator[Forgetful]:
    service = Forgetful(f"127.0.0.1:{fleet.coordinators[0].environment['ASH_REGISTRY_PORT']}")
    server = grpc.server(ThreadPoolExecutor(4))
    add_RunnerServicer_to_server(service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        runner = {"runnerId": "forgetful", "host": "127.0.0.1", "port": port, "maxSandboxes": 10}
        answer = fleet.apis[0].call("POST", "/api/internal/runners/register", runner, Authorization=f"Bearer {SECRET}")
        assert answer.status == 200
        yield service
    finally:
        server.stop(None).wait()


def test_a_launch_answered_to_nobody_is_followed_and_not_called_unrun(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    with forgetful_runner(fleet) as runner:
        api.deploy("hello", agents.HELLO)
        session = api.session("hello")
        stream = api.send(session, "you")
        assert stream.done["outcome"] == "completed" and not stream.named("error")
        assert len(runner.launches) > 1 and len(set(runner.launches)) == 1
        (turn,) = api.call("GET", f"/api/sessions/{session}/turns").body["turns"]
        assert (turn["state"], turn["outcome"], turn["lastSeq"]) == ("settled", "completed", 2)
        assert "turn.launched" not in json.dumps([frame.data for frame in stream.frames])
