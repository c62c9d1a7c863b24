"""One run of the machine: qemu's command line, what the guest says, and the deadlines after which it is killed.

The guest has two serial lines: the first is its console and goes to a file; the second carries one JSON fact a line.
Covers: starting, following, ending. Leaves out: what the facts mean to a reader (report.py).
Sources: qemu-system-x86_64(1), setpriv(1), Documentation/admin-guide/kernel-parameters.txt.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.vm import initramfs
from tests.vm.packages import QEMU, Parts

POLL_S = 0.2
END_S = 20.0  # from the guest's last fact until it is off
DISK_BYTES = 8 * 2**30  # sparse
NOT_COPIED = (".git", ".venv", ".*_cache", ".hypothesis", "*.egg-info")
KERNEL_OPTIONS = (
    "console=ttyS0", "quiet", "loglevel=3", "panic=-1", "cgroup_no_v1=all", "psi=1", "mitigations=off",
)  # fmt: skip

Fact = dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """What a machine is given."""

    memory_mib: int = 2048
    cpus: int = 2
    kvm: bool = False
    boot_s: float = 120.0
    tests_s: float = 25 * 60.0


class Stuck(Exception):
    """The guest missed a deadline or ended early."""


def command(
    settings: Settings, kernel: Path, archive: Path, disk: Path, facts: Path, shares: Sequence[initramfs.Share]
) -> list[str]:
    """The process to start. It dies with the one who started it."""
    said = [
        *("setpriv", "--pdeathsig", "KILL", QEMU),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-machine", "pc", "-cpu", "max", "-smp", str(settings.cpus), "-m", str(settings.memory_mib)),
        *("-accel", "kvm" if settings.kvm else "tcg,thread=multi"),
        *("-kernel", str(kernel), "-initrd", str(archive), "-append", " ".join(KERNEL_OPTIONS)),
        *("-serial", "stdio", "-serial", f"file:{facts}"),
        *("-drive", f"file={disk},format=raw,if=virtio,cache=unsafe"),
    ]
    for share in shares:
        said += ["-virtfs"]
        said += [f"local,path={share.folder},mount_tag={share.tag},security_model=none,readonly=on,multidevs=remap"]
    return said


class Facts:
    """What the guest has said so far, read from the file that its second serial line goes to."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def new(self) -> Iterator[Fact]:
        """Facts not seen before. Half a line waits for its end; a line that is no fact is not one."""
        if not self._path.exists():
            return
        with self._path.open("rb") as lines:
            lines.seek(self._at)
            content = lines.read()
        whole = content.rpartition(b"\n")[0]
        self._at += len(whole) + 1 if whole else 0
        for line in whole.splitlines():
            try:
                fact = json.loads(line)
            except ValueError:
                continue
            if isinstance(fact, dict) and "fact" in fact:
                yield fact


def copied(checkout: Path, target: Path) -> Path:
    """The checkout as it is now: a guest that caches must not see its files change."""
    return shutil.copytree(checkout, target, ignore=shutil.ignore_patterns(*NOT_COPIED), symlinks=True)


def run(
    settings: Settings,
    parts: Parts,
    shares: Sequence[initramfs.Share],
    plan: Fact,
    console: Path,
    hear: Callable[[Fact], None],
) -> None:
    """Boots, follows and ends one machine; `hear` gets each fact. Raises Stuck; leaves no process and no file but the
    console's.
    """
    with tempfile.TemporaryDirectory(prefix="ashd-vm-") as made, console.open("wb") as said:
        folder = Path(made)
        archive, disk, facts = folder / "initramfs", folder / "disk", folder / "facts"
        initramfs.build(archive, parts.busybox, initramfs.needed_modules(parts.modules), shares, plan)
        with disk.open("wb") as empty:
            empty.truncate(DISK_BYTES)
        line = command(settings, parts.kernel, archive, disk, facts, shares)
        qemu = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT)
        try:
            _follow(qemu, Facts(facts), settings, hear)
        finally:
            qemu.kill()
            qemu.wait()


def _follow(qemu: subprocess.Popen[bytes], facts: Facts, settings: Settings, hear: Callable[[Fact], None]) -> None:
    deadline, waited_for = time.monotonic() + settings.boot_s, "the guest to boot"
    while True:
        ended = qemu.poll() is not None  # ORDER: before the last look, or its last facts are missed
        for fact in facts.new():
            hear(fact)
            if fact["fact"] == "booted":
                deadline, waited_for = time.monotonic() + settings.tests_s + END_S, "the tests to end"
            if fact["fact"] == "broken":
                raise Stuck(f"process 1 of the guest failed: {fact['why']}")
            if fact["fact"] == "end":
                return
        if ended:
            raise Stuck(f"the machine went off (exit status {qemu.returncode}) while this waited for {waited_for}")
        if time.monotonic() > deadline:
            raise Stuck(f"waited in vain for {waited_for}")
        time.sleep(POLL_S)
