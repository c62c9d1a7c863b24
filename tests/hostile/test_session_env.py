"""Attacks by the environment a session brings along: what loaders, interpreters and shells obey reaches the agent of
that session, which may ruin itself with it, and nobody who is privileged or lives on.
"""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.hostile.scene import RUNTIMES, Scene

EVIL_SHELL = "for folder in / /tmp /dev/shm /var/tmp /run /etc; do echo x > $folder/{mark}; done 2>/dev/null\n"
EVIL_PYTHON = (
    "import os\nfor f in ('/', '/tmp', '/run', '/etc'):\n    try: open(f + '/{mark}', 'w')\n    except OSError: pass\n"
)

TRICKS = {
    "a preloaded library": {"LD_PRELOAD": "/workspace/evil.so", "LD_AUDIT": "/workspace/evil.so"},
    "a library path": {"LD_LIBRARY_PATH": "/workspace", "GCONV_PATH": "/workspace", "LOCPATH": "/workspace"},
    "modules of its own": {"PYTHONPATH": "/workspace/evil", "PYTHONSTARTUP": "/workspace/evil/json.py"},
    "another home of Python's": {"PYTHONHOME": "/workspace/evil"},
    "a debugger": {"PYTHONBREAKPOINT": "os.abort", "PYTHONINSPECT": "1", "PYTHONFAULTHANDLER": "1"},
    "a shell's start": {
        "BASH_ENV": "/workspace/evil.sh",
        "ENV": "/workspace/evil.sh",
        "PS4": "$(sh /workspace/evil.sh)",
    },
    "a path": {"PATH": "/workspace/bin:."},
    "no path": {"PATH": ""},
    "folders": {"HOME": "/root", "TMPDIR": "/", "PWD": "/etc", "XDG_RUNTIME_DIR": "/run"},
    "settings of ours": {"ASH_INTERNAL_SECRET": "mine", "ASH_STATE_DIR": "/", "ASH_ISOLATION": "none"},
    "memory": {"MALLOC_ARENA_MAX": "1000", "GLIBC_TUNABLES": "glibc.malloc.mxfast=0x4000000000000000"},
    "almost a megabyte": {f"LARGE_{number}": "x" * 100_000 for number in range(10)},
}


@pytest.mark.parametrize("trick", TRICKS)
@pytest.mark.parametrize("runtime", RUNTIMES)
def test_a_sessions_environment_reaches_nobody_but_its_agent(scene: Scene, runtime: str, trick: str) -> None:
    files = {
        **scene.agent_files(runtime),
        "evil.so": "no library",
        "evil.sh": EVIL_SHELL.format(mark=scene.mark),
        "startup.sh": ":\n",
        "bin/python3": f"#!/bin/sh\n{EVIL_SHELL.format(mark=scene.mark)}exit 1\n",
        **{
            f"evil/{name}.py": EVIL_PYTHON.format(mark=scene.mark) for name in ("json", "sitecustomize", "os", "socket")
        },
    }
    scene.api.deploy(f"bewitched-{runtime}", files)
    answer = scene.api.call("POST", "/api/sessions", {"agent": f"bewitched-{runtime}", "extraEnv": TRICKS[trick]})
    assert answer.status in (201, 400, 422, 500, 503), answer
    if answer.status == 201:
        session = answer.body["session"]["id"]
        scene.api.send(session, scene.order("output.say_hello", session))
        assert_untouched(scene, trick, session)
        scene.end(session)
    scene.assert_nobody_noticed()


def assert_untouched(scene: Scene, trick: str, session: str) -> None:
    """Keeper, zygote and supervisor have none of it in their environment, nor a file of the workspace in memory."""
    folder = scene.fleet.keeper_of(session).cwd()
    for pid in (scene.fleet.keeper_of(session).pid, scene.zygote, scene.runner.process.pid):
        environment = psutil.Process(pid).environ()
        assert not [name for name, value in TRICKS[trick].items() if environment.get(name) == value]
        assert f"{folder}/workspace" not in Path(f"/proc/{pid}/maps").read_text()


@pytest.mark.parametrize("name", ["", "A=B", "A\0B", "1A", "A B", "ü", "A\nB"])
def test_a_variable_without_a_proper_name_is_refused(scene: Scene, name: str) -> None:
    answer = scene.api.call("POST", "/api/sessions", {"agent": "attacker-python", "extraEnv": {name: "x"}})
    assert answer.status == 400
    scene.assert_nobody_noticed()
