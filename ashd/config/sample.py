"""The commented files of conf/, written from the schema: every key with its default and its docstring.

`python -m ashd.config.sample conf` writes them (`make conf`); a test compares them with what stands there.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import json
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ashd.config.loader import settings_of
from ashd.config.schema import Bytes, CoordinatorConfig, RunnerConfig, Seconds, StandaloneConfig
from ashd.config.units import format_bytes, format_seconds

_WIDTH = 110

_HEADER = """\
Made from ashd/config/schema.py by `make conf`. Every setting stands here with its default; a file of your own needs
only the lines that differ. A variable, where one is named, is stronger than the file.
`ashd config check FILE` checks a file, `ashd config show --origin` tells where each value comes from.
"""

FILES: dict[str, tuple[type, str]] = {
    "coord.yaml": (CoordinatorConfig, "ashd coordinator -c conf/coord.yaml"),
    "runner.yaml": (RunnerConfig, "ashd runner -c conf/runner.yaml"),
    "standalone.yaml": (StandaloneConfig, "ashd up -c conf/standalone.yaml"),
}


def render(schema: type, command: str) -> str:
    """The whole text of one file."""
    lines = [f"# {command}", "#", *(f"# {line}" for line in _HEADER.splitlines()), *_section(schema, "")]
    return "\n".join(lines) + "\n"


def written(kind: Any, value: Any) -> str:
    """A value as the file has it: `256MiB`, `10s`, `["a", "b"]`, `null`."""
    if kind is Bytes:
        return format_bytes(value)
    if kind is Seconds:
        return format_seconds(value)
    if value is None:
        return "null"
    if isinstance(value, Path):
        value = str(value)
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def _section(schema: type, indent: str) -> Iterator[str]:
    texts = _docstrings(schema)
    for setting in settings_of(schema):
        name = setting.field.name
        yield ""
        yield from _comment(texts[name], indent)
        if dataclasses.is_dataclass(setting.kind):
            yield f"{indent}{name}:"
            yield from _section(typing.cast(type, setting.kind), indent + "  ")
            continue
        if setting.field.metadata["env"]:
            yield f"{indent}# Variable: {setting.field.metadata['env']}"
        yield f"{indent}{name}: {written(setting.kind, setting.field.default)}"


def _comment(text: str, indent: str) -> Iterator[str]:
    for line in textwrap.wrap(text, _WIDTH - len(indent), break_on_hyphens=False):
        yield f"{indent}# {line}"


def _docstrings(schema: type) -> dict[str, str]:
    """Setting -> the text under it. Python keeps no such docstrings at run time, so they are read from the source."""
    body = typing.cast(ast.ClassDef, ast.parse(inspect.getsource(schema)).body[0]).body
    texts: dict[str, str] = {}
    for statement, after in itertools.pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            texts[statement.target.id] = ast.literal_eval(typing.cast(ast.Expr, after).value)
    return texts


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, (schema, command) in FILES.items():
        (folder / name).write_text(render(schema, command), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
