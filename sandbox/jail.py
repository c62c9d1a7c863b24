"""The jail: what a bridge gives up, irrevocably, before the first instruction of agent code.

Covers: joining cgroups, namespaces, mounts, limits, identity, privileges, in the one order that works.
Leaves out: which of it a host allows (`probe`, asked once by the zygote), making cgroups and choosing user ids
(ashd.runner).

Sources: namespaces(7), pid_namespaces(7), mount_namespaces(7), prctl(2), credentials(7), cgroups(7).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox.memory import expose

CLONE_NEWNS = 0x00020000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWPID = 0x20000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38

SCRATCH_BYTES = 64 * 1024 * 1024
SCRATCH = ("/tmp", "/var/tmp", "/dev/shm")
"""Folders every sandbox gets as an empty one of its own, of SCRATCH_BYTES at most."""

_libc = ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """unshare(2). os.unshare exists from Python 3.12 on only."""
    _checked(_libc.unshare(flags), "unshare")


def _prctl(option: int, value: int, what: str) -> None:
    _checked(_libc.prctl(option, value, 0, 0, 0), what)


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    _checked(
        _libc.mount(source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode()),
        f"mount on {target}",
    )


def become_subreaper() -> None:
    """Orphans among our descendants become our children, so that none escapes the end of its sandbox."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1, "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass(frozen=True)
class JailSpec:
    """What one sandbox gets. Made by the supervisor, carried as JSON to the zygote."""

    namespaces: bool = False
    """Own pid, mount, ipc and uts namespaces."""
    uid: int | None = None
    """User and group id to become; None = stay who we are."""
    cgroups: list[str] = field(default_factory=list)
    """cgroup folders to join, made beforehand."""
    reveal: list[str] = field(default_factory=list)
    """Folders the sandbox must be able to reach although a parent folder is hidden or closed to it."""
    rlimits: dict[str, int] = field(default_factory=dict)
    """Soft and hard limits by name: NOFILE, NPROC, FSIZE, CORE, DATA."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JailSpec:
        return cls(**value)


def enter(spec: JailSpec) -> None:
    """Puts the calling process, a fresh child of the keeper, into the jail. Raises OSError; then the process must exit.

    ORDER: cgroups first, so that everything after is already accounted and limited; mounts while we are still
    privileged; limits before the identity (NPROC counts per user id); the identity before no_new_privs and PDEATHSIG,
    because changing it clears the latter (prctl(2)).
    """
    for folder in spec.cgroups:
        Path(folder, "cgroup.procs").write_text("0")
    expose()  # ORDER: still privileged, so that nothing inside can ever take it back
    os.setsid()
    if spec.namespaces:
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
        _build_mounts(spec.reveal)
    for name, value in spec.rlimits.items():
        limit(name, value)
    if spec.uid is not None:
        os.setgroups([])
        os.setresgid(spec.uid, spec.uid, spec.uid)
        os.setresuid(spec.uid, spec.uid, spec.uid)
        _prctl(PR_SET_DUMPABLE, 1, "prctl(PR_SET_DUMPABLE)")  # or /proc/self would belong to root
    _prctl(PR_SET_NO_NEW_PRIVS, 1, "prctl(PR_SET_NO_NEW_PRIVS)")
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL, "prctl(PR_SET_PDEATHSIG)")


def limit(name: str, value: int) -> None:
    """Sets a limit of getrlimit(2), soft and hard; never above the hard one there is."""
    which = getattr(resource, f"RLIMIT_{name}")
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _build_mounts(reveal: list[str]) -> None:
    """Hides scratch folders and folders closed to other users behind empty ones, then binds `reveal` back into
    place.
    """
    _mount("none", "/", "", MS_REC | MS_PRIVATE)  # nothing below reaches the host
    held = [(path, os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)) for path in _outermost(reveal)]
    hidden = _outermost([*SCRATCH, *(closed for path, _ in held if (closed := _closed_parent(path)))])
    for folder in hidden:
        if os.path.isdir(folder):
            mode = "1777" if folder in SCRATCH else "0755"
            _mount("tmpfs", folder, "tmpfs", MS_NOSUID | MS_NODEV, f"size={SCRATCH_BYTES},mode={mode}")
    for path, descriptor in held:
        if any(path.startswith(folder + "/") for folder in hidden):
            os.makedirs(path, mode=0o755, exist_ok=True)
            _mount(f"/proc/self/fd/{descriptor}", path, "", MS_BIND)
        os.close(descriptor)
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def _outermost(paths: list[str]) -> list[str]:
    """The paths without those that lie inside another of them, shortest first."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept


def _closed_parent(path: str) -> str | None:
    """The first folder on the way to `path` that other users may not pass."""
    for parent in reversed(Path(path).parents[:-1]):
        if not parent.stat().st_mode & 0o001:
            return str(parent)
    return None


def probe() -> dict[str, bool]:
    """What this host lets us do, found by doing it in a throw-away child."""
    return {
        "namespaces": _try_in_child(_try_namespaces),
        "uid": _try_in_child(_try_another_user),
    }


def _try_another_user() -> None:
    another = os.getuid() + 1
    os.setresuid(another, another, another)


def _try_namespaces() -> None:
    unshare(CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        _exit_with(_try_mounts)
    _, status = os.waitpid(pid, 0)
    if status != 0:
        raise OSError(f"the child failed with status {status}")


def _try_mounts() -> None:
    unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS)
    _build_mounts([])


def _try_in_child(attempt: Callable[[], None]) -> bool:
    pid = os.fork()
    if pid == 0:
        _exit_with(attempt)
    _, status = os.waitpid(pid, 0)
    return status == 0


def _exit_with(attempt: Callable[[], None]) -> None:
    """Ends a forked child with 0 if `attempt` worked. FORK: never returns into the parent's code."""
    code = 1
    try:
        attempt()
        code = 0
    except OSError:
        pass
    finally:
        os._exit(code)
