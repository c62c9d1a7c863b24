"""The first minutes of the guest: an archive of busybox, kernel modules, a little /etc, the plan, and /init.

Covers: which modules are needed and in which order, the text of /init, the archive. Leaves out: what process 1 does
once the root is in place (guest.py).
Sources: Documentation/driver-api/early-userspace/buffer-format.rst (cpio newc), switch_root(8), modinfo(8),
Documentation/filesystems/9p.rst.
"""

from __future__ import annotations

import gzip
import json
import lzma
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = (
    "virtio_pci", "virtio_blk", "9pnet_virtio", "9p", "overlay", "crc32c_generic", "ext4", "quota_v2", "xfs", "loop",
    "fuse",
)  # fmt: skip
CHECKOUT = "/ashd"
SCRATCH = "/scratch"
USER = 1000
# Of the host's /etc only what programs of /usr can't do without, and nothing that tells who uses the host.
ETC = ("alternatives", "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "mime.types", "os-release", "protocols", "services")
ETC_WRITTEN = {
    "passwd": f"root:x:0:0:root:/root:/bin/sh\ntester:x:{USER}:{USER}::/home/tester:/bin/sh\n"
    "nobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n",
    "group": f"root:x:0:\ntty:x:5:\ntester:x:{USER}:\nnogroup:x:65534:\n",
    "hosts": "127.0.0.1 localhost\n::1 localhost\n",
    "hostname": "ashd-vm\n",
    "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    "machine-id": "00000000000000000000000000000001\n",
}


@dataclass(frozen=True)
class Share:
    """A folder of the host that the guest sees read-only, at `path`."""

    tag: str
    folder: Path
    path: str


@dataclass(frozen=True)
class Entry:
    """One member of the archive."""

    mode: int
    content: bytes = b""


def file(content: bytes | str, *, executable: bool = False) -> Entry:
    return Entry(
        stat.S_IFREG | (0o755 if executable else 0o644), content.encode() if isinstance(content, str) else content
    )


def folder() -> Entry:
    return Entry(stat.S_IFDIR | 0o755)


def link(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def cpio(entries: Mapping[str, Entry]) -> bytes:
    """An archive in the format `newc`; folders on the way to an entry are added."""
    every: dict[str, Entry] = {}
    for path, entry in entries.items():
        for parent in reversed(Path(path).parents[:-1]):
            every.setdefault(str(parent), folder())
        every[path] = entry
    packed = bytearray()
    for number, (path, entry) in enumerate([*every.items(), ("TRAILER!!!", Entry(0))], start=1):
        name = path.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        fields = (number, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, 0, 0, len(name), 0)
        packed += b"070701" + b"".join(b"%08X" % value for value in fields) + name
        packed += b"\0" * (-len(packed) % 4) + entry.content
        packed += b"\0" * (-len(packed) % 4)
    return bytes(packed)


# ---------------------------------------------------------------- modules


def needed_modules(modules: Path, wanted: Sequence[str] = MODULES) -> list[tuple[str, bytes]]:
    """Names and contents of the wanted modules and all they depend on, each after what it needs; without those that
    are built into this kernel or that it doesn't have.
    """
    files = {module_name(path): path for path in modules.glob("kernel/**/*.ko*")}
    found: dict[str, bytes] = {}

    def add(name: str) -> None:
        if name in files and name not in found:
            content = _module_content(files[name])
            for dependency in dependencies(content):
                add(dependency)
            found[name] = content

    for name in wanted:
        add(name)
    return list(found.items())


def module_name(path: Path) -> str:
    return path.name.partition(".ko")[0].replace("-", "_")


def dependencies(content: bytes) -> list[str]:
    """What a module says it needs, in its section .modinfo."""
    said = re.search(rb"\0depends=([\w,-]*)\0", content)
    return [name.replace("-", "_") for name in said[1].decode().split(",") if name] if said else []


def _module_content(path: Path) -> bytes:
    content = path.read_bytes()
    return lzma.decompress(content) if path.suffix == ".xz" else content


# ---------------------------------------------------------------- /init


def init_text(modules: Iterable[str], shares: Sequence[Share], command: Sequence[str]) -> str:
    """The shell script that builds the guest's root and hands it to `command`; the first share is /usr."""
    insert = "\n".join(f"insmod /modules/{name}.ko || say 'module {name} was not taken'" for name in modules)
    programs, others = _share_text(shares[0]), "\n".join(_share_text(share) for share in shares[1:])
    return f"""#!/bin/busybox sh
# Written by tests/vm/initramfs.py.
/bin/busybox mkdir -p /proc /sys /dev /new
/bin/busybox --install -s /bin
export PATH=/bin
say() {{ echo "init: $*"; }}
fail() {{ say "FAILED: $*"; sleep 1; poweroff -f; }}
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
{insert}

# ORDER: pivot_root(2), which jails need, refuses the kernel's first root; so the guest's root is a tmpfs over it.
mount -t tmpfs -o mode=755,size=128M root /new || fail "no root"
cd /new
mkdir -p dev etc home/tester proc root run sys tmp usr var/tmp var/lib mnt opt srv {SCRATCH[1:]} {CHECKOUT[1:]}
for name in bin sbin lib lib64; do ln -s usr/$name $name; done
cp -a /etc/. etc/
cp /plan.json plan.json
chown {USER}:{USER} home/tester

share() {{
  mkdir -p "/new$2"
  mount -t 9p -o ro,trans=virtio,version=9p2000.L,cache=loose,msize=512000 "$1" "/new$2" || fail "no $2"
}}
{programs}

# Everything that tests write lies on a disk of the machine's own, with quotas for projects.
[ -b /dev/vda ] || fail "no disk"
mount -t devtmpfs devtmpfs /new/dev
chroot /new /usr/sbin/mke2fs -q -F -t ext4 -O quota,project -E quotatype=prjquota /dev/vda || fail "no filesystem"
mount -t ext4 -o prjquota /dev/vda /new{SCRATCH} || mount -t ext4 /dev/vda /new{SCRATCH} || fail "no disk mounted"
mkdir -p /new{SCRATCH}/tmp /new{SCRATCH}/upper /new{SCRATCH}/work
chmod 1777 /new{SCRATCH}/tmp
mount --bind /new{SCRATCH}/tmp /new/tmp
mount --bind /new{SCRATCH}/tmp /new/var/tmp
# ORDER: after /tmp, below which a virtual environment may lie.
{others}
mount -t overlay -o lowerdir=/new/mnt/checkout,upperdir=/new{SCRATCH}/upper,workdir=/new{SCRATCH}/work checkout \\
  /new{CHECKOUT} || fail "no checkout"

mount -t proc -o nosuid,nodev,noexec proc /new/proc
mount -t sysfs -o nosuid,nodev,noexec sysfs /new/sys
# As systemd mounts it.
mount -t cgroup2 -o nosuid,nodev,noexec,nsdelegate,memory_recursiveprot cgroup2 /new/sys/fs/cgroup || fail "no cgroup2"
mkdir -p /new/dev/pts /new/dev/shm /new/dev/mqueue
mount -t devpts -o gid=5,mode=620,ptmxmode=666 devpts /new/dev/pts
mount -t tmpfs -o nosuid,nodev,mode=1777 shm /new/dev/shm
mount -t mqueue mqueue /new/dev/mqueue
mount -t tmpfs -o nosuid,nodev,mode=755 run /new/run
ln -sf /proc/self/fd /new/dev/fd
ln -sf pts/ptmx /new/dev/ptmx
hostname ashd-vm
ip link set lo up
stty -F /dev/ttyS1 raw -echo
umount /proc /sys
exec switch_root /new {" ".join(command)}
"""


def _share_text(share: Share) -> str:
    return f"share {share.tag} {share.path}"


def build(
    target: Path, busybox: Path, modules: Sequence[tuple[str, bytes]], shares: Sequence[Share], plan: Mapping[str, Any]
) -> None:
    """Writes the archive. `plan` is what guest.py does; its `python` runs it."""
    command = [str(plan["python"]), "-u", f"{CHECKOUT}/tests/vm/guest.py"]
    entries = {
        "init": file(init_text([name for name, _ in modules], shares, command), executable=True),
        "bin/busybox": file(busybox.read_bytes(), executable=True),
        "plan.json": file(json.dumps(plan)),
        **{f"modules/{name}.ko": file(content) for name, content in modules},
        **dict(_etc(Path("/etc"))),
        **{f"etc/{name}": file(content) for name, content in ETC_WRITTEN.items()},
    }
    target.write_bytes(gzip.compress(cpio(entries), compresslevel=1))


def _etc(root: Path) -> Iterable[tuple[str, Entry]]:
    for name in ETC:
        top = root / name
        for path in (top, *sorted(top.rglob("*"))) if top.is_dir() else (top,):
            place = f"etc/{path.relative_to(root)}"
            if path.is_symlink():
                yield place, link(str(path.readlink()))
            elif path.is_file():
                yield place, file(path.read_bytes())
