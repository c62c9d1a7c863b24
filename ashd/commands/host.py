"""What a host has for sandboxes and for ashd itself, beside the jail: looked at, never changed.

Covers: cgroups, disk quotas, memory pressure, swap, descriptors, Postgres. Leaves out: whether the jail denies what it
has to, which only trying shows (runner/selftest.py).
Sources: cgroups(7), systemd.resource-control(5) (Delegate=), proc(5) (mountinfo), getrlimit(2),
Documentation/accounting/psi.rst.
"""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ashd.config.data_dir import default_data_dir

if TYPE_CHECKING:
    from ashd.config.schema import RunnerConfig

_WANTED = ("memory", "pids", "cpu", "freezer")
"""Controllers; the freezer of version 2 is no controller but always there."""

_DESCRIPTORS_PER_SANDBOX = 4
_QUOTA_OPTIONS = {"prjquota", "pquota", "usrquota", "uquota", "quota"}


@dataclass(frozen=True)
class Fact:
    """One property of the host; `advice` is empty where there is nothing to gain."""

    name: str
    value: str
    advice: str = ""


def facts(config: RunnerConfig, environ: Mapping[str, str], root: Path = Path("/")) -> list[Fact]:
    """All of them. `root` is where /proc and /sys are."""
    return [
        user(),
        cgroups(root),
        disk_quota(root, config.state_dir or default_data_dir(environ) / "runner"),
        pressure(root),
        swap(root),
        descriptors(config.max_sandboxes),
        postgres(environ.get("ASH_POSTGRES_BIN")),
    ]


def user() -> Fact:
    """Whom the runner would run as, if it were started as this command is."""
    if os.geteuid() == 0:
        return Fact("user", "root: each sandbox gets a user id of its own")
    return Fact("user", f"uid {os.geteuid()}: sandboxes run as this user", "run the runner as root")


def cgroups(root: Path) -> Fact:
    """Whether sandboxes can have groups, by which hierarchy and with which controllers."""
    mounted = root / "sys/fs/cgroup"
    if (mounted / "cgroup.controllers").exists():
        return _cgroups_v2(mounted, root)
    writable = [name for name in _WANTED if _may_write(mounted / name)]
    present = [name for name in _WANTED if (mounted / name).is_dir()]
    if not present:
        return Fact("cgroups", "none mounted", "mount cgroup2 at /sys/fs/cgroup; until then only rlimits hold")
    missing = [name for name in _WANTED if name not in writable]
    value = f"version 1: {', '.join(writable) or 'nothing'} writable"
    advice = f"{', '.join(missing)}: mount it, run the runner as root, or chown a group to its user" if missing else ""
    return Fact("cgroups", value, advice)


def _cgroups_v2(mounted: Path, root: Path) -> Fact:
    own = mounted / _own_group(root).lstrip("/")
    controllers = _words(own / "cgroup.controllers")
    delegated = _may_write(own) and _may_write(own / "cgroup.subtree_control")
    missing = [name for name in _WANTED if name not in controllers and name != "freezer"]
    value = f"version 2: {', '.join(name for name in _WANTED if name in controllers) or 'no controller'} here, "
    value += "delegated" if delegated else "not delegated"
    if delegated and not missing:
        return Fact("cgroups", value)
    return Fact("cgroups", value, "start the runner by a systemd unit with Delegate=yes (systemd-run -p Delegate=yes)")


def _own_group(root: Path) -> str:
    """This process' group in the hierarchy of version 2."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        if line.startswith("0::"):
            return line.removeprefix("0::")
    return "/"


def disk_quota(root: Path, state_dir: Path) -> Fact:
    """Whether the file system under the workspaces has quotas of projects or users, by its options."""
    place, kind, options = "/", "unknown", set[str]()
    for line in _text(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        point = before.split()[4].encode("ascii", "replace").decode("unicode_escape")
        if state_dir.resolve().is_relative_to(point) and len(point) >= len(place):
            place, kind = point, after.split()[0]
            options = {*before.split()[5].split(","), *after.split()[-1].split(",")}
    value = f"{kind} at {place}: "
    if options & _QUOTA_OPTIONS:
        return Fact("disk quota", value + "mounted with quotas")
    return Fact("disk quota", value + "no quotas: workspaces are watched", f"mount {place} (ext4, xfs) with prjquota")


def pressure(root: Path) -> Fact:
    """Whether the kernel tells how long tasks wait for memory."""
    if _text(root / "proc/pressure/memory"):
        return Fact("memory pressure", "told by the kernel (PSI)")
    return Fact("memory pressure", "not told by the kernel", "boot with psi=1; until then only free memory is watched")


def swap(root: Path) -> Fact:
    """Whether the host may swap, which admission is to prevent."""
    lines = _text(root / "proc/meminfo").splitlines()
    sizes_kib = [int(line.split()[1]) for line in lines if line.startswith("SwapTotal:")]
    if not any(sizes_kib):
        return Fact("swap", "none")
    return Fact("swap", f"{sizes_kib[0] // 1024} MiB", "swapoff: a sandbox that swaps slows down all others")


def descriptors(max_sandboxes: int) -> Fact:
    """Whether the supervisor may open what so many sandboxes need."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 256 + _DESCRIPTORS_PER_SANDBOX * max_sandboxes
    if hard == resource.RLIM_INFINITY or hard >= needed:
        return Fact("open files", f"hard limit {'none' if hard == resource.RLIM_INFINITY else hard}")
    return Fact("open files", f"hard limit {hard}", f"{needed} for {max_sandboxes} sandboxes: LimitNOFILE={needed}")


def postgres(configured: str | None) -> Fact:
    """Whether `ashd up` could start a database of its own."""
    from ashd.errors import ConfigError
    from ashd.standalone import binaries

    with tempfile.TemporaryDirectory(prefix="ashd-doctor-") as copies:
        try:
            folder = Path(configured) if configured else None
            found = binaries.find(folder, uid=None, copies=Path(copies), major=None)
        except ConfigError as error:
            return Fact("postgres", "no binaries found (only `ashd up` needs them)", error.problems[0])
    return Fact("postgres", f"{found.major} in {found.folder}")


def _text(path: Path) -> str:
    """A file of the kernel's; empty where it isn't there, or the kernel doesn't do it."""
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""


def _words(path: Path) -> set[str]:
    return set(_text(path).split())


def _may_write(path: Path) -> bool:
    return path.exists() and os.access(path, os.W_OK, effective_ids=True)
