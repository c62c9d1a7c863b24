"""The jail: what a bridge gives up, irrevocably, before the first instruction of agent code.

Covers: the order of it, in two steps. `confine` makes a warm sandbox, before anyone knows whose it will be; `lock`
takes the rest away once it is known. In between only our own code runs in it. Leaves out: the parts (root.py,
landlock.py, seccomp.py), what of it a host allows (selftest.py), making cgroups and choosing user ids (ashd.runner).

Three levels: strict (a root file system and namespaces of its own; a user id of its own or a user namespace),
standard (no namespaces: a user id of its own or Landlock), none. All have rlimits, cgroups and no_new_privs; strict
and standard the filter of system calls.

Sources: namespaces(7), user_namespaces(7), credentials(7), prctl(2), capabilities(7), cgroups(7), netdevice(7).
"""

from __future__ import annotations

import fcntl
import os
import resource
import signal
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox import landlock, root, seccomp, syscalls
from sandbox.memory import expose
from sandbox.syscalls import (
    CLONE_NEWCGROUP,
    CLONE_NEWIPC,
    CLONE_NEWNET,
    CLONE_NEWNS,
    CLONE_NEWUSER,
    CLONE_NEWUTS,
    PR_SET_DUMPABLE,
    PR_SET_NO_NEW_PRIVS,
    PR_SET_PDEATHSIG,
    prctl,
    unshare,
)

STRICT, STANDARD, NONE = "strict", "standard", "none"
LEVELS = (STRICT, STANDARD, NONE)

_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


@dataclass(frozen=True)
class JailSpec:
    """What one sandbox gets. Made by the supervisor, carried as JSON to the zygote."""

    level: str = NONE
    template: str = ""
    """strict: the folder of the root's template (root.py), as the zygote built it."""
    folder: str = ""
    """The sandbox's folder on the host; `workspace` in it is the session's."""
    uid: int | None = None
    """User and group id to become; None = stay who we are."""
    cgroups: list[str] = field(default_factory=list)
    """cgroup folders to join, made beforehand."""
    visible: list[str] = field(default_factory=list)
    """Folders of the host the sandbox may read."""

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> JailSpec:
        return cls(**value)

    @property
    def workspace(self) -> str:
        """Where the sandbox sees its workspace."""
        return root.WORKSPACE if self.level == STRICT else f"{self.folder}/workspace"

    @property
    def scratch(self) -> str:
        """Where the sandbox may put temporary files."""
        return root.SCRATCH if self.level in (STRICT, NONE) else f"{self.folder}/scratch"


def confine(spec: JailSpec) -> None:
    """Puts the calling process, a fresh child of the keeper, into namespaces and cgroups. Raises OSError; then the
    process must exit.

    ORDER: cgroups first, so that everything after is already accounted and limited, and so that the cgroup namespace
    begins there.
    """
    for folder in spec.cgroups:
        Path(folder, "cgroup.procs").write_text("0")
    expose()  # ORDER: still privileged, so that nothing inside can ever take it back
    os.setsid()
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, what="prctl(PR_SET_PDEATHSIG)")
    if spec.level == STRICT:
        unshare(CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)
        socket.sethostname("sandbox")
        uid = os.getuid() if spec.uid is None else spec.uid
        root.enter(Path(spec.template), Path(spec.folder), uid, spec.visible)


def lock(spec: JailSpec, *, network: str, rlimits: Mapping[str, int]) -> None:
    """Takes the rest away. `network`: none or host; `rlimits`: soft and hard ones by the names of getrlimit(2). Raises
    OSError; then the process must exit.

    ORDER: the network while we may still unshare it, so that the sandbox does not own it; limits before the identity
    (NPROC counts per user id); the identity before no_new_privs and PDEATHSIG, because changing it clears the latter
    (prctl(2)); Landlock and the filter last, for they would forbid the rest.
    """
    if network == "none" and spec.level == STRICT:
        unshare(CLONE_NEWNET)
        _raise_loopback()
    for name, value in rlimits.items():
        limit(name, value)
    _become_nobody(spec)
    prctl(PR_SET_NO_NEW_PRIVS, 1, what="prctl(PR_SET_NO_NEW_PRIVS)")
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL, what="prctl(PR_SET_PDEATHSIG)")
    if spec.level != NONE:
        if landlock.version():
            landlock.restrict(_reachable(spec))
        seccomp.load(seccomp.program(internet=network != "none" or spec.level == STRICT))


def _become_nobody(spec: JailSpec) -> None:
    """A user of its own, or a user namespace of its own, without groups, capabilities and ways back."""
    if spec.uid is not None:
        os.setgroups([])
        os.setresgid(spec.uid, spec.uid, spec.uid)
        syscalls.drop_bounding_set()
        os.setresuid(spec.uid, spec.uid, spec.uid)
    elif spec.level == STRICT:
        own_user_namespace()
        syscalls.drop_bounding_set()
    syscalls.clear_capabilities()
    prctl(PR_SET_DUMPABLE, 1, what="prctl(PR_SET_DUMPABLE)")  # or /proc/self would belong to root


def own_user_namespace() -> None:
    """A user namespace in which we are who we were, and hold all capabilities. Raises OSError: not allowed here."""
    uid, gid = os.geteuid(), os.getegid()
    unshare(CLONE_NEWUSER)
    for name, line in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        Path("/proc/self", name).write_text(line)


def limit(name: str, value: int) -> None:
    """Sets a limit of getrlimit(2), soft and hard; never above the hard one there is."""
    which = getattr(resource, f"RLIMIT_{name}")
    _, hard = resource.getrlimit(which)
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(which, (value, value))


def _raise_loopback() -> None:
    """A new network has a loopback device, which is down; servers and clients within one sandbox need it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = struct.pack("16sh14x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(any_socket, _SIOCGIFFLAGS, name), 16)
        fcntl.ioctl(any_socket, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _reachable(spec: JailSpec) -> list[tuple[str, int]]:
    """What Landlock lets the sandbox do, where."""
    own = [(path, landlock.READ | landlock.WRITE) for path in (spec.workspace, spec.scratch)]
    if spec.level == STRICT:
        return [("/", landlock.READ), ("/dev", landlock.DEVICES), *own]
    programs = [(path, landlock.READ) for path in (*spec.visible, "/etc", "/proc")]
    return [*programs, ("/dev", landlock.DEVICES), *own]
