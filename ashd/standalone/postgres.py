"""The embedded Postgres: one cluster in <data_dir>/postgres, served on a Unix socket there and nowhere else.

Covers: initdb, start, readiness, what an earlier `ashd up` that was killed has left. Leaves out: finding the programs
(binaries.py), starting it again when it dies (keep.py), schema (store/migrations).

As root the server runs under a user id of its own, which owns the folder. Access: whoever can reach the socket is the
database's superuser (`trust`), and only root and that user id can (SECURITY: the folder is 0700). As an ordinary user
the same holds for everything that runs under that user.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pwd
import shutil
import signal
import stat
import time
import urllib.parse
from dataclasses import dataclass
from pathlib import Path

from ashd import log
from ashd.config.schema import PostgresConfig
from ashd.errors import ConfigError
from ashd.standalone import binaries
from ashd.standalone.child import Child
from ashd.standalone.keep import NotBooted, Part

INITDB_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 30.0
_USER = "ashd"
_SOCKET = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH = 107  # unix(7): sun_path holds 108 bytes with the closing zero
_POLL_S = 0.05

# Fast shutdown; immediate shutdown, after which the next start recovers from the log; force.
_ESCALATION = ((signal.SIGINT, STOP_TIMEOUT_S), (signal.SIGQUIT, 5.0), (signal.SIGKILL, 5.0))

# SECURITY: neither the network nor other users of the host reach the server; its log shows no statements and no values.
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_permissions": "0700",
    "port": "5432",
    "cluster_name": "ashd",
    "log_min_messages": "warning",
    "log_min_error_statement": "panic",
    "log_error_verbosity": "terse",
    "log_checkpoints": "off",
    "logging_collector": "off",
    "shared_buffers": "64MB",
}

_log = log.get(__name__)


@dataclass(frozen=True)
class EmbeddedPostgres:
    """The database of one data_dir. `connections`: how many clients it must be ready for."""

    config: PostgresConfig
    data_dir: Path
    connections: int = 100

    @property
    def folder(self) -> Path:
        return self.data_dir / "postgres"

    @property
    def cluster(self) -> Path:
        return self.folder / "data"

    @property
    def url(self) -> str:
        """The connection string (libpq: Connection URIs) for clients on this host."""
        return f"postgresql://{_USER}@/postgres?host={urllib.parse.quote(str(self.folder), safe='/')}&port=5432"

    @property
    def uid(self) -> int | None:
        """Who runs the server; None = this user."""
        return self.config.uid if os.geteuid() == 0 else None

    def part(self) -> Part:
        """How to keep it alive. SIGINT is Postgres' fast shutdown: clients are cut off, the data is checkpointed."""
        return Part(
            name="database",
            spawn=self._spawn,
            is_ready=self._is_ready,
            ready_timeout_s=self.config.start_timeout,
            stop_signal=signal.SIGINT,
            stop_timeout_s=STOP_TIMEOUT_S,
        )

    async def _spawn(self) -> Child:
        """The server's process, on a cluster that exists and belongs to nobody else."""
        self._check_socket_path()
        self._make_folder()
        found = binaries.find(
            self.config.bin_dir, uid=self.uid, copies=self.data_dir / "postgres-bin", major=self._major()
        )
        if not self.cluster.exists():
            await self._initialise(found)
        await self._end_orphan()
        settings = _SETTINGS | {"unix_socket_directories": str(self.folder), "max_connections": str(self.connections)}
        return Child(
            "database",
            [found.postgres, "-D", self.cluster, *(f"--{name}={value}" for name, value in settings.items())],
            death_signal=signal.SIGINT,
            env=_environment(),
            uid=self.uid,
        )

    async def _is_ready(self, child: Child) -> bool:
        """The last line of postmaster.pid is how pg_ctl knows, too (since Postgres 10)."""
        lines = self._pid_file()
        return len(lines) >= 8 and lines[0] == str(child.pid) and lines[7].strip() == "ready"

    def _check_socket_path(self) -> None:
        path = self.folder / _SOCKET
        excess = len(os.fsencode(path)) - _LONGEST_SOCKET_PATH
        if excess > 0:
            raise ConfigError(
                [f"{path} is {excess} bytes too long for a Unix socket. Choose a shorter path by --data-dir."]
            )

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.folder.chmod(0o700)  # an initialisation cut short may have left it open
        if self.uid is not None:
            os.chown(self.folder, self.uid, self.uid)
            self._check_reachable(self.uid)

    def _check_reachable(self, uid: int) -> None:
        """Postgres drops root first and then walks to its folder, so each folder above must let it through."""
        for folder in self.folder.parents:
            status = folder.stat()
            if not (status.st_mode & stat.S_IXOTH or (status.st_uid == uid and status.st_mode & stat.S_IXUSR)):
                raise ConfigError(
                    [
                        f"{folder} (mode {stat.S_IMODE(status.st_mode):04o}) is closed to user id {uid}, under which "
                        "the database runs because Postgres refuses to run as root. Choose a data_dir elsewhere, e.g. "
                        f"--data-dir /var/lib/ashd, or open that folder: chmod o+x {folder}"
                    ]
                )

    def _major(self) -> int | None:
        """The version of the existing data; Postgres reads no other major version's."""
        try:
            return int((self.cluster / "PG_VERSION").read_text(encoding="ascii"))
        except FileNotFoundError:
            return None

    async def _initialise(self, found: binaries.Binaries) -> None:
        """A new cluster, whole or not at all: made beside its place and moved there when it is finished."""
        staging = self.folder / "initialising"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(mode=0o700)
        account = None if self.uid is None else _account_for_initdb(self.uid)
        if account is not None:
            os.chown(staging, account, account)
            self.folder.chmod(0o711)  # for `account` to walk through while initdb runs
        child = Child(
            "initdb",
            [found.initdb, "-D", staging / "data", "-U", _USER, "--auth=trust", "--encoding=UTF8", "--no-locale"],
            death_signal=signal.SIGKILL,
            env=_environment(),
            uid=account,
            quiet=True,
        )
        code = await child.finish(timeout_s=INITDB_TIMEOUT_S)
        if code != 0:
            raise NotBooted("\n".join([f"initdb failed ({code}):", *(f"  {line}" for line in child.last_lines())]))
        if self.uid is not None:
            _give_tree(staging, self.uid)
            self.folder.chmod(0o700)
        (staging / "data").rename(self.cluster)
        staging.rmdir()
        _log.info("database created", folder=str(self.cluster), version=found.major)

    async def _end_orphan(self) -> None:
        """End a server that an `ashd up` killed a moment ago has left on our data, and correct a lock file that lies.

        RACE: nobody else starts a server here, because `ashd up` holds the lock of data_dir.
        """
        lines = self._pid_file()
        if not lines or not lines[0].strip().isdigit():
            return
        pid = int(lines[0])
        if not self._is_our_server(pid):
            self._disown_lock_file(lines)
            return
        _log.warning("ending the database of an earlier run", child=pid)
        for number, timeout_s in _ESCALATION:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            if await self._has_ended(pid, timeout_s):
                return
        raise NotBooted(f"The database of an earlier run (process {pid}) can't be ended.")

    def _disown_lock_file(self, lines: list[str]) -> None:
        """Name ourselves in postmaster.pid instead of a process that is gone, or is somebody else's by now.

        Postgres would refuse to start for the sake of any live process of that id, but never minds its own parent
        (CreateLockFile). RACE: the file must stay, because it also names the shared memory by which the next server
        sees that backends of the last one still live.
        """
        # SECURITY: the folder is another user id's; a link there must not lead root to another file.
        handle = os.open(self.cluster / "postmaster.pid", os.O_WRONLY | os.O_TRUNC | os.O_NOFOLLOW)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write("\n".join([str(os.getpid()), *lines[1:]]) + "\n")

    async def _has_ended(self, pid: int, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._is_our_server(pid):
            if time.monotonic() > deadline:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _is_our_server(self, pid: int) -> bool:
        """Whether `pid` is alive and was started as the server of our cluster.

        SECURITY: judged by the command line, which every user may read; /proc/<pid>/cwd and exe of another user id are
        closed even to root in a container without CAP_SYS_PTRACE. What can't be read counts as ours.
        """
        try:
            arguments = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        except (FileNotFoundError, ProcessLookupError):
            return False
        except OSError:
            return True
        return os.fsencode(self.cluster) in arguments and b"postgres" in arguments[0]

    def _pid_file(self) -> list[str]:
        try:
            return (self.cluster / "postmaster.pid").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []


def _environment() -> dict[str, str]:
    """Nothing of ours: PG* variables and locales of the caller must not change what the server does."""
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}


def _account_for_initdb(uid: int) -> int:
    """A user id under which initdb works: it insists that its user has a name, though the server itself does not.

    SECURITY: when `uid` has none, `nobody` lends its own while a new, still empty cluster is made; the result is then
    given to `uid`. No account is added to the host.
    """
    for candidate in (uid, 65534):
        try:
            return pwd.getpwuid(candidate).pw_uid
        except KeyError:
            continue
    raise ConfigError(
        [
            f"Neither user id {uid} (postgres.uid) nor 65534 (nobody) has a name on this host, and initdb needs one. "
            "Set postgres.uid to an account that is in /etc/passwd."
        ]
    )


def _give_tree(top: Path, uid: int) -> None:
    """Make `uid` the owner of everything below. ORDER: the top first, which shuts the former owner out."""
    os.chown(top, uid, uid)
    for folder, folders, files in os.walk(top):
        for name in (*folders, *files):
            os.chown(Path(folder) / name, uid, uid, follow_symlinks=False)
