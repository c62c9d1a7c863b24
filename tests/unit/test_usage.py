"""What sandboxes use: the budget of looking, and which sandbox is looked at when."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ashd.domain.sandbox import Fact
from ashd.runner import processes
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.usage import Pace, Sampler


class Clocks:
    """A wall clock and a processor clock that a test moves."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 0.0

    def work(self, cpu_s: float, waited_s: float = 0.0) -> None:
        self.cpu_s += cpu_s
        self.wall_s += cpu_s + waited_s

    def pace(self, share: float) -> Pace:
        return Pace(share, lambda: self.wall_s, lambda: self.cpu_s)


@given(st.lists(st.tuples(st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=50))
def test_however_the_work_comes_it_takes_no_more_than_its_share(looks: list[tuple[float, float]]) -> None:
    clocks = Clocks()
    pace = clocks.pace(0.01)
    for cpu_s, waited_s in looks:
        clocks.work(cpu_s, waited_s)
        clocks.wall_s += pace.rest_s()
        assert clocks.cpu_s <= 0.01 * clocks.wall_s + 1e-6


def test_rests_that_were_skipped_are_owed() -> None:
    clocks = Clocks()
    pace = clocks.pace(0.01)
    for _ in range(10):
        clocks.work(0.001)
        owed_s = pace.rest_s()
    assert owed_s == pytest.approx(1.0 - 0.010)


def test_an_idle_hour_is_no_credit_for_a_heap_of_work() -> None:
    clocks = Clocks()
    pace = clocks.pace(0.01)
    clocks.wall_s += 3600
    pace.rest_s()
    clocks.work(0.010)
    assert pace.rest_s() == pytest.approx(1.0 - 0.010)


def sandbox(folder: Path, *facts: Fact) -> SandboxTask:
    """One whose keeper is this process."""
    made = SandboxTask(folder.name, folder, None, lambda _: None)
    made.keeper_pid = os.getpid()
    for fact in facts:
        made.learn(fact)
    return made


RUNNING = (Fact.FORKED, Fact.CLAIMED, Fact.LOADED, Fact.TURN_LAUNCHED)
WAITING = RUNNING[:3]


def test_running_sandboxes_are_looked_at_before_idle_ones_and_more_often(tmp_path: Path) -> None:
    idle, runs = sandbox(tmp_path / "idle", *WAITING), sandbox(tmp_path / "runs", *RUNNING)
    sampler = Sampler(lambda: [idle, runs], lambda _: [])
    assert {one.id for one, _ in sampler._plan(0.0)} == {"idle", "runs"}  # new: all at once
    for one in (idle, runs):
        sampler._look(one, processes_too=True)
        sampler._records[one.id].counters_at = sampler._records[one.id].processes_at = 0.0
    assert sampler._plan(1.0) == []
    assert sampler._plan(3.0) == [(runs, False)]  # its cgroup's numbers
    assert sampler._plan(11.0) == [(runs, True), (idle, False)]  # the most overdue first
    assert sampler._plan(61.0) == [(runs, True), (idle, True)]
    idle.last_seq += 1
    assert sampler._plan(11.0) == [(idle, True), (runs, True)]  # it ran in between


def pss_bytes(pid: int) -> int:
    fields = {part.split(b":")[0]: part for part in processes.read(f"/proc/{pid}/smaps_rollup").splitlines()}
    return int(fields[b"Pss"].split()[1]) * 1024


def test_a_look_sees_memory_processes_descriptors_and_time(tmp_path: Path) -> None:
    mine = sandbox(tmp_path / "one", *RUNNING)
    sampler = Sampler(lambda: [mine], lambda _: [])
    sampler._look(mine, processes_too=True)
    used = sampler.of(mine.id)
    ours = processes.tree(os.getpid())  # with what other tests have left running below this one
    assert used.pss_bytes == pytest.approx(sum(map(pss_bytes, ours)), rel=0.2)
    assert used.processes >= 1 and used.descriptors >= 3 and used.cpu_s > 0 and used.memory_bytes == 0
    assert sampler.mean_pss() == used.pss_bytes and sampler.total() == used


@pytest.mark.parametrize(
    ("files", "memory", "cpu_s"),
    [
        ({"memory.usage_in_bytes": "4096\n", "cpuacct.usage": "2500000000\n", "cpu.stat": "nr_periods 0\n"}, 4096, 2.5),
        (
            {"memory.current": "8192\n", "cpu.stat": "usage_usec 1500000\nuser_usec 1\n", "cgroup.controllers": ""},
            8192,
            1.5,
        ),
    ],
)
def test_a_cgroup_of_either_version_counts_memory_and_time(
    tmp_path: Path, files: dict[str, str], memory: int, cpu_s: float
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    mine = sandbox(tmp_path / "one", *RUNNING)
    sampler = Sampler(lambda: [mine], lambda _: [tmp_path])
    sampler._look(mine, processes_too=False)
    used = sampler.of(mine.id)
    assert used.memory_bytes == memory
    assert used.cpu_s >= cpu_s  # the keeper's own time in addition
    mine.learn(Fact.KEEPER_DIED)
    sampler.close(mine)
    assert sampler.total().cpu_s == pytest.approx(used.cpu_s) and sampler.total().memory_bytes == 0


def test_a_look_that_ends_after_its_sandbox_leaves_nothing(tmp_path: Path) -> None:
    mine = sandbox(tmp_path / "one", *RUNNING)
    sampler = Sampler(list, lambda _: [])
    mine.learn(Fact.KEEPER_DIED)
    sampler.close(mine)
    sampler._look(mine, processes_too=True)
    assert sampler.total().processes == 0
