"""The watch over workspaces without quotas, with real processes that write."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from ashd.runner import processes
from ashd.runner.disk import Disk, allowance, shortage
from ashd.runner.disk_watch import DiskWatch, Watched, set_writing, writing_is_stopped
from ashd.runner.quota import Usage

MIB = 1024 * 1024
DEADLINE_S = 20.0
LIMIT = 16 * MIB
UID = 1_600_000 + os.getpid() % 100_000

_WRITER = """
import errno, os, sys, time
os.write(1, b"r")
try:
    while True:
        with open("filled", "ab", 0) as file:
            file.write(b"x" * (1 << 16))
        time.sleep(0.01)
except OSError as error:
    print(error.errno, flush=True)
sys.stdin.read(1)
os.unlink("filled")
print("deleted", flush=True)
while True:
    try:
        open("again", "wb", 0).write(b"x" * 100)
        print("wrote", flush=True)
        break
    except OSError:
        time.sleep(0.01)
sys.stdin.read(1)
"""

_MAPPER = """
import mmap, time
file = open("mapped", "w+b")
file.truncate(1 << 30)
area = mmap.mmap(file.fileno(), 1 << 30)
for start in range(0, 1 << 30, 1 << 16):
    area[start:start + (1 << 16)] = b"x" * (1 << 16)
    time.sleep(0.01)
"""

_FLOOD = """
import time
number = 0
while True:
    for _ in range(10):
        open(str(number), "w").close()
        number += 1
    time.sleep(0.01)
"""


class Writer:
    """A process in a workspace of its own, watched as a sandbox is; with its own user id where we are root."""

    def __init__(self, folder: Path, program: str, most: Usage) -> None:
        workspace = folder / str(len(os.listdir(folder))) / "workspace"
        workspace.mkdir(parents=True)
        self.uid = UID if os.geteuid() == 0 else None
        self.said: list[str] = []
        self.ended = 0
        if self.uid is not None:
            os.chown(workspace, self.uid, self.uid)
        self.workspace = workspace
        self.process = subprocess.Popen(
            # The interpreter starts before it gives up its rights: its folder may be root's alone.
            [sys.executable, "-c", (_AS_USER.format(uid=self.uid) if self.uid else "") + program],
            cwd=workspace,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.watched = Watched(
            workspace, self.uid, most, lambda: [self.process.pid], lambda: True, self.said.append, self.end
        )

    def end(self) -> None:
        self.ended += 1
        self.process.kill()

    def size(self) -> int:
        return sum(path.stat().st_blocks * 512 for path in self.workspace.iterdir())

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def go_on(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"x")


_AS_USER = """
import mmap, os
os.setgroups([])
os.setresgid({uid}, {uid}, {uid})
os.setresuid({uid}, {uid}, {uid})
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="ashd-watch-"))
    folder.chmod(0o711)
    yield folder
    shutil.rmtree(folder)


@contextlib.asynccontextmanager
async def watching(folder: Path, *writers: Writer) -> AsyncIterator[DiskWatch]:
    watch = DiskWatch(folder)
    for writer in writers:
        watch.watch(writer.watched)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        for writer in writers:
            writer.process.kill()
            writer.process.wait()
            for pipe in (writer.process.stdin, writer.process.stdout):
                assert pipe is not None
                pipe.close()


async def until(look: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not look():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)


async def test_writing_stops_at_the_limit_and_goes_on_when_there_is_room_again(folder: Path) -> None:
    greedy = Writer(folder, _WRITER, allowance(LIMIT))
    neighbour = Writer(folder, _WRITER, allowance(1 << 40))
    async with watching(folder, greedy, neighbour) as watch:
        answer = await asyncio.to_thread(greedy.line)
        assert answer.removeprefix("r") == str(errno.EFBIG)
        assert LIMIT < greedy.size() < LIMIT * 2
        assert not greedy.ended and watch.stops == 1
        before = neighbour.size()
        await until(lambda: neighbour.size() > before, "the neighbour writes on")
        greedy.go_on()
        assert [await asyncio.to_thread(greedy.line) for _ in range(2)] == ["deleted", "wrote"]
        assert [line.rpartition(": ")[2] for line in greedy.said] == ["writing fails", "writing works"]
        assert not neighbour.said and watch.ends == 0


async def test_what_grows_by_a_mapping_is_ended(folder: Path) -> None:
    mapper = Writer(folder, _MAPPER, allowance(LIMIT))
    async with watching(folder, mapper) as watch:
        await until(lambda: mapper.ended, "the sandbox is ended")
        assert (mapper.ended, watch.stops, watch.ends) == (1, 1, 1)


async def test_a_flood_of_empty_files_is_ended(folder: Path) -> None:
    flood = Writer(folder, _FLOOD, Usage(LIMIT, 500))
    async with watching(folder, flood) as watch:
        await until(lambda: flood.ended, "the sandbox is ended")
        assert watch.ends == 1


async def test_a_deleted_file_that_is_held_open_is_no_hiding_place(folder: Path) -> None:
    program = "import os\n" + _WRITER.replace('with open("filled", "ab", 0) as file:', "if True:").replace(
        "try:\n", 'file = open("hidden", "wb", 0)\nos.unlink("hidden")\ntry:\n', 1
    )
    hider = Writer(folder, program, allowance(LIMIT))
    async with watching(folder, hider):
        answer = await asyncio.to_thread(hider.line)
        assert answer.removeprefix("r") == str(errno.EFBIG)
        assert hider.said


async def test_nobody_is_looked_at_while_nothing_is_written(folder: Path) -> None:
    idle = Writer(folder, "import time\ntime.sleep(1000)\n", allowance(LIMIT))
    looks = 0

    def processes() -> list[int]:
        nonlocal looks
        looks += 1
        return []

    idle.watched.processes = processes
    now, unchanged = idle.watched.looked_at, idle.watched.grown_at_look
    assert not idle.watched.is_due(now + 1, unchanged)
    assert not idle.watched.is_due(now + 1, Usage(LIMIT // 2 - 1, 0))
    assert idle.watched.is_due(now + 1, Usage(LIMIT // 2, 0))
    assert idle.watched.is_due(now + 3600, unchanged)
    async with watching(folder, idle):
        pass
    assert looks == 0


def test_processes_born_while_writing_is_stopped_are_stopped_too(folder: Path) -> None:
    shell = subprocess.Popen(["sh", "-c", "while :; do sleep 0.05 & sleep 0.01; done"], start_new_session=True)
    watched = Watched(
        folder,
        None,
        allowance(LIMIT),
        lambda: processes.tree(shell.pid),
        bool,
        print,
        bool,
    )
    try:
        set_writing(watched, may=False)
        for pid in processes.tree(shell.pid):
            with contextlib.suppress(ProcessLookupError):
                assert resource.prlimit(pid, resource.RLIMIT_FSIZE)[0] == 0
        set_writing(watched, may=True)
        soft, hard = resource.prlimit(shell.pid, resource.RLIMIT_FSIZE)
        assert soft == hard
    finally:
        os.killpg(shell.pid, signal.SIGKILL)
        shell.wait()


async def test_the_next_supervisor_lets_those_write_again_that_the_last_one_stopped(folder: Path) -> None:
    sleeper = Writer(folder, "import time\ntime.sleep(1000)\n", allowance(LIMIT))
    await asyncio.to_thread(set_writing, sleeper.watched, may=False)
    disk = Disk(folder)
    disk.adopt(sleeper.watched)
    adopted = disk.watch.get(sleeper.workspace)
    assert adopted is not None and adopted.is_stopped
    async with watching(folder, sleeper) as watch:
        watch.watch(adopted)
        await until(lambda: not writing_is_stopped(adopted), "it may write")


def test_a_limit_outlives_the_supervisor_that_set_it(folder: Path) -> None:
    workspace = folder / "sandbox" / "workspace"
    workspace.mkdir(parents=True)
    (workspace / "file").write_bytes(b"x" * MIB)
    runners_own = Watched(workspace, None, allowance(1 << 30), list, bool, print, bool)
    first = Disk(folder)
    first.limit(runners_own, 5 * MIB)
    second = Disk(folder)
    second.adopt(runners_own)
    adopted = second.watch.get(workspace)
    assert adopted is not None and adopted.most == allowance(5 * MIB)
    assert adopted.is_due(time.monotonic(), Usage(0, 0))
    second.forget(workspace, None)
    assert second.watch.get(workspace) is None and second.usage_of(workspace, None) == 0


def test_a_runner_short_of_disk_space_admits_nobody(folder: Path) -> None:
    assert shortage(folder, 0) == ""
    assert "disk_headroom asks for 1099511627776 MiB" in shortage(folder, 1 << 60)
