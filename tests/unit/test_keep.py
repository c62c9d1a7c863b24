"""A kept child is started again when it dies, given up when it can't boot, and never left behind."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ashd.standalone import keep
from ashd.standalone.child import Child
from ashd.standalone.keep import NotBooted, Part, kept

SLEEP = "import time; time.sleep(60)"
DEADLINE_S = 20.0


def part(
    code: str,
    *,
    is_ready: Callable[[], bool] = lambda: True,
    started: list[Child] | None = None,
    ready_timeout_s: float = 5.0,
) -> Part:
    """A Python process with `code`; each start is noted in `started`."""

    async def spawn() -> Child:
        child = Child("test", [sys.executable, "-c", code], death_signal=signal.SIGKILL, env=os.environ, quiet=True)
        if started is not None:
            started.append(child)
        return child

    async def ready(child: Child) -> bool:
        return is_ready()

    return Part("test", spawn, ready, ready_timeout_s, stop_signal=signal.SIGTERM, stop_timeout_s=5.0)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 (other processes set no events)
            await asyncio.sleep(0.01)


def test_a_child_that_dies_is_started_again_and_ended_with_us() -> None:
    started: list[Child] = []

    async def scenario() -> None:
        async with kept(part(SLEEP, started=started)):
            os.kill(started[0].pid, signal.SIGKILL)
            await until(lambda: len(started) == 2)
            assert is_alive(started[1].pid)

    asyncio.run(scenario())
    assert not any(is_alive(child.pid) for child in started)


def test_a_child_that_cannot_boot_is_given_up_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "FIRST_PAUSE_S", 0.001)
    started: list[Child] = []

    async def scenario() -> None:
        async with kept(part("raise SystemExit('no disk')", is_ready=lambda: False, started=started)):
            pytest.fail("it was never ready")

    with pytest.RaisesGroup(pytest.RaisesExc(NotBooted, match="no disk")):
        asyncio.run(scenario())
    assert len(started) == keep.MOST_FAILURES


def test_a_child_that_never_becomes_ready_is_given_up_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keep, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(keep, "STABLE_AFTER_S", 0.0)
    started: list[Child] = []

    async def scenario() -> None:
        async with kept(part(SLEEP, is_ready=lambda: False, started=started, ready_timeout_s=0.01)):
            pytest.fail("it was never ready")

    with pytest.RaisesGroup(NotBooted):
        asyncio.run(scenario())
    assert not any(is_alive(child.pid) for child in started)


def test_giving_up_one_part_ends_the_body_and_the_others(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(keep, "FIRST_PAUSE_S", 0.001)
    first: list[Child] = []
    flag = tmp_path / "broken"
    code = f"import os, time; os.path.exists({str(flag)!r}) and exit(1); time.sleep(60)"
    second: list[Child] = []

    async def scenario() -> None:
        async with kept(part(code, started=second)), kept(part(SLEEP, started=first)):
            flag.touch()
            os.kill(second[0].pid, signal.SIGKILL)
            await asyncio.sleep(DEADLINE_S)

    with pytest.RaisesGroup(NotBooted):
        asyncio.run(scenario())
    assert not any(is_alive(child.pid) for child in (*first, *second))


def test_a_child_that_ignores_being_asked_is_forced() -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )

    async def scenario() -> int:
        child = Child("deaf", [sys.executable, "-c", code], death_signal=signal.SIGKILL, env=os.environ, quiet=True)
        await until(lambda: child.last_lines() == ["deaf"])
        return await child.stop(signal.SIGTERM, timeout_s=0.1)

    assert asyncio.run(scenario()) == -signal.SIGKILL


def test_a_flood_of_output_neither_blocks_the_child_nor_fills_memory() -> None:
    code = "import sys; [sys.stdout.write('x' * 99 + '\\n') for _ in range(100_000)]; print('end')"

    async def scenario() -> tuple[int, list[str]]:
        child = Child("loud", [sys.executable, "-c", code], death_signal=signal.SIGKILL, env=os.environ, quiet=True)
        code_ = await child.finish(timeout_s=DEADLINE_S)
        assert sum(map(len, child._output)) < 1_000_000
        return code_, child.last_lines(1)

    assert asyncio.run(scenario()) == (0, ["end"])
