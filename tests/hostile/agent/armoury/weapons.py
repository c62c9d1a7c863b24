"""What attacks are made of: system calls by number, calls of libc that raise, what is known of the target, a verdict.

Covers: running an attack in a child of the agent's (so that its death is told from the agent's) or in the agent itself.
Leaves out: the attacks.

Sources: syscalls(2), errno(3).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import importlib
import inspect
import json
import os
import select
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

Facts = Any
"""What the attacker knows: everything that is no secret. See tests/hostile/scene.py."""

REFUSALS = frozenset(
    getattr(errno, name)
    for name in (
        *("EPERM", "EACCES", "ENOENT", "ENOSYS", "EROFS", "ESRCH", "ENXIO", "ENODEV", "ENOTDIR", "EXDEV"),
        *("ECONNREFUSED", "ENETUNREACH", "EHOSTUNREACH", "ENETDOWN", "EAFNOSUPPORT", "EPROTONOSUPPORT"),
    )
)
"""What a refused attack gets. Another errno means that the attack got further than it should, or is badly made."""

PATIENCE_S = 12.0
"""No attack lasts longer in a child of the agent's."""

X86_64 = {
    "ptrace": 101, "syslog": 103, "personality": 135, "modify_ldt": 154, "pivot_root": 155, "adjtimex": 159,
    "acct": 163, "settimeofday": 164, "swapon": 167, "swapoff": 168, "reboot": 169, "iopl": 172, "ioperm": 173,
    "init_module": 175, "delete_module": 176, "quotactl": 179, "clock_settime": 227, "mq_open": 240, "mq_unlink": 241,
    "kexec_load": 246, "add_key": 248, "request_key": 249, "keyctl": 250, "migrate_pages": 256, "move_pages": 279,
    "perf_event_open": 298, "fanotify_init": 300, "name_to_handle_at": 303, "open_by_handle_at": 304,
    "clock_adjtime": 305, "setns": 308, "process_vm_readv": 310, "process_vm_writev": 311, "kcmp": 312,
    "finit_module": 313, "kexec_file_load": 320, "bpf": 321, "userfaultfd": 323, "capset": 126, "capget": 125,
    "clone": 56, "unshare": 272, "timer_create": 222, "sched_setattr": 314, "ioprio_set": 251, "memfd_create": 319,
    "vhangup": 153, "rt_sigqueueinfo": 129, "tgkill": 234, "seccomp": 317, "getpid": 39,
}  # fmt: skip
GENERIC = {
    "pidfd_send_signal": 424, "io_uring_setup": 425, "open_tree": 428, "move_mount": 429, "fsopen": 430,
    "pidfd_open": 434, "clone3": 435, "pidfd_getfd": 438, "process_madvise": 440, "mount_setattr": 442,
    "process_mrelease": 448,
}  # fmt: skip

refusals: Counter[str] = Counter()
"""What `each` was refused with so far, by the errno's name: told with the verdict, so that a defence can be told from
an attack that tried nothing.
"""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Denied(Exception):
    """The defence held, in a way that no errno tells."""


def syscall(name: str, *arguments: Any) -> int:
    """The result of a system call. Raises OSError. Text and None may be arguments, too."""
    number = GENERIC.get(name, X86_64.get(name))
    ctypes.set_errno(0)
    result: int = libc.syscall(ctypes.c_long(number), *map(_argument, arguments))
    return _checked(result, name)


def call(name: str, *arguments: Any) -> int:
    """The result of a function of libc that answers -1 when it fails. Raises OSError."""
    ctypes.set_errno(0)
    return _checked(getattr(libc, name)(*map(_argument, arguments)), name)


def _argument(value: Any) -> Any:
    if isinstance(value, int):
        return ctypes.c_long(value)
    return value.encode() if isinstance(value, str) else value


def _checked(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), what)
    return result


def each(attempt: Callable[[Any], Any], targets: Iterable[Any], *also_refusals: int) -> str:
    """Attempts it on each target; what of it did more than raise a refusal or answer with nothing."""
    gained = []
    for number, target in enumerate(targets, 1):
        try:
            result = attempt(target)
        except Denied as denied:
            refusals[str(denied)] += 1
            continue
        except OSError as error:
            if error.errno in REFUSALS or error.errno in also_refusals:
                refusals[errno.errorcode.get(error.errno or 0, "?")] += 1
                continue
            result = f"got as far as {error}"
        if result:
            gained.append(f"{f'attempt {number}' if callable(target) else target}: {result}")
    return "; ".join(gained)[:4000]


def outsiders(facts: Facts) -> list[int]:
    """Processes of the host as it numbers them: the neighbour's, the runner's, the coordinator's, our own keeper."""
    return [*facts.neighbour.pids, facts.runner.pid, facts.runner.zygote, facts.coordinator.pid, facts.own.keeper]


def visible() -> list[int]:
    """All processes in /proc."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def in_own_pid_namespace(facts: Facts) -> None:
    """SECURITY: attacks that would hit bystanders begin with this. Where there is no jail, they don't go on."""
    if os.stat("/proc/self/ns/pid").st_ino == facts.host.pid_namespace or os.getuid() == 0 or len(visible()) > 100:
        raise RuntimeError("the sandbox is not isolated: this attack would hit bystanders")


# ---------------------------------------------------------------- what an attack says of itself


def in_the_agent(attack: Any) -> Any:
    """Run by the agent itself, whose end is the sandbox's: as a python agent it is the first process of the jail."""
    attack.in_the_agent = True
    return attack


def deadly(attack: Any) -> Any:
    """May end its own process, or its sandbox, and nothing else."""
    attack.deadly = True
    return attack


def needs(*enforced: str) -> Callable[[Any], Any]:
    """Held off only where the runner says that it enforces one of these."""

    def mark(attack: Any) -> Any:
        attack.needs = enforced
        return attack

    return mark


def refused_with(*numbers: int) -> Callable[[Any], Any]:
    """These numbers of errno mean refusal here, too."""

    def mark(attack: Any) -> Any:
        attack.refusals = frozenset(numbers)
        return attack

    return mark


# ---------------------------------------------------------------- running one


def obey(order: str) -> Iterator[Any]:
    """Runs the ordered attack; what it says, and at last its verdict, {"verdict": denied | did | died | broken}."""
    told = json.loads(order, object_hook=lambda fields: SimpleNamespace(**fields))
    family, _, name = told.attack.partition(".")
    attack = getattr(importlib.import_module(f"armoury.{family}"), name)
    if inspect.isgeneratorfunction(attack):
        yield from attack(told.facts)
        verdict = {"verdict": "denied", "detail": "said all"}
    elif getattr(attack, "in_the_agent", False):
        verdict = _verdict(attack, told.facts)
    else:
        verdict = _verdict_of_child(attack, told.facts)
    yield json.dumps(verdict)


def _verdict(attack: Any, facts: Facts) -> dict[str, str]:
    refusals.clear()
    try:
        gained = attack(facts)
    except Denied as denied:
        return {"verdict": "denied", "detail": str(denied)}
    except OSError as error:
        refused = error.errno in REFUSALS or error.errno in getattr(attack, "refusals", ())
        name = errno.errorcode.get(error.errno or 0, "?")
        return {"verdict": "denied" if refused else "broken", "detail": f"{name} {error}"}
    except MemoryError:
        return {"verdict": "denied", "detail": "MemoryError"}
    except BaseException:
        return {"verdict": "broken", "detail": traceback.format_exc()[-2000:]}
    if gained:
        return {"verdict": "did", "detail": str(gained)[:8000]}
    return {"verdict": "denied", "detail": f"gained nothing; refused {dict(refusals)}"}


def _verdict_of_child(attack: Any, facts: Facts) -> dict[str, str]:
    """FORK: the child is alone in a session of its own, which is killed with it."""
    answers, answer = os.pipe2(os.O_CLOEXEC)
    fcntl.fcntl(answers, fcntl.F_SETFL, os.O_NONBLOCK)
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        os.close(answers)
        os.setsid()
        os.write(answer, json.dumps(_verdict(attack, facts)).encode() + b"\n")
        os._exit(0)
    os.close(answer)
    try:
        return _await(child, answers)
    finally:
        os.close(answers)
        try:
            os.killpg(child, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass
        try:
            os.waitpid(child, 0)
        except ChildProcessError:
            pass


def _await(child: int, answers: int) -> dict[str, str]:
    deadline, text = time.monotonic() + PATIENCE_S, b""
    while time.monotonic() < deadline:
        select.select([answers], [], [], 0.02)
        # ORDER: its death is looked at before its words are, so that none said before it is missed
        dead = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        try:
            text += os.read(answers, 65536)
        except BlockingIOError:
            pass
        if text.endswith(b"\n"):
            verdict: dict[str, str] = json.loads(text)
            return verdict
        if dead is not None:
            name = signal.Signals(dead.si_status).name if dead.si_code != os.CLD_EXITED else f"exit {dead.si_status}"
            return {"verdict": "died", "detail": name}
    return {"verdict": "broken", "detail": f"no end within {PATIENCE_S} s"}
