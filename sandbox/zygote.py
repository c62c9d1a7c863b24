"""The zygote: imports what sandboxes need once, then forks a keeper whenever its supervisor asks for one.

Covers: preloading, the self-test of what the host allows, forking, reaping. Leaves out: everything a keeper does
(keeper.py).

Runs as `python -m sandbox.zygote FD`: FD is its end of a SOCK_SEQPACKET pair, one JSON object a message. It gets one
{"levels", "setup", "modules"} and sends {"ready": what the self-test showed}; then it gets {"sandbox", "folder",
"jail", "bounds"} and answers {"sandbox", "pid"} or {"sandbox", "error"}. Ends when the supervisor's end closes. Keepers
live on; their new parent reaps them.

FORK: single-threaded, no event loop, no sockets but the one; what is imported here is shared by every sandbox.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from sandbox import execs, jail, keeper, seccomp, selftest
from sandbox.syscalls import become_subreaper
from sandbox.title import set_title

_MAX_REQUEST_BYTES = 128 * 1024


def main(arguments: list[str]) -> int:
    """Serves fork requests until the supervisor is gone."""
    control = socket.socket(fileno=int(arguments[0]))
    order = json.loads(control.recv(_MAX_REQUEST_BYTES) or b"null")
    if order is None:
        return 0
    for module in order["modules"]:
        importlib.import_module(module)
    set_title("ashd: zygote")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is for the supervisor, which ends us in its own time
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    control.send(json.dumps({"ready": _get_ready(order["levels"], selftest.Setup(**order["setup"]))}).encode())
    become_subreaper()
    keepers: set[int] = set()
    gc.collect()
    gc.freeze()  # PERF: the collector never touches, and so never copies, the pages shared with every sandbox
    while True:
        ready, _, _ = select.select([control.fileno(), wake_read], [], [])
        if wake_read in ready:
            os.read(wake_read, 4096)
            _reap(keepers)
        if control.fileno() in ready:
            request = control.recv(_MAX_REQUEST_BYTES)
            if not request:
                return 0
            control.send(json.dumps(_spawn(json.loads(request), keepers)).encode())


def _get_ready(levels: list[str], setup: selftest.Setup) -> dict[str, Any]:
    """Finds the first level that holds here, and becomes what it asks of a zygote."""
    outcome = selftest.outcome(levels, setup)
    if outcome["level"] == jail.STRICT:
        selftest.prepare(setup)
    if outcome["level"] != jail.NONE:
        seccomp.program()  # PERF: made once, shared by all
    return {**outcome, "tools": execs.probe()}


def _spawn(request: keeper.Request, keepers: set[int]) -> dict[str, object]:
    try:
        pid = os.fork()
    except OSError as error:
        return {"sandbox": request["sandbox"], "error": f"fork: {error.strerror}"}
    if pid == 0:
        keeper.run(request)  # FORK: never returns
    keepers.add(pid)
    return {"sandbox": request["sandbox"], "pid": pid}


def _reap(keepers: set[int]) -> None:
    """Collects the dead. What a dead keeper left behind is our child now (subreaper), and is killed: it is nobody's."""
    with contextlib.suppress(ChildProcessError):
        while (pid := os.waitpid(-1, os.WNOHANG)[0]) != 0:
            keepers.discard(pid)
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    for orphan in {int(pid) for pid in children} - keepers:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(orphan, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
