"""Attacks over sockets: loopback services of the host, sockets by path and by abstract name, raw ones, odd families,
and what System V and POSIX share between processes.

Sources: unix(7), packet(7), netlink(7), network_namespaces(7), sysvipc(7), mq_overview(7).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import socket
import struct
from pathlib import Path

from .weapons import Facts, call, each, libc, refused_with, syscall

TIMEOUT_S = 0.5


def _reach(address: tuple[str, int]) -> str:
    with socket.create_connection(address, timeout=TIMEOUT_S) as reached:
        return f"connected to {reached.getpeername()}"


def _everywhere(facts: Facts, port: int) -> str:
    """By every address this host has."""
    refusals = (errno.ETIMEDOUT, errno.EADDRNOTAVAIL)
    return each(_reach_patiently, [(host, port) for host in facts.host.addresses], *refusals)


def _reach_patiently(address: tuple[str, int]) -> str:
    try:
        return _reach(address)
    except TimeoutError:
        return ""


def reach_the_coordinator(facts: Facts) -> str:
    return _everywhere(facts, facts.coordinator.port)


def reach_the_registry(facts: Facts) -> str:
    return _everywhere(facts, facts.coordinator.registry_port)


def reach_the_runners_grpc(facts: Facts) -> str:
    return _everywhere(facts, facts.runner.port)


def reach_a_service_of_the_neighbours(facts: Facts) -> str:
    return _everywhere(facts, facts.neighbour.port)


def reach_a_service_of_the_hosts(facts: Facts) -> str:
    return _everywhere(facts, facts.host.port)


def reach_the_world(facts: Facts) -> str:
    """No packet is sent: a route is enough to be found out. 192.0.2.0/24 and 2001:db8::/32 are nobody's."""

    def route(family: socket.AddressFamily, address: str) -> str:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return f"from {probe.getsockname()}"

    targets = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "169.254.169.254"), (socket.AF_INET6, "2001:db8::1")]
    return each(lambda target: route(*target), targets, errno.EADDRNOTAVAIL, errno.EINVAL)


def reach_the_hosts_neighbourhood(facts: Facts) -> str:
    """Broadcast and multicast need an interface that has them."""

    def send(address: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sender.connect((address, 9))
            return "has a route"

    return each(send, ["255.255.255.255", "224.0.0.251"], errno.EADDRNOTAVAIL)


def see_interfaces_of_the_host(facts: Facts) -> str:
    names = [name for _, name in socket.if_nameindex() if name != "lo"]
    names += [name for name in os.listdir("/sys/class/net") if name != "lo"] if os.path.isdir("/sys/class/net") else []
    return " ".join(names)


def see_connections_of_the_host(facts: Facts) -> str:
    ports = {f":{port:04X}" for port in (facts.coordinator.port, facts.runner.port, facts.host.port)}
    tables = "".join(Path(f"/proc/net/{name}").read_text() for name in ("tcp", "udp") if Path("/proc/net").is_dir())
    return " ".join(port for port in ports if port in tables)


def see_unix_sockets_of_the_host(facts: Facts) -> str:
    lines = Path("/proc/net/unix").read_text().splitlines()[1:]
    named = [line.split()[7] for line in lines if len(line.split()) > 7]
    return " ".join(named[:20])


# ---------------------------------------------------------------- sockets by name


def _knock(address: str) -> str:
    kinds = (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET)

    def knock(kind: socket.SocketKind) -> str:
        with socket.socket(socket.AF_UNIX, kind) as caller:
            caller.settimeout(TIMEOUT_S)
            caller.connect(address)
            return f"connected as {kind.name}"

    return each(knock, kinds, errno.EPROTOTYPE)


def _by_every_path(facts: Facts, path: str) -> str:
    """A socket's path may have 107 bytes; a long one is reached from its folder."""
    if len(path) <= 107:
        return _knock(path)
    folder = os.open(os.path.dirname(path), os.O_PATH)
    return _knock(f"/proc/self/fd/{folder}/{os.path.basename(path)}")


def reach_the_database(facts: Facts) -> str:
    return each(lambda path: _by_every_path(facts, path), facts.database.sockets)


def reach_the_neighbours_keeper(facts: Facts) -> str:
    return each(lambda path: _by_every_path(facts, path), [f"{facts.neighbour.folder}/keeper.sock"])


def reach_its_own_keeper(facts: Facts) -> str:
    """The supervisor's conversation with it: who may speak there ends turns and sessions."""
    paths = [
        f"{facts.own.folder}/keeper.sock",
        "../keeper.sock",
        "/workspace/../keeper.sock",
        "/proc/1/cwd/../keeper.sock",
    ]
    return each(lambda path: _by_every_path(facts, path), paths)


def reach_sockets_of_the_runner(facts: Facts) -> str:
    paths = [*facts.runner.sockets, *glob.glob(f"{facts.runner.state_dir}/**/*.sock", recursive=True)]
    return each(lambda path: _by_every_path(facts, path), paths)


def reach_sockets_of_the_host(facts: Facts) -> str:
    paths = [
        "/run/docker.sock",
        "/var/run/docker.sock",
        "/run/dbus/system_bus_socket",
        "/run/systemd/private",
        "/dev/log",
    ]
    return each(_knock, [*paths, "/run/containerd/containerd.sock", "/run/systemd/journal/socket", facts.host.socket])


def reach_abstract_sockets_of_the_neighbour(facts: Facts) -> str:
    return each(_knock, [f"\0{facts.neighbour.abstract}"])


def reach_abstract_sockets_of_the_host(facts: Facts) -> str:
    return each(_knock, [f"\0{facts.host.abstract}"])


# ---------------------------------------------------------------- raw and odd


def open_raw_sockets(facts: Facts) -> str:
    kinds = [
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP),
        (socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW),
        (socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_ICMPV6),
        (socket.AF_PACKET, socket.SOCK_RAW, 0x0300),
        (socket.AF_PACKET, socket.SOCK_DGRAM, 0x0300),
    ]

    def open_(kind: tuple[int, int, int]) -> str:
        socket.socket(*kind).close()
        return "opened"

    return each(open_, kinds, errno.ESOCKTNOSUPPORT)


def open_sockets_of_odd_families(facts: Facts) -> str:
    """AF_VSOCK, AF_ALG, AF_TIPC, AF_RDS, AF_CAN, AF_XDP …: none an agent needs, and many with a history."""
    usual = {socket.AF_UNSPEC, socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK}
    gained = []
    for family in sorted(set(range(46)) - usual):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_RAW, socket.SOCK_SEQPACKET):
            try:
                socket.socket(family, kind).close()
            except OSError:
                continue
            gained.append(str(family))
            break
    return " ".join(gained)


def change_the_network(facts: Facts) -> str:
    def set_flags(name: str) -> str:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
            request = fcntl.ioctl(handle, 0x8913, struct.pack("16sh22x", name.encode(), 0))  # SIOCGIFFLAGS
            fcntl.ioctl(handle, 0x8914, request)  # SIOCSIFFLAGS, as they are
            return "set flags"

    def add_link(name: str) -> str:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0) as route:
            body = struct.pack("BxHiII", 0, 0, 0, 0, 0)
            kind = struct.pack("HH8s", 12, 3, b"dummy9\0\0") + struct.pack("HHHH8s", 16, 18, 12, 1, b"dummy\0\0\0")
            route.send(struct.pack("IHHII", 16 + len(body + kind), 16, 0x605, 1, 0) + body + kind)
            (number,) = struct.unpack("i", route.recv(4096)[16:20])
            if number:
                raise OSError(-number, os.strerror(-number))
            return "added"

    return each(set_flags, ["lo"]) + each(add_link, ["a link"], errno.EOPNOTSUPP)


def listen_to_the_kernel(facts: Facts) -> str:
    """Audit and events of devices over netlink."""

    def listen(protocol: int) -> str:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as heard:
            heard.bind((0, 1))
            return "listens"

    return each(listen, [9, 4], errno.EPROTONOSUPPORT)


def open_a_tunnel(facts: Facts) -> str:
    tunnel = os.open("/dev/net/tun", os.O_RDWR)
    call("ioctl", tunnel, 0x400454CA, struct.pack("16sH22x", b"hostile0", 0x1001))
    return "has an interface"


# ---------------------------------------------------------------- System V and POSIX


def attach_the_neighbours_shared_memory(facts: Facts) -> str:
    libc.shmat.restype = ctypes.c_void_p
    number = call("shmget", facts.neighbour.key, 0, 0)
    at = libc.shmat(number, None, 0)
    return f"reads {ctypes.string_at(at, 64)!r}"


def see_ipc_objects_of_others(facts: Facts) -> str:
    tables = {name: Path(f"/proc/sysvipc/{name}").read_text() for name in ("shm", "msg", "sem")}
    return " ".join(name for name, table in tables.items() if str(facts.neighbour.key) in table.split())


def use_the_neighbours_queues_and_semaphores(facts: Facts) -> str:
    return each(
        lambda what: f"number {call(what[0], *what[1:])}",
        [
            ("msgget", facts.neighbour.key, 0),
            ("semget", facts.neighbour.key, 0, 0),
        ],
    )


def open_the_neighbours_message_queue(facts: Facts) -> str:
    return f"queue {syscall('mq_open', facts.neighbour.queue, os.O_RDWR, 0, None)}"


@refused_with(errno.EMFILE)
def leave_ipc_objects_behind(facts: Facts) -> str:
    """They would outlive every process; the scene looks at the host's tables."""
    call("shmget", facts.host.key, 4096, 0o1666)
    call("msgget", facts.host.key, 0o1666)
    call("semget", facts.host.key, 1, 0o1666)
    syscall("mq_open", facts.mark, os.O_RDWR | os.O_CREAT, 0o666, None)
    return ""


def listen_where_the_host_listens(facts: Facts) -> str:
    """A server on the host's loopback could take a port that the runner is about to use."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        table = Path("/proc/net/tcp").read_text().splitlines()[1:]
        return f"beside {len(table) - 1} others" if len(table) > 1 else ""
