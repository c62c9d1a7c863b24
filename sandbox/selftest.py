"""The self-test: a throw-away jail from the inside of which everything it is to prevent is tried.

Covers: making it as all others will be, the bait laid out for it, and what to do about a host that can't. Leaves out:
what is tried (attempts.py), what a runner makes of it (ashd.runner.selftest).

A level holds when its jail can be entered and every attempt that belongs to it is denied.

Sources: Documentation/admin-guide/sysctl/{kernel,user}.rst.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

from sandbox import jail, root, syscalls
from sandbox.attempts import ATTEMPTS, CONTAINER, DENIALS, NO_SUCH_USER, SHARED_MEMORY_KEY, Bait
from sandbox.jail import STANDARD, STRICT, JailSpec

_RLIMITS = {"NOFILE": 256, "CORE": 0}
_DEADLINE_S = 20
_MAX_REPORT_BYTES = 256 * 1024
_IPC_CREAT = 0o1000

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Finding:
    """One attempt: `level` is the least isolation that must deny it."""

    name: str
    level: str
    denied: bool
    detail: str
    remedy: str


def _try_all(level: str, bait: Bait) -> list[Finding]:
    found = []
    for attempt, least, remedy in ATTEMPTS:
        if level == STANDARD and least == STRICT:
            continue
        name = attempt.__name__.strip("_").replace("_", " ")
        try:
            attempt(bait)
        except OSError as error:
            denied = error.errno in DENIALS
            found.append(Finding(name, least, denied, os.strerror(error.errno or 0), "" if denied else remedy))
        else:
            found.append(Finding(name, least, False, "it worked", remedy))
    return found


# ------------------------------------------------------------ the throw-away jail


@dataclass(frozen=True)
class Setup:
    """What a zygote is told about the host: the jail of the self-test is made as all others will be."""

    template: str
    visible: list[str]
    hidden: list[str]
    uid: int | None
    """A user id nobody has, to become; None where we are not root."""


def prepare(setup: Setup) -> None:
    """What a zygote does once, so that strict jails can be made of its children. Raises OSError.

    Without privileges a user namespace comes first: in it, and nowhere else, we have them.
    """
    if setup.uid is None:
        jail.own_user_namespace()
    root.build_template(Path(setup.template), setup.visible, setup.hidden)


def examine(level: str, setup: Setup) -> list[Finding]:
    """Tries a level in a throw-away jail; it holds if every finding is denied. Takes about 50 ms."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="self-test-", dir=os.path.dirname(setup.template)))
        folder.chmod(0o711)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        bait = _lay_bait(folder, stack)
        sandbox = folder / "sandbox"
        for name in ("sandbox", "sandbox/workspace", "sandbox/scratch"):
            (folder / name).mkdir(mode=0o711)
        if setup.uid is not None:
            for name in ("workspace", "scratch"):
                try:
                    os.chown(sandbox / name, setup.uid, setup.uid)
                except OSError as error:
                    return [Finding("give a user of its own", level, False, str(error), NO_SUCH_USER)]
        spec = JailSpec(level, setup.template, str(sandbox), setup.uid, [], setup.visible)
        return _in_a_child(level, lambda: _jailed(spec, setup, bait))


def _lay_bait(folder: Path, stack: ExitStack) -> Bait:
    secret = folder / "secret"
    secret.write_text("of the host\n")
    secret.chmod(0o600)
    abstract = stack.enter_context(socket.socket(socket.AF_UNIX))
    name = f"\0ashd-self-test-{os.getpid()}"
    abstract.bind(name)
    abstract.listen()
    tcp = stack.enter_context(socket.socket())
    tcp.bind(("127.0.0.1", 0))
    tcp.listen()
    segment = _libc.shmget(SHARED_MEMORY_KEY, 1, _IPC_CREAT | 0o666)
    if segment >= 0:
        stack.callback(_libc.shmctl, segment, 0, None)  # IPC_RMID
    return Bait(str(secret), os.getpid(), name, tcp.getsockname()[1], segment >= 0)


def _jailed(spec: JailSpec, setup: Setup, bait: Bait) -> list[Finding]:
    """In a child: becomes what a keeper is, and forks what a bridge is."""
    if spec.level == STRICT:
        prepare(setup)
        syscalls.unshare(syscalls.CLONE_NEWPID)
    return _in_a_child(spec.level, lambda: _locked(spec, bait))


def _locked(spec: JailSpec, bait: Bait) -> list[Finding]:
    jail.confine(spec)
    jail.lock(spec, network="none", rlimits=_RLIMITS)
    os.chdir(spec.workspace)
    return _try_all(spec.level, bait)


def _in_a_child(level: str, work: Callable[[], list[Finding]]) -> list[Finding]:
    """What `work` finds, done in a forked child. One that can't even begin is a finding too."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(read_end)
        _report(level, work, write_end)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        text = pipe.read(_MAX_REPORT_BYTES)
    _, status = os.waitpid(pid, 0)
    if not text:
        return [Finding("enter the jail", level, False, f"it died with status {status}", CONTAINER)]
    return [Finding(**values) for values in json.loads(text)]


def _report(level: str, work: Callable[[], list[Finding]], pipe: int) -> NoReturn:
    """FORK: never returns into the parent's code. WAITS: SIGALRM ends an attempt that hangs."""
    try:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_DEADLINE_S)
        found = work()
    except OSError as error:
        found = [Finding("enter the jail", level, False, str(error), _remedy_of(error))]
    try:
        os.write(pipe, json.dumps([asdict(finding) for finding in found]).encode())
    finally:
        os._exit(0)


_SWITCHES = (
    ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "0"),
    ("/proc/sys/kernel/unprivileged_userns_clone", "0", "1"),
    ("/proc/sys/user/max_user_namespaces", "0", "10000"),
)


def _remedy_of(error: OSError) -> str:
    """What to do about a jail that can't be entered."""
    for path, bad, good in _SWITCHES:
        try:
            is_bad = Path(path).read_text().strip() == bad
        except OSError:
            continue
        if is_bad:
            name = path.removeprefix("/proc/sys/").replace("/", ".")
            return f"run as root, or allow user namespaces: sysctl -w {name}={good}"
    if error.errno == errno.EACCES and error.filename:
        return f"let other users pass its folders (chmod o+x), or set state_dir elsewhere: {error.filename}"
    if "proc" in str(error):
        return "this container hides parts of /proc: start it with --security-opt systempaths=unconfined"
    return CONTAINER


def outcome(levels: list[str], setup: Setup) -> dict[str, Any]:
    """Tries the levels in turn until one holds: {"level", "findings" of the last tried, "missed" by those before}."""
    missed: list[Finding] = []
    findings: list[Finding] = []
    reached = jail.NONE
    for level in levels:
        findings = [] if level == jail.NONE else examine(level, setup)
        open_doors = [finding for finding in findings if not finding.denied]
        if not open_doors:
            reached = level
            break
        missed += open_doors
    return {"level": reached, "findings": [asdict(one) for one in findings], "missed": [asdict(one) for one in missed]}
