"""Attacks with signals, priorities, limits and processes that want to stay; see agent/armoury/processes.py."""

from __future__ import annotations

import pytest

from tests.hostile.scene import RUNTIMES, Scene, assert_fails, attacks_of, each_attack
from tests.integration.fleet import eventually

STAYING = {
    "processes.leave_a_daemon": "daemon",
    "processes.leave_many_daemons": "daemons",
    "processes.leave_a_sibling": "sibling",
}


@each_attack(*(name for name in attacks_of("processes") if name not in STAYING))
def test_no_process_of_others_feels_an_agent(scene: Scene, runtime: str, name: str) -> None:
    assert_fails(scene, runtime, name)


@each_attack(*STAYING)
def test_nothing_an_agent_leaves_running_outlives_its_session(scene: Scene, runtime: str, name: str) -> None:
    session = scene.session(runtime)
    verdict = scene.attack(name, session)
    assert (verdict.verdict, verdict.outcome) == ("denied", "completed"), verdict.detail
    scene.assert_nobody_noticed()
    scene.end(session)
    assert not scene.host.titled(STAYING[name])
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_killed_keeper_takes_everything_of_its_sandbox_along(scene: Scene, runtime: str) -> None:
    session = scene.session(runtime)
    for name in ("processes.leave_many_daemons", "processes.outlive_the_keeper", "processes.be_deaf_to_signals"):
        assert scene.attack(name, session).verdict == "denied"
    assert scene.host.titled("daemons")
    scene.fleet.keeper_of(session).kill()
    eventually(lambda: not scene.host.titled("daemons"))
    eventually(lambda: scene.api.get_session(session)["status"] != "active")
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_session_deaf_to_every_signal_ends_all_the_same(scene: Scene, runtime: str) -> None:
    session = scene.session(runtime)
    assert scene.attack("processes.be_deaf_to_signals", session).outcome == "completed"
    scene.end(session)
    scene.assert_nobody_noticed()


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_dead_are_buried(scene: Scene, runtime: str) -> None:
    """More of them, turn by turn, than a sandbox may have processes."""
    session = scene.session(runtime)
    for _ in range(6):
        assert scene.attack("processes.leave_zombies", session).verdict == "denied"
    scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()
