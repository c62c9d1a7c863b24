"""`ashd up`: one database, one coordinator and one runner on this machine, kept alive as children of this process.

Covers: their folders, secret and configuration files; the order of their start and end; the first words to the user.
Leaves out: keeping a child alive (keep.py), the database (postgres.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shlex
import shutil
import signal
import socket
import sys
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import setproctitle
import yaml

from ashd import __version__, log
from ashd.config import loader
from ashd.config.data_dir import API_KEY_FILE, INTERNAL_SECRET_FILE, default_data_dir
from ashd.config.schema import CoordinatorConfig, RunnerConfig, StandaloneConfig
from ashd.errors import AshdError, ConfigError
from ashd.http_client import DEFAULT_SERVER
from ashd.standalone.child import Child
from ashd.standalone.keep import POLL_S, Part, kept
from ashd.standalone.postgres import EmbeddedPostgres

EXAMPLE_AGENT = "shell-agent"
READY_TIMEOUT_S = 60.0
DEPLOY_TIMEOUT_S = 60.0
PROBE_TIMEOUT_S = 1.0
STOP_MARGIN_S = 5.0
_SPARE_CONNECTIONS = 20

_log = log.get(__name__)


def up(config: StandaloneConfig) -> bool:
    """Run until SIGTERM or ctrl-c; False when a part could not be started. Raises ConfigError before anything runs."""
    log.setup(config.coordinator.log)
    setproctitle.setproctitle("ashd: up")
    data_dir = (config.data_dir or default_data_dir(os.environ)).resolve()
    with locked(data_dir):
        installation = prepare(config, data_dir)
        _check_port_is_free(installation.coordinator)
        return asyncio.run(_run(installation))


@dataclass(frozen=True)
class Installation:
    """What `ashd up` keeps running: the database unless it is elsewhere, and the programs' configurations."""

    data_dir: Path
    database: EmbeddedPostgres | None
    coordinator: CoordinatorConfig
    runner: RunnerConfig

    @property
    def server_url(self) -> str:
        return self.runner.server_url


@contextlib.contextmanager
def locked(data_dir: Path) -> Iterator[None]:
    """data_dir for this process alone (flock(2): the kernel frees it, however we end)."""
    try:
        # Root's database runs under another user id, which must be able to walk through. Secrets inside are 0600.
        data_dir.mkdir(mode=0o711 if os.geteuid() == 0 else 0o700, parents=True, exist_ok=True)
        handle = (data_dir / "lock").open("a+", encoding="ascii")
    except OSError as error:
        raise ConfigError(
            [f"{data_dir} can't be used as data_dir: {error.strerror}. Choose one by --data-dir."]
        ) from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise AshdError(
                f"ashd already runs on {data_dir} (process {handle.read().strip() or 'unknown'}). "
                "Stop it first, or give this one another folder by --data-dir and another port by --port."
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield


def prepare(config: StandaloneConfig, data_dir: Path) -> Installation:
    """Folders, secret and both configuration files; the same again for an existing data_dir."""
    run = data_dir / "run"
    run.mkdir(mode=0o700, exist_ok=True)
    secret = config.coordinator.internal_secret or config.runner.internal_secret or _minted_secret(data_dir)
    connections = config.coordinator.workers * config.coordinator.database_pool_size + _SPARE_CONNECTIONS
    database = None
    if not config.coordinator.database_url:
        database = EmbeddedPostgres(config.postgres, data_dir, connections)
    coordinator = replace(
        config.coordinator,
        data_dir=data_dir,
        database_url=database.url if database else config.coordinator.database_url,
        internal_secret=secret,
        registry_socket_dir=run,
        agent_roots=config.coordinator.agent_roots or ("/",),
    )
    runner = replace(
        config.runner,
        socket=run / "runner.sock",
        server_url=_local_url(coordinator),
        internal_secret=secret,
        state_dir=config.runner.state_dir or data_dir / "runner",
    )
    _write_config(run / "coord.yaml", coordinator)
    _write_config(run / "runner.yaml", runner)
    return Installation(data_dir, database, coordinator, runner)


def _minted_secret(data_dir: Path) -> str:
    """The secret of this installation, made at its first start."""
    path = data_dir / INTERNAL_SECRET_FILE
    with contextlib.suppress(FileNotFoundError):
        if secret := path.read_text(encoding="ascii").strip():
            return secret
    secret = secrets.token_hex(32)
    _write_private(path, secret + "\n")
    return secret


def _write_config(path: Path, config: CoordinatorConfig | RunnerConfig) -> None:
    header = "# Written by `ashd up` at each start. Settings of yours belong in a file for `ashd up -c FILE`.\n"
    _write_private(path, header + yaml.safe_dump(_plain(config), sort_keys=False))


def _plain(config: Any) -> dict[str, Any]:
    def value(of: Any) -> Any:
        if isinstance(of, dict):
            return {name: value(inner) for name, inner in of.items()}
        if isinstance(of, tuple):
            return list(of)
        return str(of) if isinstance(of, Path) else of

    plain: dict[str, Any] = value(dataclasses.asdict(config))
    return plain


def _write_private(path: Path, text: str) -> None:
    """SECURITY: readable to this user only, from its first byte on; replaced in one step."""
    part = path.with_name(f".{path.name}.part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(text)
    part.rename(path)


def _local_url(config: CoordinatorConfig) -> str:
    """How this machine itself reaches the coordinator."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _check_port_is_free(config: CoordinatorConfig) -> None:
    """A clear word now rather than a coordinator that dies five times."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise ConfigError(
            [f"{config.host} port {config.port} can't be used: {error.strerror}. Choose another one by --port."]
        ) from None


async def _run(installation: Installation) -> bool:
    """Start in order, serve until told to stop, end in the reverse order; False when a part could not be started."""
    life = asyncio.current_task()
    assert life is not None, "asyncio.run() runs a task"
    stopping = False

    def stop() -> None:
        # ORDER: only the first signal counts; a second one must not interrupt the orderly end.
        nonlocal stopping
        if not stopping:
            stopping = True
            life.cancel()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop)
    try:
        await _serve(installation)
    except asyncio.CancelledError:
        _log.info("all parts have ended")
    except ExceptionGroup as group:
        expected, bugs = group.split((AshdError, OSError))
        if bugs is not None:
            raise
        for error in _leaves(expected):
            print(f"ashd up: {error}", file=sys.stderr)
        return False
    return True


async def _serve(installation: Installation) -> None:
    """Everything, for ever."""
    async with AsyncExitStack() as stack:
        # ORDER: each part needs the ones before it; on the way out the runner drains while the others still serve.
        if installation.database is not None:
            await stack.enter_async_context(kept(installation.database.part()))
        await stack.enter_async_context(kept(_coordinator(installation)))
        await stack.enter_async_context(kept(_runner(installation)))
        await _until_registered(installation)
        deployed = await _deploy_example(installation)
        print(_welcome(installation, deployed=deployed), flush=True)
        await asyncio.Event().wait()  # WAITS: until a signal, or until a part gives up


def _coordinator(installation: Installation) -> Part:
    async def is_ready(child: Child) -> bool:
        return await _ask(installation, "/ready") is not None

    return Part(
        name="coordinator",
        spawn=lambda: _spawn(installation, "coordinator", "coord.yaml"),
        is_ready=is_ready,
        ready_timeout_s=READY_TIMEOUT_S,
        stop_signal=signal.SIGTERM,
        stop_timeout_s=installation.coordinator.graceful_timeout + STOP_MARGIN_S,
    )


def _runner(installation: Installation) -> Part:
    async def is_ready(child: Child) -> bool:
        # Its own socket, not the coordinator's opinion: a runner must not be ended because the coordinator is away.
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                _, writer = await asyncio.open_unix_connection(installation.runner.socket)
        except OSError:
            return False
        writer.close()
        return True

    return Part(
        name="runner",
        spawn=lambda: _spawn(installation, "runner", "runner.yaml"),
        is_ready=is_ready,
        ready_timeout_s=READY_TIMEOUT_S,
        stop_signal=signal.SIGTERM,
        stop_timeout_s=installation.runner.drain_timeout + installation.runner.kill_timeout + STOP_MARGIN_S,
    )


async def _spawn(installation: Installation, command: str, config: str) -> Child:
    return Child(
        command,
        [sys.executable, "-m", "ashd", command, "-c", installation.data_dir / "run" / config],
        death_signal=signal.SIGTERM,
        env=_environment(),
    )


def _environment(**variables: str) -> Mapping[str, str]:
    """Ours without the ASH_* variables, which are in the files already and would be stronger than what we set there."""
    ours = loader.variables()
    return {name: value for name, value in os.environ.items() if name not in ours} | variables


async def _ask(installation: Installation, path: str) -> Any:
    """The JSON answer of the coordinator to a GET, or None when it does not (yet) answer 200 in time."""
    config = installation.coordinator
    host = urllib.parse.urlsplit(installation.server_url).hostname
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            reader, writer = await asyncio.open_connection(host, config.port)
            try:
                # HTTP/1.0: the answer ends with the connection, in one piece.
                writer.write(f"GET {path} HTTP/1.0\r\nHost: {host}\r\n\r\n".encode("ascii"))
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
            finally:
                writer.close()
        return json.loads(body) if b" 200 " in head.split(b"\r\n")[0] else None
    except (OSError, ValueError):
        return None


async def _until_registered(installation: Installation) -> None:
    """Wait until the first session has somewhere to go, so that what the welcome says can be typed at once."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        health = await _ask(installation, "/health")
        if health is not None and health["remoteRunners"] > 0:
            return
        await asyncio.sleep(POLL_S)
    _log.warning("runner has not registered in time", timeout_s=READY_TIMEOUT_S)


async def _deploy_example(installation: Installation) -> bool:
    """Send the example agent at the first start only: whoever deletes it does not want it back."""
    marker = installation.data_dir / "run" / "example-deployed"
    if marker.exists():
        return True
    variables = {"ASH_SERVER_URL": installation.server_url, "ASH_DATA_DIR": str(installation.data_dir)}
    if installation.coordinator.api_key:
        variables["ASH_API_KEY"] = installation.coordinator.api_key
    child = Child(
        "deploy",
        [sys.executable, "-m", "ashd", "deploy", Path(__file__).parent / "example", "--name", EXAMPLE_AGENT],
        death_signal=signal.SIGKILL,
        env=_environment(**variables),
        quiet=True,
    )
    if await child.finish(timeout_s=DEPLOY_TIMEOUT_S) != 0:
        _log.warning("example agent was not deployed", reason=" ".join(child.last_lines()))
        return False
    marker.touch()
    return True


def _welcome(installation: Installation, *, deployed: bool) -> str:
    """What is running, where its data and key are, and what to type next."""
    key = installation.data_dir / API_KEY_FILE
    command = _command()
    lines = [
        "",
        f"ashd {__version__} is running at {installation.server_url}",
        f"  data  {installation.data_dir}",
        f"  key   {key if key.exists() else 'as configured (ASH_API_KEY)'}",
        "",
        "Next, in another terminal:",
    ]
    elsewhere = {}
    if installation.server_url != DEFAULT_SERVER:
        elsewhere["ASH_SERVER_URL"] = installation.server_url
    if installation.data_dir != default_data_dir(_environment()):
        elsewhere["ASH_DATA_DIR"] = str(installation.data_dir)
    if elsewhere:
        lines.append("  export " + " ".join(f"{name}={shlex.quote(value)}" for name, value in elsewhere.items()))
    if deployed:
        lines.append(f'  {command} chat {EXAMPLE_AGENT} "ls -la"')
    lines += [f"  {command} deploy DIR", f"  {command} status", "", "Ctrl-c ends all parts; the data stays.", ""]
    return "\n".join(lines)


def _command() -> str:
    """How to call this program again from a shell: `ashd` where PATH finds it."""
    program = Path(sys.argv[0])
    if program.name != "ashd":
        return f"{shlex.quote(sys.executable)} -m ashd"
    return "ashd" if shutil.which("ashd") else shlex.quote(str(program))


def _leaves(group: BaseExceptionGroup[Any] | None) -> Iterator[BaseException]:
    for error in group.exceptions if group else ():
        if isinstance(error, BaseExceptionGroup):
            yield from _leaves(error)
        else:
            yield error
