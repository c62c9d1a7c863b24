"""The embedded Postgres, for real: first start, second start, and everything a kill may leave."""

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psycopg
import pytest

from ashd.config.schema import PostgresConfig
from ashd.errors import ConfigError
from ashd.standalone import binaries
from ashd.standalone.keep import NotBooted, kept
from ashd.standalone.postgres import EmbeddedPostgres

DEADLINE_S = 30.0

LAUNCHER = """
import asyncio, sys
from pathlib import Path
from ashd.config.schema import PostgresConfig
from ashd.standalone.keep import kept
from ashd.standalone.postgres import EmbeddedPostgres

async def main():
    async with kept(EmbeddedPostgres(PostgresConfig(), Path(sys.argv[1])).part()):
        print("ready", flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder that another user id may walk to (pytest's own is 0700), with nothing left running in it at the end."""
    folder = Path(tempfile.mkdtemp(prefix="ashd-"))
    folder.chmod(0o711)
    yield folder
    assert servers(folder) == []
    shutil.rmtree(folder)


def servers(data_dir: Path) -> list[int]:
    """Live processes that were started on this data_dir."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.fsencode(data_dir / "postgres") in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def use(database: EmbeddedPostgres, *statements: str) -> list[tuple[object, ...]]:
    """Start it, run the statements, stop it; the rows of the last one."""

    async def scenario() -> list[tuple[object, ...]]:
        async with asyncio.timeout(DEADLINE_S), kept(database.part()):
            return query(database, *statements)

    return asyncio.run(scenario())


def query(database: EmbeddedPostgres, *statements: str) -> list[tuple[object, ...]]:
    with psycopg.connect(database.url, autocommit=True) as connection:
        for statement in statements[:-1]:
            connection.execute(statement)
        return connection.execute(statements[-1]).fetchall()


def launch(data_dir: Path) -> subprocess.Popen[str]:
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, str(data_dir)], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    assert launcher.stdout.readline() == "ready\n"
    return launcher


def test_a_second_start_finds_the_data_of_the_first(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    use(database, "CREATE TABLE kept (value text)", "INSERT INTO kept VALUES ('yes') RETURNING value")
    assert use(database, "SELECT value FROM kept") == [("yes",)]


def test_it_listens_on_its_socket_only_and_the_socket_is_private(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    assert use(database, "SHOW listen_addresses") == [("",)]
    assert database.folder.stat().st_mode & 0o777 == 0o700


def test_it_serves_utf8_whatever_the_locale_of_the_caller(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LC_ALL", "de_DE.ISO-8859-1")
    monkeypatch.setenv("PGPORT", "1")
    assert use(EmbeddedPostgres(PostgresConfig(), data_dir), "SHOW server_encoding") == [("UTF8",)]


def test_a_killed_launcher_takes_its_server_along(data_dir: Path) -> None:
    launcher = launch(data_dir)
    assert servers(data_dir)
    launcher.kill()
    launcher.communicate(timeout=DEADLINE_S)
    wait_until(lambda: servers(data_dir) == [])


def test_the_next_start_right_after_a_kill_comes_up_with_the_data(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    launcher = launch(data_dir)
    query(database, "CREATE TABLE kept (value text)", "INSERT INTO kept VALUES ('yes') RETURNING value")
    launcher.kill()
    launcher.communicate(timeout=DEADLINE_S)
    assert use(database, "SELECT value FROM kept") == [("yes",)]


def test_a_server_that_outlived_its_launcher_is_ended_first(data_dir: Path) -> None:
    """The death signal is lost when the server is started by hand; the orphan is then ended by the next start."""
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    use(database, "SELECT 1")
    found = binaries.find(None, uid=database.uid, copies=data_dir / "copies", major=None)
    arguments = [
        found.postgres,
        "-D",
        database.cluster,
        "-c",
        "listen_addresses=",
        "-c",
        f"unix_socket_directories={database.folder}",
    ]
    orphan = subprocess.Popen(
        arguments, user=database.uid, group=database.uid, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    wait_until(lambda: (database.folder / ".s.PGSQL.5432").exists())
    assert use(database, "SELECT 1") == [(1,)]
    assert orphan.wait(DEADLINE_S) == 0


def test_a_lock_file_that_names_a_stranger_does_not_stop_it(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    use(database, "SELECT 1")
    stranger = subprocess.Popen(["sleep", "60"], user=database.uid)
    try:
        lock = database.cluster / "postmaster.pid"
        lock.write_text(f"{stranger.pid}\n{database.cluster}\n1\n5432\n\n\n\nready\n")
        assert use(database, "SELECT 1") == [(1,)]
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_backends_that_outlived_their_server_keep_the_next_one_away_until_they_are_gone(data_dir: Path) -> None:
    """Two servers on one cluster would corrupt it; the next start may take a few attempts, but not the data."""
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    launcher = launch(data_dir)
    server = next(pid for pid in servers(data_dir) if database._pid_file()[0] == str(pid))
    connection = psycopg.connect(database.url)
    (backend,) = connection.execute("SELECT pg_backend_pid()").fetchone() or (0,)
    os.kill(backend, signal.SIGSTOP)
    os.kill(server, signal.SIGKILL)
    launcher.kill()
    launcher.communicate(timeout=DEADLINE_S)
    with pytest.RaisesGroup(pytest.RaisesExc(NotBooted, match="shared memory")):
        use(database, "SELECT 1")
    os.kill(backend, signal.SIGKILL)
    connection.close()
    wait_until(lambda: servers(data_dir) == [])
    assert use(database, "SELECT 1") == [(1,)]


def test_a_server_that_dies_is_started_again(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    launcher = launch(data_dir)
    first = servers(data_dir)[0]
    os.kill(first, signal.SIGKILL)
    wait_until(lambda: any(pid != first and database._pid_file()[:1] == [str(pid)] for pid in servers(data_dir)))
    wait_until(lambda: database._pid_file()[7:8] == ["ready   "])
    assert query(database, "SELECT 1") == [(1,)]
    launcher.kill()
    launcher.communicate(timeout=DEADLINE_S)
    wait_until(lambda: servers(data_dir) == [])


def test_an_initialisation_cut_short_is_begun_anew(data_dir: Path) -> None:
    database = EmbeddedPostgres(PostgresConfig(), data_dir)
    (database.folder / "initialising" / "data").mkdir(parents=True)
    (database.folder / "initialising" / "data" / "PG_VERSION").write_text("half")
    assert use(database, "SELECT 1") == [(1,)]
    assert not (database.folder / "initialising").exists()


def test_data_of_another_version_names_the_version_to_install(data_dir: Path) -> None:
    (data_dir / "postgres" / "data").mkdir(parents=True)
    (data_dir / "postgres" / "data" / "PG_VERSION").write_text("9\n")
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="Postgres 9 binaries")):
        use(EmbeddedPostgres(PostgresConfig(), data_dir), "SELECT 1")


def test_a_path_too_long_for_a_socket_says_so(data_dir: Path) -> None:
    deep = data_dir / ("x" * 100)
    deep.mkdir()
    with pytest.RaisesGroup(pytest.RaisesExc(ConfigError, match="bytes too long for a Unix socket")):
        use(EmbeddedPostgres(PostgresConfig(), deep), "SELECT 1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs the server under another user id")
def test_as_root_a_folder_closed_to_the_servers_user_id_is_named(data_dir: Path) -> None:
    closed = data_dir / "closed"
    closed.mkdir(mode=0o700)
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, match=rf"{closed} \(mode 0700\) is closed to user id 209999")
    ):
        use(EmbeddedPostgres(PostgresConfig(), closed), "SELECT 1")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can meet binaries that the server's user id can't read")
def test_as_root_binaries_the_servers_user_id_cannot_reach_are_copied(data_dir: Path) -> None:
    hidden = data_dir / "hidden"
    hidden.mkdir(mode=0o700)
    (hidden / "bin").mkdir()
    (hidden / "lib").mkdir()
    (hidden / "share").mkdir()
    for program in ("postgres", "initdb"):
        (hidden / "bin" / program).write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 18.4'\n")
        (hidden / "bin" / program).chmod(0o700)
    found = binaries.find(hidden / "bin", uid=209999, copies=data_dir / "copies", major=None)
    assert (found.folder, found.major) == (data_dir / "copies" / "hidden" / "bin", 18)
