"""What isolation this host gives sandboxes, and whether that is what is configured.

Covers: the levels a configuration accepts, the report of a self-test, refusing to go below. Leaves out: the tests
themselves (sandbox/selftest.py, run by each zygote before anything else).
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ashd.config.schema import RunnerConfig
from ashd.domain.isolation import reaches
from ashd.errors import ConfigError
from ashd.runner.zygote_process import command, interpreter_folders
from sandbox import landlock
from sandbox.selftest import Finding, Setup

_LEVELS = {"auto": ["strict", "standard"], "strict": ["strict"], "standard": ["standard"], "none": ["none"]}
_STRICT = ("pid-namespace", "mount-namespace", "ipc-namespace", "network-namespace", "own-root")
_CHANGES_USERS = 1 << 0 | 1 << 6 | 1 << 7
_MAX_ANSWER_BYTES = 256 * 1024


@dataclass(frozen=True)
class Report:
    """What a self-test showed. `level` is the isolation sandboxes get; `findings` what was tried at it; `missed` what
    kept higher levels, or the only one allowed, from being reached.
    """

    wanted: str
    level: str
    findings: list[Finding]
    missed: list[Finding]
    enforced: list[str]

    @property
    def is_enough(self) -> bool:
        """Whether the configured level is reached."""
        return reaches(self.level, self.wanted)

    @property
    def lacking(self) -> list[str]:
        """What kept a higher level from being reached."""
        return [f"{one.name}: {one.detail}" for one in self.missed]

    def demand(self) -> None:
        """Raises ConfigError, with what the host lacks and how to get it, where the level isn't the configured one."""
        if self.is_enough:
            return
        problems = [f"this host does not give sandboxes the isolation that is configured ({self.wanted})"]
        problems += [f"{one.name}: {one.detail}. Remedy: {one.remedy}" for one in self.missed]
        raise ConfigError([*problems, _WAY_OUT])


_WAY_OUT = (
    "`ashd doctor` shows all of it. ASH_ISOLATION=none runs agents without isolation; do that only with agents "
    "you trust as yourself"
)


def levels_for(config: RunnerConfig) -> list[str]:
    """The levels that are good enough, best first."""
    return _LEVELS[config.isolation]


def may_change_users() -> bool:
    """Whether we may make files and processes another user's: CAP_CHOWN, CAP_SETGID and CAP_SETUID."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16) & _CHANGES_USERS == _CHANGES_USERS
    return False


def setup_for(config: RunnerConfig, state_dir: Path) -> Setup:
    """How jails are made here."""
    template = state_dir / "root"
    template.mkdir(mode=0o755, exist_ok=True)
    privileged = config.isolation != "none" and may_change_users()
    if privileged:
        state_dir.chmod(0o711)  # where there is no root of its own, a sandbox's user has to pass
    return Setup(
        template=str(template),
        visible=[*config.visible, *interpreter_folders()],
        hidden=[str(_private(state_dir))],
        uid=int(config.uid_range.partition("-")[0]) if privileged else None,
    )


def _private(state_dir: Path) -> Path:
    """What no sandbox may see even if it lies in a visible folder: our state, and with the usual layout
    (<data_dir>/runner) what lies beside it, the keys and the database of this installation.
    """
    return state_dir.parent if state_dir.name == "runner" else state_dir


def report_of(config: RunnerConfig, shown: Mapping[str, Any]) -> Report:
    """From what a zygote's self-test showed."""
    level = shown["level"]
    privileged = config.isolation != "none" and may_change_users()
    enforced = ["uid"] if privileged else []
    if level == "strict":
        enforced += [*_STRICT] if privileged else ["user-namespace", *_STRICT]
    if level != "none":
        enforced += ["seccomp", "landlock"] if landlock.version() else ["seccomp"]
    return Report(
        wanted=config.isolation,
        level=level,
        findings=[Finding(**one) for one in shown["findings"]],
        missed=[Finding(**one) for one in shown["missed"]],
        enforced=enforced,
    )


def examine(config: RunnerConfig) -> Report:
    """Runs the self-test by itself, with a zygote that makes no sandboxes. Takes a second at most; raises OSError."""
    with tempfile.TemporaryDirectory(prefix="ashd-self-test-") as folder:
        setup = setup_for(config, Path(folder))
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours, theirs:
            ours.settimeout(config.spawn_timeout)
            process = subprocess.Popen(pass_fds=[theirs.fileno()], **command(theirs))
            theirs.close()
            ours.send(json.dumps({"levels": levels_for(config), "setup": vars(setup), "modules": []}).encode())
            shown = json.loads(ours.recv(_MAX_ANSWER_BYTES))["ready"]
        process.wait(config.spawn_timeout)
    return report_of(config, shown)
