"""What a supervisor counts of kills in its sandboxes."""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from ashd.config.schema import RunnerConfig
from ashd.runner.sandbox_task import SandboxTask
from ashd.runner.sandboxes import Sandboxes
from ashd.runner.tending import Tending
from ashd.runner.usage import Sampler


async def nothing(*_: object) -> None:
    pass


def a_tended_one(folder: Path) -> tuple[Tending, SandboxTask]:
    """A sandbox on a host that has nothing to take back."""
    sandboxes = Sandboxes()
    host = cast(Any, SimpleNamespace(end_processes=nothing, unmake=nothing))
    usage = Sampler(sandboxes.all, lambda _: [])
    sandbox = SandboxTask("one", folder, None, lambda _: None)
    sandboxes.add(sandbox)
    return Tending(RunnerConfig(), host, sandboxes, usage, grew=lambda _: None, left=lambda: None), sandbox


def test_kills_are_counted_once_while_a_sandbox_lives_and_after(tmp_path: Path) -> None:
    tending, sandbox = a_tended_one(tmp_path)
    sandbox._hear({"kill": "tool_oom"})
    sandbox._hear({"kill": "tool_oom"})
    assert tending.kills == Counter(tool_oom=2)
    sandbox._hear({"closed": "oom"})
    asyncio.run(tending._lay_to_rest(sandbox))
    assert tending.kills == Counter(tool_oom=2, oom=1)


def test_an_ordinary_end_is_no_kill(tmp_path: Path) -> None:
    tending, sandbox = a_tended_one(tmp_path)
    sandbox._hear({"closed": "ended"})
    asyncio.run(tending._lay_to_rest(sandbox))
    assert tending.kills == Counter()
