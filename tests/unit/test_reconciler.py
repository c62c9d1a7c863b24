"""What is nobody's, by which rule, and what is left alone."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from ashd.runner import mounts, processes, reconciler
from ashd.runner.reconciler import Stray, Suspicion, _identity, _kill
from ashd.runner.sandboxes import Sandboxes

A, B = Stray("folder", "a"), Stray("folder", "b")


def test_one_look_condemns_nothing() -> None:
    suspicion = Suspicion()
    assert suspicion.confirmed({A}) == [] and suspicion.new({A}) == set()


def test_what_is_nobodys_twice_in_a_row_is_removed_and_counted_once() -> None:
    suspicion = Suspicion()
    suspicion.new({A})
    assert suspicion.confirmed({A, B}) == [A] and suspicion.new({A, B}) == {A}
    assert suspicion.confirmed({A, B}) == [A, B] and suspicion.new({A, B}) == {B}  # A again: tried, not counted


def test_what_was_somebodys_in_between_is_safe() -> None:
    suspicion = Suspicion()
    for seen in ({A}, set[Stray](), {A}):
        assert suspicion.confirmed(seen) == []
        assert suspicion.new(seen) == set()


def test_too_many_descriptors_are_said_once_and_again_when_they_have_doubled(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reconciler, "_OWN_DESCRIPTORS", 0)
    look = reconciler.Reconciler(cast(Any, None), Sandboxes(), cast(Any, None), cast(Any, None))
    with contextlib.ExitStack() as opened:
        for _ in range(3):
            look._count_descriptors()
        assert caplog.messages.count("supervisor has more descriptors open than expected") == 1
        for _ in range(3 * len(os.listdir("/proc/self/fd"))):
            opened.enter_context(open(os.devnull, "rb"))
        look._count_descriptors()
        assert caplog.messages.count("supervisor has more descriptors open than expected") == 2


def soon(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.01)


Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts processes that sleep; they are gone afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def one(folder: Path, **options: int) -> subprocess.Popen[bytes]:
        folder.mkdir(parents=True, exist_ok=True)
        code = "import time; print(1, flush=True); time.sleep(60)"
        made = subprocess.Popen(
            [sys.executable, "-c", code], cwd=folder, stdout=subprocess.PIPE, start_new_session=True, **options
        )
        assert made.stdout is not None and made.stdout.readline()
        started.append(made)
        return made

    yield one
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def test_processes_are_a_sandboxs_by_the_folder_they_work_in_even_when_it_is_removed(
    tmp_path: Path, start: Start
) -> None:
    root = tmp_path / "sandboxes"
    keeper, agent, other = start(root / "one"), start(root / "two" / "workspace"), start(tmp_path / "sandboxes-2" / "x")
    (root / "one").rmdir()
    assert processes.by_sandbox(root) == {keeper.pid: "one", agent.pid: "two"}
    assert processes.working_in(root / "one") == [keeper.pid] and processes.working_in(root / "two") == []
    assert other.pid not in processes.by_sandbox(root)


def test_a_process_with_a_terminal_is_a_persons(tmp_path: Path, start: Start) -> None:
    assert not processes.has_terminal(start(tmp_path / "one").pid)
    pid, descriptor = pty.fork()
    if pid == 0:
        time.sleep(60)
        os._exit(0)
    try:
        soon(lambda: processes.has_terminal(pid))
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(descriptor)


def test_only_the_process_that_was_seen_is_killed_not_the_next_with_its_pid(tmp_path: Path, start: Start) -> None:
    process = start(tmp_path / "one")
    _kill(f"{process.pid}@1")  # one that began at another time
    assert process.poll() is None
    _kill(_identity(process.pid))
    assert process.wait(10) == -signal.SIGKILL


def test_a_tree_is_a_process_and_all_below_it_whichever_thread_began_it(tmp_path: Path) -> None:
    code = (
        "import subprocess, sys, threading, time\n"
        "def go(): subprocess.run(['sleep', '60'])\n"
        "threading.Thread(target=go, daemon=True).start()\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        soon(lambda: len(processes.tree(process.pid)) == 2)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_mounts_below_a_folder_are_found_and_taken_off(tmp_path: Path) -> None:
    point = tmp_path / "with blank" / "workspace"
    point.mkdir(parents=True)
    if subprocess.run(["mount", "-t", "tmpfs", "none", point], check=False, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this host lets us mount nothing")
    try:
        assert mounts.below(tmp_path) == [point]
        mounts.detach(point)
        assert mounts.below(tmp_path) == []
    finally:
        with contextlib.suppress(OSError):
            mounts.detach(point)
