"""The first three promises under misfortune: processes of every kind are killed in mid-turn, and nothing is lost,
doubled or run twice.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import psutil
import pytest

from tests.conftest import Cluster
from tests.integration import agents
from tests.integration.fleet import Api, Fleet, Stream, eventually

PIECES = [f"{number} " for number in range(40)]
BLOCKS = [f"block {number}" for number in (9, 19, 29, 39)]


def start_slow_turn(api: Api) -> tuple[str, Stream]:
    """A session in the middle of a turn of forty pieces."""
    api.deploy("slow", agents.SLOW)
    session = api.session("slow")
    stream = api.send(session, "40", read=False, includePartialMessages=True).start()
    stream.wait_for("text_delta", 12)
    return session, stream


def assert_whole(api: Api, session: str, frames: list[Stream]) -> None:
    """All the streams together are one: every piece and block once and in order, numbers dense, one turn, completed."""
    others = ("session_start", "user_message")
    seen = [frame for stream in frames for frame in stream.frames if frame.event not in others]
    assert [frame.data["delta"] for frame in seen if frame.event == "text_delta"] == PIECES
    places = [frame.place for frame in seen]
    assert places == sorted(set(places))
    assert [frame.event for frame in seen].count("done") == 1 and seen[-1].data["outcome"] == "completed"
    assert_saved(api, session)


def assert_saved(api: Api, session: str) -> None:
    saved = api.events(session)
    assert [event["sequence"] for event in saved] == list(range(1, len(saved) + 1))
    turns = api.call("GET", f"/api/sessions/{session}/turns").body["turns"]
    assert [turn["outcome"] for turn in turns] == ["completed"]


def test_a_killed_supervisor_loses_nothing_and_the_stream_goes_on(fleet: Fleet) -> None:
    api, runner = fleet.add_coordinator(), fleet.add_runner()
    session, stream = start_slow_turn(api)
    keeper = fleet.keeper_of(session)
    runner.kill()
    runner.start()
    assert stream.ended.wait(30)
    assert_whole(api, session, [stream])
    assert keeper.is_running()  # the sandbox was adopted, not replaced
    assert api.send(session, "1").done["outcome"] == "completed"


def test_a_killed_worker_loses_nothing_and_clients_reattach(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    fleet.add_runner()
    session, stream = start_slow_turn(api)
    for worker in fleet.coordinators[0].children("ashd: coordinator worker"):
        worker.kill()
    assert stream.ended.wait(30)
    rest = eventually(lambda: _reattached(api, session, stream)).start()
    rest.wait_for("done")
    assert_whole(api, session, [stream, rest])
    rest.close()


def _reattached(api: Api, session: str, stream: Stream) -> Stream | None:
    """the session's stream can be attached to again"""
    try:
        attached = api.attach(session, Last_Event_ID=stream.last_id)
    except OSError:
        return None
    return attached if attached.status == 200 else None


def test_a_killed_coordinator_loses_nothing_and_another_goes_on(fleet: Fleet) -> None:
    first, second = fleet.add_coordinator(), fleet.add_coordinator()
    fleet.add_runner()
    session, stream = start_slow_turn(first)
    for process in [*fleet.coordinators[0].children("ashd: coordinator worker")]:
        process.kill()
    fleet.coordinators[0].kill()
    assert stream.ended.wait(30)
    rest = second.attach(session, Last_Event_ID=stream.last_id).start()
    rest.wait_for("done")
    assert_whole(second, session, [stream, rest])
    rest.close()


def test_a_stopping_coordinator_hands_its_streams_over(fleet: Fleet) -> None:
    first, second = fleet.add_coordinator(), fleet.add_coordinator()
    fleet.add_runner()
    session, stream = start_slow_turn(first)
    assert fleet.coordinators[0].stop() == 0
    assert stream.ended.wait(5) and "reconnect" in stream.comments[-1]
    rest = second.attach(session, Last_Event_ID=stream.last_id).start()
    rest.wait_for("done")
    assert_whole(second, session, [stream, rest])
    rest.close()


def test_a_killed_zygote_is_replaced_and_live_sandboxes_do_not_notice(fleet: Fleet) -> None:
    api, runner = fleet.add_coordinator(), fleet.add_runner()
    session, stream = start_slow_turn(api)
    (zygote,) = [p for p in runner.children("ashd: zygote") if p.parent() == psutil.Process(runner.process.pid)]
    zygote.kill()
    assert stream.ended.wait(30)
    assert_whole(api, session, [stream])
    for _ in range(4):  # more than were warm
        assert api.send(api.session("slow"), "1").done["outcome"] == "completed"
    keeper = fleet.keeper_of(session)
    assert keeper.ppid() == runner.process.pid  # an orphan of the dead zygote's, and ours to collect
    api.call("DELETE", f"/api/sessions/{session}")
    eventually(lambda: not psutil.pid_exists(keeper.pid))


def test_a_killed_keeper_takes_its_jail_along_and_settles_the_turn(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    fleet.add_runner()
    session, stream = start_slow_turn(api)
    keeper = fleet.keeper_of(session)
    below = keeper.children(recursive=True)
    keeper.kill()
    assert stream.ended.wait(30)
    assert stream.done["outcome"] == "failed" and stream.named("error")[0].data["code"] == "keeper.died"
    assert psutil.wait_procs(below, timeout=5)[1] == []
    eventually(lambda: api.get_session(session)["status"] == "paused")
    saved = api.events(session)
    assert [event["sequence"] for event in saved] == list(range(1, len(saved) + 1))


def test_supervisor_and_keeper_killed_together_are_settled_by_the_next_supervisor(fleet: Fleet) -> None:
    api, runner = fleet.add_coordinator(), fleet.add_runner()
    session, stream = start_slow_turn(api)
    keeper = fleet.keeper_of(session)
    runner.kill()
    keeper.kill()
    runner.start()
    assert stream.ended.wait(30)
    assert stream.done["outcome"] == "failed"
    eventually(lambda: api.get_session(session)["status"] == "paused")


def test_while_the_database_is_away_no_turn_is_called_done(fleet: Fleet, postgres: Cluster) -> None:
    api = fleet.add_coordinator()
    fleet.add_runner()
    session, stream = start_slow_turn(api)
    postgres.stop()
    try:
        stream.wait_for("turn_complete")  # partial and saved events go on; nothing says they are saved
        time.sleep(1.0)  # long enough for a `done` that came too early to arrive
        assert not stream.named("done")
        refused = api.call("POST", "/api/sessions", {"agent": "slow"})
        assert refused.status == 503 and refused.headers["Retry-After"] and refused.body["retryable"]
        assert api.call("GET", "/ready").status == 503 and api.call("GET", "/health").status == 200
    finally:
        postgres.start()
    assert stream.ended.wait(30)
    assert_whole(api, session, [stream])


def test_a_turn_accepted_by_a_coordinator_that_died_is_launched_once(fleet: Fleet) -> None:
    """The runner's supervisor is stopped while the message is accepted, so that nobody can launch it; then its
    coordinator is killed.
    """
    first, second = fleet.add_coordinator(), fleet.add_coordinator(config="sweep_interval: 1s")
    runner = fleet.add_runner()
    first.deploy("counter", agents.COUNTER)
    session = first.session("counter")
    runner.process.send_signal(signal.SIGSTOP)
    key = {"Idempotency-Key": "once"}
    stream = first.send(session, "x", read=False, headers=key).start()
    stream.wait_for("session_start")
    for process in fleet.coordinators[0].children("ashd: coordinator worker"):
        process.kill()
    fleet.coordinators[0].kill()
    runner.process.send_signal(signal.SIGCONT)
    retried = second.send(session, "x", headers=key)
    assert retried.done["outcome"] == "completed"
    assert retried.named("turn_complete")[0].data["result"] == "1 0 1"
    assert_saved(second, session)


def test_a_runner_that_stops_drains_and_its_sessions_are_paused(fleet: Fleet) -> None:
    api, runner = fleet.add_coordinator(), fleet.add_runner()
    session, stream = start_slow_turn(api)
    assert runner.stop() == 0
    assert stream.ended.wait(10)
    assert stream.done["outcome"] == "completed"  # the open turn was let end
    assert api.get_session(session)["status"] == "paused"
    assert not [listed for listed in fleet.listed_runners() if listed["healthy"]]
    refused = api.call("POST", "/api/sessions", {"agent": "slow"})
    assert refused.status == 503 and "No runners available" in refused.body["error"]
    assert api.call("DELETE", f"/api/sessions/{session}").body["session"]["status"] == "ended"


def test_a_dead_runner_is_swept_its_turn_lost_and_fenced_when_it_returns(fleet: Fleet) -> None:
    quick = "runner_dead_after: 2s\nsweep_interval: 500ms\n"
    api = fleet.add_coordinator(config=quick)
    runner = fleet.add_runner()
    session, stream = start_slow_turn(api)
    keeper = fleet.keeper_of(session)
    runner.kill()
    assert stream.ended.wait(30)
    assert stream.frames[-1].event == "done" and stream.frames[-1].data["outcome"] == "lost"
    assert stream.named("error")[0].data["code"] == "turn.lost" and stream.named("error")[0].data["retryable"]
    assert api.get_session(session)["status"] == "paused"
    runner.start()
    eventually(lambda: not keeper.is_running())  # its lease is over: Register said so
    saved = api.events(session)
    assert [event["sequence"] for event in saved] == list(range(1, len(saved) + 1))


def test_a_silent_runner_keeps_no_stream_waiting(fleet: Fleet) -> None:
    """A host that is cut off closes nothing: its supervisor is stopped, not killed."""
    api = fleet.add_coordinator(config="runner_dead_after: 2s\nsweep_interval: 500ms\n")
    runner = fleet.add_runner()
    session, stream = start_slow_turn(api)
    runner.process.send_signal(signal.SIGSTOP)
    try:
        assert stream.ended.wait(30)
        assert stream.frames[-1].event == "done" and stream.frames[-1].data["outcome"] == "lost"
        assert api.get_session(session)["status"] == "paused"
    finally:
        runner.process.send_signal(signal.SIGCONT)
    eventually(lambda: not fleet.keepers_of(session))  # its lease is over


def test_a_full_runner_refuses_and_says_so(fleet: Fleet) -> None:
    api = fleet.add_coordinator()
    fleet.add_runner(ASH_MAX_SANDBOXES="2")
    api.deploy("hello", agents.HELLO)
    sessions = [api.session("hello") for _ in range(2)]
    refused = api.call("POST", "/api/sessions", {"agent": "hello"})
    assert refused.status == 503 and "capacity reached" in refused.body["error"]
    api.call("DELETE", f"/api/sessions/{sessions[0]}")
    eventually(lambda: api.call("POST", "/api/sessions", {"agent": "hello"}).status == 201)


@pytest.mark.parametrize("listener", ["coordinator", "runner"])
def test_listening_beyond_loopback_without_a_secret_is_refused(
    fleet: Fleet, listener: str, new_database: Callable[[], str]
) -> None:
    variables = {"ASH_INTERNAL_SECRET": "", "ASH_HOST": "0.0.0.0", "ASH_RUNNER_HOST": "0.0.0.0"}
    part = fleet._part("open", [listener], ASH_DATABASE_URL=fleet.database_url, **variables)
    part.start()
    assert part.process.wait(timeout=20) != 0
    assert "internal_secret" in part.log.read_text()
