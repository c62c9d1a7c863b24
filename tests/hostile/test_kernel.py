"""Attacks on the kernel by system calls; see agent/armoury/kernel.py."""

from __future__ import annotations

from tests.hostile.scene import Scene, assert_fails, attacks_of, each_attack


@each_attack(*attacks_of("kernel"))
def test_the_kernel_refuses_an_agent_to(scene: Scene, runtime: str, name: str) -> None:
    assert_fails(scene, runtime, name)
