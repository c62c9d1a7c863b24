"""Attacks that eat; see agent/armoury/resources.py."""

from __future__ import annotations

import pytest

from tests.hostile.scene import RUNTIMES, Scene, assert_fails, attacks_of, each_attack, property_of

BURN = "resources.burn_all_processors"


@each_attack(*(name for name in attacks_of("resources") if name != BURN))
def test_an_agent_eats_only_its_own(scene: Scene, runtime: str, name: str) -> None:
    session = scene.attacker(runtime)
    verdict = assert_fails(scene, runtime, name)
    if verdict.verdict in ("denied", "died") and not property_of(name, "in_the_agent", False):
        assert scene.api.get_session(session)["status"] in ("active", "ended"), "what died was a tool, not the session"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_neighbour_is_answered_while_an_agent_burns_all_processors(scene: Scene, runtime: str) -> None:
    session = scene.attacker(runtime)
    burning = scene.api.send(session, scene.order(BURN, session), read=False).start()
    for _ in range(3):
        scene.assert_nobody_noticed()
    assert burning.ended.wait(30)
    assert scene.verdict_of(burning).verdict == "denied"


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_session_of_a_tool_that_ate_too_much_lives_on(scene: Scene, runtime: str) -> None:
    scene.skip_unless_enforced(("cgroup-memory",))
    session = scene.session(runtime)
    for _ in range(2):
        verdict = scene.attack("resources.hoard_memory_in_small_steps", session)
        assert (verdict.verdict, verdict.outcome) in (("died", "completed"), ("denied", "completed")), verdict.detail
        scene.assert_answers(session)
    scene.end(session)
    scene.assert_nobody_noticed()
