"""Process 1 of the guest: runs pytest once for each way of living that the plan names, and tells the host of it.

A way is a user in a cgroup: `root` in the topmost one; `service`, root in a delegated one as of a systemd unit with
Delegate=yes; `user`, an ordinary user in a subtree delegated to them as of systemd's user manager.

Covers: cgroups and their delegation, deadlines, reaping, what a way leaves behind, power off. Leaves out: mounts
(initramfs.py's /init), outcomes of single tests (outcomes.py). Runs as a script, stdlib only.
Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst (Delegation), systemd's docs/CGROUP_DELEGATION.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

CGROUPS = Path("/sys/fs/cgroup")
TOLD_TO = "/dev/ttyS1"
CONTROLLERS = ("cpu", "memory", "pids", "io")
# Below CGROUPS: what belongs to a way's user, and where its tests start.
PLACES = {
    "root": ("", ""),
    "service": ("system.slice/ashd.service", "system.slice/ashd.service"),
    "user": ("user.slice/user@1000.service", "user.slice/user@1000.service/tests.scope"),
}
DELEGATED_FILES = ("cgroup.procs", "cgroup.threads", "cgroup.subtree_control")
DELEGATION_MARKS = ("trusted.delegate", "user.delegate")  # systemd's, on a unit with Delegate=yes
SUPERVISOR = "supervisor"  # the leaf into which a runner, or a test in its stead, moves those it finds in its group
POLL_S = 0.1
ENDING_S = 10.0
POWER_OFF = 0x4321FEDC
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_VERSION = 1


def tell(**fact: Any) -> None:
    with open(TOLD_TO, "ab", buffering=0) as host:
        host.write(json.dumps(fact).encode() + b"\n")


def main() -> None:
    plan = json.loads(Path("/plan.json").read_text())
    os.chmod(TOLD_TO, 0o622)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 524_288))
    for name in CONTROLLERS:
        enable(CGROUPS, name)
    tell(fact="booted", **described())
    deadline = time.monotonic() + plan["seconds"]
    for number, way in enumerate(plan["ways"]):
        share_s = (deadline - time.monotonic()) / (len(plan["ways"]) - number)
        live(way, plan, share_s)
    tell(fact="end")


def described() -> dict[str, Any]:
    """What this kernel gives."""
    libc = ctypes.CDLL(None, use_errno=True)
    landlock = libc.syscall(LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_VERSION)
    return {
        "kernel": platform.release(),
        "python": platform.python_version(),
        "controllers": (CGROUPS / "cgroup.controllers").read_text().split(),
        "landlock": max(landlock, 0),
        "psi": Path("/proc/pressure/memory").exists(),
        "quotas": any(
            "/scratch" in line and "prjquota" in line for line in Path("/proc/mounts").read_text().splitlines()
        ),
        "uptime": float(Path("/proc/uptime").read_text().split()[0]),
    }


def live(way: str, plan: dict[str, Any], seconds: float) -> None:
    """One way, from an empty machine to an empty machine."""
    uid = plan["user"] if way == "user" else 0
    group = delegate(way, uid)
    tell(fact="way", way=way)
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        become(way, plan, uid, group)
    code = wait(child, started + seconds)
    left = [] if code is None else left_behind()  # of tests cut off in the middle, everything is left
    os.kill(-1, signal.SIGKILL)  # everything but process 1
    reap_all()
    remove_groups(CGROUPS)
    tell(fact="way-end", way=way, exit=code, left=left, seconds=round(time.monotonic() - started, 1))


def delegate(way: str, uid: int) -> Path:
    """Makes the way's cgroups; the one its tests start in."""
    owned, place = (CGROUPS / folder for folder in PLACES[way])
    place.mkdir(parents=True, exist_ok=True)
    if owned == CGROUPS:
        return place
    for folder in reversed([owned, *owned.parents][:-1]):
        if folder.is_relative_to(CGROUPS) and folder != owned:
            for name in CONTROLLERS:
                enable(folder, name)
    for folder in {owned, place}:
        for target in (folder, *(folder / name for name in DELEGATED_FILES)):
            os.chown(target, uid, uid)
    for mark in DELEGATION_MARKS:
        os.setxattr(owned, mark, b"1")
    if owned != place:
        for name in CONTROLLERS:
            enable(owned, name)
    return place


def enable(folder: Path, controller: str) -> None:
    if controller in (folder / "cgroup.controllers").read_text().split():
        (folder / "cgroup.subtree_control").write_text(f"+{controller}")


def become(way: str, plan: dict[str, Any], uid: int, group: Path) -> NoReturn:
    """The forked child turns into pytest."""
    try:
        (group / "cgroup.procs").write_text("0")
        os.setsid()
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        home = "/home/tester" if uid else "/root"
        env = {
            "PATH": plan["path"],
            "HOME": home,
            "USER": "tester" if uid else "root",
            "LANG": "C.UTF-8",
            "TERM": "dumb",
            "ASHD_VM": way,
            "ASHD_VM_OUTCOMES": TOLD_TO,
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",  # PERF: hypothesis's, which its tests do without, takes ten seconds
            **plan["env"],
        }
        os.chdir(plan["checkout"])
        options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "tests.vm.outcomes"]
        os.execve(plan["python"], [plan["python"], "-u", "-m", "pytest", *options, *plan["tests"]], env)
    except BaseException as error:
        print(f"guest: {way}: {error!r}", flush=True)
        os._exit(70)


def wait(child: int, deadline: float) -> int | None:
    """Reaps whoever ends until `child` does; its exit code, or None when it was cut off at the deadline."""
    while time.monotonic() < deadline:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == child:
            return os.waitstatus_to_exitcode(status)
        if pid == 0:
            time.sleep(POLL_S)
    return None


def reap_ended() -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def reap_all() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)


def left_behind() -> list[str]:
    """What is still there when everything that was ending has had its time."""
    deadline = time.monotonic() + ENDING_S
    while (left := leftovers()) and time.monotonic() < deadline:
        reap_ended()
        time.sleep(POLL_S)
    return left


def leftovers() -> list[str]:
    """Processes and cgroups that tests made and forgot; what only needs to be reaped doesn't count."""
    processes = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            command = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except OSError:
            continue
        if command and state != "Z" and folder.name != "1":  # threads of the kernel have no command line
            processes.append(f"process {folder.name}: {command[:200]}")
    ours = {CGROUPS / place for pair in PLACES.values() for place in pair}
    ours |= {place / SUPERVISOR for place in ours}
    known = ours | {parent for place in ours for parent in place.parents}
    groups = [f"cgroup {path.relative_to(CGROUPS)}" for path in subgroups(CGROUPS) if path not in known]
    return processes + groups


def subgroups(top: Path) -> list[Path]:
    """Every cgroup below, the deepest first."""
    return sorted((path for path in top.glob("**/") if path != top), key=lambda path: -len(path.parts))


def remove_groups(top: Path) -> None:
    for group in subgroups(top):
        try:
            group.rmdir()
        except OSError as error:
            print(f"guest: {group} stays: {error}", flush=True)


def power_off() -> None:
    os.sync()
    ctypes.CDLL(None).reboot(POWER_OFF)


if __name__ == "__main__":
    try:
        main()
    except BaseException as error:
        tell(fact="broken", why=repr(error))
        raise
    finally:
        sys.stdout.flush()
        time.sleep(0.5)  # for the serial lines to drain
        power_off()
