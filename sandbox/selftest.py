"""The self-test: a throw-away jail from the inside of which everything it is to prevent is tried.

Covers: what is tried, what must come of it, and what to do about a host that can't prevent it. Leaves out: what a
runner makes of it (ashd.runner.selftest).

A level holds when its jail can be entered and every attempt that belongs to it is denied. Attempts are harmless where
they succeed: they name nothing that exists, or change something to what it is.

Sources: those of jail.py, and for the remedies docker-run(1), Documentation/admin-guide/sysctl/{kernel,user}.rst.
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
from sandbox.jail import STANDARD, STRICT, JailSpec

_RLIMITS = {"NOFILE": 256, "CORE": 0}
_DEADLINE_S = 20
_MAX_REPORT_BYTES = 256 * 1024
_DENIALS = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOENT, errno.ESRCH, errno.EROFS, errno.ECONNREFUSED}
    | {errno.ENETUNREACH, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}
)
_KEY = 0x61736864
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


@dataclass(frozen=True)
class Bait:
    """What a sandbox must not reach: things of its host, real ones."""

    file: str
    pid: int
    abstract: str
    port: int
    shared_memory: bool


# ------------------------------------------------------------ the attempts; each raises OSError when it is denied


def _call(x86_64: int, aarch64: int, *arguments: int) -> None:
    """A system call with arguments that mean nothing. Denied when it is refused before anybody looks at them."""
    number = x86_64 if syscalls.ARCHITECTURE == "x86_64" else aarch64
    ctypes.set_errno(0)
    if _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments)) < 0:
        failure = ctypes.get_errno()
        if failure in _DENIALS:
            raise OSError(failure, os.strerror(failure))


def _read_a_file_of_the_host(bait: Bait) -> None:
    os.close(os.open(bait.file, os.O_RDONLY))


def _write_to_the_system(_: Bait) -> None:
    os.close(os.open("/usr/.ashd-self-test", os.O_WRONLY | os.O_CREAT))
    os.unlink("/usr/.ashd-self-test")


def _see_processes(bait: Bait) -> None:
    os.stat(f"/proc/{bait.pid}")


def _signal_a_process(bait: Bait) -> None:
    os.kill(bait.pid, 0)


def _trace_a_process(bait: Bait) -> None:
    _call(101, 117, 16, bait.pid, 0, 0)  # PTRACE_ATTACH


def _share_memory(bait: Bait) -> None:
    if not bait.shared_memory:
        raise OSError(errno.ENOSYS, "this kernel has no System V shared memory")
    if _libc.shmget(_KEY, 1, 0) < 0:
        raise OSError(ctypes.get_errno(), "shmget")


def _reach_the_network(bait: Bait) -> None:
    with socket.socket() as client:
        client.connect(("127.0.0.1", bait.port))


def _reach_an_abstract_socket(bait: Bait) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(bait.abstract)


def _hold_a_capability(_: Bait) -> None:
    lines = dict(line.split(":\t") for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    held = [name for name in ("CapInh", "CapPrm", "CapEff", "CapAmb") if int(lines[name], 16)]
    if not held and lines["NoNewPrivs"].strip() == "1":
        raise OSError(errno.EPERM, "none, and none to be had")


def _make_a_user_namespace(_: Bait) -> None:
    syscalls.unshare(syscalls.CLONE_NEWUSER)


def _mount(_: Bait) -> None:
    syscalls.mount("tmpfs", root.SCRATCH, "tmpfs", 0)


def _change_root(_: Bait) -> None:
    os.chroot("/")


def _make_a_device(_: Bait) -> None:
    os.mknod("device", 0o020600, os.makedev(1, 1))


def _become_root(_: Bait) -> None:
    try:
        os.setuid(0)
    except OSError as error:  # EINVAL: this user namespace has no such user
        raise OSError(errno.EPERM, "setuid") from error


def _set_the_clock(_: Bait) -> None:
    _call(227, 112, 0, 0)


def _load_a_module(_: Bait) -> None:
    _call(175, 105, 0, 0, 0)


def _restart_the_machine(_: Bait) -> None:
    _call(169, 142, 0, 0, 0, 0)  # without the magic numbers: EINVAL if it were allowed


def _use_keys(_: Bait) -> None:
    _call(250, 219, 0, 0, 0)


def _use_bpf(_: Bait) -> None:
    _call(321, 280, 0, 0, 0)


def _use_perf(_: Bait) -> None:
    _call(298, 241, 0, 0, -1, -1, 0)


def _use_userfaultfd(_: Bait) -> None:
    _call(323, 282, -1)


def _use_io_uring(_: Bait) -> None:
    _call(425, 425, 0, 0)


def _open_a_raw_socket(_: Bait) -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def _lower_its_oom_score(_: Bait) -> None:
    Path("/proc/self/oom_score_adj").write_text("-1000")


_CONTAINER = "in a container: give it CAP_SYS_ADMIN and an unconfined seccomp profile, or a virtual machine of its own"
_NO_SUCH_USER = "set uid_range to ids that exist in this user namespace (/proc/self/uid_map)"
_FILTER = "a kernel with CONFIG_SECCOMP_FILTER, on x86_64 or aarch64"
_APART = "run the runner as root, so that each sandbox gets a user id of its own, or on a kernel with Landlock (5.13)"
_ATTEMPTS: tuple[tuple[Callable[[Bait], None], str, str], ...] = (
    (_read_a_file_of_the_host, STANDARD, _APART),
    (_signal_a_process, STANDARD, f"{_APART.removesuffix('(5.13)')}(6.12)"),
    (_trace_a_process, STANDARD, _FILTER),
    (_reach_the_network, STANDARD, _FILTER),
    (_hold_a_capability, STANDARD, "run the runner as root or as an ordinary user, not as something in between"),
    (_make_a_user_namespace, STANDARD, _FILTER),
    (_mount, STANDARD, _FILTER),
    (_change_root, STANDARD, _FILTER),
    (_make_a_device, STANDARD, _APART),
    (_become_root, STANDARD, _APART),
    (_set_the_clock, STANDARD, _FILTER),
    (_load_a_module, STANDARD, _FILTER),
    (_restart_the_machine, STANDARD, _FILTER),
    (_use_keys, STANDARD, _FILTER),
    (_use_bpf, STANDARD, _FILTER),
    (_use_perf, STANDARD, _FILTER),
    (_use_userfaultfd, STANDARD, _FILTER),
    (_use_io_uring, STANDARD, _FILTER),
    (_open_a_raw_socket, STANDARD, _FILTER),
    (_lower_its_oom_score, STANDARD, _APART),
    (_write_to_the_system, STRICT, _CONTAINER),
    (_see_processes, STRICT, _CONTAINER),
    (_share_memory, STRICT, _CONTAINER),
    (_reach_an_abstract_socket, STRICT, _CONTAINER),
)


def _try_all(level: str, bait: Bait) -> list[Finding]:
    found = []
    for attempt, least, remedy in _ATTEMPTS:
        if level == STANDARD and least == STRICT:
            continue
        name = attempt.__name__.strip("_").replace("_", " ")
        try:
            attempt(bait)
        except OSError as error:
            found.append(Finding(name, least, error.errno in _DENIALS, os.strerror(error.errno or 0), ""))
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
                    return [Finding("give a user of its own", level, False, str(error), _NO_SUCH_USER)]
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
    segment = _libc.shmget(_KEY, 1, _IPC_CREAT | 0o666)
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
        return [Finding("enter the jail", level, False, f"it died with status {status}", _CONTAINER)]
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
    return _CONTAINER


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
