"""What the machine is made of: qemu of this host, and Debian's kernel and a static busybox, fetched and unpacked
but not installed.

Leaves out: which of the kernel's modules are used (initramfs.py).
Sources: apt-get(8), apt-cache(8), dpkg-deb(1).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

QEMU = "qemu-system-x86_64"
QEMU_PACKAGE = "qemu-system-x86"
KERNEL_PACKAGE = "linux-image-amd64"  # not the cloud kernel: that one has no 9p
BUSYBOX_PACKAGE = "busybox-static"
APT_TIMEOUT_S = 300.0
AS_ROOT = ("-o", "APT::Sandbox::User=root")  # else apt, run by root, warns that its own user can't write to the cache


class Lacking(Exception):
    """The machine can't be made; says what is missing and what to do."""


@dataclass(frozen=True)
class Parts:
    """Where the unpacked parts lie."""

    kernel: Path
    modules: Path  # lib/modules/RELEASE
    busybox: Path

    @property
    def release(self) -> str:
        return self.modules.name


def cache_folder() -> Path:
    """~/.cache/ashd-vm, or where XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ashd-vm"


def qemu_install_command() -> list[str]:
    return ["apt-get", "install", "-y", "--no-install-recommends", QEMU_PACKAGE]


def demand_qemu(*, install: bool) -> None:
    """Raises Lacking where qemu, setpriv or mke2fs isn't there; installs qemu if told to."""
    if install and shutil.which(QEMU) is None:
        _run(qemu_install_command(), {**os.environ, "DEBIAN_FRONTEND": "noninteractive"})
    if shutil.which(QEMU) is None:
        raise Lacking(
            f"{QEMU} is not installed. Run `{' '.join(qemu_install_command())}` as root, or this command with --install"
        )
    for name, package in (("setpriv", "util-linux"), ("mke2fs", "e2fsprogs")):
        if shutil.which(name, path="/usr/sbin:/usr/bin") is None:
            raise Lacking(f"{name} is not in /usr/bin or /usr/sbin: apt-get install {package}")


def parts(cache: Path) -> Parts:
    """Kernel, modules and busybox below `cache`; fetched when they are not there yet. Raises Lacking."""
    kernel = _unpacked(cache, "linux-image") or _fetch(
        cache, newest_kernel(_output(["apt-cache", "depends", KERNEL_PACKAGE]))
    )
    busybox = _unpacked(cache, BUSYBOX_PACKAGE) or _fetch(cache, BUSYBOX_PACKAGE)
    images = sorted(kernel.glob("boot/vmlinuz-*"))
    modules = sorted((*kernel.glob("lib/modules/*"), *kernel.glob("usr/lib/modules/*")))
    if not images or not modules:
        raise Lacking(f"{kernel} holds no kernel with modules: remove the folder and run this again")
    return Parts(images[0], modules[0], busybox / "bin/busybox")


def newest_kernel(depends: str) -> str:
    """The package with the kernel that the metapackage stands for, from what `apt-cache depends` prints."""
    found = re.search(r"Depends: (linux-image-\S+)", depends)
    if found is None:
        raise Lacking(f"apt knows no {KERNEL_PACKAGE}: this needs Debian's archive for amd64 (try apt-get update)")
    return found[1]


def _unpacked(cache: Path, prefix: str) -> Path | None:
    """The newest unpacked package of that name in the cache."""
    return max(cache.glob(f"{prefix}*.unpacked"), default=None, key=lambda folder: folder.stat().st_mtime)


def _fetch(cache: Path, package: str) -> Path:
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as made:
        folder = Path(made)
        print(f"fetching {package} with apt-get download (not installed; kept in {cache})", flush=True)
        _run(["apt-get", "download", "-q", *AS_ROOT, package], cwd=folder)
        archive = next(folder.glob("*.deb"))
        _run(["dpkg-deb", "-x", str(archive), str(folder / "content")])
        target = cache / f"{archive.stem}.unpacked"
        if not target.exists():  # else another run was faster
            (folder / "content").rename(target)
    return target


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=APT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise Lacking(f"`{' '.join(command)}` failed: {error}; the machine is made of Debian's packages") from error
    return done.stdout


def _run(command: list[str], env: dict[str, str] | None = None, cwd: Path | None = None) -> None:
    try:
        subprocess.run(command, check=True, env=env, cwd=cwd, timeout=APT_TIMEOUT_S, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        raise Lacking(f"`{' '.join(command)}` failed: {error}") from error
