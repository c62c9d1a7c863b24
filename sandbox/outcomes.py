"""How a turn ends, and why a sandbox did: decided from what its keeper knows, without doing anything.

Covers: which of several causes counts, and the words it is told in. Leaves out: when it is asked (keeper.py), how it is
written (ledger.py).
"""

from __future__ import annotations

import os
import signal
from typing import Any

from sandbox.frames import agents_code, text_of
from sandbox.ledger import Outcome
from sandbox.memory import Kill

TIMEOUT, INTERRUPTED, DISK = "timeout", "interrupted", "disk"
_STOPPED = {
    TIMEOUT: Outcome("timeout", "The turn took longer than it may.", "turn.timeout"),
    INTERRUPTED: Outcome("interrupted"),
    DISK: Outcome("failed", "The workspace grew beyond its limit of disk space or files.", "sandbox.disk"),
}


def of_cause(cause: str) -> str:
    """What a turn is asked to stop for when its sandbox is ended for `cause`."""
    return cause if cause in _STOPPED else INTERRUPTED


def asked_to_stop(why: str) -> Outcome:
    """Of a turn that was asked to stop, whatever it says itself."""
    return _STOPPED[why]


def of_end(end: dict[str, Any], asked: str, agent_kill: Kill | None) -> Outcome:
    """Of a turn whose end a bridge tells; `asked` is what it was asked to stop for, if it was."""
    error = text_of(end, "error", "")
    if asked:
        return asked_to_stop(asked)
    if error and agent_kill:  # whatever the bridge says, this is why
        return _oom(agent_kill)
    if error:
        return Outcome("failed", error, agents_code(end, "agent.failed"))
    return Outcome("completed")


def of_death(status: int, cause: str, asked: str, agent_kill: Kill | None) -> tuple[str, Outcome]:
    """The cause of a sandbox's end, and with it the outcome of a turn that was open.

    `status` is the wait status of its first process, `cause` what its keeper ended it for, if it did.
    """
    if cause == TIMEOUT:
        return cause, asked_to_stop(TIMEOUT)
    if cause:
        return cause, asked_to_stop(asked or of_cause(cause))
    if not os.WIFSIGNALED(status):
        code = os.waitstatus_to_exitcode(status)
        return "exited", Outcome("failed", f"The agent's process exited with code {code}.", "sandbox.exited")
    number = os.WTERMSIG(status)
    if number == signal.SIGKILL and agent_kill:
        return "oom", _oom(agent_kill)
    name = signal.Signals(number).name
    return "killed", Outcome("failed", f"The sandbox was killed by {name}.", "sandbox.killed")


def _oom(kill: Kill) -> Outcome:
    return Outcome("oom", f"The agent used {kill}", "sandbox.oom", kill.to_json())
