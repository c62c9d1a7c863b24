"""Attacks by paths; see agent/armoury/files.py."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from tests.hostile.scene import RUNTIMES, Scene, assert_fails, attacks_of, each_attack
from tests.integration.fleet import eventually

TRAP = "files.leave_a_trap_for_whoever_cleans_up"


@each_attack(*(name for name in attacks_of("files") if name != TRAP))
def test_no_path_leads_an_agent_out_to(scene: Scene, runtime: str, name: str) -> None:
    assert_fails(scene, runtime, name)


@each_attack(TRAP)
def test_a_workspace_full_of_traps_is_removed_and_nothing_else(scene: Scene, runtime: str, name: str) -> None:
    session = scene.attacker(runtime)
    folder = Path(scene.fleet.keeper_of(session).cwd())
    assert_fails(scene, runtime, name)
    assert os.path.islink(folder / "workspace/trap/link-0")
    scene.dismiss(runtime)
    try:
        eventually(lambda: not folder.exists())
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(folder / "workspace/trap/closed", 0o700)  # so that the next case is told nothing of this one
    scene.assert_nobody_noticed()


def test_a_workspace_of_one_session_is_not_what_the_next_one_gets(scene: Scene) -> None:
    """Nothing of one session's files and processes is there in the next of the same agent, nor in its /tmp."""
    for runtime in RUNTIMES:
        scene.attack("files.leave_marks_where_everybody_looks", scene.attacker(runtime))
        scene.dismiss(runtime)
        for name in ("files.find_files_of_others_where_everybody_writes", "files.see_processes_of_others"):
            assert_fails(scene, runtime, name)
