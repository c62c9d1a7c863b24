"""`ashd status` and `ashd health`: what is running, and is it well."""

from __future__ import annotations

import argparse
from typing import Any
from urllib.parse import quote

from ashd.commands import parsers
from ashd.commands.connection import connect
from ashd.commands.exits import Exit
from ashd.commands.output import print_fields, print_json, print_table

_FLEET = [
    *("runner", "address", "healthy", "active", "max", "warming", "paused", "draining"),
    *("isolation", "pssMb", "refusing", "lastHeartbeat"),
]
_SANDBOXES = ["sandbox", "session", "state", "isolation", "pssMb", "memoryMb", "cpuSeconds"]
_SANDBOXES += ["processes", "descriptors", "diskMb"]


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    status = parsers.add(
        commands,
        "status",
        run_status,
        summary="show the fleet: runners, their load and their health",
        example="ashd status",
        then="ashd status --runner ID shows what runs there, and what it uses",
    )
    status.add_argument("--runner", metavar="ID", help="show this runner's sandboxes instead, the largest first")
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
    if args.runner:
        return _show_sandboxes(args)
    client = connect(args)
    health, fleet = client.get("/health"), client.get("/api/internal/runners")
    if args.json:
        print_json({"health": health, **fleet})
        return Exit.OK
    print(
        f"{client.server}  version {health['version']}  up {health['uptime']:.0f} s  "
        f"sessions {health['activeSessions']}  sandboxes {health['activeSandboxes']}\n"
    )
    print_table([_row(runner) for runner in fleet["runners"]], _FLEET, empty="No runners: ashd runner starts one.")
    return Exit.OK


def _show_sandboxes(args: argparse.Namespace) -> int:
    answer = connect(args).get(f"/api/internal/runners/{quote(args.runner, safe='')}/sandboxes")
    if args.json:
        print_json(answer)
        return Exit.OK
    sandboxes = sorted(answer["sandboxes"], key=lambda one: (-one["pssMb"], one["sandboxId"]))
    rows = [
        {**one, **_limits_of(one), "sandbox": one["sandboxId"][:8], "session": one["sessionId"]} for one in sandboxes
    ]
    print_table(rows, _SANDBOXES, empty=f"No sandboxes on {args.runner}.")
    return Exit.OK


def run_health(args: argparse.Namespace) -> int:
    client = connect(args)
    health = client.get("/health")
    client.get("/ready")
    (print_json if args.json else print_fields)(health)
    return Exit.OK


def _row(runner: dict[str, Any]) -> dict[str, Any]:
    pss_mb = runner.get("usage", {}).get("pssMb")
    return {
        **runner,
        "runner": runner["runnerId"],
        "address": f"{runner['host']}:{runner['port']}",
        "pssMb": pss_mb,
    }


def _limits_of(sandbox: dict[str, Any]) -> dict[str, Any]:
    """Beside what it uses, what it may."""
    limits = sandbox["limits"]
    return {
        "pssMb": _of(sandbox["pssMb"], limits.get("memoryMb")),
        "processes": _of(sandbox["processes"], limits.get("maxProcesses")),
        "diskMb": _of(sandbox["diskMb"], limits.get("diskMb")),
    }


def _of(used: float, most: float | None) -> str:
    return f"{used:g}" if most is None else f"{used:g}/{most:g}"
