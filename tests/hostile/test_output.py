"""Attacks by what an agent says; see agent/armoury/output.py."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.hostile.scene import JOURNAL, MIB, RUNTIMES, TURN_TIMEOUT_S, Scene, each_attack

TOO_MUCH = ("say_a_giant_event", "say_a_deep_event", "say_an_event_of_many_values", "say_what_is_no_number")
HARMLESS = ("say_what_ends_a_stream", "say_something_for_the_neighbour", "say_events_in_the_platforms_name")
PAST_THE_RUNTIME = (
    "forge_frames",
    "send_descriptors_to_the_keeper",
    "send_an_endless_frame",
    "forge_the_end_of_its_turn",
)
WRONG_LINES = ("write_lines_that_are_no_json", "write_an_endless_line")
DEAF = ("never_read_its_input", "spin_without_end")
PATIENCE_S = 1
"""Turns of the deaf may last so long."""


def named(*names: str) -> list[str]:
    return [f"output.{name}" for name in names]


@each_attack(*named(*TOO_MUCH))
def test_an_event_too_large_ends_its_turn_only(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    assert scene.attack(name, session).outcome == "failed"
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack(*named(*HARMLESS))
def test_what_looks_like_the_platforms_own_words_is_the_agents(scene: Scene, runtime: str, name: str) -> None:
    before = scene.api.events(scene.neighbour)
    session = scene.session(runtime)
    stream = scene.attack(name, session, includePartialMessages=True).stream
    assert [frame.event for frame in stream.frames].count("done") == 1
    assert stream.done["sessionId"] == session
    assert {frame.id.split(".")[0] for frame in stream.frames} == {"1"}
    assert scene.api.events(scene.neighbour) == before
    assert scene.api.get_session(session)["status"] == "active"
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("turn_timeout_s", [TURN_TIMEOUT_S, PATIENCE_S], ids=["in a turn", "after its timeout"])
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_events_come_no_faster_than_they_may(scene: Scene, runtime: str, turn_timeout_s: int) -> None:
    scene.api.deploy(f"eager-{runtime}", scene.agent_files(runtime, turn_timeout_s))
    session, began = scene.api.session(f"eager-{runtime}"), time.monotonic()
    scene.attack("output.say_ten_thousand_events", session)
    at_hand = 500  # what the keeper has read before it sees that it is too much
    allowed = JOURNAL["events_per_s"] * (10 + time.monotonic() - began) + at_hand
    turns = scene.api.call("GET", f"/api/sessions/{session}/turns").body["turns"]
    assert turns[-1]["lastSeq"] - turns[-1]["firstSeq"] < allowed
    scene.end(session)
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_flood_of_pieces_fills_no_journal(scene: Scene, runtime: str) -> None:
    session = scene.session(runtime)
    folder = Path(scene.fleet.keeper_of(session).cwd())
    scene.attack("output.say_a_hundred_thousand_pieces", session, includePartialMessages=True)
    assert size_of(folder / "journal") < 17 * MIB
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack("output.log_without_end", "output.log_what_looks_like_our_log")
def test_logs_are_cut_and_are_never_the_runners(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    folder = Path(scene.fleet.keeper_of(session).cwd())
    assert scene.attack(name, session).outcome == "completed"
    assert size_of(folder) - size_of(folder / "workspace") - size_of(folder / "journal") < 4 * JOURNAL["log"]
    assert scene.mark not in "".join(part.log.read_text() for part in (scene.runner, *scene.fleet.coordinators))
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack(*named(*PAST_THE_RUNTIME), runtimes=("python",))
def test_forged_frames_spoil_no_turn_but_their_own(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    keeper = scene.fleet.keeper_of(session)
    descriptors = keeper.num_fds()
    scene.attack(name, session)
    scene.assert_answers(session)
    assert keeper.num_fds() <= descriptors + 2
    assert keeper.memory_info().rss < 100 * MIB
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack("output.hang_up_on_the_keeper", runtimes=("python",))
def test_who_hangs_up_on_its_keeper_ends_its_sandbox(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    assert scene.attack(name, session).outcome == "failed"
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack(*named(*WRONG_LINES), runtimes=("command",))
def test_wrong_lines_spoil_no_turn_but_their_own(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    verdict = scene.attack(name, session)
    assert verdict.outcome in ("failed", "completed")
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack("output.end_the_turn_a_hundred_times", runtimes=("command",))
def test_ends_of_turns_to_spare_are_its_own(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    for _ in range(3):
        assert scene.attack(name, session).outcome in ("completed", "failed")
        scene.assert_nobody_noticed()
    turns = scene.api.call("GET", f"/api/sessions/{session}/turns").body["turns"]
    assert [turn["state"] for turn in turns] == ["settled"] * 3
    scene.end(session)


@each_attack(*named(*DEAF))
def test_an_agent_that_hears_nothing_is_ended_by_its_turns_timeout(scene: Scene, runtime: str, name: str) -> None:
    scene.api.deploy(f"impatient-{runtime}", scene.agent_files(runtime, PATIENCE_S))
    session = scene.api.session(f"impatient-{runtime}")
    assert scene.attack(name, session).outcome == "timeout"
    scene.end(session)
    scene.assert_nobody_noticed()


@each_attack("output.stop_itself")
def test_an_agent_that_stops_itself_is_ended_by_its_turns_timeout(scene: Scene, runtime: str, name: str) -> None:
    """As a python agent it is the first process of a namespace, which no signal from inside stops."""
    scene.api.deploy(f"impatient-{runtime}", scene.agent_files(runtime, PATIENCE_S))
    session = scene.api.session(f"impatient-{runtime}")
    assert scene.attack(name, session).outcome == ("timeout" if runtime == "command" else "completed")
    scene.end(session)
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("program", ["sleep 600", "kill -STOP $$", "exec >&-; sleep 600", "while :; do :; done"])
def test_a_program_that_never_reads_is_ended_by_its_turns_timeout(scene: Scene, program: str) -> None:
    """With more to read than a pipe holds."""
    yaml = f"runtime: command\nentry: {json.dumps(['sh', '-c', program])}\nturn_timeout: {PATIENCE_S}s\n"
    scene.api.deploy("never-reads", {"agent.yaml": yaml})
    session = scene.api.session("never-reads")
    assert scene.api.send(session, "x" * 400_000).done["outcome"] in ("timeout", "failed")
    scene.end(session)
    scene.assert_nobody_noticed()


def size_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if not path.is_dir())
