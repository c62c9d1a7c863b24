"""Attacks over sockets and shared objects; see agent/armoury/network.py."""

from __future__ import annotations

from tests.hostile.scene import Scene, assert_fails, attacks_of, each_attack


@each_attack(*attacks_of("network"))
def test_no_socket_and_no_shared_object_leads_an_agent_to(scene: Scene, runtime: str, name: str) -> None:
    assert_fails(scene, runtime, name)
