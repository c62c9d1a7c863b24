"""loadtest/memory_ceiling.py on real servers: one of its own, and one that is there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.fleet import KEY, Fleet
from tests.loadtests import FOLDER

CGROUPS = Path("/sys/fs/cgroup")
BOUNDS = [
    "--max-sessions",
    "4",
    "--max-minutes",
    "3",
    "--step",
    "2",
    "--concurrency",
    "2",
    "--stop-at-available",
    "64MiB",
]


@pytest.fixture
def folder() -> Iterator[Path]:
    """For all the script makes; open on its way, because root's database runs under another user id."""
    path = Path(tempfile.mkdtemp(prefix="ashd-ceiling-test-"))
    path.chmod(0o711)
    yield path
    shutil.rmtree(path)


def _run(folder: Path, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The script to its end, and the numbers it wrote."""
    (folder / "temporary").mkdir(mode=0o711)
    ours = {name: value for name, value in os.environ.items() if not name.startswith("ASH_")}
    command = [sys.executable, str(FOLDER / "memory_ceiling.py"), *BOUNDS, "--write", str(folder / "out"), *arguments]
    ended = subprocess.run(
        command,
        env={**ours, "TMPDIR": str(folder / "temporary"), **variables},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (raw,) = (folder / "out").glob("*.json")
    assert raw.with_suffix(".md").read_text(encoding="utf-8").startswith("# Memory ceiling")
    (run,) = json.loads(raw.read_text(encoding="utf-8"))["runs"]
    return ended, run


def _assert_refused_at(run: dict[str, Any], sessions: int) -> None:
    assert (run["stop"]["reason"], run["sessions"], run["active_at_end"]) == ("refused", sessions, sessions)
    assert run["refusals"] >= 3
    assert run["failures"] == {} and run["left"] == []
    first, *_, last = run["steps"]
    assert first["sandboxes"] == 0
    assert last["sandboxes"] == sessions and last["processes"] >= 2 * sessions
    assert last["sandboxes_pss_bytes"] > 64 * 1024 * 1024 * sessions


def test_it_ramps_on_a_server_of_its_own_to_where_that_refuses_and_leaves_nothing(folder: Path) -> None:
    config = folder / "up.yaml"
    config.write_text(f"runner:\n  cgroup_parent: {(name := f'ashd-ceiling-test-{os.getpid()}')}\n", encoding="utf-8")
    arguments = ("--agent", "heap64", "--memory-limit", "256", "--config", str(config))
    ended, run = _run(folder, *arguments, ASH_MAX_SANDBOXES="3")
    _assert_refused_at(run, 3)
    assert "64 MiB heap" in ended.stdout
    assert list((folder / "temporary").iterdir()) == []
    assert [*CGROUPS.glob(f"*/{name}"), *CGROUPS.glob(name)] == []
    assert _processes_named(str(folder)) == []


def test_it_ramps_on_a_server_that_is_there_and_leaves_it_as_it_was(fleet: Fleet, folder: Path) -> None:
    api = fleet.add_coordinator()
    fleet.add_runner(ASH_MAX_SANDBOXES="2", ASH_MEMORY_HEADROOM="64MiB")
    server = ["--url", f"http://127.0.0.1:{api.port}", "--api-key", KEY]
    _, run = _run(folder, *server, "--agent", "subprocess", "--memory-limit", "none")
    _assert_refused_at(run, 2)
    assert run["steps"][-1]["processes"] >= 6
    assert api.call("GET", "/api/agents").body["agents"] == []
    sessions = api.call("GET", "/api/sessions").body["sessions"]
    assert {session["status"] for session in sessions} <= {"ended"}


def _processes_named(text: str) -> list[str]:
    """Command lines with `text` in them."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if text in line:
            found.append(line)
    return found
