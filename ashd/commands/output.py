"""What commands print: tables for people, JSON for programs."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any


def print_json(value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    print("".join(char if char.isprintable() or char == "\n" else json.dumps(char)[1:-1] for char in text))


def print_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, empty: str) -> None:
    """`rows` under the headings `columns` (keys of the rows), aligned; `empty` is said when there are none."""
    if not rows:
        print(empty, file=sys.stderr)
        return
    lines = [list(columns), *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(line[index]) for line in lines) for index in range(len(columns))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def print_fields(fields: Mapping[str, Any]) -> None:
    """One object, a field a line."""
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        print(f"{name.ljust(width)}  {_cell(value)}")


def printable(text: str) -> str:
    """SECURITY: text of agents may hold terminal escapes; all control characters but line ends and tabs are dropped."""
    return "".join(char for char in text if char.isprintable() or char in "\n\t")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, (dict, list)) else str(value)
    return printable(text).replace("\n", " ")
