"""How every command describes itself: an example, and the next thing to do."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

Commands = argparse._SubParsersAction  # argparse has no public name for what add_subparsers() returns
Run = Callable[[argparse.Namespace], int]


def add(
    commands: Commands[argparse.ArgumentParser], name: str, run: Run, *, summary: str, example: str, then: str
) -> argparse.ArgumentParser:
    """A command with its function; `summary` is one line, `example` a command line, `then` a sentence."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog=f"example:\n  {example}\n\nnext:\n  {then}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def add_group(
    commands: Commands[argparse.ArgumentParser], name: str, *, summary: str
) -> Commands[argparse.ArgumentParser]:
    """A command that is only a name for others, like `session`."""
    group: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    return group.add_subparsers(metavar="command", required=True, title="commands")


def add_server_options(parser: argparse.ArgumentParser) -> None:
    """Which server, with which key."""
    parser.add_argument("--server", metavar="URL", help="default: ASH_SERVER_URL or http://127.0.0.1:4100")
    parser.add_argument("--api-key", metavar="KEY", help="default: ASH_API_KEY, or the key that `ashd up` wrote here")
    parser.add_argument("--data-dir", type=Path, metavar="DIR", help="where `ashd up` keeps its data (ASH_DATA_DIR)")


def add_json_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the server's answer as JSON")


def add_config_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", type=Path, metavar="FILE", help="YAML file; ASH_* variables are stronger")
