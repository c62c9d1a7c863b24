"""An ashd of a load test's own: `ashd up` on a temporary folder, gone afterwards.

Covers: its configuration, waiting until it takes sessions, its end, and whether anything is left of it.
Leaves out: what is measured on it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from host_memory import Process, below, processes, still_there
from interrupts import undisturbed

ROOT = Path(__file__).resolve().parents[1]
START_TIMEOUT_S = 90.0
STOP_TIMEOUT_S = 90.0
POLL_S = 0.1
READY = "is running at"
"""Words of `ashd up` when the first session has somewhere to go."""

CGROUPS = Path("/sys/fs/cgroup")

_OURS = (
    "ASH_DATA_DIR",
    "ASH_STATE_DIR",
    "ASH_HOST",
    "ASH_PORT",
    "ASH_API_KEY",
    "ASH_DATABASE_URL",
    "ASH_MODE",
    "ASH_RUNNER_ID",
)
_PR_SET_PDEATHSIG = 1


class NotStarted(Exception):
    """`ashd up` did not come up; its last words are in the message."""


class Installation:
    """A running `ashd up`, as a context. `settings` are sections as in its configuration file, laid over `base`.

    ASH_* variables of the environment hold as always, save those that say where it is.
    """

    def __init__(self, settings: Mapping[str, Any], base: Mapping[str, Any] | None = None) -> None:
        self.api_key = f"ash_{secrets.token_urlsafe(24)}"
        self.port = _free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.runner_id = f"ceiling-{secrets.token_hex(4)}"
        self._settings = laid_over(base or {}, settings)
        self.left: list[str] = []

    def __enter__(self) -> Self:
        with undisturbed():
            self.folder = Path(tempfile.mkdtemp(prefix="ashd-ceiling-"))
            self.folder.chmod(0o711)  # root's database runs under another user id, which must be able to walk through
            self._log = self.folder / "log"
            try:
                self._start()
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        try:
            self._wait_until_ready()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _start(self) -> None:
        config = self.folder / "ashd.json"
        own = {
            "data_dir": str(self.folder / "data"),
            "coordinator": {"host": "127.0.0.1", "port": self.port, "api_key": self.api_key},
            "runner": {"runner_id": self.runner_id},
        }
        with os.fdopen(os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            json.dump(laid_over(self._settings, own), file)  # JSON is YAML
        environment = {name: value for name, value in os.environ.items() if name not in _OURS}
        parent, libc = os.getpid(), ctypes.CDLL(None)

        def die_with_parent() -> None:
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)  # FORK: nothing is imported or logged here
            if os.getppid() != parent:
                os._exit(1)

        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ashd", "up", "-c", str(config)],
                cwd=ROOT,  # `-m` looks here first: this checkout is measured
                env={**environment, "ASH_LOG_FORMAT": "console"},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self._said():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise NotStarted(f"`ashd up` did not start:\n{self._said()[-2000:]}")
            time.sleep(POLL_S)

    def _said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    def _stop(self) -> None:
        """Ends it, then whatever of it is left, and says what was: `left` is empty when all went well."""
        with undisturbed():
            self._end()

    def _end(self) -> None:
        all_ = processes()
        ours = {pid: all_[pid] for pid in below(all_, [self.pid])}
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.left.append("`ashd up` did not end when asked")
            self._process.kill()
            self._process.wait(STOP_TIMEOUT_S)
        self.left += [f"process {pid}" for pid in _ended_by_force(ours)]
        self.left += [f"cgroup {folder}" for folder in _cgroups_removed(self.runner_id)]
        shutil.rmtree(self.folder, ignore_errors=True)
        if self.folder.exists():
            self.left.append(str(self.folder))


def _ended_by_force(before: dict[int, Process]) -> list[int]:
    """Kills what has not ended by itself within a moment; which that was."""
    deadline = time.monotonic() + 5.0
    while (left := list(still_there(before))) and time.monotonic() < deadline:
        time.sleep(POLL_S)
    for pid in left:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    return left


def _cgroups_removed(runner_id: str) -> list[Path]:
    """Removes the groups the runner has left, of either version; which those were."""
    found = [*CGROUPS.glob(f"*/*/{runner_id}*"), *CGROUPS.glob(f"*/{runner_id}*")]
    for folder in found:
        for path, _, _ in os.walk(folder, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)
    return found


def laid_over(below_: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both mappings in one, section by section; where both say something, `above` holds."""
    merged = dict(below_)
    for name, value in above.items():
        under = merged.get(name)
        merged[name] = laid_over(under, value) if isinstance(under, Mapping) and isinstance(value, Mapping) else value
    return merged


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
