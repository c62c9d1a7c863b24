"""The sandboxes of one runner: which there are, and which belongs to which session.

Covers: finding one by session and lease, counting. Leaves out: what is done with them (supervisor.py, tending.py).
"""

from __future__ import annotations

from collections.abc import Iterable

from ashd.domain.sandbox import State
from ashd.errors import NotFound, Rejected
from ashd.runner.sandbox_task import SandboxTask
from ashd.wire.status import NOT_HERE, STALE


class Sandboxes:
    """Every sandbox from the moment it is being made until nothing of it is left."""

    def __init__(self) -> None:
        self._by_id: dict[str, SandboxTask] = {}
        self._by_session: dict[str, SandboxTask] = {}

    def add(self, sandbox: SandboxTask) -> None:
        self._by_id[sandbox.id] = sandbox

    def give(self, sandbox: SandboxTask) -> None:
        """From now on it is its session's, in place of one of an older lease."""
        self._by_session[sandbox.session] = sandbox

    def remove(self, sandbox: SandboxTask) -> None:
        self._by_id.pop(sandbox.id, None)
        if self._by_session.get(sandbox.session) is sandbox:
            del self._by_session[sandbox.session]

    # ------------------------------------------------------------ looking

    def __contains__(self, sandbox_id: object) -> bool:
        return sandbox_id in self._by_id

    def all(self) -> list[SandboxTask]:
        """Every sandbox there is, warm ones too."""
        # RACE: the sampler's thread asks too, so the copy is made in one step.
        return list(self._by_id.copy().values())

    def live(self) -> Iterable[SandboxTask]:
        """Sandboxes that belong to a session."""
        return [sandbox for sandbox in self._by_session.values() if sandbox.takes_a_slot]

    def count(self, *states: State) -> int:
        return sum(sandbox.state in states for sandbox in self._by_id.values())

    def leases(self) -> list[tuple[str, int]]:
        """Every (session, epoch) there is something of here: a sandbox, or events not saved yet."""
        return [(sandbox.session, sandbox.epoch) for sandbox in self._by_session.values()]

    def of_session(self, session: str) -> SandboxTask | None:
        return self._by_session.get(session)

    def of_lease(self, session: str, epoch: int) -> SandboxTask | None:
        """Like find, for those who don't mind."""
        sandbox = self._by_session.get(session)
        return sandbox if sandbox is not None and sandbox.epoch == epoch else None

    def find(self, session: str, epoch: int) -> SandboxTask:
        """The session's sandbox under this lease. Raises NotFound, or Rejected for another epoch."""
        sandbox = self._by_session.get(session)
        if sandbox is None:
            raise NotFound(f"session {session} has no sandbox on this runner", code=NOT_HERE)
        if sandbox.epoch != epoch:
            raise Rejected(f"the lease of session {session} here is {sandbox.epoch}, not {epoch}", code=STALE)
        return sandbox
