"""`ashd status` and `ashd health`: what is running, and is it well."""

from __future__ import annotations

import argparse
from typing import Any

from ashd.commands import parsers
from ashd.commands.connection import connect
from ashd.commands.exits import Exit
from ashd.commands.output import print_fields, print_json, print_table


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    status = parsers.add(
        commands,
        "status",
        run_status,
        summary="show the fleet: runners, their load and their health",
        example="ashd status",
        then="ashd session list shows who uses it",
    )
    health = parsers.add(
        commands,
        "health",
        run_health,
        summary="ask the server whether it is ready; for scripts and probes",
        example="ashd health --server http://127.0.0.1:4100",
        then="ashd status for more",
    )
    for parser in (status, health):
        parsers.add_server_options(parser)
        parsers.add_json_option(parser)


def run_status(args: argparse.Namespace) -> int:
    client = connect(args)
    health, fleet = client.get("/health"), client.get("/api/internal/runners")
    if args.json:
        print_json({"health": health, **fleet})
        return Exit.OK
    print(
        f"{client.server}  version {health['version']}  up {health['uptime']:.0f} s  "
        f"sessions {health['activeSessions']}  sandboxes {health['activeSandboxes']}\n"
    )
    columns = ["runner", "address", "healthy", "active", "max", "warming", "paused", "draining", "lastHeartbeat"]
    print_table([_row(runner) for runner in fleet["runners"]], columns, empty="No runners: ashd runner starts one.")
    return Exit.OK


def run_health(args: argparse.Namespace) -> int:
    client = connect(args)
    health = client.get("/health")
    client.get("/ready")
    (print_json if args.json else print_fields)(health)
    return Exit.OK


def _row(runner: dict[str, Any]) -> dict[str, Any]:
    return {**runner, "runner": runner["runnerId"], "address": f"{runner['host']}:{runner['port']}"}
