"""The bridge: first process of the jail. Gives up its privileges, loads the agent, runs its turns, reaps.

Covers: the agent's side of the conversation with the keeper, and what is the same for every runtime: joining pieces of
text, adding a result, turning an exception into the turn's end. Leaves out: how each runtime runs an agent (runtimes/).

FORK: runs in a child of the keeper's. asyncio is imported here only once the fork is done (the zygote has it
preloaded). SECURITY: from `claim` on this process runs the agent's code. Nothing it says is believed by the keeper.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sandbox import execs, jail
from sandbox.protocol import Tag
from sandbox.title import set_title

if TYPE_CHECKING:
    from sandbox.turns import Bridge


def run(spec: jail.JailSpec, keeper_fd: int, stdout_fd: int, stderr_fd: int, execs_fd: int | None) -> NoReturn:
    """Becomes the bridge. FORK: called in a fresh child of the keeper; never returns."""
    code = 1
    try:
        set_title("ashd: bridge (warm)")
        keeper = _own_descriptors(keeper_fd, stdout_fd, stderr_fd, execs_fd)
        jail.confine(spec)
        keeper.sendall(Tag.JAILED + b"{}\n")
        claim = _await_claim(keeper)
        code = 0 if claim is None else _serve(spec, keeper, claim)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _own_descriptors(keeper_fd: int, stdout_fd: int, stderr_fd: int, execs_fd: int | None) -> socket.socket:
    """stdin from nowhere, stdout and stderr to the keeper's log, the keeper's socket as descriptor 3, the one for its
    `Execs` as execs.CHANNEL, and nothing else.
    """
    high = os.dup2(keeper_fd, 100, inheritable=False)
    if execs_fd is not None:
        os.dup2(execs_fd, 101, inheritable=False)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(stdout_fd, 1)
    os.dup2(stderr_fd, 2)
    os.closerange(3, 100)
    os.closerange(101 if execs_fd is None else 102, 65536)
    os.dup2(high, 3, inheritable=False)
    os.close(high)
    if execs_fd is not None:
        os.dup2(101, execs.CHANNEL, inheritable=False)
        os.close(101)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    return socket.socket(fileno=3)


def _await_claim(keeper: socket.socket) -> dict[str, Any] | None:
    """The session this sandbox is given to; None if it is never claimed. WAITS: as long as the sandbox stays warm."""
    buffer = bytearray()
    while not buffer.endswith(b"\n"):
        data = keeper.recv(1 << 16)
        if not data:
            return None
        buffer += data
    claim: dict[str, Any] = json.loads(buffer)
    return claim if claim["type"] == "claim" else None


def _serve(spec: jail.JailSpec, keeper: socket.socket, claim: dict[str, Any]) -> int:
    """Runs the session's turns until told to end."""
    import asyncio  # FORK: only now

    from sandbox.turns import Bridge

    set_title(f"ashd: bridge {claim['session_id']}")
    sys.dont_write_bytecode = True  # the workspace is the session's: nothing of ours in it
    jail.lock(spec, network=claim["network"], rlimits=claim["rlimits"])
    execs.report_to_keeper()
    workspace = Path(spec.workspace)
    os.chdir(workspace)
    os.environ.clear()  # SECURITY: an allow-list; what the host's environment holds is none of the agent's business
    own = {"PATH": claim["path"], "HOME": str(workspace), "LANG": "C.UTF-8", "TMPDIR": spec.scratch}
    os.environ.update({**own, "PWD": str(workspace), **claim["env"]})
    # The zygote ignores SIGINT, and what an agent starts would inherit that.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    bridge: Bridge = Bridge(keeper, {**claim, "workspace": str(workspace)})
    return asyncio.run(bridge.serve())
