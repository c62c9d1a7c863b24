"""A session from end to end, through every process: what clients see and what the database keeps."""

from __future__ import annotations

import base64
import io
import json
import tarfile
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.integration import agents
from tests.integration.fleet import SECRET, Api, Fleet, eventually


@pytest.fixture(scope="module")
def api(shared: Fleet) -> Api:
    return shared.apis[0]


@pytest.fixture(scope="module")
def other(shared: Fleet) -> Api:
    """The second coordinator."""
    return shared.apis[1]


def test_a_message_streams_in_order_and_done_means_saved(api: Api, other: Api) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    stream = api.send(session, "you", includePartialMessages=True)
    assert [frame.event for frame in stream.frames] == [
        "session_start",
        *["text_delta", "message"] * 2,
        "message",
        "turn_complete",
        "message",
        "done",
    ]
    assert stream.headers["Content-Type"].startswith("text/event-stream")
    assert stream.headers["Cache-Control"] == "no-cache" and stream.headers["X-Accel-Buffering"] == "no"
    assert stream.text == "hello you"
    done = stream.done
    assert done["outcome"] == "completed" and done["sessionId"] == session
    saved = other.events(session)  # at once, and at the other coordinator: it was committed before `done`
    assert [event["sequence"] for event in saved] == list(range(1, done["lastSeq"] + 1))
    turn = other.call("GET", f"/api/sessions/{session}/turns/{done['turnId']}").body["turn"]
    assert (turn["state"], turn["outcome"], turn["firstSeq"], turn["lastSeq"]) == ("settled", "completed", 1, 6)


def test_every_frame_has_a_cursor_of_its_own_and_they_ascend(api: Api) -> None:
    api.deploy("tools", agents.TOOLS)
    stream = api.send(api.session("tools"), "go", includePartialMessages=True)
    places = [frame.place for frame in stream.frames]
    assert places == sorted(set(places))


def test_messages_are_announced_by_granular_frames_and_saved_with_their_timeline(api: Api) -> None:
    api.deploy("tools", agents.TOOLS)
    session = api.session("tools")
    stream = api.send(session, "go")
    plain = ("session_start", "message", "done")
    shown = [(frame.event, frame.data) for frame in stream.frames if frame.event not in plain]
    assert shown == [
        ("thinking_delta", {"delta": "hm"}),
        ("tool_use", {"id": "t1", "name": "Bash", "input": {"command": "ls"}}),
        ("server_thing", {"type": "server_thing", "payload": 1}),
        ("block", {"type": "done", "forged": True}),  # an agent can't forge a frame of ours
        ("tool_result", {"tool_use_id": "t1", "content": "a.txt", "is_error": False}),
        ("turn_complete", {"numTurns": 2, "result": "one file"}),
    ]
    assert [m.data["type"] for m in stream.named("message")] == ["system", "assistant", "user", "result"]
    timeline = api.call("GET", f"/api/sessions/{session}/events").body["events"]
    assert [event["type"] for event in timeline] == [
        "reasoning", "text", "tool_start", "tool_result", "turn_complete", "lifecycle",
    ]  # fmt: skip
    assert json.loads(timeline[2]["data"]) == {"toolName": "Bash", "toolId": "t1", "input": {"command": "ls"}}
    messages = api.call("GET", f"/api/sessions/{session}/messages").body["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant", "assistant"]
    turn = api.call("GET", f"/api/sessions/{session}/turns").body["turns"][0]
    assert turn["usage"] == {"input_tokens": 3, "output_tokens": 5}


@pytest.mark.parametrize("way", ["files", "path", "tar"])
def test_an_agent_is_deployed_each_way(api: Api, tmp_path: Path, way: str, shared: Fleet) -> None:
    name = f"by-{way}"
    source = agents.HELLO["agent.py"]
    if way == "files":
        api.deploy(name, agents.HELLO)
    elif way == "path":
        (tmp_path / "agent.py").write_text(source)
        refused = api.call("POST", "/api/agents", {"name": name, "path": str(tmp_path)})
        assert refused.status == 400 and "agent_roots" in refused.body["error"]
        rooted = shared.add_coordinator(config=f"agent_roots: [{tmp_path}]")
        assert rooted.call("POST", "/api/agents", {"name": name, "path": str(tmp_path)}).status == 201
        outside = rooted.call("POST", "/api/agents", {"name": name, "path": str(tmp_path / "..")})
        assert outside.status == 400
    else:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            member = tarfile.TarInfo("agent.py")
            member.size = len(source)
            tar.addfile(member, io.BytesIO(source.encode()))
        answer = api.call("PUT", f"/api/agents/{name}/bundle", raw=packed.getvalue(), Content_Type="application/gzip")
        assert answer.status == 201, answer
    stream = api.send(api.session(name), "all", includePartialMessages=True)
    assert stream.text == "hello all"


def test_a_redeployed_agent_keeps_its_id_and_counts_its_versions(api: Api) -> None:
    first = api.deploy("twice", agents.HELLO).body["agent"]
    second = api.deploy("twice", agents.ECHO).body["agent"]
    assert second["id"] == first["id"] and second["version"] == first["version"] + 1
    assert second["digest"] != first["digest"]
    assert api.send(api.session("twice"), "ping", includePartialMessages=True).text == "ping"


def test_agents_and_sessions_do_not_mix(api: Api) -> None:
    api.deploy("hello", agents.HELLO)
    api.deploy("counter", agents.COUNTER)
    sessions = [api.session("hello"), api.session("counter"), api.session("counter")]
    with ThreadPoolExecutor(3) as pool:
        streams = [s for _ in range(2) for s in pool.map(lambda session: api.send(session, "x"), sessions)]
    results = [stream.named("turn_complete")[0].data["result"] for stream in streams]
    assert results[0] == results[3] == "hello x"
    assert sorted(results[1:3]) == ["1 0 1", "1 0 1"] and sorted(results[4:6]) == ["2 2 2", "2 2 2"]


def test_a_python_agent_remembers_across_turns(api: Api) -> None:
    api.deploy("counter", agents.COUNTER)
    session = api.session("counter")
    answers = [api.send(session, "again").named("turn_complete")[0].data["result"] for _ in range(3)]
    assert answers == ["1 0 1", "2 2 2", "3 4 3"]


def test_the_command_runtime_the_echo_and_the_mock_answer(api: Api) -> None:
    for name, files in (("command", agents.COMMAND), ("echo", agents.ECHO), ("mock", agents.MOCK)):
        api.deploy(name, files)
    assert api.send(api.session("command"), "hi", includePartialMessages=True).text == "you said hi"
    assert api.send(api.session("echo"), "hi", includePartialMessages=True).text == "hi"
    blocks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    echoed = api.send(api.session("echo"), blocks).named("message")[0].data
    assert echoed["message"]["content"] == blocks
    session = api.session("mock")
    assert api.send(session, "p1", includePartialMessages=True).text == "[Mock] Turn 1 | History: p1"
    assert api.send(session, "p2").named("turn_complete")[0].data["result"] == (
        "[Resumed session] [Mock] Turn 2 | History: p1 | p2"
    )


def test_a_failing_turn_tells_why_and_the_session_goes_on(api: Api) -> None:
    api.deploy("failing", agents.FAILING)
    session = api.session("failing")
    for _ in range(2):
        stream = api.send(session, "x")
        assert stream.done["outcome"] == "failed"
        (error,) = stream.named("error")
        assert error.data == {"error": "ValueError: no such luck", "code": "agent.failed", "retryable": False}
    assert api.get_session(session)["status"] == "active"


def test_an_agent_that_dies_settles_its_turn_and_pauses_the_session(api: Api) -> None:
    api.deploy("suicide", agents.SUICIDE)
    session = api.session("suicide")
    stream = api.send(session, "x")
    assert stream.done["outcome"] == "failed"
    assert stream.named("error")[0].data["code"] in ("sandbox.exited", "sandbox.killed")
    eventually(lambda: api.get_session(session)["status"] == "paused")
    refused = api.call("POST", f"/api/sessions/{session}/messages", {"content": "y"})
    assert (refused.status, refused.body["error"], refused.body["admitted"]) == (400, "Session is paused", "no")


def test_an_agent_over_its_memory_limit_ends_as_oom(api: Api, shared: Fleet) -> None:
    if any("missing=cgroup-memory" in runner.log.read_text() for runner in shared.runners):
        pytest.skip("no memory cgroup may be written on this host")
    api.deploy("hungry", agents.HUNGRY)
    session = api.session("hungry")
    stream = api.send(session, "x")
    assert stream.done["outcome"] == "oom" and stream.named("error")[0].data["code"] == "sandbox.oom"
    eventually(lambda: api.get_session(session)["status"] == "paused")


def test_a_session_shows_the_limits_that_hold_whatever_was_asked_for(api: Api, shared: Fleet) -> None:
    api.deploy("greedy", {**agents.HELLO, "agent.yaml": "limits: {memoryMb: 100000, maxProcesses: 50}\n"})
    limits = {"maxProcesses": 20, "cpuPercent": 50, "openFiles": 100, "fileMb": 3, "diskMb": 99999}
    session = api.get_session(api.session("greedy", limits=limits))
    holds = {"memoryMb": 512, "diskMb": 2048, "maxProcesses": 20, "cpuPercent": 50, "openFiles": 100, "fileMb": 3}
    assert session["limits"] == holds
    path = f"/api/internal/runners/{session['runnerId']}/sandboxes"
    listed = api.call("GET", path, Authorization=f"Bearer {SECRET}").body["sandboxes"]
    assert session["id"] in [sandbox["sessionId"] for sandbox in listed]
    assert shared.listed_runners()[0]["refusing"] is None


def test_utf8_of_every_width_arrives_whole(api: Api) -> None:
    api.deploy("unicode", agents.UNICODE)
    text = 'aé€😀\u2028\x01"\\' * 3
    stream = api.send(api.session("unicode"), text, includePartialMessages=True)
    assert stream.text == text
    assert stream.named("turn_complete")[0].data["result"] == text


def test_a_client_that_leaves_does_not_stop_its_turn(api: Api) -> None:
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "30", read=False).start()
    stream.wait_for("message")
    stream.close()
    eventually(lambda: api.get_session(session)["openTurnId"] is None)
    (turn,) = api.call("GET", f"/api/sessions/{session}/turns").body["turns"]
    assert turn["outcome"] == "completed"
    saved = api.events(session)
    assert [event["sequence"] for event in saved] == list(range(1, turn["lastSeq"] + 1))


def test_respond_async_answers_at_once_and_the_turn_runs(api: Api) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    answer = api.call("POST", f"/api/sessions/{session}/messages", {"content": "x"}, Prefer="respond-async")
    assert answer.status == 202
    turn = answer.body["turn"]["id"]
    path = f"/api/sessions/{session}/turns/{turn}"
    eventually(lambda: api.call("GET", path).body["turn"]["outcome"] == "completed")


def test_only_one_turn_is_open_at_a_time(api: Api, other: Api) -> None:
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "20", read=False).start()
    stream.wait_for("session_start")
    refused = other.call("POST", f"/api/sessions/{session}/messages", {"content": "1"})
    assert (refused.status, refused.body["code"], refused.body["retryable"]) == (409, "turn.open", True)
    stream.ended.wait(30)
    assert stream.done["outcome"] == "completed"


def test_an_idempotency_key_reattaches_to_the_turn_it_made(api: Api, other: Api) -> None:
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    key = {"Idempotency-Key": "k1"}
    first = api.send(session, "15", read=False, headers=key).start()
    first.wait_for("session_start")
    again = other.send(session, "15", headers=key)
    first.ended.wait(30)
    assert again.done["turnId"] == first.done["turnId"]
    later = api.send(session, "15", headers=key)  # settled by now: from the database and the journal
    assert [f.id for f in later.named("message")] == [f.id for f in first.named("message")] == [
        f.id for f in again.named("message")
    ]  # fmt: skip
    mismatch = api.call("POST", f"/api/sessions/{session}/messages", {"content": "16"}, Idempotency_Key="k1")
    assert (mismatch.status, mismatch.body["code"]) == (409, "idempotency.mismatch")
    assert len(api.call("GET", f"/api/sessions/{session}/turns").body["turns"]) == 1


def test_creating_a_session_twice_with_one_key_makes_one(api: Api, other: Api) -> None:
    api.deploy("hello", agents.HELLO)
    body = {"agent": "hello", "labels": {"for": "idempotency"}}
    first = api.call("POST", "/api/sessions", body, Idempotency_Key="s1")
    again = other.call("POST", "/api/sessions", body, Idempotency_Key="s1")
    assert first.status == again.status == 201 and first.body["session"]["id"] == again.body["session"]["id"]
    other_body = other.call("POST", "/api/sessions", {"agent": "hello"}, Idempotency_Key="s1")
    assert (other_body.status, other_body.body["code"]) == (409, "idempotency.mismatch")


def test_attaching_in_mid_turn_at_another_coordinator_replays_and_follows(api: Api, other: Api) -> None:
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "30", read=False, includePartialMessages=True).start()
    stream.wait_for("text_delta", 5)
    attached = other.attach(session, "0").start()
    attached.wait_for("done")
    stream.ended.wait(30)
    seen = [(f.id, f.event) for f in attached.frames if f.event not in ("session_start", "user_message")]
    assert seen == [(f.id, f.event) for f in stream.frames if f.event != "session_start"]
    attached.close()


def test_a_stream_cut_anywhere_goes_on_exactly_there(api: Api, other: Api) -> None:
    api.deploy("tools", agents.TOOLS)
    session = api.session("tools")
    api.send(session, "go")
    whole = api.attach(session, "0").start()
    whole.wait_for("done")
    frames = [frame for frame in whole.frames if frame.event != "session_start"]
    for position, frame in enumerate(frames[:-1]):
        rest = other.attach(session, Last_Event_ID=frame.id).start()
        rest.wait_for("done")
        assert [(f.id, f.event) for f in rest.frames[1:]] == [(f.id, f.event) for f in frames[position + 1 :]]
        rest.close()
    whole.close()


def test_attaching_follows_across_turns(api: Api, other: Api) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    attached = other.attach(session).start()
    attached.wait_for("session_start")
    api.send(session, "one")
    api.send(session, "two")
    attached.wait_for("done", 2)
    said = [frame.data["content"] for frame in attached.named("user_message")]
    assert said == ["one", "two"]
    attached.close()


@pytest.mark.parametrize("cursor", ["x", "1.2", "1.2.3.4", "-1.0.0", "1.99999.0", "99.0.0", "1.0.99999999999999999999"])
def test_a_cursor_that_is_none_is_refused(api: Api, cursor: str) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    refused = api.attach(session, cursor)
    assert refused.status == 400 and refused.error["code"] in ("cursor.invalid", "cursor.ahead")


def test_deleting_in_mid_turn_ends_the_session_and_its_stream(api: Api, other: Api, shared: Fleet) -> None:
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "200", read=False).start()
    stream.wait_for("message")
    attached = other.attach(session, "0").start()
    ended = other.call("DELETE", f"/api/sessions/{session}")
    assert ended.status == 200 and ended.body["session"]["status"] == "ended"
    assert other.call("DELETE", f"/api/sessions/{session}").body["session"]["status"] == "ended"
    assert stream.ended.wait(30) and stream.frames[-1].event == "done"
    assert stream.frames[-1].data["outcome"] == "interrupted"
    assert attached.ended.wait(30)  # an ended session has nothing more to say
    eventually(lambda: not shared.keepers_of(session))
    assert api.attach(session, attached.last_id).status == 204
    numbers = [event["sequence"] for event in api.events(session)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_a_burst_of_creates_spreads_over_the_runners(api: Api, other: Api, shared: Fleet) -> None:
    api.deploy("hello", agents.HELLO)
    for runner in range(2):
        eventually(lambda runner=runner: shared.listed_runners()[runner]["healthy"])
    before = {r["runnerId"]: r["active"] for r in shared.listed_runners()}
    with ThreadPoolExecutor(10) as pool:
        made = list(pool.map(lambda n: (api, other)[n % 2].session("hello"), range(20)))
    placed = [api.get_session(session)["runnerId"] for session in made]
    counts = {name: placed.count(name) + before[name] for name in before}
    assert abs(counts["runner-0"] - counts["runner-1"]) <= 1, (before, counts)
    for session in made:
        api.call("DELETE", f"/api/sessions/{session}")


def test_a_session_of_an_agent_that_cannot_load_is_refused_with_the_reason(api: Api) -> None:
    api.deploy("broken", {"agent.py": "import nothing_like_this\n"})
    refused = api.call("POST", "/api/sessions", {"agent": "broken"})
    assert refused.status == 400 and "nothing_like_this" in refused.body["error"]
    assert refused.body["code"] == "agent.import_failed"
    (session,) = api.call("GET", "/api/sessions?agent=broken").body["sessions"]
    assert session["status"] == "error"
    for _ in range(2):  # the same answer for the same key, not a session that never began
        keyed = api.call("POST", "/api/sessions", {"agent": "broken"}, Idempotency_Key="broken")
        assert keyed.status == 400 and "nothing_like_this" in keyed.body["error"]


def test_a_variable_that_cannot_be_stored_is_refused_before_anything_begins(api: Api) -> None:
    api.deploy("hello", agents.HELLO)
    raw = b'{"agent": "hello", "extraEnv": {"A": "\\ud800"}}'
    refused = api.call("POST", "/api/sessions", raw=raw, Content_Type="application/json")
    assert refused.status == 400 and "extraEnv.A" in refused.body["error"]


def test_a_slow_client_of_a_flood_costs_no_memory(api: Api, shared: Fleet) -> None:
    api.deploy("flood", agents.FLOOD)
    session = api.session("flood")
    workers = shared.coordinators[0].children("ashd: coordinator worker")
    supervisors = [psutil.Process(runner.process.pid) for runner in shared.runners]
    watched = [*workers, *supervisors, shared.keeper_of(session)]
    before = [process.memory_info().rss for process in watched]
    stream = api.send(session, "125000", read=False, includePartialMessages=True)  # 500 MB, and nobody reads
    eventually(lambda: api.get_session(session)["openTurnId"] is None, 90)
    grown = [process.memory_info().rss - rss for process, rss in zip(watched, before, strict=True)]
    assert max(grown) < 40 << 20, grown
    stream.start()
    assert stream.ended.wait(60)
    places = [frame.place for frame in stream.frames]
    assert places == sorted(set(places)) and stream.done["outcome"] == "completed"
    assert max(process.memory_info().rss - rss for process, rss in zip(watched, before, strict=True)) < 60 << 20
    api.call("DELETE", f"/api/sessions/{session}")


def test_bad_input_is_refused_by_name_and_changes_nothing(api: Api) -> None:
    api.deploy("hello", agents.HELLO)
    session = api.session("hello")
    path = f"/api/sessions/{session}/messages"
    unknown = f"/api/sessions/{uuid.uuid4()}/messages"
    refusals: list[tuple[Callable[[], object], int, str]] = [
        (lambda: api.call("POST", path, {}), 400, "content"),
        (lambda: api.call("POST", path, {"content": 5}), 400, "content"),
        (lambda: api.call("POST", path, {"content": "x" * 500_001}), 400, "content"),
        (lambda: api.call("POST", path, {"content": []}), 400, "content"),
        (lambda: api.call("POST", path, raw=b"{", Content_Type="application/json"), 400, "JSON"),
        (lambda: api.call("POST", path, raw=b"x", Content_Type="text/plain"), 415, "application/json"),
        (lambda: api.call("POST", "/api/sessions/not-a-uuid/messages", {"content": "x"}), 400, "uuid"),
        (lambda: api.call("POST", unknown, {"content": "x"}), 404, "Session not found"),
        (lambda: api.call("POST", "/api/sessions", {"agent": "nobody"}), 404, 'Agent "nobody" not found'),
        (lambda: api.call("GET", "/api/nothing"), 404, ""),
        (lambda: api.call("PATCH", "/health"), 405, ""),
        (lambda: api.call("GET", "/api/agents", Authorization="Bearer wrong"), 401, "Invalid API key"),
        (lambda: api.call("GET", "/api/agents", Authorization="x"), 401, "Invalid Authorization header format"),
    ]
    for request, status, text in refusals:
        answer = request()
        assert answer.status == status and text in answer.body["error"], answer  # type: ignore[attr-defined]
        assert answer.body["statusCode"] == status and answer.body["code"]  # type: ignore[attr-defined]
    assert api.get_session(session)["lastSeq"] == 0


def test_a_bundle_that_would_leave_its_folder_is_refused(api: Api) -> None:
    for name in ("../out", "/abs", "a/../../b"):
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO(b""))
        answer = api.call("PUT", "/api/agents/evil/bundle", raw=packed.getvalue(), Content_Type="application/gzip")
        assert answer.status == 400 and name in answer.body["error"], answer
    content = base64.b64encode(b"x").decode()
    answer = api.call("POST", "/api/agents", {"name": "evil", "files": [{"path": "../x", "content": content}]})
    assert answer.status == 400
    assert api.call("GET", "/api/agents/evil").status == 404
