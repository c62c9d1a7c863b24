"""`ashd coordinator`: the gunicorn master, from configuration to the last worker's end."""

from __future__ import annotations

import time
from typing import Any

from gunicorn.app.base import BaseApplication
from gunicorn.config import Setting
from gunicorn.errors import HaltServer
from setproctitle import setproctitle

from ashd import log
from ashd.config.schema import CoordinatorConfig
from ashd.coordinator.slots import Slots
from ashd.coordinator.worker import hold_signals_over_forks
from ashd.domain.restart import Backoff
from ashd.errors import AshdError, Unavailable
from ashd.store.migrate import migrate

_log = log.get(__name__)

_DATABASE_PATIENCE_S = 60.0
_KEEP_ALIVE_S = 5
"""An idle connection stays open for so long; a stopping worker waits for idle ones too, so it is short."""
_HEARTBEAT_TIMEOUT_S = 30
"""A worker whose event loop stands still for so long is killed by the master."""


def serve(config: CoordinatorConfig) -> int:
    """Runs a coordinator until SIGTERM or SIGINT. Returns the exit code: 0 after an orderly end, 1 if it could not
    start.
    """
    log.setup(config.log)
    try:
        if config.migrate_on_start:
            for name in _migrate_patiently(config.database_url):
                _log.info("database migrated", migration=name)
    except AshdError as error:
        _log.error("coordinator could not start", code=error.code, error=error.message)
        return 1
    hold_signals_over_forks()
    try:
        Gunicorn(config).run()
    except SystemExit as end:  # gunicorn's way of ending
        return end.code if isinstance(end.code, int) else 0
    except HaltServer as halt:  # a worker could not start; it has said why
        return int(halt.exit_status)
    return 0


def _migrate_patiently(database_url: str) -> list[str]:
    """Brings the schema up to date; a database that is only just starting is waited for. Raises Unavailable."""
    backoff = Backoff(first_s=0.2, most_s=2.0)
    deadline = time.monotonic() + _DATABASE_PATIENCE_S
    while True:
        try:
            return migrate(database_url)
        except Unavailable as error:
            if time.monotonic() > deadline:
                raise
            _log.warning("database is not there yet", error=error.message)
            time.sleep(backoff.next_s(1.0))  # before the event loop and the first fork


class SendBuffer(Setting):  # type: ignore[misc]
    """Makes our send_buffer reach the workers by gunicorn's own way."""

    name = "ashd_send_buffer"
    section = "ashd"
    validator = int
    default = 0
    desc = "Kernel send buffer per client connection, in bytes."


class Gunicorn(BaseApplication):  # type: ignore[misc]
    """gunicorn, configured from ours."""

    def __init__(self, config: CoordinatorConfig) -> None:
        self._config = config
        super().__init__()

    def load_config(self) -> None:
        config = self._config
        slots = Slots(config.data_dir, config.port)

        def before_fork(arbiter: Any, worker: Any) -> None:
            setproctitle("ashd: coordinator master")  # the first hook after gunicorn has given it a title of its own
            slots.pre_fork(arbiter, worker)

        settings: dict[str, Any] = {
            "bind": f"[{config.host}]:{config.port}" if ":" in config.host else f"{config.host}:{config.port}",
            "workers": config.workers,
            "worker_class": "ashd.coordinator.worker.CoordinatorWorker",
            "logger_class": "ashd.coordinator.worker.CoordinatorLog",
            "backlog": config.backlog,
            "timeout": _HEARTBEAT_TIMEOUT_S,
            "graceful_timeout": int(config.graceful_timeout),
            "keepalive": _KEEP_ALIVE_S,
            "asgi_lifespan": "on",
            "control_socket_disable": True,
            "ashd_send_buffer": config.send_buffer,
            "when_ready": slots.when_ready,
            "pre_fork": before_fork,
            "post_fork": slots.post_fork,
            "child_exit": slots.child_exit,
            "on_exit": slots.on_exit,
        }
        for name, value in settings.items():
            self.cfg.set(name, value)

    def load(self) -> Any:
        from ashd.coordinator.lifespan import Coordinator  # gRPC is imported after the fork only

        return Coordinator(self._config)
