"""`ashd config check|show`: is a configuration right, and where does each value come from."""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ashd.commands import parsers
from ashd.commands.exits import Exit
from ashd.commands.output import print_table

if TYPE_CHECKING:
    from ashd.config.loader import Loaded

_PROGRAMS = ("up", "coordinator", "runner")


def register(commands: parsers.Commands[argparse.ArgumentParser]) -> None:
    group = parsers.add_group(commands, "config", summary="check a configuration, or show the one in force")
    check = parsers.add(
        group,
        "check",
        run_check,
        summary="check a file together with the ASH_* variables; lists all problems at once",
        example="ashd config check conf/coord.yaml --for coordinator",
        then="ashd config show --origin -c FILE tells where each value comes from",
    )
    check.add_argument("file", type=Path, metavar="FILE")
    show = parsers.add(
        group,
        "show",
        run_show,
        summary="show every setting as a program would see it; secrets as ***",
        example="ashd config show --origin -c conf/coord.yaml --for coordinator",
        then="conf/*.yaml explain each setting",
    )
    show.add_argument("--origin", action="store_true", help="also show where each value comes from")
    parsers.add_config_option(show)
    for parser in (check, show):
        parser.add_argument(
            "--for", dest="program", choices=_PROGRAMS, help="whose configuration (default: judged by the file's keys)"
        )


def run_check(args: argparse.Namespace) -> int:
    for note in _load(args.program, args.file).notes:
        print(note)
    print(f"{args.file}: no problems found")
    return Exit.OK


def run_show(args: argparse.Namespace) -> int:
    loaded = _load(args.program, args.config)
    rows = [{"setting": key, "value": value, "origin": loaded.origins[key]} for key, value in _values(loaded.config)]
    print_table(rows, ["setting", "value", *(["origin"] if args.origin else [])], empty="")
    return Exit.OK


def _load(program: str | None, path: Path | None) -> Loaded[Any]:
    from ashd.config import loader

    load: dict[str, Any] = {
        "up": loader.load_standalone,
        "coordinator": loader.load_coordinator,
        "runner": loader.load_runner,
    }
    loaded: Loaded[Any] = load[program or _likely_program(path)](path, os.environ)
    return loaded


def _likely_program(path: Path | None) -> str:
    """The program that knows most of the file's keys; `up` without a file, or when none of them is known."""
    if path is None:
        return "up"
    from ashd.config import loader, schema

    schemas = (schema.StandaloneConfig, schema.CoordinatorConfig, schema.RunnerConfig)
    keys = loader.top_level_keys(path)
    known = [len(keys & {setting.field.name for setting in loader.settings_of(kind)}) for kind in schemas]
    return _PROGRAMS[known.index(max(known))]


def _values(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    from ashd.config.loader import settings_of
    from ashd.config.sample import written

    for setting in settings_of(type(config)):
        name, value = setting.field.name, getattr(config, setting.field.name)
        if dataclasses.is_dataclass(value):
            yield from _values(value, f"{prefix}{name}.")
        elif setting.field.metadata["secret"] and value:
            yield prefix + name, "***"
        else:
            yield prefix + name, written(setting.kind, value)
