"""A sandbox's memory, watched on files that stand for its cgroups' where this machine has none of that version."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from sandbox.execs import AGENT, TOOL, Program
from sandbox.memory import Kill, Memory

MIB = 1024 * 1024


class Watched:
    """Version 2's files of one sandbox, and what its keeper hears."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        for name, limit in (("", 96), ("agent", 0), ("tools", 84)):
            (folder / name).mkdir(exist_ok=True)
            self.say(name, high=0, max=0, oom=0, oom_kill=0)
            (folder / name / "memory.max").write_text(f"{limit * MIB}\n" if limit else "max\n")
            (folder / name / "memory.peak").write_text(f"{(limit or 20) * MIB}\n")
        (folder / "memory.current").write_text(f"{90 * MIB}\n")
        self.kills: list[Kill] = []
        self.warnings: list[tuple[int, int]] = []
        self.memory = Memory(
            {"version": 2, "folder": str(folder)},
            killed=self.kills.append,
            warned=lambda used, limit: self.warnings.append((used, limit)),
        )
        self.descriptors = self.memory.watch()
        self.memory.begin_turn()

    def say(self, group: str, **counts: int) -> None:
        lines = [f"{name} {count}\n" for name, count in counts.items()]
        (self._folder / group / "memory.events").write_text("".join(lines))


@pytest.fixture
def watched(tmp_path: Path) -> Watched:
    return Watched(tmp_path)


def test_version_2_warns_when_somebody_is_slowed_down_and_once_a_turn(watched: Watched) -> None:
    assert len(watched.descriptors) == 1  # inotify
    watched.memory.look()
    assert watched.warnings == []
    for count in (1, 2, 3):
        watched.say("", high=count, oom=0, oom_kill=0)
        watched.memory.look()
    assert watched.warnings == [(90 * MIB, 96 * MIB)]
    watched.memory.begin_turn()
    watched.say("", high=4, oom=0, oom_kill=0)
    watched.memory.look()
    assert len(watched.warnings) == 2


def test_version_2_names_the_tool_that_was_killed_for_the_tools_limit(watched: Watched) -> None:
    watched.memory.died(Program(7, TOOL, "innocent"), 0)
    watched.memory.died(Program(8, TOOL, "perhaps"), None)
    watched.say("", high=1, oom=1, oom_kill=1)
    watched.say("tools", high=1, oom=1, oom_kill=1)
    watched.memory.died(Program(9, TOOL, "cc1"), signal.SIGKILL)
    assert watched.kills == [Kill(TOOL, "cc1", 9, 84 * MIB, 84 * MIB)]


def test_version_2_gives_the_sandboxs_limit_where_that_was_the_one(watched: Watched) -> None:
    watched.say("", high=1, oom=1, oom_kill=1)
    watched.say("tools", high=0, oom=0, oom_kill=1)
    watched.memory.died(Program(9, TOOL, "cc1"), signal.SIGKILL)
    assert watched.kills == [Kill(TOOL, "cc1", 9, 96 * MIB, 96 * MIB)]


def test_a_kill_waits_a_moment_for_its_victims_name_and_is_told_without_in_the_end(watched: Watched) -> None:
    watched.say("agent", oom=0, oom_kill=2)
    watched.memory.look()
    assert watched.kills == []
    assert watched.memory.deadline < float("inf")
    watched.memory.died(Program(1, AGENT, "python3"), signal.SIGKILL)
    watched.memory.look_for_all()
    assert [(kill.name, kill.pid) for kill in watched.kills] == [("python3", 1), ("a child of the agent", None)]
    watched.memory.look()
    assert len(watched.kills) == 2


def test_nothing_is_watched_where_there_is_nothing(tmp_path: Path) -> None:
    for group in (None, {"version": 1, "folder": str(tmp_path)}, {"version": 2, "folder": str(tmp_path)}):
        memory = Memory(group, killed=pytest.fail, warned=pytest.fail)  # type: ignore[arg-type]
        assert memory.watch() == []
        memory.died(Program(1, TOOL, "x"), signal.SIGKILL)
        memory.look_for_all()
        assert memory.deadline == float("inf")


def test_a_kill_reads_as_a_sentence() -> None:
    kill = Kill(AGENT, "python3", 1, 96 * MIB, 96 * MIB)
    assert str(kill) == "more memory than its limit of 96 MiB (peak 96 MiB) and was killed: python3"
