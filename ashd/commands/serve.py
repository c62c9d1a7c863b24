"""`ashd up`, `coordinator`, `runner`, `migrate`: the commands that become, or prepare, a server."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from ashd.commands import parsers
from ashd.commands.exits import Exit


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    up = parsers.add(
        commands,
        "up",
        run_up,
        summary="start everything on this machine: database, coordinator and runner",
        example="ashd up --data-dir ./data --port 4100",
        then='in another terminal: ashd chat shell-agent "ls -la"',
    )
    up.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="all state (default: /var/lib/ashd or ~/.local/share/ashd)"
    )
    up.add_argument("--port", type=int, metavar="N", help="port of the HTTP API (default: 4100)")
    parsers.add_config_option(up)

    coordinator = parsers.add(
        commands,
        "coordinator",
        run_coordinator,
        summary="serve the HTTP API, with state in a Postgres of yours",
        example="ASH_DATABASE_URL=postgresql://ashd@db.example/ashd ashd coordinator -c conf/coord.yaml",
        then="ashd runner -c conf/runner.yaml on this or another host",
    )
    parsers.add_config_option(coordinator)

    runner = parsers.add(
        commands,
        "runner",
        run_runner,
        summary="run sandboxes on this host for a coordinator",
        example="ASH_SERVER_URL=http://coordinator:4100 ashd runner -c conf/runner.yaml",
        then="ashd status shows it in the fleet",
    )
    parsers.add_config_option(runner)

    migrate = parsers.add(
        commands,
        "migrate",
        run_migrate,
        summary="bring a database's schema up to date",
        example="ashd migrate --database-url postgresql://ashd@db.example/ashd",
        then="ashd coordinator -c conf/coord.yaml",
    )
    parsers.add_config_option(migrate)
    migrate.add_argument("--database-url", metavar="URL", help="default: database_url of the file, or ASH_DATABASE_URL")


def run_up(args: argparse.Namespace) -> int:
    from ashd.config.loader import load_standalone

    loaded = load_standalone(args.config, _environ(ASH_DATA_DIR=args.data_dir, ASH_PORT=args.port))
    _mention(loaded.notes)
    if loaded.config.mode == "coordinator":
        from ashd.coordinator.main import serve

        return serve(loaded.config.coordinator)
    from ashd.standalone.up import up

    return Exit.OK if up(loaded.config) else Exit.NOT_BOOTED


def run_coordinator(args: argparse.Namespace) -> int:
    from ashd.config.loader import load_coordinator
    from ashd.coordinator.main import serve

    loaded = load_coordinator(args.config, os.environ)
    _mention(loaded.notes)
    return serve(loaded.config)


def run_runner(args: argparse.Namespace) -> int:
    from ashd.config.loader import load_runner
    from ashd.runner.main import serve

    loaded = load_runner(args.config, os.environ)
    _mention(loaded.notes)
    return serve(loaded.config)


def run_migrate(args: argparse.Namespace) -> int:
    from ashd.config.loader import load_coordinator
    from ashd.store.migrate import migrate

    loaded = load_coordinator(args.config, _environ(ASH_DATABASE_URL=args.database_url))
    applied = migrate(loaded.config.database_url)
    for name in applied:
        print(f"applied {name}")
    if not applied:
        print("the schema is up to date")
    return Exit.OK


def _environ(**options: object) -> Mapping[str, str]:
    """The environment with what the command line says on top: options are the strongest source of a setting."""
    return {**os.environ, **{name: str(value) for name, value in options.items() if value is not None}}


def _mention(notes: tuple[str, ...]) -> None:
    for note in notes:
        print(f"ashd: {note}", file=sys.stderr)
