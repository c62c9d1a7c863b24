"""`ashd deploy` and `ashd agent …`: agents are folders; the server keeps them as bundles."""

from __future__ import annotations

import argparse
import gzip
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from ashd.commands import parsers
from ashd.commands.connection import connect
from ashd.commands.exits import Exit
from ashd.commands.output import print_fields, print_json, print_table
from ashd.errors import Rejected
from ashd.http_client import Client

_LEFT_OUT = {".git", "__pycache__"}
_SPOOLED_BYTES = 8 * 1024 * 1024


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    deploy_parser = parsers.add(
        commands,
        "deploy",
        run_deploy,
        summary="send a folder to the server as an agent (.git and __pycache__ are left out)",
        example="ashd deploy examples/shell-agent --name shell",
        then='ashd chat shell "uname -a"',
    )
    deploy_parser.add_argument("folder", type=Path, metavar="DIR")
    deploy_parser.add_argument("--name", help="default: the folder's name")

    group = parsers.add_group(commands, "agent", summary="list, show or delete agents")
    list_parser = parsers.add(
        group, "list", run_list, summary="list agents", example="ashd agent list", then="ashd agent info NAME"
    )
    info_parser = parsers.add(
        group, "info", run_info, summary="show one agent", example="ashd agent info shell", then="ashd chat NAME"
    )
    delete_parser = parsers.add(
        group,
        "delete",
        run_delete,
        summary="delete an agent and end its sessions",
        example="ashd agent delete shell",
        then="ashd agent list",
    )
    for parser in (info_parser, delete_parser):
        parser.add_argument("name", metavar="NAME")
    for parser in (deploy_parser, list_parser, info_parser, delete_parser):
        parsers.add_server_options(parser)
        parsers.add_json_option(parser)


def run_deploy(args: argparse.Namespace) -> int:
    name = args.name or args.folder.resolve().name
    agent = deploy(connect(args), args.folder, name)
    if args.json:
        print_json(agent)
    else:
        print(f'{agent["name"]} is deployed (version {agent["version"]}). Next: ashd chat {agent["name"]} "hello"')
    return Exit.OK


def run_list(args: argparse.Namespace) -> int:
    agents = connect(args).get("/api/agents")["agents"]
    if args.json:
        print_json(agents)
    else:
        print_table(agents, ["name", "version", "updatedAt"], empty="No agents yet: ashd deploy DIR sends one.")
    return Exit.OK


def run_info(args: argparse.Namespace) -> int:
    agent = connect(args).get(f"/api/agents/{quote(args.name, safe='')}")["agent"]
    (print_json if args.json else print_fields)(agent)
    return Exit.OK


def run_delete(args: argparse.Namespace) -> int:
    answer = connect(args).delete(f"/api/agents/{quote(args.name, safe='')}")
    if args.json:
        print_json(answer)
    else:
        print(f"{args.name} is deleted.")
    return Exit.OK


def deploy(client: Client, folder: Path, name: str) -> Any:
    """Send `folder` as the agent `name`; the agent as the server now knows it. Raises Rejected when it is no folder."""
    if not folder.is_dir():
        raise Rejected(f"{folder} is not a folder. An agent is a folder with an agent.yaml, agent.py or CLAUDE.md.")
    try:
        with bundle(folder) as content:
            return client.put_file(f"/api/agents/{quote(name, safe='')}/bundle", content)["agent"]
    except OSError as error:  # the client's own are ServerUnreachable by now
        raise Rejected(f"{error.filename or folder} can't be packed: {error.strerror}") from None


@contextmanager
def bundle(folder: Path) -> Iterator[IO[bytes]]:
    """The folder as tar.gz, on disk when large. The same content gives the same bytes, whoever owns the files."""
    with tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES) as content:
        with (
            gzip.GzipFile(fileobj=content, mode="wb", mtime=0) as compressed,
            tarfile.open(fileobj=compressed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            for entry in sorted(folder.iterdir()):
                archive.add(entry, arcname=entry.name, filter=_member)
        content.seek(0)
        yield content


def _member(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    if Path(member.name).name in _LEFT_OUT:
        return None
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member
