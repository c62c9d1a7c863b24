"""The root file system of a sandbox: the host's programs, read-only, and next to nothing else of the host.

Covers: the template, built once by the zygote in a mount namespace of its own; entering it, by each bridge in one of
its own. Leaves out: who may do that (jail.py), what lies in a workspace (ashd.runner).

    /usr /bin /lib …          the host's, as configured (`visible`), with the interpreter ashd runs on
    /etc                      what programs need of it to run; no secrets, no accounts but the sandbox's own
    /dev /proc                its own
    /tmp, /var/tmp, /dev/shm  one empty folder of SCRATCH_BYTES in memory, charged to the sandbox
    /workspace                the session's

Sources: mount_namespaces(7), pivot_root(2), tmpfs(5), Documentation/filesystems/devpts.rst.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sandbox.syscalls import (
    CLONE_NEWNS,
    MS_BIND,
    MS_NODEV,
    MS_NOEXEC,
    MS_NOSUID,
    MS_PRIVATE,
    MS_RDONLY,
    MS_REC,
    MS_REMOUNT,
    MS_SLAVE,
    bind,
    mount,
    pivot_root_here,
    seal,
    unshare,
)

WORKSPACE = "/workspace"
SCRATCH = "/tmp"
SCRATCH_BYTES = 64 * 1024 * 1024
SCRATCH_INODES = 16 * 1024

_TEMPLATE_BYTES = 16 * 1024 * 1024
_MAX_COPIED_BYTES = 1024 * 1024
_MAX_TERMINALS = 64
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "dev/fd": "/proc/self/fd",
    "dev/stdin": "/proc/self/fd/0",
    "dev/stdout": "/proc/self/fd/1",
    "dev/stderr": "/proc/self/fd/2",
    "dev/ptmx": "pts/ptmx",
    "etc/mtab": "/proc/mounts",
    "var/run": "/run",
}
_SCRATCH_TOO = ("/var/tmp", "/dev/shm")
_FOLDERS = ("proc", "sys", "run", "home", "root", "mnt", "var/lib", "var/cache", "dev/pts", "etc", "tmp", "workspace")
_ETC = (
    "alternatives",
    "bash.bashrc",
    "bash_completion.d",
    "ca-certificates",
    "ca-certificates.conf",
    "debian_version",
    "fonts",
    "gai.conf",
    "gitconfig",
    "host.conf",
    "hosts",
    "inputrc",
    "java",
    "ld.so.cache",
    "ld.so.conf",
    "ld.so.conf.d",
    "localtime",
    "lsb-release",
    "magic",
    "magic.mime",
    "mime.types",
    "networks",
    "nsswitch.conf",
    "os-release",
    "perl",
    "pki",
    "profile",
    "protocols",
    "python3",
    "resolv.conf",
    "rpc",
    "services",
    "shells",
    "ssl",
    "terminfo",
    "timezone",
    "vim",
)
"""SECURITY: an allow-list. What else lies in /etc (shadow, ssh, tokens of other services) is nobody's business here."""

_ACCOUNTS = """\
root:x:0:0:root:/root:/usr/sbin/nologin
{name}:x:{uid}:{uid}:sandbox:{home}:/bin/sh
nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin
"""
_GROUPS = "root:x:0:\n{name}:x:{uid}:\nnogroup:x:65534:\n"


def build_template(template: Path, visible: Iterable[str], hidden: Iterable[str]) -> None:
    """Builds it at `template`, an empty folder, in a new mount namespace of the calling process. `visible`: folders of
    the host; `hidden`: folders that stay unseen although they lie in a visible one. Raises OSError.

    What the host mounts later appears in the new namespace too, below what is there (MS_SLAVE); nothing we mount
    appears on the host.
    """
    unshare(CLONE_NEWNS)
    mount("none", "/", "", MS_REC | MS_SLAVE)
    mount("tmpfs", str(template), "tmpfs", MS_NOSUID, f"size={_TEMPLATE_BYTES},mode=755")
    for folder in _FOLDERS:
        (template / folder).mkdir(parents=True, exist_ok=True)
    for folder in _outermost(visible):
        if _in_scratch(folder) is None:
            _show(Path(folder), _within(template, folder))
    for folder in hidden:
        if (inside := _within(template, folder)).is_dir():
            mount("tmpfs", str(inside), "tmpfs", MS_NOSUID | MS_NODEV | MS_RDONLY, "size=4k,mode=700")
    _fill_etc(template / "etc")
    _fill_dev(template / "dev")
    for name, target in [*_LINKS.items(), *((folder[1:], SCRATCH) for folder in _SCRATCH_TOO)]:
        (template / name).symlink_to(target)
    mount("none", str(template), "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID)


def _show(folder: Path, inside: Path) -> None:
    """One folder of the host; where it is a link, the link."""
    if folder.is_symlink():
        inside.parent.mkdir(parents=True, exist_ok=True)
        inside.symlink_to(os.readlink(folder))
    elif folder.is_dir():
        inside.mkdir(parents=True, exist_ok=True)
        bind(str(folder), str(inside))
        seal(str(inside))


def _in_scratch(path: str) -> str | None:
    """Where in the scratch folder a path lies; None if it lies elsewhere. Nothing in it can be in the template."""
    for folder in (SCRATCH, *_SCRATCH_TOO):
        if path.startswith(folder + "/"):
            return path[len(folder) + 1 :]
    return None


def _within(template: Path, path: str | Path) -> Path:
    return template / Path(path).relative_to("/")


def _fill_etc(etc: Path) -> None:
    """Small files as copies, folders as they are, links as links where what they name is visible too."""
    for name in _ETC:
        original, inside = Path("/etc", name), etc / name
        if original.is_symlink() and os.readlink(original).startswith("/usr/"):
            inside.symlink_to(os.readlink(original))
        elif original.is_dir():
            inside.mkdir()
            bind(str(original), str(inside))
            seal(str(inside))
        elif original.is_file() and original.stat().st_size <= _MAX_COPIED_BYTES and os.access(original, os.R_OK):
            shutil.copyfile(original, inside)
    for name in ("passwd", "group"):  # each sandbox has its own mounted over them
        (etc / name).touch()


def _fill_dev(dev: Path) -> None:
    """The host's harmless devices, which can be made nowhere without privileges."""
    for name in _DEVICES:
        (dev / name).touch()
        bind(f"/dev/{name}", str(dev / name))


def enter(template: Path, folder: Path, uid: int, visible: Iterable[str]) -> None:
    """Makes a copy of the template the root of the calling process, which has a mount namespace of its own and is the
    first of a pid namespace. `folder` is the sandbox's on the host, `uid` the user it will be. Raises OSError.

    ORDER: everything is mounted below the template while the host's paths still exist, then the host goes.
    """
    accounts = {"name": "sandbox", "uid": uid, "home": WORKSPACE}
    (folder / "passwd").write_text(_ACCOUNTS.format(**accounts))
    (folder / "group").write_text(_GROUPS.format(**accounts))
    mount("none", "/", "", MS_REC | MS_PRIVATE)
    os.chdir(template)
    mount("proc", "proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    mount("devpts", "dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, f"mode=620,ptmxmode=666,max={_MAX_TERMINALS}")
    size = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_INODES},mode=1777"
    mount("tmpfs", "tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in _outermost(visible):
        if (name := _in_scratch(path)) is not None:
            _show(Path(path), Path("tmp", name))
    bind(str(folder / "workspace"), "workspace")
    mount("none", "workspace", "", MS_REMOUNT | MS_BIND | MS_NOSUID | MS_NODEV)
    for name in ("passwd", "group"):
        bind(str(folder / name), f"etc/{name}")
        mount("none", f"etc/{name}", "", MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    pivot_root_here()


def _outermost(paths: Iterable[str]) -> list[str]:
    """The paths without those that lie inside another of them, shortest first."""
    kept: list[str] = []
    for path in sorted({os.path.normpath(path) for path in paths}, key=len):
        if not any(path == outer or path.startswith(outer + "/") for outer in kept):
            kept.append(path)
    return kept
