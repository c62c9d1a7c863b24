"""Real zygotes, keepers and jails for tests, and the supervisor's side of the conversation with them.

A test asks a `Host` for sandboxes and talks to their keepers as a supervisor would. When the host is left, it ends them all and
counts: no process, cgroup, folder or descriptor may be left over.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

import sandbox
from ashd.runner import cgroup, workspace
from ashd.runner.zygote_process import PRELOADED, revealed_folders
from sandbox.journal import Position, Reader
from sandbox.protocol import Kind, LineReader, Record, encode_line

DEADLINE_S = 20.0
MIB = 1024 * 1024
KILL_TIMEOUT_S = 1.0
BOUNDS = {
    "max_frame": MIB,
    "segment_bytes": MIB,
    "max_journal_bytes": 8 * MIB,
    "max_log_bytes": 256 * 1024,
    "kill_timeout_s": KILL_TIMEOUT_S,
}
MEMORY = 256 * MIB
_FIRST_UID = 230_000
_PATH = f"{sys.base_prefix}/bin:/usr/local/bin:/usr/bin:/bin"
_uids = itertools.count(_FIRST_UID)


def until[T](look: Callable[[], T], what: str, within_s: float = DEADLINE_S) -> T:
    """The first true answer of `look`, asked again and again; fails the test when there is none in time."""
    deadline = time.monotonic() + within_s
    while not (answer := look()):
        if time.monotonic() > deadline:
            pytest.fail(f"not within {within_s} s: {what}")
        time.sleep(0.005)
    return answer
