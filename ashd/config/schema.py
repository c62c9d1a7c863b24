"""Every setting of ashd: its type, default, environment variable, and what it means.

Covers: the shape of the three configuration files (coordinator, runner, standalone).
Leaves out: reading files and the environment (loader.py), human units (units.py).

A setting's docstring is its documentation: the commented files in conf/ are generated from it.
Types tell the unit a value is written in: `Bytes` ("256MiB"), `Seconds` ("10s", "250ms"), `Path`, and plain
str, int, bool, tuple[str, ...].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NewType

Bytes = NewType("Bytes", int)
Seconds = NewType("Seconds", float)

MIB = 1024 * 1024


def setting(
    default: Any,
    env: str | None = None,
    *,
    secret: bool = False,
    least: float | None = None,
    most: float | None = None,
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field with a default, the environment variable that overrides it, and what it may be.

    `secret` values are never shown. Numbers lie within `least` (None = more than nothing) and `most`; text is one of
    `choices`, if any.
    """
    rules = {"env": env, "secret": secret, "least": least, "most": most, "choices": choices}
    return field(default=default, metadata=rules)


def tcp_port(default: int, env: str | None = None) -> Any:
    """A TCP port."""
    return setting(default, env, least=1, most=65535)


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """How a process writes its log (always to stderr)."""

    level: str = setting("info", "ASH_LOG_LEVEL", choices=("debug", "info", "warning", "error"))
    """Least level written: debug, info, warning or error."""

    format: str = setting("auto", "ASH_LOG_FORMAT", choices=("auto", "json", "console"))
    """`json`, `console`, or `auto`: console on a terminal, JSON elsewhere."""


@dataclass(frozen=True, kw_only=True)
class CoordinatorConfig:
    """Settings of `ashd coordinator`."""

    host: str = setting("127.0.0.1", "ASH_HOST")
    """Address the HTTP API listens on. Beyond loopback an internal_secret is required."""

    port: int = tcp_port(4100, "ASH_PORT")
    """Port of the HTTP API."""

    workers: int = setting(2, "ASH_WORKERS")
    """Worker processes; one per core is a good start."""

    backlog: int = setting(2048)
    """Connections the kernel may hold before a worker accepts them."""

    registry_host: str = setting("")
    """Address the gRPC registry for runners listens on; empty = the same as host."""

    registry_port: int = tcp_port(4101, "ASH_REGISTRY_PORT")
    """Port of the gRPC registry; all workers share it."""

    registry_advertise_host: str = setting("", "ASH_REGISTRY_ADVERTISE_HOST")
    """Host under which runners reach the registry; empty = registry_host, or this host's name when that is 0.0.0.0."""

    registry_socket_dir: Path | None = setting(None)
    """Folder for Unix sockets (one per worker) to serve the registry on instead of a port. Used by `ashd up`."""

    database_url: str = setting("", "ASH_DATABASE_URL", secret=True)
    """Postgres (14 or later) or CockroachDB connection string, e.g. postgresql://ashd@db.example/ashd. Required."""

    database_pool_size: int = setting(8)
    """Connections each worker may open."""

    database_timeout: Seconds = setting(Seconds(5.0))
    """How long a request may wait for the database before it answers 503."""

    migrate_on_start: bool = setting(True)
    """Bring the database's schema up to date at start; false = refuse to start until `ashd migrate` has run."""

    internal_secret: str = setting("", "ASH_INTERNAL_SECRET", secret=True)
    """Secret shared by coordinators and runners; required as soon as either listens beyond loopback."""

    api_key: str = setting("", "ASH_API_KEY", secret=True)
    """A fixed API key of the tenant `default`. With none here and none in the database, the first start mints one."""

    data_dir: Path | None = setting(None, "ASH_DATA_DIR")
    """Where a minted API key is written and uploads are staged; default /var/lib/ashd (root) or ~/.local/share/ashd."""

    agent_roots: tuple[str, ...] = setting(())
    """Folders of this host from which agents may be deployed by `path`; none = never, ["/"] = any."""

    allowed_origins: tuple[str, ...] = setting((), "ALLOWED_ORIGINS")
    """Browser origins allowed by CORS, e.g. ["https://app.example"]; none = no CORS headers."""

    max_json_body: Bytes = setting(Bytes(1 * MIB))
    """Largest JSON request body, messages and uploads apart."""

    max_message_body: Bytes = setting(Bytes(50 * MIB))
    """Largest body of a message."""

    max_upload: Bytes = setting(Bytes(256 * MIB))
    """Largest agent bundle or file upload; streamed to disk, never held in memory."""

    idle_timeout: Seconds = setting(Seconds(1800.0), "ASH_IDLE_TIMEOUT_MS")
    """Time without a turn after which a session may be paused (no effect yet). The variable is in milliseconds."""

    create_timeout: Seconds = setting(Seconds(60.0))
    """A session still `starting` after this becomes `error`."""

    turn_timeout: Seconds = setting(Seconds(3600.0))
    """Longest turn; an agent's own turn_timeout may only be shorter."""

    keep_alive_interval: Seconds = setting(Seconds(15.0))
    """Silence on an SSE stream after which a comment is sent."""

    stall_timeout: Seconds = setting(Seconds(30.0))
    """A client that takes nothing for this long is disconnected; its cursor stays valid."""

    send_buffer: Bytes = setting(Bytes(64 * 1024))
    """Kernel send buffer per client connection; what one slow client may cost."""

    runner_dead_after: Seconds = setting(Seconds(30.0))
    """A runner without a heartbeat for this long is dead."""

    sweep_interval: Seconds = setting(Seconds(30.0))
    """How often each coordinator sweeps for dead runners and overdue states; plus 0-5 s of jitter."""

    graceful_timeout: Seconds = setting(Seconds(30.0), least=0)
    """How long a stopping worker may take to finish what it has open."""

    debug_timing: bool = setting(False, "ASH_DEBUG_TIMING")
    """Write one JSON line of timings per turn to stderr."""

    log: LogConfig = field(default_factory=LogConfig)
    """What is logged, and how."""


@dataclass(frozen=True, kw_only=True)
class SandboxLimits:
    """What one sandbox may use unless its agent or session asks for less."""

    memory: Bytes = setting(Bytes(512 * MIB))
    """Memory of all processes of the sandbox together."""

    processes: int = setting(256)
    """Processes and threads of the sandbox."""

    open_files: int = setting(1024)
    """Open descriptors of each process."""

    file_size: Bytes = setting(Bytes(1024 * MIB))
    """Largest file a process may write."""

    cpu_percent: int = setting(200)
    """Processor time of the sandbox; 100 = one core."""

    disk: Bytes = setting(Bytes(2048 * MIB))
    """Space of the sandbox's workspace."""


@dataclass(frozen=True, kw_only=True)
class JournalConfig:
    """Bounds of what a keeper writes to disk for one sandbox."""

    max_bytes: Bytes = setting(Bytes(256 * MIB))
    """Largest journal of one sandbox. When it is full, old deltas go first; saved events are never dropped."""

    segment_bytes: Bytes = setting(Bytes(4 * MIB))
    """Size at which a journal starts its next file."""

    max_frame: Bytes = setting(Bytes(16 * MIB))
    """Largest single message an agent may emit."""

    max_log_bytes: Bytes = setting(Bytes(4 * MIB))
    """Largest log (stdout and stderr of the agent) kept of one sandbox."""

    max_events_per_s: int = setting(500)
    """Saved events of one sandbox a second, over ten seconds; an agent that makes more has to wait."""


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Settings of `ashd runner`."""

    runner_id: str = setting("", "ASH_RUNNER_ID")
    """Unique name of this runner; empty = runner-<hostname>-<pid> of its first start, kept in state_dir."""

    host: str = setting("127.0.0.1", "ASH_RUNNER_HOST")
    """Address the runner's gRPC service listens on. Beyond loopback an internal_secret is required."""

    port: int = tcp_port(4200, "ASH_RUNNER_PORT")
    """Port of the runner's gRPC service."""

    socket: Path | None = setting(None)
    """Unix socket to serve gRPC on instead of a port. Used by `ashd up`."""

    advertise_host: str = setting("", "ASH_RUNNER_ADVERTISE_HOST")
    """Host under which coordinators reach this runner; empty = host, or this host's name when that is 0.0.0.0."""

    server_url: str = setting("http://127.0.0.1:4100", "ASH_SERVER_URL")
    """Where coordinators are: http(s)://… (asked for the registry's addresses) or grpc://a:4101,b:4101."""

    internal_secret: str = setting("", "ASH_INTERNAL_SECRET", secret=True)
    """Secret shared by coordinators and runners; must match the coordinators'."""

    max_sandboxes: int = setting(1000, "ASH_MAX_SANDBOXES")
    """Most sandboxes at once on this runner."""

    warm_sandboxes: int = setting(2, "ASH_WARM_SANDBOXES", least=0)
    """Sandboxes kept forked and ready for the next session."""

    state_dir: Path | None = setting(None, "ASH_STATE_DIR")
    """Sandboxes, journals, workspaces and the bundle cache; default <ASH_DATA_DIR>/runner."""

    isolation: str = setting("auto", "ASH_ISOLATION", choices=("auto", "strict", "standard", "none"))
    """Isolation of sandboxes; on a host that can't give it the runner does not start. `auto`: strict where possible,
    else standard with a warning. `none` is for agents you trust as yourself. `ashd doctor` shows what a host can."""

    network: str = setting("none", "ASH_NETWORK", choices=("none", "host"))
    """Network of agents that don't say: `none`, or `host`, which is all of this host's, its loopback included. Agents
    of the claude runtime, which can't work without, get `host`."""

    visible: tuple[str, ...] = setting(("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/nix/store"))
    """Folders of this host that sandboxes may read: programs, no data. Add /opt, say, if tools are there and nothing
    else is. The interpreter ashd runs on is always among them."""

    uid_range: str = setting("210000-219999")
    """User ids given to sandboxes, one each, when the runner is privileged."""

    cgroup_parent: str = setting("ashd")
    """cgroup below which each sandbox gets its own, relative to the controllers' roots."""

    limits: SandboxLimits = field(default_factory=SandboxLimits)
    """Default and most of what one sandbox may use."""

    memory_headroom: Bytes = setting(Bytes(512 * MIB), "ASH_MEMORY_HEADROOM", least=0)
    """Memory of the host kept free: no session is admitted while less is available."""

    memory_pressure: int = setting(20, most=100)
    """No session is admitted while tasks of the host waited for memory more than this share of the last 10 s (%)."""

    disk_headroom: Bytes = setting(Bytes(1024 * MIB), "ASH_DISK_HEADROOM", least=0)
    """Space kept free where state_dir is: no session is admitted while less is left."""

    journal: JournalConfig = field(default_factory=JournalConfig)
    """Bounds of a sandbox's journal."""

    heartbeat_interval: Seconds = setting(Seconds(10.0))
    """How often the runner reports to its coordinator."""

    spawn_timeout: Seconds = setting(Seconds(20.0))
    """Longest a sandbox may take from fork to ready."""

    kill_timeout: Seconds = setting(Seconds(5.0))
    """Time between asking a sandbox to end and forcing it."""

    drain_timeout: Seconds = setting(Seconds(30.0), least=0)
    """Time open turns get when the runner is stopped."""

    real_sdk: bool = setting(True, "ASH_REAL_SDK")
    """false (ASH_REAL_SDK=0) puts a mock in place of the model for CLAUDE.md agents."""

    debug_timing: bool = setting(False, "ASH_DEBUG_TIMING")
    """Write JSON lines of timings per sandbox and turn to stderr."""

    log: LogConfig = field(default_factory=LogConfig)
    """What is logged, and how."""


@dataclass(frozen=True, kw_only=True)
class PostgresConfig:
    """The embedded database of `ashd up`."""

    bin_dir: Path | None = setting(None, "ASH_POSTGRES_BIN")
    """Folder with `postgres` and `initdb`; empty = PATH, Debian's folders, then the wheel of the extra `postgres`."""

    uid: int = setting(209999, least=1, most=4294967294)
    """User id the database runs under when ashd is started by root (Postgres refuses to run as root)."""

    start_timeout: Seconds = setting(Seconds(60.0))
    """Longest the database may take to accept connections (recovery after a crash included)."""


@dataclass(frozen=True, kw_only=True)
class StandaloneConfig:
    """Settings of `ashd up`: one database, one coordinator and one runner as its children."""

    mode: str = setting("standalone", "ASH_MODE", choices=("standalone", "coordinator"))
    """`standalone` starts all three; `coordinator` only a coordinator, from its section below."""

    data_dir: Path | None = setting(None, "ASH_DATA_DIR")
    """All state of this installation; default /var/lib/ashd (root) or ~/.local/share/ashd."""

    postgres: PostgresConfig = field(default_factory=PostgresConfig)
    """The embedded database; not started when coordinator.database_url names another one."""

    coordinator: CoordinatorConfig = field(default_factory=CoordinatorConfig)
    """As in coord.yaml. `ashd up` itself sets data_dir, registry_socket_dir, and secret and database unless given."""

    runner: RunnerConfig = field(default_factory=RunnerConfig)
    """As in runner.yaml. `ashd up` itself sets socket, server_url, internal_secret, and state_dir unless given."""
