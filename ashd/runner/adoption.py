"""Adoption: takes over what a supervisor before us left.

Covers: live sandboxes, journals not saved yet, and litter. Leaves out: tending them from then on (tending.py), what has
no folder any more (reconciler.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ashd import log
from ashd.config.schema import RunnerConfig
from ashd.domain.sandbox import Fact
from ashd.errors import SandboxFailed
from ashd.runner.sandbox_host import SandboxHost
from ashd.runner.sandbox_task import Grew, SandboxTask
from ashd.runner.sandboxes import Sandboxes
from ashd.runner.tending import Tending

_log = log.get(__name__)


class Adoption:
    """Makes folders of sandboxes into sandboxes again."""

    def __init__(
        self, config: RunnerConfig, host: SandboxHost, sandboxes: Sandboxes, tending: Tending, grew: Grew
    ) -> None:
        self._config = config
        self._host = host
        self._sandboxes = sandboxes
        self._tending = tending
        self._grew = grew

    async def adopt_all(self) -> None:
        """Everything there is at a start."""
        folders = await self._host.found()
        for folder in folders:
            await self.adopt(folder)
        if folders:
            _log.info("sandboxes adopted", found=len(folders), live=len(list(self._sandboxes.live())))

    async def adopt(self, folder: Path) -> None:
        """A live sandbox is taken over; of a dead one everything is saved, and then nothing is left."""
        sandbox = SandboxTask(folder.name, folder, self._host.uid_of(folder), self._grew)
        sandbox.enforced = self._host.enforced
        sandbox.isolation = self._host.isolation
        self._sandboxes.add(sandbox)
        lease = _read_lease(folder / "session.json")
        is_fenced = lease is not None and not self._take_lease(sandbox, lease)
        try:
            if sandbox.keeper_is_dead():
                raise SandboxFailed("its keeper is dead")
            hello = await sandbox.connect(self._config.kill_timeout)
        except SandboxFailed:
            self._tending.bury(sandbox)
            return
        self._host.adopt(sandbox)
        sandbox.learn(Fact.FORKED)
        if lease is None:
            sandbox.learn(Fact.TOLD_TO_END)
            sandbox.tell("end", cause="not_adopted")  # warm: cheaper made new than asked about
        elif is_fenced:
            sandbox.learn(Fact.TOLD_TO_END)
            sandbox.tell("end", cause="fenced")
        else:
            self._take_over(sandbox, hello)
        self._tending.own(sandbox)

    def _take_lease(self, sandbox: SandboxTask, lease: dict[str, Any]) -> bool:
        """Whether the sandbox is its session's; of two of one session, only the one with the newer lease is."""
        sandbox.belong_to(lease["session"], lease["epoch"], 0)
        other = self._sandboxes.of_session(sandbox.session)
        if other is not None and other.epoch >= sandbox.epoch:
            sandbox.recording.fence()
            return False
        if other is not None:
            other.recording.fence()
            other.learn(Fact.TOLD_TO_END)
            other.tell("end", cause="fenced")
        self._sandboxes.give(sandbox)
        return True

    def _take_over(self, sandbox: SandboxTask, hello: dict[str, Any]) -> None:
        sandbox.learn(Fact.CLAIMED)
        sandbox.last_seq = hello["last_seq"]
        sandbox.open_turn = hello["open_turn"]
        if hello["life"] in ("ready", "ending"):
            sandbox.learn(Fact.LOADED)
        if sandbox.open_turn:
            sandbox.learn(Fact.TURN_LAUNCHED)
        if hello["life"] == "ending":
            sandbox.learn(Fact.TOLD_TO_END)
        self._grew(sandbox)


def _read_lease(path: Path) -> dict[str, Any] | None:
    try:
        lease: dict[str, Any] = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
    return lease
